"""From the differences of several experts to one: coefficients, sparsifiers, sign election, average."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from weightpatch.errors import MergeError
from weightpatch.merging.sparsifying import Draw, Sparsifier, sparsify

Election = Literal["none", "weighted", "unweighted"]
"""Where experts pull an entry both ways, only those on the side of the sum count. `weighted`: the sum of what would be
added, as in mergekit; `unweighted`: the sum of the differences, as in the TIES paper."""
Average = Literal["none", "all", "kept"]
"""What the sum is divided by, entry by entry: nothing, all coefficients, or those of experts that add something."""

_LEAST = 1e-8


@dataclass(frozen=True, kw_only=True)
class Method:
    """How experts' differences become one.

    Attributes:
        sparsifier: What of each difference stays.
        election: Whether experts vote on signs.
        average: What the sum is divided by.
        scale: What the sum is multiplied by in the end (`lambda`).
    """

    sparsifier: Sparsifier = field(default_factory=Sparsifier)
    election: Election = "none"
    average: Average = "none"
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check names and scale.

        Raises:
            MergeError: an unknown name, or a scale that is no number.
        """
        if not math.isfinite(self.scale):
            raise MergeError(f"scale {self.scale} is no number to multiply by. Give one such as 0.7.")
        for name, value, known in (("election", self.election, Election), ("average", self.average, Average)):
            if value not in get_args(known):
                raise MergeError(f"unknown {name} {value!r} of a merge. Choose one of {', '.join(get_args(known))}.")


METHODS: Mapping[str, Method] = {
    "task-arithmetic": Method(),
    "ties": Method(sparsifier=Sparsifier(kind="trim", density=0.2), election="weighted", average="kept"),
    "dare-linear": Method(sparsifier=Sparsifier(kind="drop", density=0.5, rescale="inverse")),
    "dare-ties": Method(sparsifier=Sparsifier(kind="drop", density=0.5, rescale="inverse"), election="weighted"),
    "della": Method(
        sparsifier=Sparsifier(kind="magprune", density=0.5, rescale="l1"), election="weighted", average="kept"
    ),
    "della-linear": Method(sparsifier=Sparsifier(kind="magprune", density=0.5, rescale="l1")),
    "breadcrumbs": Method(sparsifier=Sparsifier(kind="breadcrumbs", density=0.9)),
    "localize-and-stitch": Method(sparsifier=Sparsifier(kind="trim", density=0.05), average="kept"),
}
"""Name -> what it does; `dataclasses.replace` changes a part. Localize-and-Stitch (arXiv:2408.13656) in its dataless
form; like TIES it is published with one threshold for a whole model: `over="model"` of its sparsifier."""


def method_of(name: str) -> Method:
    """A method by its name.

    Raises:
        MergeError: there is none.
    """
    if name not in METHODS:
        raise MergeError(f"unknown method {name!r}. Choose one of {', '.join(METHODS)}.")
    return METHODS[name]


def combine(
    base: Tensor,
    changes: Iterable[Tensor],
    coefficients: Sequence[Tensor],
    method: Method,
    *,
    draws: Sequence[Draw],
    thresholds: Sequence[float | None] | None = None,
) -> Tensor:
    """One merged tensor: base + scale * sum_i c_i S(d_i), with the method's election and average.

    Coefficients of 0 take their entries out before anything is sparsified: ranks, shares and norms are those of what is
    selected. Election and average go entry by entry, so an expert has no vote where its coefficient is 0.

    Args:
        base: The base's tensor, float32.
        changes: Each expert's tensor minus the base's, same shape; taken one after the other.
        coefficients: Each expert's: a single number, or one along one axis (shape `(rows, 1)` or `(1, columns)`, as
            `broadcast` would have it).
        method: How.
        draws: Of each expert, for what is left to chance; see `seeded_draw`.
        thresholds: Of each expert, for `trim` over more than this tensor; None: by its density in this tensor.

    Returns:
        The merged tensor, the base's shape and dtype.

    Raises:
        MergeError: shapes that do not fit, or coefficients that vary along two axes.
    """
    if method.election == "none" and method.average != "kept":  # expert by expert, in place: nothing else is held
        total = torch.zeros_like(base)
        every = zip(changes, coefficients, draws, thresholds or [None] * len(draws), strict=True)
        for change, coefficient, draw, threshold in every:
            left = thin([change], [coefficient], method, draws=[draw], thresholds=[threshold])[0]
            total.addcmul_(left, coefficient.to(left.dtype))
        if method.average == "all":
            total /= _all(coefficients, base)
        return total.mul_(method.scale).add_(base)
    thinned = thin(changes, coefficients, method, draws=draws, thresholds=thresholds)
    parts = [coefficient * left for coefficient, left in zip(coefficients, thinned, strict=True)]
    if method.election != "unweighted":
        thinned.clear()
    if method.election != "none":
        votes = parts if method.election == "weighted" else thinned
        elected = torch.where(sum(votes, torch.zeros_like(base)) >= 0, 1.0, -1.0)
        parts = [part * (vote.sign() == elected) for part, vote in zip(parts, votes, strict=True)]
    total = sum(parts, torch.zeros_like(base))
    if method.average == "all":
        total = total / _all(coefficients, base)
    elif method.average == "kept":
        divisor = sum((c * (part != 0) for c, part in zip(coefficients, parts, strict=True)), torch.zeros_like(base))
        total = total / torch.where(divisor == 0, 1.0, divisor)
    return base + method.scale * total


def _all(coefficients: Sequence[Tensor], base: Tensor) -> Tensor:
    """The sum of all coefficients, entry by entry; 1 where it is nothing that could be divided by."""
    total = sum((one.expand_as(base) for one in coefficients), torch.zeros_like(base))
    return torch.where(total.abs() < _LEAST, 1.0, total)


def thin(
    changes: Iterable[Tensor],
    coefficients: Sequence[Tensor],
    method: Method,
    *,
    draws: Sequence[Draw],
    thresholds: Sequence[float | None] | None = None,
) -> list[Tensor]:
    """What the method's sparsifier leaves of each difference, where its coefficient is not 0; arguments as `combine`.

    Raises:
        MergeError: shapes that do not fit, or coefficients that vary along two axes.
    """
    return [
        _within(change, coefficient, partial(sparsify, how=method.sparsifier, draw=draw, threshold=threshold))
        for change, coefficient, draw, threshold in zip(
            changes, coefficients, draws, thresholds or [None] * len(coefficients), strict=True
        )
    ]


def check_fit(coefficient: Sequence[int], shape: Sequence[int]) -> None:
    """Check that coefficients can be multiplied by a tensor, and vary along one of its axes at most.

    Args:
        coefficient: Their shape.
        shape: Of the tensor.

    Raises:
        MergeError: they cannot.
    """
    ends = zip(reversed(coefficient), reversed(shape), strict=False)
    fits = len(coefficient) <= len(shape) and all(own in (1, length) for own, length in ends)
    if not fits or sum(length > 1 for length in coefficient) > 1:
        raise MergeError(
            f"coefficients of shape {tuple(coefficient)} do not fit a tensor of shape {tuple(shape)}: give one number, "
            "or one along a single axis."
        )


def _within(change: Tensor, coefficient: Tensor, leave: partial[Tensor]) -> Tensor:
    """A difference thinned out where its coefficient is not 0, and 0 elsewhere."""
    check_fit(coefficient.shape, change.shape)
    axes = [axis for axis, length in enumerate(coefficient.shape) if length > 1]
    chosen = coefficient.reshape(-1) != 0
    if bool(chosen.all()):
        return leave(change)
    left = torch.zeros_like(change)
    if not axes or not bool(chosen.any()):
        return left
    axis = axes[0] - coefficient.ndim + change.ndim
    places = chosen.nonzero()[:, 0]
    return left.index_copy_(axis, places, leave(change.index_select(axis, places)))


def seeded_draw(seed: int, expert: str, tensor: str) -> Draw:
    """Chance that depends on these three alone, so that a merge is the same in whatever order tensors come.

    Args:
        seed: Of the merge.
        expert: Name of the expert.
        tensor: Name of the tensor.
    """
    digest = hashlib.sha256(f"{seed}\0{expert}\0{tensor}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def draw(probabilities: Tensor) -> Tensor:
        numbers = torch.rand(probabilities.shape, generator=generator)
        return numbers.to(probabilities.device) < probabilities

    return draw
