"""A null for effects: the same pair with the difference of the weights shuffled within each tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightpatch.pair import ModelPair
from weightpatch.streaming import streamed


@dataclass(frozen=True, kw_only=True, eq=False)
class _ShuffledSource:
    """Base plus the shuffled difference, tensor by tensor; a `Source`.

    Attributes:
        pair: The true pair.
        seed: Of the shuffles; each tensor has its own.
    """

    pair: ModelPair
    seed: int
    config: None = field(default=None, init=False)
    generation_config: None = field(default=None, init=False)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape."""
        return self.pair.architecture.parameters

    def tensor(self, name: str) -> Tensor:
        """One parameter."""
        ours = self.pair.base.get_parameter(name).detach().cpu()
        change = self.pair.specialized_weight(name).cpu() - ours
        if not change.any():
            return ours
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        order = torch.randperm(change.numel(), generator=generator)
        return ours + change.flatten()[order].view_as(change)


def shuffled(pair: ModelPair, *, seed: int = 0) -> ModelPair:
    """The pair with a specialized model that differs as much in every tensor, but at other places.

    Each tensor's difference keeps its numbers, hence its norm, mean and outliers, and loses what it means. Differences
    of heads and neurons mix within their tensor. The weights are shuffled again whenever they are read, so that nothing
    is held in memory.

    Args:
        pair: The true pair.
        seed: Of the shuffles.
    """
    return pair.with_models(pair.base, streamed(pair.base, _ShuffledSource(pair=pair, seed=seed)))
