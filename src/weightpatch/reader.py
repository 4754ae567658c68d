"""How token sequences are read, as engines need to know it: where, and what number comes of what is found there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from weightpatch.architecture import embedding_weight, family_of

Score = Callable[[int, Tensor], Tensor]
"""Sequence and what was found at its places, `(..., position, feature)` -> `(...)`, float64, on the CPU."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reader:
    """A readout prepared for given sequences of tokens.

    Attributes:
        layer: The residual stream that enters this layer is read; `n_layers`: what leaves the last one.
        places: For each sequence the positions that are read, from its start.
        score: What the readout is, of residuals, or of logits where it is read through the head.
        through_head: Whether the last norm and the output head stand between the residual stream and the score.
        is_alike: Whether every sequence has as many places and is scored alike; never through the head.
    """

    layer: int
    places: tuple[tuple[int, ...], ...]
    score: Score
    through_head: bool = False
    is_alike: bool = False

    def read(self, model: PreTrainedModel, sequence: int, residual: Tensor) -> Tensor:
        """Readout of residuals at a sequence's places: `(row, position, feature)` -> `(row,)`, float64, on the CPU."""
        return self.score(sequence, logits_of(model, residual) if self.through_head else residual)

    def read_all(
        self, model: PreTrainedModel, rows: Tensor, index: Sequence[Tensor], sequences: Sequence[int]
    ) -> Tensor:
        """Readouts of several sequences that share rows.

        Args:
            model: Whose head is used.
            rows: Residuals, shape `(row, read, feature)`.
            index: For each sequence, its places among these, shape `(position,)`.
            sequences: Their numbers.

        Returns:
            Shape `(row, sequence)`, float64, on the CPU.
        """
        if self.is_alike:
            return self.score(sequences[0], rows.cpu()[:, torch.stack([*index])])
        found = [
            self.read(model, sequence, rows[:, own.to(rows.device)])
            for own, sequence in zip(index, sequences, strict=True)
        ]
        return torch.stack(found, dim=1)

    def gradient(self, model: PreTrainedModel, sequence: int, residual: Tensor) -> Tensor:
        """How the readout follows residuals at a sequence's places, same shape: `(row, position, feature)`."""
        residual = residual.detach().to(torch.promote_types(residual.dtype, torch.float32)).requires_grad_()
        with torch.enable_grad():
            readout = self.read(model, sequence, residual.to(model.dtype) if self.through_head else residual)
            (gradient,) = torch.autograd.grad(readout.sum(), residual)
        return gradient


class Readable(Protocol):
    """What can be localized towards: an anchor, or a readout of the output."""

    @property
    def layer(self) -> int:
        """The residual stream that enters this layer is read."""
        ...

    def reader(self, token_ids: Sequence[Sequence[int]]) -> Reader:
        """Prepare for the sequences that `reading.inputs` makes of prompts."""
        ...


def logits_of(model: PreTrainedModel, residual: Tensor, *, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """What the model's own norm, head and whatever it does to logits make of the last residual stream.

    Args:
        model: A model whose family has a row in the architecture table.
        residual: What leaves the last layer, shape `(row, position, feature)`.
        weights: Parameters that stand in for the model's own of these names.

    Returns:
        Shape `(row, position, vocabulary)`.
    """
    family = family_of(model.config)
    norm = model.get_submodule(family.norm)
    path, _, name = family.layers.rpartition(".")
    stack = model.get_submodule(path)
    layers = stack._modules[name]
    device = next(norm.parameters()).device

    def given(_module: nn.Module, _args: Any) -> tuple[Tensor]:
        return (residual.to(device),)

    handle = norm.register_forward_pre_hook(given)
    stack._modules[name] = nn.ModuleList()
    try:
        nothing = torch.zeros(residual.shape[:2], dtype=torch.long, device=embedding_weight(model).device)
        others = {key: own for key, own in (weights or {}).items() if not key.startswith(f"{family.layers}.")}
        found: Tensor = functional_call(model, others, (), {"input_ids": nothing, "use_cache": False}).logits
    finally:
        stack._modules[name] = layers
        handle.remove()
    return found
