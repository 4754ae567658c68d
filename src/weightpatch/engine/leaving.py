"""What leaves one layer of the recipient with each of some components patched: from few calls, or from one each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weightpatch.component import Component
from weightpatch.engine.changes import Changes, Donor, Override
from weightpatch.engine.hybrids import columns
from weightpatch.packed.calls import LayerCall, Parts
from weightpatch.pair import ModelPair


class Leaving:
    """One layer, from one call of the recipient's and a few of the patched one.

    Args:
        pair: The two models.
        donor: What gives patches.
        layer: The layer's number.
        call: The layer.
        residual: The recipient's residual stream entering it, shape `(1, token, feature)`.
        only_reads: Whether what leaves it is wanted at the readout positions only.
    """

    def __init__(
        self, pair: ModelPair, donor: Donor, layer: int, call: LayerCall, residual: Tensor, *, only_reads: bool
    ) -> None:
        self.pair = pair
        self.layer = layer
        self.call = call
        self.residual = residual
        self.only_reads = only_reads
        self.family = pair.architecture.family
        self.prefix = pair.architecture.layer_prefix(layer)
        self.changes: Changes = donor.layer(layer, call, residual)
        self.entering = residual.to(self.changes.attention.device)

    def rows(self, chunk: Sequence[Component]) -> Tensor:
        """Residual that leaves the layer with each component patched: `(component, token or read, feature)`."""
        rows: dict[int, Tensor] = {}
        attention = [place for place, component in enumerate(chunk) if self.changes.heads(component.unit)]
        if attention:
            changes = torch.cat([self.attention_change(chunk[place]) for place in attention])
            writes = self._wanted(self.changes.attention) + self._wanted(changes)
            rows |= zip(attention, self._finish(writes).unsqueeze(1), strict=True)
        neurons = [place for place, component in enumerate(chunk) if is_plain_neuron(component)]
        if neurons:
            changes = torch.cat([self.neuron_change(chunk[place]) for place in neurons])
            mlp = self._wanted(self.changes.mlp) + self._wanted(changes)
            writes = self._wanted(self.changes.attention).expand_as(mlp)
            rows |= zip(neurons, self._finish(writes, mlp=mlp).unsqueeze(1), strict=True)
        for place, component in enumerate(chunk):
            if place not in rows:
                rows[place] = self._alone(component)
        return torch.cat([rows[place] for place in range(len(chunk))])

    def parts(self, component: Component) -> tuple[Parts, Override]:
        """What the layer does at the readout positions with a component patched, and what leaves it."""
        override = self._override(component)
        parts = self.call.parts(self.residual, override.weights, last=self.only_reads, edits=override.edits)
        return override.delivered(parts), override

    def attention_change(self, component: Component) -> Tensor:
        """Change of the attention's write by a component whose unit `Changes.heads` knows, `(1, token, feature)`."""
        new, with_columns = self.changes.heads(component.unit) or (self.changes.heads_in, False)
        about, index = self.pair.architecture, component.index or 0
        n_heads = about.heads_per_kv if component.unit == "kvs" else 1
        places = list(range(index * n_heads * about.head_dim, (index + 1) * n_heads * about.head_dim))
        return self._change(self.family.o, places, new, self.changes.heads_in, with_columns=with_columns)

    def neuron_change(self, component: Component) -> Tensor:
        """Change of the MLP's write by a neuron of a plain MLP, shape `(1, token, feature)`."""
        new, old = self.changes.neurons_in_with, self.changes.neurons_in
        return self._change(self.family.mlp_out, [component.index or 0], new, old, with_columns=True)

    def _change(self, path: str, places: list[int], new: Tensor, old: Tensor, *, with_columns: bool) -> Tensor:
        name = f"{self.prefix}{path}.weight"
        ours = columns(self.pair, name, places, specialized=False)
        theirs = columns(self.pair, name, places, specialized=True) if with_columns else ours
        old, new = (self._wanted(inputs[..., places]) for inputs in (old, new))
        change = new @ theirs - old @ ours
        if self.changes.mask is None:
            return change
        return change * self._wanted(self.changes.mask.to(change.device)).to(change.dtype)

    def _override(self, component: Component) -> Override:
        here = [one for one in component.members or (component,) if one.layer == self.layer]
        return self.changes.override(here)

    def _alone(self, component: Component) -> Tensor:
        """What leaves the layer when it is called with the component patched in it."""
        override = self._override(component)
        if override.edits:
            leaving = self.call.watch(self.residual, override.weights, edits=override.edits)[""][1]
            return self._wanted(leaving)
        attention = self.changes.attention
        beside = tuple(f"{path}." for path in (*self.family.mlp, *self.family.norm_mlp))
        if not all(name.startswith(beside) for name in override.weights):
            attention = self.call.attend(self.residual, override.weights, only_reads=self.only_reads)
        return self.call.finish(self._wanted(self.entering), override.weights, attention=self._wanted(attention))

    def _wanted(self, tensor: Tensor) -> Tensor:
        """A tensor of the packed row where it is wanted: `(1, token, feature)` -> `(1, token or read, feature)`."""
        is_whole = tensor.shape[1] == self.residual.shape[1]
        return self.call.at_reads(tensor) if self.only_reads and is_whole else tensor

    def _finish(self, attention: Tensor, *, mlp: Tensor | None = None) -> Tensor:
        return self.call.finish(self._wanted(self.entering).expand_as(attention), {}, attention=attention, mlp=mlp)


def is_plain_neuron(component: Component) -> bool:
    """Whether it is a neuron of an MLP that is no expert."""
    return component.unit == "neurons" and component.expert is None
