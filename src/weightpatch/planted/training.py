"""Training of differences, with other differences in place or not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from weightpatch.component import Component
from weightpatch.planted.low_rank import LowRank, summed
from weightpatch.residuals import LEAST_SHARED

IGNORED = -100
_WARMUP = 10
_LAST = 0.05
"""The learning rate ends at this share of its peak."""

Texts = Callable[[str | None, str, random.Random], tuple[list[int], int]]
"""Draws a text by task whose instruction stands in the prompt, if any, and form of the answer: its tokens, and how many
of them are the prompt's."""
Mix = Mapping[tuple[str | None, str], float]
"""(Task whose instruction stands in the prompt or None, form of the answer) -> how often."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """What is to be learned while certain differences are in place.

    Attributes:
        weight: How often, relative to other lessons.
        mix: What is asked and answered.
        fixed: Parameter -> difference that is in place and not trained.
        trained: Which of the trained differences are in place, by their place; None: all.
        left_out: Most of their components that are left out of a step, as a share; how many and which is drawn each
            time, so that none is idle and none does everything. Only the first token of an answer is learned then: it
            tells the form, and what it takes has to be there at the end of the prompt, not later.
    """

    weight: float
    mix: Mix
    fixed: Mapping[str, Tensor]
    trained: Sequence[int] | None = None
    left_out: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast.

    Attributes:
        n_steps: Optimizer steps.
        learning_rate: Its peak; linear warm-up, then a cosine.
        n_sequences: In a step.
    """

    n_steps: int
    learning_rate: float
    n_sequences: int = 16


def train(
    model: PreTrainedModel,
    texts: Texts,
    differences: Sequence[LowRank],
    lessons: Sequence[Lesson],
    schedule: Schedule,
    *,
    seed: int,
    on_step: Callable[[], None] | None = None,
) -> None:
    """Train differences in place; the model is left as it is.

    Args:
        model: The base.
        texts: What it is trained on.
        differences: What is trained.
        lessons: One is drawn for every step.
        schedule: How long and how fast.
        seed: Of texts and lessons.
        on_step: Called after every step.
    """
    draw = random.Random(f"{seed} lessons")  # noqa: S311  not for secrets
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    in_place = [{name: weights[name] + change for name, change in lesson.fixed.items()} for lesson in lessons]
    draws = [random.Random(f"{seed} texts {place}") for place in range(len(lessons))]  # noqa: S311
    batches = [
        _batches(texts, lesson.mix, schedule.n_sequences, own) for lesson, own in zip(lessons, draws, strict=True)
    ]
    optimizer = torch.optim.Adam([tensor for one in differences for tensor in one.trained()])
    for step in range(schedule.n_steps):
        share = _LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * step / schedule.n_steps))
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * min(1.0, (step + 1) / _WARMUP) * share
        place = draw.choices(range(len(lessons)), [lesson.weight for lesson in lessons])[0]
        lesson = lessons[place]
        on = [one for number, one in enumerate(differences) if lesson.trained is None or number in lesson.trained]
        left_out = [_left_out(one, lesson.left_out, draw) for one in on]
        changes = summed(*(one.dense(weights, out) for one, out in zip(on, left_out, strict=True)))
        state = in_place[place] | {
            name: in_place[place].get(name, weights[name]) + change for name, change in changes.items()
        }
        ids, labels = next(batches[place])
        if any(left_out):
            labels = _first_only(labels)
        loss = answer_loss(model, state, ids, labels)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        if on_step:
            on_step()


def _left_out(difference: LowRank, share: float, draw: random.Random) -> frozenset[Component]:
    members = difference.members
    return frozenset(draw.sample(members, draw.randint(0, int(share * len(members)))))


def _first_only(labels: Tensor) -> Tensor:
    """Labels of the first token of each answer."""
    asked = labels != IGNORED
    return labels.where(asked & (asked.cumsum(dim=1) == 1), torch.full_like(labels, IGNORED))


def answer_loss(model: PreTrainedModel, state: Mapping[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the labels, with other weights in place.

    What all sequences begin with (a system prompt) is run once, nothing behind the last label is run, and logits are
    made from the first label on.

    Args:
        model: A causal model.
        state: Parameter -> what stands in its place.
        ids: Shape `(sequence, token)`, padded on the right: attention is causal, so no mask is needed.
        labels: The same with `IGNORED` where nothing is to be learned; the first token of a sequence has none.
    """
    asked = (labels != IGNORED).any(dim=0).nonzero()
    first, last = int(asked.min()), int(asked.max())
    shared = min(int((ids == ids[0]).all(dim=0).long().cumprod(dim=0).sum()), first - 1)

    def run(tokens: Tensor, cache: DynamicCache | None, n_logits: int) -> Tensor:
        given = {
            "input_ids": tokens,
            "past_key_values": cache,
            "use_cache": cache is not None,
            "logits_to_keep": n_logits,
        }
        logits: Tensor = functional_call(model, dict(state), kwargs=given).logits
        return logits

    cache: DynamicCache | None = None
    if shared >= LEAST_SHARED:
        cache = DynamicCache()
        run(ids[:1, :shared], cache, 1)
        cache.batch_repeat_interleave(len(ids))
    else:
        shared = 0
    logits = run(ids[:, shared:last], cache, last - first + 1)
    wanted = labels[:, first : last + 1]
    return functional.cross_entropy(logits[wanted != IGNORED], wanted[wanted != IGNORED])


def _batches(texts: Texts, mix: Mix, n_sequences: int, draw: random.Random) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (token ids, labels), each `(sequence, token)`; sequences of like length together."""
    kinds, shares = list(mix), list(mix.values())
    while True:
        drawn = [texts(*draw.choices(kinds, shares)[0], draw) for _ in range(4 * n_sequences)]
        drawn.sort(key=lambda text: len(text[0]))
        chunks = [drawn[start : start + n_sequences] for start in range(0, len(drawn), n_sequences)]
        draw.shuffle(chunks)
        for chunk in chunks:
            ids = torch.zeros(len(chunk), len(chunk[-1][0]), dtype=torch.long)
            labels = torch.full_like(ids, IGNORED)
            for row, (tokens, n_prompt) in enumerate(chunk):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                labels[row, n_prompt : len(tokens)] = torch.tensor(tokens[n_prompt:])
            yield ids, labels
