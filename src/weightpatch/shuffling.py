"""A null for effects: the same pair with the difference of the weights shuffled within each tensor."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from weightpatch.altered import altered
from weightpatch.pair import ModelPair


def shuffled(pair: ModelPair, *, seed: int = 0) -> ModelPair:
    """The pair with a specialized model that differs as much in every tensor, but at other places.

    Each tensor's difference keeps its numbers, hence its norm, mean and outliers, and loses what it means. Differences
    of heads and neurons mix within their tensor. The weights are shuffled again whenever they are read, so that nothing
    is held in memory.

    Args:
        pair: The true pair.
        seed: Of the shuffles.
    """

    def shuffle(name: str, ours: Tensor, theirs: Tensor) -> Tensor:
        change = theirs - ours
        if not change.any():
            return ours
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        order = torch.randperm(change.numel(), generator=generator)
        return ours + change.flatten()[order].view_as(change)

    return altered(pair, shuffle)
