"""The whole benchmark: prompts, anchor layers, races, and the rows of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from weightpatch.errors import ComponentError
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompts
from weightpatch.speed.contestants import CONTESTANTS, LOOPS, check_names, missing
from weightpatch.speed.machine import load_average, matrix_product_rate, versions
from weightpatch.speed.operations import PrefixTree, operations
from weightpatch.speed.race import Outcome, race
from weightpatch.speed.sampling import sample
from weightpatch.speed.work import Work, choose_prompts

DEPTHS = (0.6, 0.8, 0.97)
"""Where the anchors are when no layer is named, as shares of the model's depth."""


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """What is measured, and how often.

    Attributes:
        layers: Anchor layers; none: at 60, 80 and 97 % of the depth.
        units: Units that are patched, with commas.
        engines: Contestants, some of `CONTESTANTS`.
        n_prompts: How many of the prompts.
        sample: Components that the loops are timed on, at least; from every layer at least one is taken.
        repeats: How often everything is done; medians over these are reported.
        n_rounds: Rounds of a repeat; in each of them every loop has one turn.
        seed: Of the prompts drawn, the components sampled and their dealing.
    """

    layers: tuple[int, ...] = ()
    units: str = "heads,kvs,attns,mlps"
    engines: tuple[str, ...] = CONTESTANTS
    n_prompts: int = 16
    sample: int = 24
    repeats: int = 3
    n_rounds: int = 4
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contestant towards one anchor layer. What it has no value for is None.

    Attributes:
        engine: Its name.
        anchor_layer: The residual stream that enters this layer is read.
        seconds: Wall time of the whole sweep: the median over the repeats; for loops the mean of the sampled components
            times `n_components`.
        seconds_low: The smallest of the repeats.
        seconds_high: The largest of them.
        ratio: Seconds of `loop` over `seconds`.
        share_of_ideal: Operations that the exact method needs, over the machine's rate of matrix products, over
            `seconds`.
        peak_memory: Most MiB of anonymous memory above what was there before a turn: the models, and the contestant
            made ready.
        n_components: Components of the sweep.
        n_measured: How many of them were really patched in each repeat.
        max_difference: Largest difference of its readouts to those of `swap`, over the mean gap.
        note: Why it was not timed; empty when it was.
    """

    engine: str
    anchor_layer: int
    seconds: float | None
    seconds_low: float | None
    seconds_high: float | None
    ratio: float | None
    share_of_ideal: float | None
    peak_memory: float | None
    n_components: int
    n_measured: int
    max_difference: float | None
    note: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What it was measured on, and with.

    Attributes:
        load_before: Load average of the last minute before the first turn; None where the system does not tell.
        load_after: The same after the last turn. The benchmark itself is in it.
        threads: Threads that torch computes with.
        matrix_product_rate_gflops: Best rate of float32 matrix products before or after, in 10^9 operations per second.
        dtype: Of the weights.
        device: Where they are.
        n_prompts: Prompts.
        n_tokens_padded: Tokens of the prompts padded into one batch.
        n_tokens_tree: Tokens with what several prompts share at their start counted once.
        settings: As given.
        versions: Package -> version.
    """

    load_before: float | None
    load_after: float | None
    threads: int
    matrix_product_rate_gflops: float
    dtype: str
    device: str
    n_prompts: int
    n_tokens_padded: int
    n_tokens_tree: int
    settings: SpeedSettings
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured.

    Attributes:
        rows: By anchor layer, then in the order of `CONTESTANTS`.
        machine: On what.
        notes: Contestants that are not installed, one sentence each.
    """

    rows: tuple[Row, ...]
    machine: Machine
    notes: tuple[str, ...]


def measure_speed(
    pair: ModelPair,
    prompts: ContrastPrompts,
    settings: SpeedSettings,
    *,
    on_turn: Callable[[int, int], None] | None = None,
) -> Speed:
    """Time the same sweep with every contestant that is installed, interleaved and repeated.

    Args:
        pair: The two models. The base is written to and restored bit for bit.
        prompts: Where the prompts are drawn from.
        settings: What is measured.
        on_turn: Told how many turns are done, and how many there are.

    Raises:
        ComponentError: an unknown contestant or unit, or one whose operations are not counted.
        AnchorError: a layer that the model does not have, or with nothing below it.
        PromptError: not as many prompts as asked for, or prompts that the pair cannot read.
    """
    wanted = check_names(settings.engines)
    if min(settings.sample, settings.repeats, settings.n_rounds) < 1:
        raise ComponentError("sample, repeats and rounds must be at least 1.")
    notes = tuple(note for name in wanted if (note := missing(name)))
    names = tuple(name for name in wanted if not missing(name))
    if not names:
        raise ComponentError(f"none of the engines can be run: {' '.join(notes)}")
    chosen = choose_prompts(pair, prompts, n_prompts=settings.n_prompts, seed=settings.seed)
    layers = settings.layers or default_layers(pair.architecture.n_layers)
    works = [Work.of(pair, chosen, layer=layer, units=settings.units) for layer in dict.fromkeys(layers)]
    tree = PrefixTree.of(works[0].token_ids)
    needed = [
        operations(pair.architecture, tree, anchor_layer=work.anchor.layer, components=work.components)
        for work in works
    ]
    samples = [sample(work.components, settings.sample, seed=settings.seed) for work in works]
    device = works[0].batch.tokens.device
    count = _Counter(total=sum(_n_turns(names, one, settings) for one in samples), on_turn=on_turn)

    load_before, rate = load_average(), matrix_product_rate(pair.architecture, tree.all.n_tokens, device)
    outcomes = [
        race(
            work,
            names,
            sampled,
            repeats=settings.repeats,
            n_rounds=settings.n_rounds,
            seed=settings.seed,
            on_turn=count.step,
        )
        for work, sampled in zip(works, samples, strict=True)
    ]
    rate = max(rate, matrix_product_rate(pair.architecture, tree.all.n_tokens, device))
    ideals = [None if n_operations is None else n_operations / rate for n_operations in needed]
    return Speed(
        rows=tuple(
            row for work, found, ideal in zip(works, outcomes, ideals, strict=True) for row in _rows(work, found, ideal)
        ),
        machine=Machine(
            load_before=load_before,
            load_after=load_average(),
            threads=torch.get_num_threads(),
            matrix_product_rate_gflops=rate / 1e9,
            dtype=str(pair.base.dtype).removeprefix("torch."),
            device=str(device),
            n_prompts=len(chosen),
            n_tokens_padded=works[0].batch.tokens.numel(),
            n_tokens_tree=tree.all.n_tokens,
            settings=settings,
            versions=versions(("torch", "transformers", *(name for name in LOOPS if name in names))),
        ),
        notes=notes,
    )


def default_layers(n_layers: int) -> tuple[int, ...]:
    """Anchor layers at 60, 80 and 97 % of the depth; fewer in a model so small that some coincide."""
    return tuple(sorted({max(1, round(depth * n_layers)) for depth in DEPTHS}))


@dataclass(kw_only=True)
class _Counter:
    """Tells how many turns are done."""

    total: int
    on_turn: Callable[[int, int], None] | None
    done: int = 0

    def step(self) -> None:
        self.done += 1
        if self.on_turn:
            self.on_turn(self.done, self.total)


def _n_turns(names: Sequence[str], sampled: Sequence[object], settings: SpeedSettings) -> int:
    n_rounds = min(settings.n_rounds, len(sampled))
    return settings.repeats * (n_rounds * len({*names} - {"suffix"}) + ("suffix" in names))


def _rows(work: Work, outcomes: Sequence[Outcome], ideal: float | None) -> list[Row]:
    """The rows of one anchor layer."""
    n_components = len(work.components)
    seconds = {
        one.engine: [_extrapolated(one, repeat, n_components) for repeat in range(len(one.turns))] for one in outcomes
    }
    loop = median(seconds["loop"]) if seconds.get("loop") else None
    return [_row(work, one, seconds[one.engine], loop, ideal) for one in outcomes]


def _extrapolated(outcome: Outcome, repeat: int, n_components: int) -> float:
    """Seconds of a whole sweep from one repeat: the mean over the components patched, times all of them."""
    turns = outcome.turns[repeat]
    return sum(turn.seconds for turn in turns) / sum(len(turn.effects) for turn in turns) * n_components


def _row(work: Work, outcome: Outcome, seconds: Sequence[float], loop: float | None, ideal: float | None) -> Row:
    took = median(seconds) if seconds else None
    peaks = [turn.peak_memory for turns in outcome.turns for turn in turns if turn.peak_memory is not None]
    return Row(
        engine=outcome.engine,
        anchor_layer=work.anchor.layer,
        seconds=took,
        seconds_low=min(seconds, default=None),
        seconds_high=max(seconds, default=None),
        ratio=loop / took if loop and took else None,
        share_of_ideal=ideal / took if ideal and took else None,
        peak_memory=max(peaks, default=None),
        n_components=len(work.components),
        n_measured=sum(len(turn.effects) for turn in outcome.turns[0]) if outcome.turns else 0,
        max_difference=outcome.max_difference,
        note=outcome.failure,
    )
