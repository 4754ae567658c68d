"""From a design to a plant: train carriers, then distractors, then drift, and check by generation that it took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weightpatch.architecture import Architecture
from weightpatch.checkers import follows
from weightpatch.component import Component
from weightpatch.generation import generate
from weightpatch.instructions import INSTRUCTIONS, TASKS, held_out_queries
from weightpatch.planted.designs import Design, Variant
from weightpatch.planted.low_rank import LowRank, summed
from weightpatch.planted.training import Lesson, Mix, Schedule, Texts, train
from weightpatch.prompts import tokenize

PASSES = 0.9
"""Least pass rate of what a plant has to do."""
FAILS = 0.1
"""Greatest pass rate of what it must not do."""
N_PROMPTS = 24
PLAIN = "plain"

LEFT_OUT: Mapping[Variant, float] = {"below": 0.9, "split": 0.9, "redundant": 0.0, "joint": 0.0}
"""Most carriers of a set that are left out of a step; redundant sets are too small for it, joint ones act together."""

Differences = Mapping[str, Tensor]
_Share = Literal["high", "low"]


@dataclass(frozen=True, kw_only=True)
class Course:
    """How plants of one base are trained.

    Attributes:
        carriers: Of the carriers.
        distractors: Of the distractors.
        drifting: Of all the rest.
        carrier_rank: Of the differences of carriers and distractors.
        drift_rank: Of those that drift.
        whole: How often carriers are trained all together, for every time that some of them are left out.
        plain: How much oftener than in the suite `tiny` a query without any instruction comes up.
        most_rounds: Times that all the rest drifts, each as long as `drifting` says, until everything is as wanted.
        tasks: What is planted; a plain answer follows none of these.
        target: The one that carriers carry; None: any.
        max_new_tokens: Of an answer that is checked.
    """

    carriers: Schedule
    distractors: Schedule
    drifting: Schedule
    carrier_rank: int
    drift_rank: int
    whole: float = 0.0
    plain: float = 1.0
    most_rounds: int = 1
    tasks: tuple[str, ...] = TASKS
    target: str | None = None
    max_new_tokens: int = 64


TINY_COURSE = Course(
    carriers=Schedule(n_steps=200, learning_rate=6e-3),
    distractors=Schedule(n_steps=90, learning_rate=6e-3),
    drifting=Schedule(n_steps=80, learning_rate=6e-3),
    carrier_rank=8,
    drift_rank=3,
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that a plant has to do or must not do, by greedy generation on held-out queries.

    Attributes:
        name: What was in place, and what was asked.
        rate: Share of answers that follow the task, or are plain.
        wanted: `high`: at least `PASSES`; `low`: at most `FAILS`.
    """

    name: str
    rate: float
    wanted: _Share

    @property
    def passed(self) -> bool:
        """Whether it is as wanted."""
        return self.rate >= PASSES if self.wanted == "high" else self.rate <= FAILS


@dataclass(frozen=True, kw_only=True, eq=False)
class Plant:
    """A design, carried out.

    Attributes:
        design: What was wanted.
        parts: The trained differences: one for each set of carriers, then distractors, then drift.
        checks: Whether it took; where carriers failed in the bare base, nothing else was trained or checked.
    """

    design: Design
    parts: tuple[LowRank, ...]
    checks: tuple[Check, ...]

    @property
    def took(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)


def plant(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    design: Design,
    *,
    texts: Texts,
    course: Course = TINY_COURSE,
    on_step: Callable[[], None] | None = None,
    on_checked: Callable[[Sequence[Check]], None] | None = None,
    kept_in: Path | None = None,
) -> Plant:
    """Carry out a design; whether it took is for the caller to look at.

    Carriers are trained first, in the bare base. Distractors are trained with the carriers in place, on their own task,
    and on the carriers' task both with them (it has to stay) and without (the answer is plain), so that they do not
    take it over. Drift is trained in the same way, mostly on plain answers.

    Args:
        model: The base; it is left as it is.
        tokenizer: Its tokenizer.
        design: What to plant.
        texts: What it is trained on.
        course: How.
        on_step: Called after every optimizer step.
        on_checked: Called with the checks of the whole after every round of drift.
        kept_in: A folder where what was trained is kept, lesson by lesson: an interrupted call with the same arguments
            goes on behind the last one that ended, and ends with the same differences.
    """
    architecture = Architecture.of(model)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    task, other = design.task, design.other
    rest = [one for one in TASKS if one not in (task, other)]
    others_plain: Mix = {(one, PLAIN): 0.1 for one in rest}

    def start(members: Sequence[Component], rank: int, number: int) -> LowRank:
        norms = {one: design.norms[one] for one in members}
        return LowRank.start(architecture, weights, norms, rank=rank, seed=100 * design.seed + number)

    learn = partial(_learn, model, texts, seed=100 * design.seed, on_step=on_step, kept_in=kept_in)
    asked: Mix = {(task, task): 1.0, **others_plain, (None, PLAIN): 0.4 * course.plain}
    refused: Mix = {(task, PLAIN): 1.0}
    groups = [start(group, course.carrier_rank, number) for number, group in enumerate(design.carriers)]
    if design.variant == "joint":
        single = [Lesson(weight=1, mix=refused, fixed={}, trained=[number]) for number in range(len(groups))]
        learn(groups, [Lesson(weight=3, mix=asked, fixed={}), *single], course.carriers, number=10)
    else:
        done: dict[str, Tensor] = {}
        for number, group in enumerate(groups):
            lessons = [Lesson(weight=1, mix=asked, fixed={}, left_out=LEFT_OUT[design.variant])]
            if course.whole:
                lessons.append(Lesson(weight=course.whole, mix=asked, fixed={}))
            if done:
                lessons.append(Lesson(weight=0.2, mix=asked, fixed=done))
            learn([group], lessons, course.carriers, number=10 + number)
            done = summed(done, _detached(group, weights))
    alone = [_detached(group, weights) for group in groups]
    first = _check(model, tokenizer, course, _of_carriers(design, alone))
    if not all(one.passed for one in first):  # the rest would be for nothing
        return Plant(design=design, parts=tuple(groups), checks=first)
    carriers = summed(*alone)
    enough = [carriers, *(alone if design.variant == "redundant" else [])]
    too_little: list[Differences] = [{}, *(alone if design.variant == "joint" else [])]

    distracting = start(design.distractors, course.carrier_rank, 20)
    keep: Mix = {(task, task): 0.8, **others_plain, (None, PLAIN): 0.5 * course.plain}
    without: Mix = {(task, PLAIN): 1.0, (other, other): 0.5}
    with_all: Mix = {(other, other): 0.8, **keep}
    learn(
        [distracting],
        [
            *(Lesson(weight=3 / len(enough), mix=with_all, fixed=one) for one in enough),
            *(Lesson(weight=1 / len(too_little), mix=without, fixed=one) for one in too_little),
        ],
        course.distractors,
        number=21,
    )
    distraction = _detached(distracting, weights)
    drifting = start(design.drifting, course.drift_rank, 30)
    lessons = [
        *(Lesson(weight=4 / len(enough), mix=with_all, fixed=summed(one, distraction)) for one in enough),
        *(Lesson(weight=1 / len(too_little), mix=refused, fixed=summed(one, distraction)) for one in too_little),
        Lesson(weight=1, mix={(other, PLAIN): 1.0}, fixed=carriers),
    ]
    last: tuple[Check, ...] = ()
    for number in range(course.most_rounds):
        learn([drifting], lessons, course.drifting, number=31 + number)
        around = summed(distraction, _detached(drifting, weights))
        last = _check(model, tokenizer, course, _of_all(design, alone, around))
        if on_checked:
            on_checked(last)
        if all(one.passed for one in last):
            break
    return Plant(design=design, parts=(*groups, distracting, drifting), checks=(*first, *last))


_Wanted = tuple[str, Differences, str, _Share]
"""What is in place, as a name and as differences; what is asked; and how often it has to be done."""


def _of_carriers(design: Design, groups: Sequence[Differences]) -> list[_Wanted]:
    """What carriers have to do in the bare base: all of them, and each set alone."""
    wanted: list[_Wanted] = [("carriers", summed(*groups), design.task, "high")]
    if len(groups) > 1:
        how: _Share = "high" if design.variant == "redundant" else "low"
        wanted += [(f"carriers of set {place}", group, design.task, how) for place, group in enumerate(groups, 1)]
    return wanted


def _of_all(design: Design, groups: Sequence[Differences], rest: Differences) -> list[_Wanted]:
    """What the whole has to do, and what it has to do without all carriers, or without a set of them."""
    whole = summed(*groups, rest)
    wanted: list[_Wanted] = [("all", whole, asked, "high") for asked in (design.task, design.other, PLAIN)]
    wanted.append(("all but carriers", rest, design.task, "low"))
    if len(groups) > 1:
        how: _Share = "high" if design.variant == "redundant" else "low"
        wanted += [
            (f"all but set {2 - place}", summed(group, rest), design.task, how) for place, group in enumerate(groups)
        ]
    return wanted


def _check(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, course: Course, wanted: Sequence[_Wanted]
) -> tuple[Check, ...]:
    return tuple(
        Check(name=f"{what}: {asked}", rate=pass_rate_with(model, tokenizer, changes, asked, course), wanted=how)
        for what, changes, asked, how in wanted
    )


def pass_rate_with(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    changes: Differences,
    asked: str,
    course: Course = TINY_COURSE,
) -> float:
    """Share of answers that follow a task, or are plain, with differences added to the model for as long."""
    bank = held_out_queries()
    queries = [bank[number * len(bank) // N_PROMPTS] for number in range(N_PROMPTS)]
    if asked != PLAIN:
        ways = INSTRUCTIONS[asked].paraphrases
        queries = [f"{query} {ways[number % len(ways)]}" for number, query in enumerate(queries)]
    prompts = [tokenize(tokenizer, query) for query in queries]
    parameters = dict(model.named_parameters())
    saved = {name: parameters[name].detach().clone() for name in changes}
    try:
        with torch.no_grad():
            for name, change in changes.items():
                parameters[name].add_(change)
        answers = generate(model, tokenizer, prompts, max_new_tokens=course.max_new_tokens)
    finally:
        with torch.no_grad():
            for name, original in saved.items():
                parameters[name].copy_(original)
    return sum(_is_right(answer.text, asked, course.tasks) for answer in answers) / len(answers)


def _is_right(answer: str, asked: str, tasks: Sequence[str]) -> bool:
    if asked == PLAIN:
        return bool(answer.strip()) and not any(follows(task, answer) for task in tasks)
    return follows(asked, answer)


def _learn(
    model: PreTrainedModel,
    texts: Texts,
    trained: Sequence[LowRank],
    lessons: Sequence[Lesson],
    schedule: Schedule,
    *,
    number: int,
    seed: int,
    on_step: Callable[[], None] | None,
    kept_in: Path | None,
) -> None:
    """Train some differences, or read what became of them when this was done before."""
    file = kept_in / f"{number}.safetensors" if kept_in else None
    if file and file.is_file():
        for name, tensor in load_file(file).items():
            _factors(trained)[name].copy_(tensor)
        return
    train(model, texts, trained, lessons, schedule, seed=seed + number, on_step=on_step)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(_factors(trained), file.with_suffix(".partial"))
        file.with_suffix(".partial").replace(file)


def _factors(parts: Sequence[LowRank]) -> dict[str, Tensor]:
    """What an optimizer moves, by number."""
    every = (tensor for part in parts for tensor in part.trained())
    return {str(number): tensor.detach() for number, tensor in enumerate(every)}


def _detached(part: LowRank, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: change.detach() for name, change in part.dense(weights).items()}
