"""One layer of the base called with some of its parameters specialized, on the base's own residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from torch import Tensor

from weightpatch.component import Component, components, slices
from weightpatch.packed.calls import LayerCall
from weightpatch.packed.packing import Packing
from weightpatch.pair import ModelPair
from weightpatch.residuals import walk

Seen = Mapping[str, tuple[Tensor, Tensor]]
"""Input and output of some modules of a layer, as `LayerCall.watch` gives them."""


def hybrid(pair: ModelPair, members: Sequence[Component], *, prefix: str) -> dict[str, Tensor]:
    """Parameters with the members' specialized slices in the base's tensors, named relative to `prefix`."""
    weights: dict[str, Tensor] = {}
    for piece in (piece for member in members for piece in slices(pair.architecture, member)):
        name = piece.parameter.removeprefix(prefix)
        ours = pair.base.get_parameter(piece.parameter).detach()
        theirs = pair.specialized_weight(piece.parameter)
        if piece.of(ours).numel() == ours.numel():
            weights[name] = theirs.to(ours.device)
            continue
        if name not in weights:
            weights[name] = ours.clone()
        piece.of(weights[name]).copy_(piece.of(theirs))
    return weights


def embedded(pair: ModelPair, packing: Packing, tokens: Tensor, members: Iterable[Component]) -> Tensor:
    """The packed row that enters layer 0 with those of the members specialized that lie in no layer.

    Args:
        pair: The two models.
        packing: How the prompts lie.
        tokens: The prompts, right-padded, shape `(prompt, token)`.
        members: Components, `embed` among them.

    Returns:
        Shape `(1, token, feature)`.
    """
    entering: list[Tensor] = []
    weights = hybrid(pair, [member for member in members if member.layer is None], prefix="")
    walk(pair.base, tokens, 0, lambda _layer, rows, _args, _kwargs: entering.append(rows), weights=weights)
    folded: Tensor = packing.fold(entering[0])
    return folded


def watched(pair: ModelPair, layer: int) -> tuple[str, ...]:
    """Modules of a layer whose inputs and outputs tell what each of its heads and neurons writes."""
    family = pair.architecture.family
    return family.o, family.mlp_out if pair.architecture.n_neurons_of(layer) else family.mlp[-1]


class Hybrids:
    """A layer in the base, and what heads and neurons would write with specialized weights. Packed rows throughout.

    Heads read only their own queries, groups feed only their own heads, neurons are independent: so one call with all
    members of a unit specialized serves every one of them.

    Args:
        pair: The two models.
        layer: The layer's number.
        call: The layer.
        residual: Base residual stream entering it, shape `(1, token, feature)`.
        seen: The modules of `watched` in the base, and `""`, the layer.
    """

    def __init__(self, pair: ModelPair, layer: int, call: LayerCall, residual: Tensor, seen: Seen) -> None:
        self.pair = pair
        self.layer = layer
        self.call = call
        self.residual = residual
        self.prefix = pair.architecture.layer_prefix(layer)
        attention, mlp = (seen[path] for path in watched(pair, layer))
        self.heads_in, self.attention = attention
        self.neurons_in = mlp[0].view(1, residual.shape[1], -1)
        self.mlp = mlp[1].view(1, residual.shape[1], -1)
        self.leaving = seen[""][1]
        self._heads_in: dict[str, Tensor] = {}

    @classmethod
    def of(cls, pair: ModelPair, layer: int, call: LayerCall, residual: Tensor) -> Hybrids:
        """Call the base's layer once and keep what is wanted of it."""
        return cls(pair, layer, call, residual, call.watch(residual, {}, *watched(pair, layer)))

    def heads_in_with(self, unit: str) -> Tensor:
        """Input of `o`, `(1, token, head x feature)`, with all `heads.q`, or `kvs`, of the layer specialized."""
        if unit not in self._heads_in:
            members = [one for one in components(self.pair.architecture, unit) if one.layer == self.layer]
            weights = hybrid(self.pair, members, prefix=self.prefix)
            path = self.pair.architecture.family.o
            self._heads_in[unit] = self.call.watch(self.residual, weights, path, stop=True)[path][0]
        return self._heads_in[unit]

    @cached_property
    def neurons_in_with(self) -> Tensor:
        """Activations of all neurons of a plain MLP with their own specialized weights, `(1, token, neuron)`."""
        family = self.pair.architecture.family
        weights = {  # whole matrices instead of thousands of slices
            f"{path}.{name}": self.pair.specialized_weight(f"{self.prefix}{path}.{name}").to(ours.device)
            for path in dict.fromkeys(family.mlp_in)
            for name, ours in self.call.layer.get_submodule(path).named_parameters()
        }
        entering = self.residual.to(self.attention.device)
        seen = self.call.finish_at(family.mlp_out, entering, weights, attention=self.attention)
        return seen[0].view_as(self.neurons_in)
