"""Plants whose carriers are taken out: pairs with distractors and drift, and nothing that carries the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from weightpatch.component import Component, Slice, slices
from weightpatch.pair import ModelPair
from weightpatch.streaming import streamed


@dataclass(frozen=True, kw_only=True, eq=False)
class _EmptiedSource:
    """The specialized weights with the base's in some places, tensor by tensor; a `Source`.

    Attributes:
        pair: The true pair.
        pieces: Parameter -> what is the base's there.
    """

    pair: ModelPair
    pieces: Mapping[str, Sequence[Slice]]
    config: None = field(default=None, init=False)
    generation_config: None = field(default=None, init=False)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape."""
        return self.pair.architecture.parameters

    def tensor(self, name: str) -> Tensor:
        """One parameter."""
        theirs = self.pair.specialized_weight(name).detach().cpu().clone()
        ours = self.pair.base.get_parameter(name).detach().cpu()
        for piece in self.pieces.get(name, ()):
            piece.of(theirs).copy_(piece.of(ours))
        return theirs


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
    return pair.with_models(pair.base, streamed(pair.base, _EmptiedSource(pair=pair, pieces=pieces)))
