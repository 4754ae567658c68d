"""Plants whose carriers are taken out: pairs with distractors and drift, and nothing that carries the task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from weightpatch.altered import altered
from weightpatch.component import Component, Slice, slices
from weightpatch.pair import ModelPair


def emptied(pair: ModelPair, taken_out: Sequence[Component]) -> ModelPair:
    """The pair with a specialized model that has the base's weights in some components.

    Args:
        pair: The true pair.
        taken_out: The components.
    """
    pieces: dict[str, list[Slice]] = {}
    for component in taken_out:
        for piece in slices(pair.architecture, component):
            pieces.setdefault(piece.parameter, []).append(piece)

    def empty(name: str, ours: Tensor, theirs: Tensor) -> Tensor:
        left = theirs.clone()
        for piece in pieces.get(name, ()):
            piece.of(left).copy_(piece.of(ours))
        return left

    return altered(pair, empty)
