"""How far an estimate agrees with what was measured exactly, and how much it can have missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom as hypergeometric
from scipy.stats import rankdata

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

OVERLAP_AT = (5, 10, 20, 50)
LEAST_CORRELATED = 3
"""Fewer items than this have no correlation, and no verdict: two points always lie on a line."""
LEAST_IN_LAYER = 5
"""A layer with fewer items than this is not judged by itself (our choice)."""
LEAST_SPEARMAN = 0.9
"""Below this rank correlation on a random sample, an estimate is called poor (our choice)."""
LEAST_SIGN = 0.9
"""Below this share of equal signs on a random sample, an estimate is called poor (our choice)."""

_ROUNDING = 1e-9  # relative; so that rounding does not decide where a probability and its bound are equal


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of estimates with exact values; NaN where it is undefined.

    Attributes:
        n: Items compared.
        pearson: Linear correlation; NaN with fewer than three items, or when either side is constant.
        spearman: Correlation of ranks, ties sharing their mean rank; NaN as for `pearson`.
        sign: Share of items with the same sign on both sides; 0 is a sign of its own, which only 0 shares.
        slope: Of the least-squares line through the origin, exact on estimate: above 1, the estimate is too small.
        error: Sum of |estimate - exact| over sum of |exact|. 0: equal; 1: as far off as an estimate of 0 for every
            item; infinite where all exact values are 0 and an estimate is not.
        overlap: For each k below `n`, the share of the k largest by |exact| that are also among the k largest by
            |estimate|. Items tied at the cut share the places left evenly, so that their order does not matter.
    """

    n: int
    pearson: float
    spearman: float
    sign: float
    slope: float
    error: float
    overlap: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """How far off the estimates of one layer are.

    Attributes:
        layer: Its number.
        n: Items compared in it.
        error: As in `Agreement`, over this layer's items.
    """

    layer: int
    n: int
    error: float


def agreement(estimate: Floats, exact: Floats, *, overlap_at: Sequence[int] = OVERLAP_AT) -> Agreement:
    """How far estimates agree with exact values of the same items.

    Multiplying both sides by one positive number changes nothing, however small the values become.

    Args:
        estimate: Estimated effects, shape `(item,)`.
        exact: Measured effects, same shape and unit.
        overlap_at: The numbers k of largest items to compare; those that are not smaller than the number of items are
            left out, for there the overlap is 1 whatever the estimate.

    Raises:
        ValueError: the shapes differ, a value is not finite, or a k is below 1.

    Source:
        Spearman 1904 (doi:10.2307/1412159) for the correlation of ranks; the choice of figures is ours.
    """
    _check(estimate, exact)
    if min(overlap_at, default=1) < 1:
        raise ValueError(f"cannot compare the {min(overlap_at)} largest items: overlap_at needs numbers of at least 1")
    n = len(exact)
    return Agreement(
        n=n,
        pearson=_correlation(estimate, exact),
        spearman=_correlation(rankdata(estimate), rankdata(exact)),
        sign=float((np.sign(estimate) == np.sign(exact)).mean()) if n else float("nan"),
        slope=_slope(estimate, exact),
        error=float(_errors(estimate, exact, np.zeros(n, dtype=np.intp))[0]),
        overlap={k: float(_largest(estimate, k) @ _largest(exact, k)) / k for k in overlap_at if k < n},
    )


def is_poor(found: Agreement) -> bool:
    """Whether an estimate is too poor to rank by, judged on a uniform random sample of items.

    Poor is a rank correlation below `LEAST_SPEARMAN`, a share of equal signs below `LEAST_SIGN`, or, with three items
    or more, a rank correlation that is undefined because one side is constant. Fewer items are never called poor: they
    are too few to tell.
    """
    return found.n >= LEAST_CORRELATED and not (found.spearman >= LEAST_SPEARMAN and found.sign >= LEAST_SIGN)


def poor_layers(estimate: Floats, exact: Floats, layers: Indices, *, most_error: float) -> tuple[LayerError, ...]:
    """Layers whose estimates are further off than allowed, worst first; equally bad ones from the bottom up.

    Args:
        estimate: Estimated effects, shape `(item,)`.
        exact: Measured effects, same shape and unit.
        layers: Each item's layer, same shape, in any order.
        most_error: The largest `error` that is not reported.

    Returns:
        Those of at least `LEAST_IN_LAYER` items; a layer that is 0 on both sides has no error and is not among them.

    Raises:
        ValueError: the shapes differ, or a value is not finite.
    """
    _check(estimate, exact)
    if layers.shape != exact.shape:
        raise ValueError(f"layers of shape {layers.shape} for values of shape {exact.shape}: give each item its layer")
    numbers, members = np.unique(layers, return_inverse=True)
    counts, errors = np.bincount(members, minlength=1), _errors(estimate, exact, members)
    poor = np.flatnonzero((counts >= LEAST_IN_LAYER) & (errors > most_error))
    worst_first = poor[np.argsort(-errors[poor], kind="stable")]
    return tuple(
        LayerError(layer=int(numbers[place]), n=int(counts[place]), error=float(errors[place])) for place in worst_first
    )


def missed_at_most(*, n_rest: int, n_sampled: int, n_found: int, confidence: float = 0.95) -> int:
    """How many items above a threshold the unmeasured rest can hold at most, by a random sample of it.

    Had the rest held more, so few of them would have been in the sample with probability `1 - confidence` at most. That
    is exact for every size, without any approximation, as long as the sample is uniform and without replacement, and
    the threshold was set without looking at it.

    Args:
        n_rest: Items from which the sample was drawn: all that are not in the list that was measured anyway.
        n_sampled: Items drawn and measured.
        n_found: Those of the sample that lie above the threshold.
        confidence: Least probability, over the draw, that the bound holds.

    Returns:
        Upper bound on the number above the threshold that were not drawn; those in the sample are known, hence not
        missed. `n_rest` if nothing was drawn, 0 if everything was.

    Raises:
        ValueError: the counts do not nest, or the confidence does not lie between 0 and 1.

    Source:
        One-sided interval of Clopper and Pearson 1934 (doi:10.1093/biomet/26.4.404) with the hypergeometric in place of
        the binomial distribution; one-sided intervals of this kind: Wang 2015 (doi:10.1080/01621459.2014.966191).
    """
    if not 0 <= n_found <= n_sampled <= n_rest:
        raise ValueError(
            f"found {n_found} in a sample of {n_sampled} out of {n_rest}: needs 0 <= n_found <= n_sampled <= n_rest"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence}: needs a probability between 0 and 1, such as 0.95")
    fewest, most = n_found, n_rest - (n_sampled - n_found)  # what the sample leaves possible
    while fewest < most:  # the probability falls as the number above the threshold grows
        middle = (fewest + most + 1) // 2
        if hypergeometric.cdf(n_found, n_rest, middle, n_sampled) > (1 - confidence) * (1 + _ROUNDING):
            fewest = middle
        else:
            most = middle - 1
    return fewest - n_found


def _check(estimate: Floats, exact: Floats) -> None:
    if estimate.shape != exact.shape or exact.ndim != 1:
        raise ValueError(
            f"estimates of shape {estimate.shape} for exact values of shape {exact.shape}: needs one of each per item"
        )
    n_broken = int((~(np.isfinite(estimate) & np.isfinite(exact))).sum())
    if n_broken:
        raise ValueError(f"{n_broken} of {len(exact)} items are not finite: leave them out, and say so")


def _correlation(first: Floats, second: Floats) -> float:
    if len(first) < LEAST_CORRELATED or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return min(1.0, max(-1.0, float(_direction(first) @ _direction(second))))


def _direction(values: Floats) -> Floats:
    """Deviations from the mean, scaled to length 1 in two steps so that the squares of tiny ones are not 0."""
    deviations = values - values.mean()
    deviations /= np.abs(deviations).max()
    unit: Floats = deviations / np.linalg.norm(deviations)
    return unit


def _slope(estimate: Floats, exact: Floats) -> float:
    size = float(np.abs(estimate).max(initial=0.0))
    if size == 0:
        return float("nan")
    scaled = estimate / size
    return float(scaled @ exact) / float(scaled @ scaled) / size


def _errors(estimate: Floats, exact: Floats, groups: Indices) -> Floats:
    """Sum of |estimate - exact| over sum of |exact| in each group, shape `(group,)`; at least one group."""
    off = np.bincount(groups, weights=np.abs(estimate - exact), minlength=1)
    size = np.bincount(groups, weights=np.abs(exact), minlength=1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        errors: Floats = off / size
    return errors


def _largest(values: Floats, k: int) -> Floats:
    """Each item's share of a place among the k largest by size, shape `(item,)`: 1, 0, or between for ties at the cut.

    Shares add up to k.
    """
    sizes = np.abs(values)
    cut = np.partition(sizes, len(sizes) - k)[len(sizes) - k]
    above, tied = sizes > cut, sizes == cut
    shares: Floats = above + tied * ((k - above.sum()) / tied.sum())
    return shares
