"""From scores to coefficients: which expert brings which component, and how much of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Literal, get_args

from weightpatch.component import Component
from weightpatch.errors import MergeError

Policy = Literal["soft", "top", "owner"]
"""`soft`: the expert that ranks a component highest brings it whole, others less the lower they rank it; `top`: each
expert brings the share of components that it ranks highest; `owner`: each component comes from one expert alone."""
Scores = Mapping[str, Mapping[Component, float]]
"""Expert -> component -> score, higher for what carries more of the expert's behaviour."""
Weights = dict[str, dict[Component, float]]
"""Expert -> component -> coefficient."""

TEMPERATURE = 0.25
SHARE = 0.3


def weigh(scores: Scores, policy: Policy, *, temperature: float = TEMPERATURE, share: float = SHARE) -> Weights:
    """Turn scores into coefficients from 0 to 1.

    Scores of different experts are made comparable by their ranks within each unit, from 0 to 1 (ties share their mean
    rank): r. With `soft` the coefficient is exp((r - highest r of any expert) / temperature): with a high temperature
    all are 1 (task arithmetic), with a low one only the winner's (`owner`). Components that some experts did not score
    are decided among those who did.

    Args:
        scores: Of every expert.
        policy: How.
        temperature: Of `soft`, in ranks.
        share: Of `top`, within each unit.

    Raises:
        MergeError: an unknown policy, a number out of range, or scores that are no numbers.

    Source:
        Rank normalisation and the three ways: Sun et al. 2026 (arXiv:2604.13694) as far as its abstract tells; the
        formulas are ours.
    """
    if policy not in get_args(Policy):
        raise MergeError(f"unknown policy {policy!r}. Choose one of {', '.join(get_args(Policy))}.")
    check_numbers(temperature, share)
    ranks = {expert: normalized_ranks(own) for expert, own in scores.items()}
    if policy == "top":
        return {expert: _top(own, share) for expert, own in scores.items()}
    highest: dict[Component, float] = {}
    for own in ranks.values():
        for component, rank in own.items():
            highest[component] = max(rank, highest.get(component, 0.0))
    if policy == "soft":
        return {
            expert: {one: math.exp((rank - highest[one]) / temperature) for one, rank in own.items()}
            for expert, own in ranks.items()
        }
    owners = {component: _owner(component, ranks, scores) for component in highest}
    return {expert: {one: float(owners[one] == expert) for one in own} for expert, own in ranks.items()}


def check_numbers(temperature: float, share: float) -> None:
    """Check what `weigh` is told.

    Raises:
        MergeError: a number out of range.
    """
    if not 0 < temperature < math.inf:
        raise MergeError(f"temperature {temperature} gives no coefficients. Give a number above 0, such as 0.25.")
    if not 0 < share <= 1:
        raise MergeError(f"share {share} is no part of the components. Give one above 0 and at most 1.")


def only(members: Mapping[str, Set[Component]], among: Mapping[str, Sequence[Component]]) -> Weights:
    """Each expert brings its own members, whole: the components with the role source, say.

    Args:
        members: Expert -> what it brings.
        among: Expert -> everything that is decided.
    """
    return {expert: {one: float(one in members[expert]) for one in own} for expert, own in among.items()}


def normalized_ranks(scores: Mapping[Component, float]) -> dict[Component, float]:
    """Rank of each component within its unit, from 0 (lowest) to 1; ties share their mean; .5 for a single one.

    Raises:
        MergeError: a score that is no number.
    """
    from scipy.stats import rankdata  # takes half a second, and task arithmetic has no ranks

    if odd := [str(one) for one, score in scores.items() if not math.isfinite(score)]:
        raise MergeError(f"{len(odd)} scores are no numbers, the first that of {odd[0]}. Measure them again.")
    found: dict[Component, float] = {}
    for members in _by_unit(scores):
        ranks = rankdata([scores[one] for one in members])
        span = len(members) - 1
        found |= {one: float(rank - 1) / span if span else 0.5 for one, rank in zip(members, ranks, strict=True)}
    return found


def overlap(weights: Mapping[str, Mapping[Component, float]]) -> dict[tuple[str, str], float]:
    """Two experts -> share of the components that either brings (coefficient not 0) which both bring; NaN for none."""
    brought = {expert: {one for one, weight in own.items() if weight} for expert, own in weights.items()}
    return {
        (one, other): len(first & second) / len(first | second) if first | second else math.nan
        for one, first in brought.items()
        for other, second in brought.items()
    }


def _top(scores: Mapping[Component, float], share: float) -> dict[Component, float]:
    chosen: set[Component] = set()
    for members in _by_unit(scores):
        ordered = sorted(members, key=lambda one: (-scores[one], one.layer or 0, one.index or 0))
        chosen |= set(ordered[: max(1, round(share * len(members)))])
    return {one: float(one in chosen) for one in scores}


def _by_unit(scored: Iterable[Component]) -> Iterable[list[Component]]:
    units: dict[str, list[Component]] = {}
    for component in scored:
        units.setdefault(component.unit, []).append(component)
    return units.values()


def _owner(component: Component, ranks: Mapping[str, Mapping[Component, float]], scores: Scores) -> str:
    """Who ranks it highest; of several the one with the higher score, then the first."""
    able = [expert for expert, own in ranks.items() if component in own]
    return max(able, key=lambda expert: (ranks[expert][component], scores[expert][component]))
