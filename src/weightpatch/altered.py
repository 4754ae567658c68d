"""Pairs whose specialized weights are altered as they are read, tensor by tensor: nothing more is held in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from weightpatch.pair import ModelPair
from weightpatch.streaming import streamed

Alter = Callable[[str, Tensor, Tensor], Tensor]
"""From a parameter's name, the base's and the specialized model's, what is to stand for the latter."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _AlteredSource:
    """The specialized weights, altered; a `Source`.

    Attributes:
        pair: The true pair.
        alter: How; it must not write into what it is given.
    """

    pair: ModelPair
    alter: Alter
    config: None = field(default=None, init=False)
    generation_config: None = field(default=None, init=False)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape."""
        return self.pair.architecture.parameters

    def tensor(self, name: str) -> Tensor:
        """One parameter."""
        ours = self.pair.base.get_parameter(name).detach().cpu()
        return self.alter(name, ours, self.pair.specialized_weight(name).detach().cpu())


def altered(pair: ModelPair, alter: Alter) -> ModelPair:
    """The pair with a specialized model whose weights are altered whenever they are read.

    Args:
        pair: The true pair.
        alter: How; it must not write into what it is given.
    """
    return pair.with_models(pair.base, streamed(pair.base, _AlteredSource(pair=pair, alter=alter)))
