"""Weight patching: layers of the base called with some of their parameters specialized, on its own residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from weightpatch.component import Component, components, slices
from weightpatch.engine.changes import Changes, Override
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


def layer_weights(pair: ModelPair, call: LayerCall, layer: int) -> dict[str, Tensor]:
    """All parameters of a layer in the specialized model, by their names within it."""
    prefix = pair.architecture.layer_prefix(layer)
    return {
        name: pair.specialized_weight(prefix + name).to(ours.device) for name, ours in call.layer.named_parameters()
    }


def columns(pair: ModelPair, parameter: str, inputs: Sequence[int], *, specialized: bool) -> Tensor:
    """What some inputs of a projection are multiplied with, as `(input, output)`.

    Args:
        pair: The two models.
        parameter: Its weight, by full name.
        inputs: Which ones.
        specialized: Of which model.
    """
    ours = pair.base.get_parameter(parameter).detach()
    whole = pair.specialized_weight(parameter).to(ours.device) if specialized else ours
    return whole[inputs] if pair.architecture.family.transposed else whole[:, inputs].T


def watched(call: LayerCall) -> tuple[str, str]:
    """Modules of a layer whose inputs and outputs tell what each of its heads and neurons writes."""
    return call.family.o, call.mlp_path


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
        attention, mlp = (seen[path] for path in watched(call))
        self.heads_in, self.attention = attention
        self.neurons_in = mlp[0].view(1, residual.shape[1], -1)
        self.mlp = mlp[1].view(1, residual.shape[1], -1)
        self.leaving = seen[""][1]
        self.mask: Tensor | None = None
        self._heads_in: dict[str, Tensor] = {}

    @classmethod
    def of(cls, pair: ModelPair, layer: int, call: LayerCall, residual: Tensor) -> Hybrids:
        """Call the base's layer once and keep what is wanted of it."""
        return cls(pair, layer, call, residual, call.watch(residual, {}, *watched(call)))

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

    def heads(self, unit: str) -> tuple[Tensor, bool] | None:
        """See `Changes`."""
        if unit == "heads.o":
            return self.heads_in, True
        if unit not in ("heads", "heads.q", "kvs") or not self.pair.architecture.heads_are_independent:
            return None
        return self.heads_in_with("kvs" if unit == "kvs" else "heads.q"), unit == "heads"

    def override(self, members: Sequence[Component]) -> Override:
        """See `Changes`."""
        weights = hybrid(self.pair, members, prefix=self.prefix)
        return Override(weights=weights, written=weights)


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """Gives the specialized model's weights: weight patching.

    Attributes:
        pair: The two models.
        packing: How the prompts lie.
        tokens: Right-padded token ids, shape `(prompt, token)`.
    """

    pair: ModelPair
    packing: Packing
    tokens: Tensor

    def embedded(self, members: Sequence[Component]) -> Tensor:
        """See `Donor`."""
        return embedded(self.pair, self.packing, self.tokens, members)

    def layer(self, layer: int, call: LayerCall, residual: Tensor) -> Changes:
        """See `Donor`."""
        return Hybrids.of(self.pair, layer, call, residual)

    def override(self, layer: int, members: Sequence[Component]) -> Override:
        """See `Donor`."""
        weights = hybrid(self.pair, members, prefix=self.pair.architecture.layer_prefix(layer))
        return Override(weights=weights, written=weights)
