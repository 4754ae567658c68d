"""How often a model's own answers pass: greedy generation on a suite, judged strictly and loosely."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weightpatch.generation import BATCH_SIZE, MAX_NEW_TOKENS, Generation, generate
from weightpatch.prompts import tokenize
from weightpatch.statistics import Interval, pass_rate
from weightpatch.suites import Problem, Suite


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Pass rates with Wilson 95 % intervals.

    Attributes:
        n: Answers or instructions judged.
        strict: The answer as it is.
        loose: Any of IFEval's variants of it.
    """

    n: int
    strict: Interval
    loose: Interval


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One answer with its verdicts.

    Attributes:
        problem: What was asked.
        generation: What was answered.
        strict: Verdict of each check, in the problem's order; None where there is no checker for its type.
        loose: The same, loosely.
    """

    problem: Problem
    generation: Generation
    strict: tuple[bool | None, ...]
    loose: tuple[bool | None, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A suite's answers and how they were judged.

    Attributes:
        suite: Its name.
        answers: Every answer, in the order of the problems.
    """

    suite: str
    answers: tuple[Judged, ...]

    @property
    def rates(self) -> Rates:
        """Share of problems whose every check passes, among those with a checker for each (IFEval: prompt level)."""
        whole = [judged for judged in self.answers if None not in judged.strict]
        return _rates([all(judged.strict) for judged in whole], [all(judged.loose) for judged in whole])

    @property
    def types(self) -> Mapping[str, Rates]:
        """Rates of each type of check by itself, in order of appearance (IFEval: instruction level)."""
        verdicts: dict[str, tuple[list[bool], list[bool]]] = {}
        for judged in self.answers:
            for check, strict, loose in zip(judged.problem.checks, judged.strict, judged.loose, strict=True):
                if strict is not None and loose is not None:
                    own = verdicts.setdefault(check.name, ([], []))
                    own[0].append(strict)
                    own[1].append(loose)
        return {name: _rates(*own) for name, own in verdicts.items()}

    @property
    def unknown_types(self) -> Mapping[str, int]:
        """Types without a checker here -> how many checks of them were left unjudged."""
        unknown = [check.type for judged in self.answers for check in judged.problem.checks if not check.is_known]
        return dict(Counter(unknown))

    def save(self, path: str | Path) -> None:
        """Write every answer with its verdicts as JSONL."""
        lines = [json.dumps(_record(judged), ensure_ascii=False) for judged in self.answers]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    on_done: Callable[[int], None] | None = None,
) -> Evaluation:
    """Let a model answer every problem of a suite greedily, and judge the answers.

    Args:
        model: The model, with whatever is patched into it.
        tokenizer: Its tokenizer; problems go through its chat template where it has one.
        suite: The problems.
        max_new_tokens: Most tokens of an answer.
        batch_size: Answers generated side by side.
        on_done: Called with the number of answers so far, for progress.
    """
    prompts = [tokenize(tokenizer, problem.prompt) for problem in suite.problems]
    generations = generate(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, on_done=on_done
    )
    answers = (judge(problem, found) for problem, found in zip(suite.problems, generations, strict=True))
    return Evaluation(suite=suite.name, answers=tuple(answers))


def judge(problem: Problem, generation: Generation) -> Judged:
    """Check one answer strictly and loosely."""
    verdicts = [
        tuple(check.passes(generation.text, loose=loose) if check.is_known else None for check in problem.checks)
        for loose in (False, True)
    ]
    return Judged(problem=problem, generation=generation, strict=verdicts[0], loose=verdicts[1])


def _rates(strict: list[bool], loose: list[bool]) -> Rates:
    n = len(strict)
    return Rates(n=n, strict=pass_rate(sum(strict), n), loose=pass_rate(sum(loose), n))


def _record(judged: Judged) -> dict[str, Any]:
    return {
        "id": judged.problem.id,
        "prompt": judged.problem.prompt,
        "types": [check.type for check in judged.problem.checks],
        "response": judged.generation.text,
        "finished": judged.generation.finished,
        "strict": list(judged.strict),
        "loose": list(judged.loose),
    }
