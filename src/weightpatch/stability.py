"""How far a ranking of components depends on what it was measured on, and how far two agree beyond chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.integrate import trapezoid
from scipy.stats import hypergeom as hypergeometric

from weightpatch.agreement import agreement
from weightpatch.statistics import Floats

OVERLAP_AT = (20, 50, 100, 200)
JACCARD_AT = (10, 20, 50)
N_SPLITS = 100


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What the leading items of two rankings have in common.

    Attributes:
        k: Leading items of each.
        n: Items in all.
        n_common: In both.
        expected: By chance, k * k / n.
        p: Chance of so many or more.
    """

    k: int
    n: int
    n_common: int
    expected: float
    p: float


@dataclass(frozen=True, kw_only=True)
class Stability:
    """Agreement of measurements of the same components.

    Attributes:
        n: Comparisons.
        spearman: Rank correlation, mean over comparisons; NaN where it is undefined.
        spearman_low: Its 2.5 % quantile over comparisons.
        spearman_high: Its 97.5 % quantile.
        jaccard: k -> Jaccard index of the two sets of the k highest, mean over comparisons.
    """

    n: int
    spearman: float
    spearman_low: float
    spearman_high: float
    jaccard: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Areas:
    """A curve of recovery over the share of components patched, in two numbers.

    Attributes:
        cpr: Area under it: 1 if the first component restores everything.
        cmd: Area between it and 1: 0 if the first component restores everything and no set restores more.

    Source:
        Circuit performance ratio and circuit-model distance of Mueller et al. 2025, "MIB: A Mechanistic
        Interpretability Benchmark" (arXiv:2504.13151), there over edges and a task's metric.
    """

    cpr: float
    cmd: float


def overlaps(one: Sequence[str], other: Sequence[str], *, at: Sequence[int] = OVERLAP_AT) -> tuple[Overlap, ...]:
    """What the leading items of two rankings of the same items have in common, at each k below their number.

    Args:
        one: A ranking, best first.
        other: Another one.
        at: The numbers k.

    Raises:
        ValueError: rankings of different items, or with repeated ones, or a k below 1.

    Source:
        Sun et al. 2026 (arXiv:2604.13694) report such an overlap; the p-value is ours.
    """
    if set(one) != set(other) or len(set(one)) != len(one) or len(set(other)) != len(other):
        odd = sorted(set(one) ^ set(other))[:1] or ["one that is there twice"]
        raise ValueError(f"rankings of different items ({odd[0]}): rank the same items, each once")
    if min(at, default=1) < 1:
        raise ValueError(f"cannot compare the {min(at)} leading items: at needs numbers of at least 1")
    n = len(one)
    found = []
    for k in at:
        if k < n:
            common = len(set(one[:k]) & set(other[:k]))
            chance = float(hypergeometric.sf(common - 1, n, k, k))
            found.append(Overlap(k=k, n=n, n_common=common, expected=k * k / n, p=chance))
    return tuple(found)


def split_halves(per_prompt: Floats, *, groups: Sequence[str], n_splits: int = N_SPLITS, seed: int = 0) -> Stability:
    """Compare mean effects of two halves of the queries, split at random again and again.

    Args:
        per_prompt: Effects, shape `(component, prompt)`.
        groups: The query of each prompt; those of one stay together.
        n_splits: How often.
        seed: Of the splits.

    Raises:
        ValueError: fewer than two queries, no splits, or groups that do not fit the prompts.
    """
    _check(per_prompt, groups)
    if n_splits < 1:
        raise ValueError(f"{n_splits} splits, nothing to compare: split at least once")
    names = list(dict.fromkeys(groups))
    if len(names) < 2:
        raise ValueError(f"{len(names)} query cannot be halved: measure more queries")
    generator = np.random.default_rng(seed)
    pairs = []
    for _ in range(n_splits):
        chosen = {names[place] for place in generator.permutation(len(names))[: len(names) // 2]}
        is_first = np.array([group in chosen for group in groups])
        pairs.append((per_prompt[:, is_first].mean(axis=1), per_prompt[:, ~is_first].mean(axis=1)))
    return _compared(pairs)


def across(per_prompt: Floats, labels: Sequence[str]) -> Stability:
    """Compare mean effects on prompts of one label with those of every other one, in all pairs.

    Args:
        per_prompt: Effects, shape `(component, prompt)`.
        labels: For each prompt, such as the paraphrase of its instruction.

    Raises:
        ValueError: fewer than two labels, or labels that do not fit the prompts.
    """
    _check(per_prompt, labels)
    names = list(dict.fromkeys(labels))
    if len(names) < 2:
        raise ValueError(f"{len(names)} label, nothing to compare: measure prompts of two labels at least")
    means = [per_prompt[:, np.array([label == name for label in labels])].mean(axis=1) for name in names]
    return _compared(list(combinations(means, 2)))


def between(one: Floats, other: Floats) -> Stability:
    """Compare two measurements of the same components, each of shape `(component,)`."""
    return _compared([(one, other)])


def areas(shares: Floats, recoveries: Floats) -> Areas:
    """The two areas of a curve, which is taken to be linear between its points and to begin at 0.

    Args:
        shares: Share of the components patched at each point, in any order; 1 must be among them.
        recoveries: What was recovered there.

    Raises:
        ValueError: no point with all components, a share that is none, or sides of different lengths.
    """
    if shares.shape != recoveries.shape:
        raise ValueError(f"{len(shares)} shares for {len(recoveries)} recoveries: give one of each to a point")
    outside = shares[~((shares >= 0) & (shares <= 1))]
    if len(outside):
        raise ValueError(f"a share of {outside[0]:g}: needs parts of all components, between 0 and 1")
    if not (shares == 1).any():
        raise ValueError(f"{len(shares)} shares up to {max(shares, default=0):g}: needs one with all components, 1")
    order = np.argsort(shares, kind="stable")
    x, y = shares[order], recoveries[order]
    if x[0] > 0:
        x, y = np.concatenate([[0.0], x]), np.concatenate([[0.0], y])
    off = 1 - y
    distance = 0.0
    for left, right, width in zip(off[:-1], off[1:], np.diff(x), strict=True):
        if left * right < 0:  # the line crosses 1 on the way: two triangles
            distance += width * (left * left + right * right) / (2 * (abs(left) + abs(right)))
        else:
            distance += width * (abs(left) + abs(right)) / 2
    return Areas(cpr=float(trapezoid(y, x)), cmd=float(distance))


def _check(per_prompt: Floats, labels: Sequence[str]) -> None:
    if per_prompt.ndim != 2 or per_prompt.shape[1] != len(labels):
        raise ValueError(
            f"effects of shape {per_prompt.shape} for {len(labels)} prompts: needs (component, prompt), one label each"
        )


def _compared(pairs: Sequence[tuple[Floats, Floats]]) -> Stability:
    correlations = np.array([agreement(one, other, overlap_at=()).spearman for one, other in pairs])
    known = correlations[~np.isnan(correlations)]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (float("nan"), float("nan"))
    n = len(pairs[0][0])
    return Stability(
        n=len(pairs),
        spearman=float(known.mean()) if len(known) else float("nan"),
        spearman_low=float(low),
        spearman_high=float(high),
        jaccard={k: float(np.mean([_jaccard(one, other, k) for one, other in pairs])) for k in JACCARD_AT if k < n},
    )


def _jaccard(one: Floats, other: Floats, k: int) -> float:
    first, second = (set(np.argsort(-values, kind="stable")[:k].tolist()) for values in (one, other))
    return len(first & second) / len(first | second)
