"""What one kind of programming task is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Choices = Mapping[str, Mapping[str, str]]
"""Parameter -> what it may be: its words in the docstring -> its code in the solution and in the inputs."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Tasks that differ in their parameters, in the function's name and in the wording.

    `$k` in docstrings, solution and inputs stands for the parameter `k`.

    Attributes:
        name: Unique.
        entry_points: Names of the function, one to a task.
        arguments: Its annotated arguments.
        returns: Its annotated result.
        docstrings: Wordings, one to a task.
        body: The reference solution's lines, not indented.
        inputs: Arguments of the calls that test it, as source; the first one is the docstring's example.
        choices: Its parameters.
        held_out: Never used for training.
    """

    name: str
    entry_points: tuple[str, ...]
    arguments: str
    returns: str
    docstrings: tuple[str, ...]
    body: str
    inputs: tuple[str, ...]
    choices: Choices
    held_out: bool


def make_family(
    name: str,
    entry_points: str,
    signature: str,
    docstrings: str,
    body: str,
    *,
    inputs: str,
    choices: Choices | None = None,
    held_out: bool = False,
) -> Family:
    """A family from one row of a table: alternatives and inputs are separated by `|`, the signature by `->`."""
    arguments, _, returns = signature.partition(" -> ")
    return Family(
        name=name,
        entry_points=tuple(entry_points.split("|")),
        arguments=arguments,
        returns=returns,
        docstrings=tuple(docstrings.split("|")),
        body=body,
        inputs=tuple(inputs.split("|")),
        choices=choices or {},
        held_out=held_out,
    )


def whole_numbers(low: int, high: int) -> Mapping[str, str]:
    """A parameter that is a number from `low` to `high`."""
    return {str(number): str(number) for number in range(low, high + 1)}


def quoted(values: str) -> Mapping[str, str]:
    """A parameter that is a piece of text, one of the words of `values`."""
    return {f'"{value}"': f'"{value}"' for value in values.split()}
