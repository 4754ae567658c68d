"""What the components of one layer contribute to a readout to first order, summed over tokens as asked.

`Writes` multiplies the gradient with the change of what a component writes; `Parameters` multiplies the gradient of the
parameters with their difference. Both take all components of a unit at once where these do not disturb one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from weightpatch.component import Component, slices
from weightpatch.engine.changes import Changes
from weightpatch.engine.hybrids import Hybrids, Seen, watched
from weightpatch.packed.calls import LayerCall, Weights
from weightpatch.pair import ModelPair


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradients:
    """Gradient of the readout with respect to what a layer writes, each of shape `(1, token, feature)`.

    Attributes:
        attention: To the write of its attention module, before any norm behind it.
        mlp: To the write of its MLP, likewise.
        leaving: To the residual stream that leaves the layer.
        modules: Module of the layer -> to its output; only where parameters are asked for.
    """

    attention: Tensor
    mlp: Tensor
    leaving: Tensor
    modules: Mapping[str, Tensor]


class Contributions(Protocol):
    """Contributions of the components of one layer."""

    def of(self, members: Sequence[Component], gradients: Gradients, sums: Tensor) -> Tensor:
        """Sum contributions over tokens.

        Args:
            members: Components of one unit of the layer, of plain MLPs or of experts alone.
            gradients: The readout's.
            sums: How often each sum counts each token, shape `(sum, token)`.

        Returns:
            Shape `(component, sum)`.
        """
        ...


class Writes:
    """Gradient times change of write: exact in the component, linear in all that follows it.

    Args:
        pair: The two models.
        layer: The layer's number.
        call: The layer.
        residual: Residual stream entering it, shape `(1, token, feature)`.
        changes: What its components do once they are patched.
    """

    def __init__(self, pair: ModelPair, layer: int, call: LayerCall, residual: Tensor, changes: Changes) -> None:
        self.pair = pair
        self.call = call
        self.residual = residual
        self.changes = changes
        self.about = pair.architecture
        self.family = self.about.family
        self.prefix = self.about.layer_prefix(layer)

    def of(self, members: Sequence[Component], gradients: Gradients, sums: Tensor) -> Tensor:
        """See `Contributions`."""
        unit = members[0].unit
        index = [member.index or 0 for member in members]
        if self.changes.mask is not None:
            sums = sums * self.changes.mask[0, :, 0].to(sums)
        if unit == "neurons" and members[0].expert is not None and isinstance(self.changes, Hybrids):
            return self._expert_neurons(gradients.mlp, sums)[:, [one.expert or 0 for one in members], index].T
        if unit == "neurons" and members[0].expert is None:
            return summed(sums, self._neurons(gradients.mlp)).T[index]
        if patched := self.changes.heads(unit):
            new, with_columns = patched
            found = self._heads(new, gradients.attention, unit, with_columns=with_columns)
            return summed(sums, found).T[index]
        return torch.stack([summed(sums, self._alone(member, gradients)) for member in members])

    def _neurons(self, gradient: Tensor) -> Tensor:
        """Contributions `(token, neuron)`."""
        old, new = (_wide(inputs[0]) for inputs in (self.changes.neurons_in, self.changes.neurons_in_with))
        ours, moved = self._columns_along(gradient, self.family.mlp_out)
        return (new - old) * (ours + moved) + old * moved

    def _heads(self, new: Tensor, gradient: Tensor, unit: str, *, with_columns: bool) -> Tensor:
        """Contributions `(token, head or group)`."""
        ours, moved = self._columns_along(gradient, self.family.o)
        old = _wide(self.changes.heads_in[0])
        found = (_wide(new[0]) - old) * (ours + moved if with_columns else ours)
        if with_columns:
            found = found + old * moved
        size = self.about.head_dim * (self.about.heads_per_kv if unit == "kvs" else 1)
        return found.reshape(len(found), -1, size).sum(dim=2)

    def _columns_along(self, gradient: Tensor, path: str) -> tuple[Tensor, Tensor]:
        """How the readout follows what each column of a last projection is multiplied with, `(token, column)`.

        Returns:
            With the base's columns, and with the specialized ones' difference to them: small, so taken first.
        """
        ours, theirs = _both(self.pair, self.prefix, [f"{path}.weight"])
        base, other = (_wide(side[f"{path}.weight"]) for side in (ours, theirs))
        along = _wide(gradient[0])
        if self.family.transposed:
            base, other = base.T, other.T
        return along @ base, along @ (other - base)

    def _expert_neurons(self, gradient: Tensor, sums: Tensor) -> Tensor:
        """Contributions `(sum, expert, neuron)`: what experts write is linear in their last matrices."""
        experts = self.family.experts
        if experts is None:
            raise TypeError("a family without experts has no expert neurons")
        ours, theirs = _both(self.pair, self.prefix, (*experts.matrices_in, experts.matrix_out))
        out = experts.matrix_out
        found = []
        for side in (theirs, ours):
            weights = {name: weight for name, weight in side.items() if name != out}
            products = _mixture_products(
                self.call,
                (self.residual, self.changes.attention),
                {**weights, out: ours[out]},
                {out: side[out]},
                gradient=gradient,
                sums=sums,
            )
            found.append(products[out])
        return found[0] - found[1]

    def _alone(self, component: Component, gradients: Gradients) -> Tensor:
        """Contribution by token of a component that has a call of its own, `(token,)`."""
        override, here = self.changes.override([component]), self.changes
        touched = [*override.weights, *(f"{path}." for path in override.edits)]
        is_attention = all(name.startswith(f"{self.family.attn}.") for name in touched)
        is_mlp = all(name.startswith(tuple(f"{path}." for path in self.family.mlp)) for name in touched)
        o, mlp = watched(self.call)
        if override.edits:
            seen = self.call.watch(self.residual, override.weights, o, mlp, edits=override.edits)
            attention, write, leaving = seen[o][1], seen[mlp][1], seen[""][1]
        elif is_attention:
            attention = self.call.attend(self.residual, override.weights)
        elif is_mlp:
            entering = self.residual.to(here.attention.device)
            write = self.call.finish_at(mlp, entering, override.weights, attention=here.attention)[1]
        else:
            leaving = self.call(self.residual, override.weights)
        if is_attention:
            change, gradient = attention - here.attention, gradients.attention
        elif is_mlp:
            change, gradient = write.view_as(here.mlp) - here.mlp, gradients.mlp
        else:
            change, gradient = leaving - here.leaving, gradients.leaving
        return (_wide(change) * _wide(gradient))[0].sum(dim=-1)


class Parameters:
    """Gradient of the parameters times their difference, `specialized - base`: linear in everything.

    Every module outside a mixture of experts is affine in its own parameters, so the gradient at its output times the
    change of that output on the same input is the product that is wanted, token by token.

    Args:
        pair: The two models.
        layer: The layer's number.
        call: The layer.
        residual: Residual stream entering it where the gradient was taken, shape `(1, token, feature)`.
        seen: Input and output there of the modules of `parametrized`.
        weights: Parameters that stood in for the base's.
    """

    def __init__(
        self, pair: ModelPair, layer: int, call: LayerCall, residual: Tensor, *, seen: Seen, weights: Weights
    ) -> None:
        self.pair = pair
        self.layer = layer
        self.call = call
        self.residual = residual
        self.seen = seen
        self.weights = weights
        self.about = pair.architecture
        self.family = pair.architecture.family
        self.prefix = pair.architecture.layer_prefix(layer)
        self._mixed: tuple[Tensor, dict[str, Tensor]] | None = None

    def of(self, members: Sequence[Component], gradients: Gradients, sums: Tensor) -> Tensor:
        """See `Contributions`."""
        first = members[0]
        if first.unit == "neurons" and first.expert is not None and self.family.experts:
            mixture = self._mixture(gradients.mlp, sums)
            found = mixture[self.family.experts.matrix_out]
            for place, name in enumerate(self.family.experts.matrices_in):
                start = self.family.experts.matrices_in[:place].count(name) * found.shape[-1]
                found = found + mixture[name][..., start : start + found.shape[-1]]
            return found[:, [one.expert or 0 for one in members], [one.index or 0 for one in members]].T
        if first.unit == "neurons":
            size, inputs = self.about.n_neurons_of(self.layer), self.family.mlp_in
            found = summed(sums, self._by_input(f"{self.family.mlp_out}.weight", gradients))
            for place, path in enumerate(inputs):
                start = size * inputs[:place].count(path)
                for name in self._parameters_of(path):
                    found = found + summed(sums, self._by_output(name, gradients)[:, start : start + size])
            return found.T[[member.index or 0 for member in members]]
        return torch.stack([self._alone(member, gradients, sums) for member in members])

    def _alone(self, component: Component, gradients: Gradients, sums: Tensor) -> Tensor:
        """Contribution of one component, `(sum,)`."""
        total = sums.new_zeros(len(sums))
        for piece in slices(self.about, component):
            name = piece.parameter.removeprefix(self.prefix)
            if name.rpartition(".")[0] not in self.seen:
                mixed = self._mixture(gradients.mlp, sums)[name]
                if mixed.ndim > 1:  # some experts, or all of them
                    mixed = mixed[:, piece.start : piece.stop].flatten(1).sum(dim=1)
                total = total + mixed
                continue
            shape = self.about.parameters[piece.parameter]
            out_axis = 1 if self.family.transposed and len(shape) == 2 else 0
            if piece.stop - piece.start == shape[piece.axis]:
                by_token = self._by_output(name, gradients)
            elif piece.axis == out_axis:
                by_token = self._by_output(name, gradients)[:, piece.start : piece.stop]
            else:
                by_token = self._by_input(name, gradients)[:, piece.start : piece.stop]
            total = total + summed(sums, by_token.sum(dim=1))
        return total

    def _by_output(self, name: str, gradients: Gradients) -> Tensor:
        """A parameter's part, by the module's outputs: `(token, output)`."""
        path, _, last = name.rpartition(".")
        entering, _ = self.seen[path]
        module = self.call.layer.get_submodule(path)
        ours, theirs = _both(self.pair, self.prefix, [name])
        if ours[name].ndim == 2:
            difference = _wide(theirs[name]) - _wide(ours[name])
            change = _wide(entering) @ (difference if self.family.transposed else difference.T)
        else:
            change = _wide(functional_call(module, {last: theirs[name]}, entering))
            change = change - _wide(functional_call(module, {last: ours[name]}, entering))
        gradient = _wide(gradients.modules[path])
        if entering.ndim == 4 and self._has_heads_first(entering):
            change, gradient = change.transpose(1, 2), gradient.transpose(1, 2)
        return self._flat(change) * self._flat(gradient)

    def _by_input(self, name: str, gradients: Gradients) -> Tensor:
        """A matrix's part, by the module's inputs: `(token, input)`."""
        path = name.rpartition(".")[0]
        ours, theirs = _both(self.pair, self.prefix, [name])
        difference = _wide(theirs[name]) - _wide(ours[name])
        along = self._flat(_wide(gradients.modules[path])) @ (difference.T if self.family.transposed else difference)
        return self._flat(_wide(self.seen[path][0])) * along

    def _has_heads_first(self, entering: Tensor) -> bool:
        """Whether a norm of heads works on `(1, head, token, feature)`; a transposed view, where both are as many."""
        n_tokens = self.residual.shape[1]
        if entering.shape[1] != entering.shape[2]:
            return entering.shape[2] == n_tokens
        return entering.stride(1) < entering.stride(2)

    def _flat(self, tensor: Tensor) -> Tensor:
        """`(1, token, ...)` -> `(token, all the rest)`."""
        return tensor.reshape(self.residual.shape[1], -1)

    def _parameters_of(self, path: str) -> list[str]:
        return [f"{path}.{name}" for name, _ in self.call.layer.get_submodule(path).named_parameters()]

    def _mixture(self, gradient: Tensor, sums: Tensor) -> dict[str, Tensor]:
        """What the parameters of a mixture contribute; see `_mixture_products`."""
        if self._mixed and self._mixed[0] is gradient:
            return self._mixed[1]
        names = [name for path in self.family.mlp for name in self._parameters_of(path)]
        ours, theirs = _both(self.pair, self.prefix, names)
        found = _mixture_products(
            self.call,
            (self.residual, self.seen[self.family.o][1]),
            {**ours, **self.weights},
            {name: theirs[name] - ours[name] for name in names},
            gradient=gradient,
            sums=sums,
        )
        self._mixed = gradient, found
        return found


def parametrized(pair: ModelPair, layer: int, call: LayerCall) -> tuple[str, ...]:
    """Modules of a layer with parameters of their own, those inside a mixture of experts left out."""
    mixture = () if pair.architecture.n_neurons_of(layer) else tuple(f"{p}." for p in pair.architecture.family.mlp)
    return tuple(
        path
        for path, module in call.layer.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and not f"{path}.".startswith(mixture or "/")
    )


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: what is added up here are differences of nearly equal numbers."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def summed(sums: Tensor, by_token: Tensor) -> Tensor:
    """Sums over tokens, in the precision of the sums: `(sum, token)` and `(token, ...)` -> `(sum, ...)`."""
    return sums @ by_token.to(sums.dtype)


def _both(pair: ModelPair, prefix: str, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters of the base and of the specialized model, by their names within the layer."""
    ours = {name: pair.base.get_parameter(prefix + name).detach() for name in names}
    theirs = {name: pair.specialized_weight(prefix + name).to(ours[name].device) for name in ours}
    return ours, theirs


def _mixture_products(
    call: LayerCall,
    entering: tuple[Tensor, Tensor],
    weights: Weights,
    factors: Mapping[str, Tensor],
    *,
    gradient: Tensor,
    sums: Tensor,
) -> dict[str, Tensor]:
    """Gradients of some of a mixture's parameters, one to a sum, times factors: tokens do not meet in an MLP.

    Args:
        call: The layer.
        entering: Residual stream that enters it, and what its attention writes.
        weights: Parameters of the mixture at which the gradient is taken.
        factors: Parameter -> what its gradient is multiplied with.
        gradient: The readout's, to the mixture's write, shape `(1, token, feature)`.
        sums: As in `Contributions`.

    Returns:
        Parameter -> products added up over features, `(sum, expert, neuron)`, rows of several matrices side by side;
        for what no expert owns, such as the router, over everything: `(sum,)`.
    """
    leaves = {name: weights[name].detach().requires_grad_() for name in factors}
    residual, attention = entering
    with torch.enable_grad():
        path = call.family.mlp[-1]
        write = call.finish_at(path, residual.to(attention.device), {**weights, **leaves}, attention=attention)[1]
        along = (write.view_as(gradient) * gradient)[0].sum(dim=-1)
    experts = call.family.experts
    found: dict[str, list[Tensor]] = {name: [] for name in factors}
    for row in sums:
        weighted = row.to(along.dtype)
        grads = torch.autograd.grad(along, [*leaves.values()], weighted, retain_graph=True, allow_unused=True)
        for (name, factor), grad in zip(factors.items(), grads, strict=True):
            product = _wide(torch.zeros_like(factor) if grad is None else grad) * _wide(factor)
            features = {3: 1 if experts and name == experts.matrix_out else 2}.get(product.ndim)
            found[name].append(product.sum() if features is None else product.sum(dim=features))
    return {name: torch.stack(products) for name, products in found.items()}
