"""The size above which a share of all entries of a model lies, exactly, in two passes and little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_HALF_BITS = 16
_N_BINS = 1 << _HALF_BITS


def find_threshold(entries: Callable[[], Iterator[Tensor]], share: float) -> float:
    """The least size among the largest entries.

    Sizes of float32 numbers are ordered as their bits are, so that a histogram of the upper half of the bits says in
    which bin the threshold lies, and one of the lower half within that bin says where.

    Args:
        entries: Goes through all entries, part by part, float32; called twice.
        share: Of the entries that are kept; at least one is.

    Returns:
        The size; infinity where there is no entry.
    """
    upper = torch.zeros(_N_BINS, dtype=torch.long)
    for part in entries():
        upper += torch.bincount(_bits(part) >> _HALF_BITS, minlength=_N_BINS).cpu()
    total = int(upper.sum())
    if not total:
        return float("inf")
    wanted = max(1, int(share * total))
    bin_, above = _place(upper, wanted)
    lower = torch.zeros(_N_BINS, dtype=torch.long)
    for part in entries():
        bits = _bits(part)
        inside = bits[bits >> _HALF_BITS == bin_] & (_N_BINS - 1)
        lower += torch.bincount(inside, minlength=_N_BINS).cpu()
    rest, _ = _place(lower, wanted - above)
    return float(torch.tensor(bin_ << _HALF_BITS | rest, dtype=torch.int32).view(torch.float32))


def _bits(part: Tensor) -> Tensor:
    return part.float().abs().reshape(-1).contiguous().view(torch.int32)


def _place(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the entry of a rank from above, and how many entries lie in the bins above it."""
    down = counts.flip(0).cumsum(0)
    place = int((down < wanted).sum())
    return len(counts) - 1 - place, int(down[place - 1]) if place else 0
