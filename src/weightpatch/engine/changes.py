"""What patches do to the layers of the recipient, and who gives them: one interface for weights and activations.

A donor serves one packed row of prompts. It says what a layer of the recipient does with some components patched: as
weights that stand in for the layer's own, as outputs of modules that stand in for theirs, or, for components that can
be had from calls shared with their like, as their inputs to the last matrix before the write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from weightpatch.component import Component
from weightpatch.packed.calls import Edits, LayerCall, Parts


def _as_seen(parts: Parts) -> Parts:
    return parts


@dataclass(frozen=True, kw_only=True, eq=False)
class Override:
    """What makes a layer do what it does with some of its components patched.

    Attributes:
        weights: Parameters that stand in for the layer's own.
        edits: Outputs of modules that stand in for theirs.
        written: Parameters by which its writes are split among components, `weights` unless something else wrote them.
        delivered: Gives what the components did, for that split, from what was seen of the layer.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    edits: Edits = field(default_factory=dict)
    written: Mapping[str, Tensor] = field(default_factory=dict)
    delivered: Callable[[Parts], Parts] = _as_seen


class Changes(Protocol):
    """A layer of the recipient, and what its components do there once they are patched; packed rows throughout.

    Attributes:
        attention: What the recipient's attention writes, `(1, token, feature)`, before a norm behind it.
        heads_in: What its heads gathered, side by side, `(1, token, head x feature)`.
        mlp: What its MLP writes, likewise.
        neurons_in: Activations of its neurons, `(1, token, neuron)`.
        leaving: What leaves the layer.
        mask: Tokens where patches act, `(1, token, 1)`; None: all.
    """

    attention: Tensor
    heads_in: Tensor
    mlp: Tensor
    neurons_in: Tensor
    leaving: Tensor
    mask: Tensor | None

    @property
    def neurons_in_with(self) -> Tensor:
        """Activations of all neurons of a plain MLP, each patched, like `neurons_in`."""
        ...

    def heads(self, unit: str) -> tuple[Tensor, bool] | None:
        """What heads gather with all members of a unit patched, like `heads_in`.

        Returns:
            That, and whether the donor's columns of `o` take it up; None for a unit whose members disturb one another
            and have to be called alone.
        """
        ...

    def override(self, members: Sequence[Component]) -> Override:
        """What makes the layer do what it does with these of its components patched."""
        ...


class Donor(Protocol):
    """What gives patches to one packed row."""

    def embedded(self, members: Sequence[Component]) -> Tensor:
        """The row that enters layer 0 with those of the members patched that lie in no layer, `(1, token, feature)`."""
        ...

    def layer(self, layer: int, call: LayerCall, residual: Tensor) -> Changes:
        """The recipient's layer, called once on the residual stream that enters it, `(1, token, feature)`."""
        ...

    def override(self, layer: int, members: Sequence[Component]) -> Override:
        """As `Changes.override`, for a layer that something patched below it has reached."""
        ...
