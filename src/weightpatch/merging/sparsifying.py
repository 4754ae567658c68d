"""Which entries of a difference are kept: by size, at random, or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from weightpatch.errors import MergeError

Kind = Literal["none", "trim", "drop", "magprune", "breadcrumbs"]
"""`trim`: the largest are kept (TIES, arXiv:2306.01708); `drop`: each is kept with one probability (DARE,
arXiv:2311.03099); `magprune`: with one that grows with its rank in its row (DELLA, arXiv:2406.11617); `breadcrumbs`:
the largest but for outliers (arXiv:2312.06795)."""
Rescale = Literal["none", "inverse", "l1"]
"""`inverse`: every entry over its probability of being kept, as DARE and DELLA are published; `l1`: the whole so that
the sum of sizes is what it was, as mergekit does."""
Scope = Literal["tensor", "model"]
"""What `trim` ranks together: each tensor, as mergekit does, or the whole model, as TIES is published."""
Draw = Callable[[Tensor], Tensor]
"""Probabilities -> what is kept, of the same shape, bool."""

_LEAST = 1e-7


@dataclass(frozen=True, kw_only=True)
class Sparsifier:
    """How a difference is thinned out.

    Attributes:
        kind: Which entries stay.
        density: Share of entries that stay.
        rescale: Whether what stays grows for what goes.
        gamma: Of `breadcrumbs`: share of the largest entries that go as outliers.
        epsilon: Of `magprune`: the probability of being kept runs from density - epsilon to density + epsilon.
        over: What `trim` ranks together.
    """

    kind: Kind = "none"
    density: float = 1.0
    rescale: Rescale = "none"
    gamma: float = 0.01
    epsilon: float = 0.15
    over: Scope = "tensor"

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            MergeError: an unknown name, or a number outside of its range.
        """
        named = (("kind", self.kind, Kind), ("rescale", self.rescale, Rescale), ("over", self.over, Scope))
        for name, value, known in named:
            if value not in get_args(known):
                raise MergeError(
                    f"unknown {name} {value!r} of a sparsifier. Choose one of {', '.join(get_args(known))}."
                )
        if self.over == "model" and self.kind != "trim":
            raise MergeError(f"{self.kind} goes tensor by tensor; only trim can rank a whole model.")
        if not 0 < self.density <= 1:
            raise MergeError(f"density {self.density} is no share of entries to keep. Give one above 0 and at most 1.")
        if not 0 <= self.gamma < 1:
            raise MergeError(f"gamma {self.gamma} is no share of outliers. Give one from 0 to below 1.")
        lowest, highest = self.density - self.epsilon, self.density + self.epsilon
        if self.kind == "magprune" and self.density < 1 and not (0 < lowest <= highest < 1):
            raise MergeError(
                f"density {self.density} -+ epsilon {self.epsilon} runs from {lowest:.3g} to {highest:.3g}; both "
                "have to lie between 0 and 1. Give a smaller epsilon."
            )
        if self.rescale == "inverse" and self.kind not in ("none", "drop", "magprune"):
            raise MergeError(f"{self.kind} keeps nothing at random, so there is no probability to divide by.")


def sparsify(change: Tensor, how: Sparsifier, *, draw: Draw, threshold: float | None = None) -> Tensor:
    """Set entries of a difference to 0.

    Args:
        change: The difference, any shape; float32.
        how: Which entries, and whether the others grow.
        draw: Decides where chance does.
        threshold: Of `trim`: the least size that is kept, instead of the one that the density gives in this tensor.

    Returns:
        The same shape; a new tensor, or the given one where nothing changes.
    """
    if how.kind == "none" or change.numel() == 0 or (how.density >= 1 and threshold is None):
        return change
    match how.kind:
        case "trim":
            kept = change.abs() >= threshold if threshold is not None else _largest(change, max(1, _share(change, how)))
            return _rescaled(change, change * kept, how)
        case "breadcrumbs":
            return _rescaled(change, change * _without_outliers(change, how), how)
    probabilities = _probabilities(change, how)
    left = change * draw(probabilities)
    return left / probabilities if how.rescale == "inverse" else _rescaled(change, left, how)


def _share(change: Tensor, how: Sparsifier) -> int:
    return int(how.density * change.numel())


def _largest(change: Tensor, n_kept: int) -> Tensor:
    """The n largest entries by size; of those that tie at the edge, the first in memory."""
    sizes = change.abs().reshape(-1)
    if n_kept >= len(sizes):
        return torch.ones_like(change, dtype=torch.bool)
    edge = sizes.kthvalue(len(sizes) - n_kept + 1).values
    above = sizes > edge
    tied = sizes == edge
    left = n_kept - above.sum()
    return (above | (tied & (tied.cumsum(dim=0) <= left))).reshape(change.shape)


def _without_outliers(change: Tensor, how: Sparsifier) -> Tensor:
    """As many as the density says, the largest but for the outliers, of which fewer go where too few were left."""
    n_kept, n_entries = _share(change, how), change.numel()
    n_outliers = min(int(how.gamma * n_entries), n_entries - n_kept)
    if n_kept == 0:
        return torch.zeros_like(change, dtype=torch.bool)
    both = _largest(change, n_kept + n_outliers)
    return both & ~_largest(change, n_outliers) if n_outliers else both


def _probabilities(change: Tensor, how: Sparsifier) -> Tensor:
    if how.kind == "drop":
        return torch.full_like(change, how.density)
    rows = change.abs().reshape(1, -1) if change.ndim < 2 else change.abs()
    ranks = rows.argsort(dim=1, stable=True).argsort(dim=1).to(change.dtype)
    span = max(rows.shape[1] - 1, 1)
    return (how.density - how.epsilon + ranks / span * 2 * how.epsilon).reshape(change.shape)


def _rescaled(whole: Tensor, left: Tensor, how: Sparsifier) -> Tensor:
    if how.rescale != "l1":
        return left
    before, after = whole.abs().sum(), left.abs().sum()
    return left if before < _LEAST or after < _LEAST else left * (before / after)
