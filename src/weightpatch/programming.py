"""Short Python functions to be written from a docstring, with hidden tests; and what to take from a response."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from string import Template
from typing import Any

from weightpatch.coding import FAMILIES
from weightpatch.coding.family import Family
from weightpatch.errors import PromptError

SPLITS: tuple[str, ...] = ("train", "held-out")
REQUEST = "Complete the function. Answer with one Python code block only."
N_CLASSES = 4
"""One setting of a family's parameters in this many is held out."""


@dataclass(frozen=True, kw_only=True)
class CodingTask:
    """One function to write.

    Attributes:
        id: Stable name made of the family and a digest of the prompt.
        prompt: `REQUEST` and the function's head with its docstring in a code block.
        entry_point: The function's name.
        solution: A reference function, without docstring.
        tests: Asserts that a right function passes; the docstring's example is none of them.
        family: Name of the family.
        is_new_family: No task of the family is in the training split; otherwise only its parameters are new.
    """

    id: str
    prompt: str
    entry_point: str
    solution: str
    tests: str
    family: str
    is_new_family: bool


def coding_tasks(split: str, *, n: int, seed: int = 0) -> tuple[CodingTask, ...]:
    """Draw tasks, none twice, the families in equal shares as long as they last.

    Of a family with parameters, the settings whose SHA-256 digest starts with a byte that is a multiple of `N_CLASSES`
    are held out, in every wording and under every name; families without parameters are for training. The families
    marked `held_out` are held out as a whole.

    Args:
        split: `train` or `held-out`.
        n: How many.
        seed: Decides which, and their order.

    Returns:
        `n` tasks.

    Raises:
        PromptError: the split is unknown, or there are not so many tasks.
    """
    if split not in SPLITS:
        raise PromptError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}.")
    draw = random.Random(f"{seed}:{split}")  # noqa: S311
    pools = [pool for family in FAMILIES if (pool := list(_list_variants(family, split)))]
    n_tasks = sum(map(len, pools))
    if not 1 <= n <= n_tasks:
        raise PromptError(f"n={n}, but the split {split} has {n_tasks} tasks: use 1 to {n_tasks}.")
    for pool in pools:
        draw.shuffle(pool)
    chosen: list[_Variant] = []
    while len(chosen) < n:
        draw.shuffle(pools)
        chosen += [pool.pop() for pool in pools if pool]
    return tuple(_write_task(variant) for variant in chosen[:n])


def extract_code(response: str, entry_point: str) -> str:
    """The Python code of a response.

    Args:
        response: What the model wrote.
        entry_point: Name of the function asked for.

    Returns:
        The first fenced block that defines the function. Without one, the text from the line `def entry_point` on, as
        far as it looks like code: up to the first line that is neither indented nor the start of a definition. An
        empty string when the function is not defined at all.
    """
    definition = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    # The last block may lack its end: generation stops after so many tokens.
    for block in re.findall(r"```[^\n`]*\n(.*?)(?:```|\Z)", response, flags=re.DOTALL):
        if definition.search(block):
            return str(block).rstrip() + "\n"
    found = definition.search(response)
    if found is None:
        return ""
    lines = response[found.start() :].split("\n")
    is_code = re.compile(r"\s|$|def |async def |class |@|import |from \w+ import |[)\]}]")
    return "\n".join(itertools.takewhile(is_code.match, lines)).rstrip() + "\n"


@dataclass(frozen=True, kw_only=True)
class _Variant:
    """A family with chosen parameters (words and code), name and wording."""

    family: Family
    words: Mapping[str, str]
    code: Mapping[str, str]
    entry_point: str
    docstring: str


def _list_variants(family: Family, split: str) -> Iterator[_Variant]:
    for setting in itertools.product(*(values.items() for values in family.choices.values())):
        words = dict(zip(family.choices, (word for word, _ in setting), strict=True))
        code = dict(zip(family.choices, (code for _, code in setting), strict=True))
        is_held_out = family.held_out or (bool(code) and _is_held_out(family.name, code))
        if is_held_out == (split == "held-out"):
            for entry_point, docstring in itertools.product(family.entry_points, family.docstrings):
                yield _Variant(family=family, words=words, code=code, entry_point=entry_point, docstring=docstring)


def _is_held_out(family: str, code: Mapping[str, str]) -> bool:
    key = ":".join([family, *code.values()])
    return hashlib.sha256(key.encode()).digest()[0] % N_CLASSES == 0


def _write_task(variant: _Variant) -> CodingTask:
    family, name = variant.family, variant.entry_point
    head = f"def {name}({family.arguments}) -> {family.returns}:"
    body = Template(family.body).substitute(variant.code)
    solution = "\n".join([head, *(f"    {line}" for line in body.split("\n"))]) + "\n"
    docstring = " ".join(Template(variant.docstring).substitute(variant.words).split())
    calls = [f"{name}({Template(arguments).substitute(variant.code)})" for arguments in family.inputs]
    # The example and the tests say what the reference returns.
    namespace: dict[str, Any] = {}
    exec(solution, namespace)  # noqa: S102 - our own table, not a model's answer
    calls = [f"{name}({_fold(call, name, namespace)})" for call in calls]
    results = [eval(call, namespace) for call in calls]  # noqa: S307
    tests = [
        f"assert {call} {'is' if isinstance(result, bool) else '=='} {result!r}\n"
        for call, result in zip(calls[1:], results[1:], strict=True)
        if call != calls[0]
    ]
    lines = [head, f'    """{docstring}', "", f"    >>> {calls[0]}", f"    {results[0]!r}", '    """']
    prompt = "\n".join([REQUEST, "", "```python", *lines, "```"])
    return CodingTask(
        id=f"{family.name}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}",
        prompt=prompt,
        entry_point=name,
        solution=solution,
        tests="".join(tests),
        family=family.name,
        is_new_family=family.held_out,
    )


def _fold(call: str, name: str, namespace: dict[str, Any]) -> str:
    """The call's arguments worked out: `[5 + 2, 1]` reads `[7, 1]`."""
    arguments = eval(call, {**namespace, name: lambda *values: values})  # noqa: S307
    return ", ".join(map(repr, arguments))
