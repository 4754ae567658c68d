"""What an anchor does to generated answers: steering the base, ablating the specialized model, and the controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, get_args

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weightpatch.anchor import Arm, Behaviour, Gate, Span
from weightpatch.errors import AnchorError
from weightpatch.generation import generate
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompt, ContrastPrompts
from weightpatch.statistics import Floats, Interval, mean_interval
from weightpatch.steering import Hold, from_the_end, holding, random_direction
from weightpatch.streaming import materialized
from weightpatch.streams import Estimator, Indices, Streams
from weightpatch.suites import Check

Passes = Callable[[ContrastPrompt, str], bool]
"""Whether an answer to a prompt follows its instruction."""

SPANS: tuple[Span, ...] = get_args(Span)
MAX_NEW_TOKENS = 80
N_LAYERS = 4
BATCH_SIZE = 96
"""Answers side by side: more than `generate`'s default, since many short arms are answered together."""

REPETITIVE = 0.5
"""An answer repeats itself if more than this share of its sequences of four tokens stood there before (our choice)."""

_NGRAM = 4
_Way = TypeVar("_Way")


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How answers are generated and judged.

    Attributes:
        passes: Judges an answer; None: the checker that a prompt names by `type` and `kwargs`, or by its task.
        others: Prompts of other tasks, whose anchors serve as a control, one prompt each in turn; None: no control.
        max_new_tokens: Most tokens of an answer.
        batch_size: Answers generated side by side.
        n_layers: Most layers that steering is tried at.
        seed: Of the random directions.
    """

    passes: Passes | None = None
    others: ContrastPrompts | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    batch_size: int = BATCH_SIZE
    n_layers: int = N_LAYERS
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdicts:
    """Answers judged, one entry to a job. An answer that repeats itself does not pass, whatever its form."""

    passed: Floats
    repetitive: Floats


def can_judge(pair: ModelPair, prompts: ContrastPrompts) -> bool:
    """Whether answers can be generated and every prompt names a checker that is known here."""
    return pair.tokenizer is not None and all(not row.with_instruction and _check(row).is_known for row in prompts)


def repetition(ids: Sequence[int]) -> float:
    """Share of an answer's sequences of four tokens that stood there before; 0 for one of fewer than five tokens."""
    grams = [tuple(ids[at : at + _NGRAM]) for at in range(len(ids) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """One task's prompts with all that is needed to have them answered in many ways.

    Attributes:
        pair: The two models.
        prompts: What is asked; a response that a prompt carries is left out, since the answer is to be generated.
        positions: Where the anchor is read.
        answering: How answers are generated and judged.

    Raises:
        AnchorError: no tokenizer, prompts that cannot be judged, or positions where nothing can be held.
    """

    pair: ModelPair
    prompts: ContrastPrompts
    positions: tuple[int, ...]
    answering: Answering

    def __post_init__(self) -> None:
        from_the_end(self.held_positions)
        _ = self.tokenizer
        if self.answering.passes is None and not can_judge(self.pair, self.prompts):
            unknown = sorted({_check(row).type for row in self.prompts if not _check(row).is_known})
            raise AnchorError(
                f"there is no checker here for {', '.join(unknown) or 'prompts given as token ids'}. Name one in the "
                "prompts' field `type`, judge answers yourself with Answering(passes=...), or use gates='readout'."
            )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The pair's.

        Raises:
            AnchorError: it has none.
        """
        if self.pair.tokenizer is None:
            raise AnchorError("gates by behaviour generate text: give the pair a tokenizer and prompts as text.")
        return self.pair.tokenizer

    @property
    def is_read_along(self) -> bool:
        """Whether the anchor is read along responses; it is then held where these stood, from the prompt's end on."""
        return any(row.response for row in self.prompts)

    @property
    def held_positions(self) -> tuple[int, ...]:
        """Where in a prompt the anchor is held."""
        return (-1,) if self.is_read_along else self.positions

    @property
    def n_tokens(self) -> int | None:
        """How many tokens of an answer it is held at, if at any; None: all."""
        return len(self.positions) if self.is_read_along else None

    def judge(self, model: PreTrainedModel, jobs: Sequence[tuple[int, Hold | None]]) -> Verdicts:
        """Let a model answer prompts, by their place, each held as its job says, and judge the answers."""
        rows = [self.prompts.rows[place] for place, _ in jobs]
        asked = ContrastPrompts(tuple({row.id: row for row in rows}.values())).without_responses()
        tokenized = asked.tokenize(self.tokenizer)
        ids = dict(zip(tokenized.ids, tokenized.with_instruction, strict=True))
        with materialized(model), holding(model, [hold for _, hold in jobs]) as select:
            answers = generate(
                model,
                self.tokenizer,
                [ids[row.id] for row in rows],
                max_new_tokens=self.answering.max_new_tokens,
                batch_size=self.answering.batch_size,
                on_batch=select,
            )
        passes = self.answering.passes or (lambda row, text: _check(row).passes(text))
        repetitive = np.array([repetition(answer.ids) > REPETITIVE for answer in answers])
        passed = np.array([passes(row, answer.text) for row, answer in zip(rows, answers, strict=True)])
        return Verdicts(passed=(passed & ~repetitive).astype(float), repetitive=repetitive.astype(float))


def search_layers(
    bench: Bench,
    streams: Streams,
    halves: tuple[Indices, Indices],
    layers: Sequence[int],
    estimator: Estimator,
) -> dict[Span, dict[int, float]]:
    """Rise of the base's pass rate by steering at some layers: each half with the direction and level of the other.

    Args:
        bench: What to answer.
        streams: Residuals at these layers at least.
        halves: Places of the prompts, in two disjoint parts.
        layers: Where steering may be tried; too many are thinned evenly.
        estimator: How directions are found.

    Returns:
        Span -> layer -> mean rise.
    """
    thinned = sorted({layers[round(at)] for at in np.linspace(0, len(layers) - 1, bench.answering.n_layers)})
    places = [int(place) for half in halves for place in half]
    ways: dict[tuple[Span, int] | None, Sequence[Hold | None]] = {None: [None] * len(places)}
    for span in SPANS:
        for layer in thinned:
            fits = [fit_hold(bench, streams, layer, other, estimator, span=span) for other in reversed(halves)]
            ways[span, layer] = [hold for half, hold in zip(halves, fits, strict=True) for _ in half]
    passed = {way: found.passed for way, found in _by_way(bench, bench.pair.base, places, ways).items()}
    return {
        span: {layer: round(float((passed[span, layer] - passed[None]).mean()), 6) for layer in thinned}
        for span in SPANS
    }


def fit_hold(
    bench: Bench, streams: Streams, layer: int, chosen: Indices, estimator: Estimator, *, span: Span
) -> Hold | None:
    """The hold that gives a prompt the specialized model's mean readout with the instruction; None: no direction."""
    direction = streams.direction(layer, chosen, estimator)
    if direction is None:
        return None
    level = float(streams.project(direction, layer, "s_with")[chosen].mean())
    return Hold(
        layer=layer,
        direction=direction,
        level=level,
        positions=bench.held_positions,
        span=span,
        n_tokens=bench.n_tokens,
    )


def measure_behaviour(
    bench: Bench,
    held_out: Indices,
    hold: Hold,
    *,
    ablation_level: float,
    search: dict[Span, dict[int, float]],
    others: Mapping[str, Hold],
) -> tuple[Behaviour, tuple[Gate, ...]]:
    """Answers of both models, steered, ablated and with the controls, on prompts that had no part in fitting.

    Args:
        bench: What to answer.
        held_out: Places of the prompts to use.
        hold: The anchor at the specialized model's level with the instruction.
        ablation_level: The specialized model's own level without it.
        search: How the layer was chosen, for the record.
        others: Other tasks' anchors at their own levels, by task; the prompts take them in turn.

    Returns:
        Pass rates by arm, and the gates.
    """
    pair, places = bench.pair, [int(place) for place in held_out]
    generator = torch.Generator().manual_seed(bench.answering.seed)
    randoms = [replace(hold, along=random_direction(len(hold.direction), generator)) for _ in places]
    ways: dict[str, Sequence[Hold | None]] = {
        "base": [None] * len(places),
        "steered": [hold] * len(places),
        "random": randoms,
    }
    if others:
        turns = list(others.values())
        ways["other-task"] = [turns[number % len(turns)] for number in range(len(places))]
    verdicts = _by_way(bench, pair.base, places, ways)
    ablation = replace(hold, level=ablation_level, span="answer", n_tokens=None)
    own: dict[str, Sequence[Hold | None]] = {"specialized": [None] * len(places), "ablated": [ablation] * len(places)}
    verdicts |= _by_way(bench, pair.specialized, places, own)
    behaviour = Behaviour(
        span=hold.span,
        level=hold.level,
        ablation_level=ablation_level,
        arms=tuple(
            Arm(name=name, n=len(places), n_passed=int(own.passed.sum()), n_repetitive=int(own.repetitive.sum()))
            for name, own in verdicts.items()
        ),
        search=search,
        other_tasks=tuple(others),
        max_new_tokens=bench.answering.max_new_tokens,
    )
    queries = [bench.prompts.rows[place].query for place in places]
    return behaviour, _gates({name: own.passed for name, own in verdicts.items()}, queries)


def _gates(passed: dict[str, Floats], queries: Sequence[str]) -> tuple[Gate, ...]:
    def rise(after: str, before: str) -> Interval:
        return mean_interval(passed[after] - passed[before], groups=queries)

    steering, ablation = rise("steered", "base"), rise("specialized", "ablated")
    gates = [
        _gate("steering", steering.low, "holding the base at the anchor raises its pass rate (lower end of 95 %)"),
        _gate("ablation", ablation.low, "ablating the anchor lowers the specialized model's pass rate (lower end)"),
    ]
    controls = {"random": "random directions, pushed as far", "other-task": "the anchors of other tasks"}
    for name, words in controls.items():
        if name in passed:
            by_itself, advantage = rise(name, "base"), rise("steered", name)
            meaning = f"the anchor raises the pass rate by more than {words} (lower end), and these do not raise it"
            gates.append(_gate(name, advantage.low, meaning, unless=by_itself.low > 0))
    return tuple(gates)


def _gate(name: str, low: float, meaning: str, *, unless: bool = False) -> Gate:
    return Gate(name=name, value=low, threshold=0.0, passed=low > 0 and not unless, meaning=meaning)


def _by_way(
    bench: Bench, model: PreTrainedModel, places: Sequence[int], ways: Mapping[_Way, Sequence[Hold | None]]
) -> dict[_Way, Verdicts]:
    """Have the same prompts answered in several ways, all in one go."""
    jobs = [(place, hold) for holds in ways.values() for place, hold in zip(places, holds, strict=True)]
    found = bench.judge(model, jobs)
    passed, repetitive = (values.reshape(len(ways), len(places)) for values in (found.passed, found.repetitive))
    return {name: Verdicts(passed=passed[row], repetitive=repetitive[row]) for row, name in enumerate(ways)}


def _check(row: ContrastPrompt) -> Check:
    return Check(type=row.type or row.task, kwargs=row.kwargs)
