"""Intervals and ratios that every score comes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm as normal
from scipy.stats import t as student_t

from weightpatch.errors import NoGapError

Floats = NDArray[np.float64]

N_RESAMPLES = 2000
LEVEL = 0.95
REAL_GAP = 0.1
"""A prompt's own gap counts in the mean of ratios from this share of the mean gap on (our choice)."""

_CHUNK = 4096
_Z = 1.959963984540054  # the normal quantile that leaves 2.5 % on either side


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its 95 % interval; NaN bounds where there is too little to tell."""

    estimate: float
    low: float
    high: float

    @property
    def contains_zero(self) -> bool:
        """Whether 0 lies within the bounds; unknown bounds count as containing it."""
        return not (self.low > 0 or self.high < 0)


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Fractions of the base-to-specialized gap that each patch closes. Shapes `(component,)`.

    Attributes:
        ratio: Ratio of means: 0, the patch changed nothing; 1, it alone reproduces the specialized model. Not clipped.
        low: Lower end of its bootstrap 95 % interval over queries; NaN with fewer than two.
        high: Upper end.
        mean_of_ratios: Mean over prompts with a real gap of each prompt's own ratio.
    """

    ratio: Floats
    low: Floats
    high: Floats
    mean_of_ratios: Floats


def mean_interval(values: Floats, *, groups: Sequence[str] | None = None) -> Interval:
    """Mean of values, shape `(prompt,)`, with Student's t 95 % interval.

    Args:
        values: One to a prompt.
        groups: What each prompt shares with others (its base query); a group counts as one observation. None: nothing.

    Returns:
        The mean over prompts; NaN bounds with fewer than two groups.
    """
    means = _group_weights(len(values), groups) @ values
    estimate, n = float(values.mean()), len(means)
    if n < 2:
        return Interval(estimate=estimate, low=float("nan"), high=float("nan"))
    half = float(student_t.ppf((1 + LEVEL) / 2, n - 1) * means.std(ddof=1) / n**0.5)
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half)


def check_gap(gap: Floats, *, groups: Sequence[str] | None = None) -> Interval:
    """The mean gap with its interval.

    Args:
        gap: Specialized minus base readout, shape `(prompt,)`.
        groups: As in `mean_interval`.

    Raises:
        NoGapError: the interval contains 0, the gap of a single prompt is 0, or a readout is no number.
    """
    if odd := int((~np.isfinite(gap)).sum()):
        raise NoGapError(
            f"{odd} of {len(gap)} prompts read NaN or infinite numbers, so there is no gap. Run in float32 or bfloat16 "
            "(--dtype)."
        )
    interval = mean_interval(gap, groups=groups)
    if (interval.contains_zero and not np.isnan(interval.low)) or interval.estimate == 0:
        raise NoGapError(
            f"the two models do not differ measurably in this readout: mean gap {interval.estimate:.4g}, 95 % interval "
            f"{interval.low:.4g} to {interval.high:.4g} over {len(gap)} prompts. A recovery would divide by noise. "
            "Choose another anchor layer, an anchor fitted on this behaviour, or more prompts."
        )
    return interval


def recovery(
    effects: Floats, gap: Floats, *, groups: Sequence[str] | None = None, seed: int = 0, is_positive: bool = False
) -> Recovery:
    """Fraction of the base-to-specialized gap that each patch closes.

    Args:
        effects: Patched minus recipient readout, shape `(component, prompt)`, in the readout's unit.
        gap: Specialized minus base readout, shape `(prompt,)`, same unit.
        groups: What each prompt shares with others (its base query); groups are resampled as a whole.
        seed: Of the bootstrap; every component sees the same resamples.
        is_positive: Whether the gap cannot be negative, like a divergence, so that its interval need not leave out 0.

    Returns:
        Ratios of means with intervals, and means of ratios.

    Raises:
        NoGapError: the gap's 95 % interval contains 0.

    Source:
        Our reading of E_w in Sun et al. 2026 (arXiv:2604.13694); ranking by the ratio of means is our choice.
        Intervals: expanded percentile bootstrap (Hesterberg 2015, doi:10.1080/00031305.2015.1089789), wider for few
        prompts.
    """
    mean_gap = float(gap.mean()) if is_positive else check_gap(gap, groups=groups).estimate
    ratio = effects.mean(axis=1) / mean_gap
    real = gap / mean_gap >= REAL_GAP
    mean_of_ratios = (effects[:, real] / gap[real]).mean(axis=1)
    low, high = np.full_like(ratio, np.nan), np.full_like(ratio, np.nan)
    members = _group_weights(len(gap), groups)
    if len(members) > 1:
        sizes = (members > 0).sum(axis=1)
        draws = np.random.default_rng(seed).multinomial(
            len(members), np.full(len(members), 1 / len(members)), size=N_RESAMPLES
        )
        weights = (draws * sizes) @ members  # prompts in each resample: a group's sum is its size times its mean
        gaps = weights @ gap
        for start in range(0, len(effects), _CHUNK):
            part = slice(start, start + _CHUNK)
            low[part], high[part] = np.quantile(weights @ effects[part].T / gaps[:, None], _tails(len(members)), axis=0)
    return Recovery(ratio=ratio, low=low, high=high, mean_of_ratios=mean_of_ratios)


def pass_rate(n_passed: int, n: int) -> Interval:
    """Share of passes with its Wilson 95 % interval; NaN throughout when nothing was judged."""
    if n == 0:
        return Interval(estimate=float("nan"), low=float("nan"), high=float("nan"))
    z, share = _Z, n_passed / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return Interval(estimate=share, low=max(0.0, centre - half), high=min(1.0, centre + half))


def orientation(gap: Floats) -> int:
    """1, or -1 where the specialized model reads lower: what turns effects into the gap's direction."""
    return 1 if float(gap.mean()) >= 0 else -1


def area_under_curve(positive: Floats, negative: Floats) -> float:
    """Probability that a positive lies above a negative, ties half (AUC of the ROC curve)."""
    above = (positive[:, None] > negative[None, :]).mean()
    return float(above + 0.5 * (positive[:, None] == negative[None, :]).mean())


def _tails(n: int) -> tuple[float, float]:
    """Quantiles of the bootstrap between which an interval lies: further out than 2.5 % and 97.5 % for few groups."""
    low = float(normal.cdf(-((n / (n - 1)) ** 0.5) * student_t.ppf((1 + LEVEL) / 2, n - 1)))
    return low, 1 - low


def _group_weights(n_prompts: int, groups: Sequence[str] | None) -> Floats:
    """Means within groups as a matrix, shape `(group, prompt)`; rows add up to 1."""
    if groups is None:
        return np.eye(n_prompts)
    names = list(dict.fromkeys(groups))
    members = np.array([[float(name == group) for group in groups] for name in names])
    shares: Floats = members / members.sum(axis=1, keepdims=True)
    return shares
