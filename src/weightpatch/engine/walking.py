"""Patching many sets of components one after another: only what changes from one set to the next is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor

from weightpatch.component import Component, slices
from weightpatch.errors import ComponentError
from weightpatch.pair import ModelPair

_NOBODY = -1
Write = Callable[[frozenset[int]], None]
"""Puts the specialized weights of these components, by their places, into the base, and takes all others' out."""


@contextmanager
def walking(pair: ModelPair, components: Sequence[Component]) -> Iterator[Write]:
    """The base, ready to be patched with one set of components after another; restored bit for bit on leaving.

    Args:
        pair: The two models. Both sides of all that the components own are in memory as long as the block lasts.
        components: What sets consist of.

    Raises:
        ComponentError: two components that share weights.
    """
    owned: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in components]
    pieces = [(place, piece) for place, one in enumerate(components) for piece in slices(pair.architecture, one)]
    pieces.sort(key=lambda found: found[1].parameter)  # so that a streamed layer is read once
    for name, group in groupby(pieces, key=lambda found: found[1].parameter):
        ours, theirs = pair.base.get_parameter(name).data, pair.specialized_weight(name).detach()
        owner = torch.full(ours.shape, _NOBODY, dtype=torch.int32)
        for place, piece in group:
            taken = piece.of(owner)
            others = taken[(taken != _NOBODY) & (taken != place)]
            if len(others):
                raise ComponentError(
                    f"{components[int(others[0])]} and {components[place]} share weights ({name}). In company every "
                    "weight belongs to one component: name units that do not overlap, for example heads,kvs,mlps."
                )
            taken.fill_(place)
            target = piece.of(ours)
            owned[place].append((target, target.clone(), piece.of(theirs).clone()))
    now: set[int] = set()

    def write(wanted: frozenset[int]) -> None:
        with torch.no_grad():
            for place in now - wanted:
                for target, ours, _ in owned[place]:
                    target.copy_(ours)
            for place in wanted - now:
                for target, _, theirs in owned[place]:
                    target.copy_(theirs)
        now.clear()
        now.update(wanted)

    try:
        yield write
    finally:
        write(frozenset())
