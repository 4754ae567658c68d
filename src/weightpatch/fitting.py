"""Fitting an anchor: the direction, the layer, and the tests that say whether it can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from weightpatch.anchor import Anchor, AnchorReport, Behaviour, Gate, Readout, Span
from weightpatch.behaviour import Answering, Bench, fit_hold, measure_behaviour, search_layers
from weightpatch.errors import AnchorError
from weightpatch.pair import ModelPair, check_prompts
from weightpatch.prompts import ContrastPrompts
from weightpatch.residuals import BATCH_TOKENS
from weightpatch.statistics import Floats, area_under_curve, mean_interval
from weightpatch.steering import Hold
from weightpatch.streams import Estimator, Indices, Streams

Gates = Literal["readout", "behaviour"]

SPLIT_HALF_COSINE = 0.8
AUC = 0.9
SEARCH = (0.2, 0.9)


def fit_anchor(
    pair: ModelPair,
    prompts: ContrastPrompts,
    *,
    layer: int | None = None,
    positions: Sequence[int] = (-1,),
    estimator: Estimator = "mean-difference",
    readout: Readout = "projection",
    search: tuple[float, float] = SEARCH,
    gates: Gates = "readout",
    answering: Answering | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Anchor:
    """Fit the direction in which the specialized model moves when the instruction is added, at the best layer.

    The queries are dealt to two halves. Within the first, directions fitted on one quarter and tried on the other
    choose the layer: by mean(gap) / std(gap), or with `gates="behaviour"` by how much steering the base raises its pass
    rate, among layers with a gap. The gates are measured on the second half with the direction fitted on the first, so
    on prompts that neither chose the layer nor made the direction. The direction returned is fitted on all prompts.

    Args:
        pair: The two models.
        prompts: All of them are used; at least four queries.
        layer: Fix the layer instead of searching it.
        positions: Readout positions; negative ones count from the end of each prompt. Their residuals are averaged.
        estimator: `mean-difference`: with minus without the instruction, in the specialized model.
            `difference-in-differences`: what that difference has beyond the base's. `principal-component`: the first
            of the specialized model's differences, not centred (pointing the same way).
        readout: What the anchor's readout will be.
        search: Part of the depth that is searched.
        gates: `readout`: from forward passes alone. `behaviour`: these and four more that generate answers, with the
            base steered, the specialized model ablated, and controls.
        answering: How answers are generated and judged; only for `behaviour`.
        batch_tokens: Most tokens of one forward pass.

    Returns:
        The anchor with its report. Whether it is stable is for the caller to look at: `anchor.report.stable`.

    Raises:
        AnchorError: too few queries, more than one task, no difference to fit, or answers that cannot be judged.
        PromptError: prompts that the models cannot read.

    Source:
        Method section 1. Difference in means at the last prompt token is the consensus; thresholds are our choice.
    """
    if len(prompts.tasks) > 1:
        raise AnchorError(
            f"these prompts hold {len(prompts.tasks)} tasks ({', '.join(prompts.tasks)}). An anchor belongs to one: "
            "fit it on prompts.of_task(...)."
        )
    if gates not in get_args(Gates):
        raise AnchorError(f"unknown gates {gates!r}. Choose one of {', '.join(get_args(Gates))}.")
    check_prompts(pair, prompts, positions=positions)
    n_layers = pair.architecture.n_layers
    layers = _candidates(n_layers, search) if layer is None else [layer]
    if min(layers) < 0 or max(layers) > n_layers:
        raise AnchorError(f"layer {layer} is outside this model's residual streams 0 to {n_layers}.")
    bench = None
    if gates == "behaviour":
        bench = Bench(pair=pair, prompts=prompts, positions=tuple(positions), answering=answering or Answering())
    first, second = halves(prompts)
    # Within the first half, each quarter's direction is tried on the other: the second half stays out of the choice.
    quarters = _deal(prompts, first)
    streams = Streams.read(
        pair, prompts.tokenize(pair.tokenizer), layers=layers, positions=positions, batch_tokens=batch_tokens
    )

    def fit(at: int, chosen: Indices) -> Anchor | None:
        direction = streams.direction(at, chosen, estimator)
        if direction is None:
            return None
        return Anchor(layer=at, direction=direction, positions=positions, readout=readout)

    gaps = {}
    for at in layers:
        fits = [fit(at, chosen) for chosen in (*quarters, first, second)]
        if all(fits):
            pairs = zip(fits, reversed(quarters), strict=False)
            gaps[at] = np.concatenate([streams.gap(anchor)[other] for anchor, other in pairs if anchor])
    if not gaps:
        raise AnchorError(
            f"the instruction changes nothing at the readout positions {list(positions)} of layers {layers[0]} to "
            f"{layers[-1]}: prompts with and without it end alike there. Try a later layer or other positions."
        )
    strength = {at: _strength(gap) for at, gap in gaps.items()}
    best, span, found = max(strength, key=lambda at: strength[at]), None, {}
    if bench:
        order = [prompts.rows[place].query for quarter in reversed(quarters) for place in quarter]
        open_ = [at for at, gap in gaps.items() if mean_interval(gap, groups=order).low > 0] or [best]
        found = search_layers(bench, streams, quarters, open_, estimator)
        best, span = _most_steerable(found, strength) or (best, "answer")
    fitted, other, final = fit(best, first), fit(best, second), fit(best, np.arange(len(prompts)))
    if fitted is None or other is None or final is None:
        raise AnchorError("the differences of the two halves of the prompts cancel out. Give more prompts.")
    gap = mean_interval(streams.gap(fitted)[second], groups=[prompts.rows[place].query for place in second])
    auc = area_under_curve(*(streams.read_side(fitted, side)[second] for side in ("s_with", "s_without")))
    passed = _readout_gates(float(fitted.direction @ other.direction), auc, gap.low)
    behaviour: Behaviour | None = None
    if bench and span and (hold := fit_hold(bench, streams, best, first, estimator, span=span)):
        behaviour, more = measure_behaviour(
            bench,
            second,
            hold,
            ablation_level=float(streams.project(hold.direction, best, "s_without")[first].mean()),
            search=found,
            others=_holds_of_others(bench, hold, estimator, batch_tokens=batch_tokens),
        )
        passed += more
    report = AnchorReport(
        estimator=estimator,
        gates=passed,
        levels=streams.levels(final),
        gap=gap.estimate,
        gap_low=gap.low,
        gap_high=gap.high,
        search={at: round(value, 6) for at, value in strength.items()},
        n_prompts=len(prompts),
        n_held_out=len(second),
        behaviour=behaviour,
    )
    return replace(final, report=report)


def _most_steerable(
    found: Mapping[Span, Mapping[int, float]], strength: Mapping[int, float]
) -> tuple[int, Span] | None:
    """Layer and span with the highest rise, the larger gap first where they are equal; None if nothing rises."""
    rises = [
        (rise, strength[layer], layer, span) for span, by_layer in found.items() for layer, rise in by_layer.items()
    ]
    rise, _, layer, span = max(rises)
    return (layer, span) if rise > 0 else None


def _holds_of_others(bench: Bench, hold: Hold, estimator: Estimator, *, batch_tokens: int) -> dict[str, Hold]:
    """The anchors of other tasks at the same layer, each at its own level."""
    others = bench.answering.others
    if others is None:
        return {}
    found = {}
    for task in others.tasks:
        own = others.of_task(task)
        streams = Streams.read(
            bench.pair,
            own.tokenize(bench.pair.tokenizer),
            layers=[hold.layer],
            positions=bench.positions,
            batch_tokens=batch_tokens,
        )
        held = fit_hold(bench, streams, hold.layer, np.arange(len(own)), estimator, span=hold.span)
        if held is not None:
            found[task] = held
    return found


def _strength(gap: Floats) -> float:
    """Mean over spread; 0 where there is no spread, which only readouts without any gap have."""
    spread = float(gap.std(ddof=1)) if len(gap) > 1 else 0.0
    return float(gap.mean()) / spread if spread > 0 else 0.0


def _readout_gates(cosine: float, auc: float, gap_low: float) -> tuple[Gate, ...]:
    return (
        Gate(
            name="split-half-cosine",
            value=cosine,
            threshold=SPLIT_HALF_COSINE,
            passed=cosine >= SPLIT_HALF_COSINE,
            meaning="directions fitted on two disjoint halves of the queries agree",
        ),
        Gate(
            name="auc",
            value=auc,
            threshold=AUC,
            passed=auc >= AUC,
            meaning="the specialized model's readout tells held-out prompts with the instruction from those without",
        ),
        Gate(
            name="gap",
            value=gap_low,
            threshold=0.0,
            passed=gap_low > 0,
            meaning="the specialized model reads higher than the base on held-out prompts (lower end of 95 %)",
        ),
    )


def _candidates(n_layers: int, search: tuple[float, float]) -> list[int]:
    low, high = (round(share * n_layers) for share in search)
    if not 0 <= low <= high <= n_layers:
        raise AnchorError(
            f"cannot search from {search[0]:g} to {search[1]:g} of the depth; give 0 <= low <= high <= 1."
        )
    return list(range(low, high + 1))


def halves(prompts: ContrastPrompts) -> tuple[Indices, Indices]:
    """Indices of the prompts of every other query, and of the rest: one half to fit an anchor, one to test it.

    Raises:
        AnchorError: fewer than four queries.
    """
    queries = {row.query for row in prompts}
    if len(queries) < 4:
        raise AnchorError(
            f"{len(queries)} different queries of {', '.join(prompts.tasks)} are too few to fit an anchor and test it "
            "on others: 4 are needed, so 10 where they are dealt to the three splits. In Python an anchor can also be "
            "made by hand: Anchor(layer=, direction=, positions=)."
        )
    return _deal(prompts, np.arange(len(prompts)))


def _deal(prompts: ContrastPrompts, chosen: Indices) -> tuple[Indices, Indices]:
    """Some prompts in two parts, every other query of theirs in each."""
    queries = {query: place for place, query in enumerate(dict.fromkeys(prompts.rows[at].query for at in chosen))}
    parity = np.array([queries[prompts.rows[at].query] % 2 for at in chosen])
    return chosen[parity == 0], chosen[parity == 1]
