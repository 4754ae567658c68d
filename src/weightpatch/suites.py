"""Suites of problems that an answer can be checked against: built in, or a user's own IFEval file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightpatch.arithmetic import solves, word_problems
from weightpatch.checkers import follows
from weightpatch.errors import PromptError
from weightpatch.instructions import INSTRUCTIONS, instruction_rows
from weightpatch.programming import coding_tasks, extract_code
from weightpatch.sandbox import run_tests

MATH = "math"
CODE = "code"
PLAIN = "plain"
"""The type of a query without an instruction: its answer should follow none of those that show."""

_SHOWING = ("capitals", "title", "sections", "quotation", "highlights")
"""Types whose form does not come about by chance; a plain answer may well lack commas."""

_IFEVAL = {kind.ifeval_id: kind.task for kind in INSTRUCTIONS.values()}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that an answer is checked for.

    Attributes:
        type: A task of the built-in instructions, an IFEval id, `math`, `code` or `plain`.
        kwargs: What the checker needs to know.
    """

    type: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_known(self) -> bool:
        """Whether there is a checker for it here."""
        return self.type in (*INSTRUCTIONS, *_IFEVAL, PLAIN, MATH, CODE)

    @property
    def name(self) -> str:
        """Our name of the type; IFEval's own where we have none."""
        return _IFEVAL.get(self.type, self.type)

    def passes(self, response: str, *, loose: bool = False) -> bool:
        """Whether an answer passes; a blank one never does.

        Args:
            response: The answer.
            loose: Whether any of IFEval's eight variants of the answer is enough; for `math`, the last number of an
                answer without `####`. `code` knows no looser way: its hidden tests pass or not.

        Raises:
            PromptError: there is no checker for this type.
        """
        if self.type == MATH:
            return solves(self.kwargs["answer"], response, loose=loose)
        if self.type == CODE:
            code = extract_code(response, self.kwargs["entry_point"])
            return run_tests(code, self.kwargs["tests"]).passed
        if self.type == PLAIN:
            shown = (follows(name, response, INSTRUCTIONS[name].kwargs) for name in _SHOWING)
            return bool(response.strip()) and not any(shown)
        return follows(self.type, response, self.kwargs, loose=loose)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One prompt and what its answer is checked for.

    Attributes:
        id: Unique within its suite.
        prompt: What the model is asked.
        checks: All of them must pass.
    """

    id: str
    prompt: str
    checks: tuple[Check, ...]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Problems under one name."""

    name: str
    problems: tuple[Problem, ...]


def load_suite(source: str | Path, *, n: int = 36, seed: int = 0) -> Suite:
    """Read a suite: `instruct`, `math`, `code`, or a JSONL file in IFEval's own form.

    Args:
        source: `instruct` (the six types and plain queries), `math` (word problems) or `code` (short functions, run
            against hidden tests), all held out from what the experts were trained on; or a file whose lines have
            `prompt`, `instruction_id_list` and `kwargs`, as IFEval's `input_data.jsonl`.
        n: Problems of each type of a built-in suite.
        seed: Which problems.

    Raises:
        PromptError: no such suite or file; every line that cannot be used.
    """
    if str(source) == "instruct":
        return Suite(name="instruct", problems=tuple(_instruct_problems(n, seed)))
    if str(source) == MATH:
        words = word_problems("held-out", n=n, seed=seed)
        solving = [(word.id, word.prompt, Check(type=MATH, kwargs={"answer": word.answer})) for word in words]
        return Suite(name=MATH, problems=tuple(Problem(id=i, prompt=p, checks=(check,)) for i, p, check in solving))
    if str(source) == CODE:
        tasks = coding_tasks("held-out", n=n, seed=seed)
        coding = [
            (task.id, task.prompt, Check(type=CODE, kwargs={"entry_point": task.entry_point, "tests": task.tests}))
            for task in tasks
        ]
        return Suite(name=CODE, problems=tuple(Problem(id=i, prompt=p, checks=(check,)) for i, p, check in coding))
    return Suite(name=str(source), problems=_read_ifeval(Path(source)))


def _instruct_problems(n: int, seed: int) -> list[Problem]:
    rows = [row for row in instruction_rows(n_queries=n, seed=seed) if row["split"] == "validate"]
    problems = [
        Problem(
            id=str(row["id"]),
            prompt=f"{row['prompt']} {row['instruction']}",
            checks=(Check(type=str(row["task"]), kwargs=INSTRUCTIONS[str(row["task"])].kwargs),),
        )
        for row in rows
    ]
    queries = dict.fromkeys(str(row["prompt"]) for row in rows)
    plain = [
        Problem(id=f"plain-{place}", prompt=query, checks=(Check(type=PLAIN),)) for place, query in enumerate(queries)
    ]
    return [*problems, *plain[:n]]


def _read_ifeval(path: Path) -> tuple[Problem, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(
            f"cannot read the suite {path}: {error}. Name instruct, math or code, or a JSONL file with IFEval's fields."
        ) from error
    problems, faults = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                problems.append(_read_problem(json.loads(line), number))
            except KeyError as error:
                faults.append(f"  - line {number}: no field {error}")
            except (ValueError, TypeError, PromptError) as error:
                faults.append(f"  - line {number}: {error}")
    if faults or not problems:
        listed = "\n".join(faults[:12]) or "  - it is empty"
        raise PromptError(
            f"the suite {path} cannot be used:\n{listed}\n"
            'Each line needs {"prompt": "...", "instruction_id_list": ["..."], "kwargs": [{...}]}.'
        )
    return tuple(problems)


def _read_problem(record: Mapping[str, Any], number: int) -> Problem:
    types: Sequence[str] = record["instruction_id_list"]
    kwargs: Sequence[Mapping[str, Any] | None] = record.get("kwargs") or [{} for _ in types]
    if len(types) != len(kwargs) or not types:
        raise PromptError(f"{len(types)} instruction ids and {len(kwargs)} kwargs; one of each is needed")
    checks = tuple(
        Check(type=str(kind), kwargs={name: value for name, value in (own or {}).items() if value is not None})
        for kind, own in zip(types, kwargs, strict=True)
    )
    return Problem(id=str(record.get("key", number)), prompt=str(record["prompt"]), checks=checks)
