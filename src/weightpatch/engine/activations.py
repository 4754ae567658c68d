"""Activation patching: what components put out in the specialized model's own run on the same input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightpatch.component import Component
from weightpatch.engine.changes import Changes, Override
from weightpatch.engine.hybrids import Seen, columns, hybrid, layer_weights, watched
from weightpatch.errors import ComponentError
from weightpatch.packed.calls import Edits, LayerCall, Parts
from weightpatch.packed.packing import Packing
from weightpatch.pair import ModelPair
from weightpatch.residuals import walk

Source = Literal["weights", "activations"]
"""What is patched: components' weights, or what they put out."""

Where = Literal["all", "readouts"]
"""Tokens at which activations are patched: all, or the readout positions."""

_WITHOUT_OUTPUT = ("norms", "rests")


class Activations:
    """Gives what components put out in the specialized model's own run on the same input: activation patching.

    Args:
        pair: The two models.
        calls: The layers, as they are called on the packed row.
        residual: The specialized model's residual stream entering layer `start`, shape `(1, token, feature)`.
        start: Where its run begins; components below are not known.
        mask: Tokens where patches act, shape `(1, token, 1)`; None: all.
    """

    def __init__(
        self,
        pair: ModelPair,
        calls: Sequence[LayerCall],
        residual: Tensor,
        *,
        start: int = 0,
        mask: Tensor | None = None,
    ) -> None:
        self.pair = pair
        self.calls = calls
        self.start = start
        self.mask = mask
        self._entering = [residual]
        self._seen: tuple[int, dict[str, tuple[Tensor, Tensor]]] = (-1, {})

    @classmethod
    def of(
        cls, pair: ModelPair, packing: Packing, tokens: Tensor, calls: Sequence[LayerCall], mask: Tensor | None
    ) -> Activations:
        """Begin at the specialized model's embedding."""
        return cls(pair, calls, _start(pair, packing, tokens), mask=mask)

    def embedded(self, members: Sequence[Component]) -> Tensor:
        """See `Donor`."""
        check_outputs(members)
        return self._entering[0]

    def entering(self, layer: int) -> Tensor:
        """The specialized model's residual stream entering a layer, `(1, token, feature)`."""
        while self.start + len(self._entering) <= layer:
            number = self.start + len(self._entering) - 1
            if self._seen[0] == number:
                self._entering.append(self._seen[1][""][1])
            else:
                weights = layer_weights(self.pair, self.calls[number], number)
                self._entering.append(self.calls[number](self._entering[-1], weights))
        return self._entering[layer - self.start]

    def seen(self, layer: int) -> Seen:
        """Inputs and outputs of the modules of a layer whose outputs can be patched, in the specialized model."""
        if self._seen[0] != layer:
            call, family = self.calls[layer], self.pair.architecture.family
            paths = dict.fromkeys([*watched(call), family.q, family.k, family.v])
            edits: Edits = {}
            if self.pair.architecture.n_experts_of(layer) and family.experts:
                edits = {family.experts.router: self._note_routing}
            weights = layer_weights(self.pair, call, layer)
            self._seen = layer, call.watch(self.entering(layer), weights, *paths, edits=edits)
        return self._seen[1]

    def routing(self, layer: int) -> Any:
        """Whatever the gate of a mixture puts out in the specialized model."""
        self.seen(layer)
        return self._routing

    def _note_routing(self, _module: nn.Module, _entering: Tensor, output: Any) -> Any:
        self._routing = output
        return output

    def parts(self, layer: int) -> Parts:
        """What the specialized model's layer did at the readout positions."""
        return self.calls[layer].parts_of(self.seen(layer))

    def layer(self, layer: int, call: LayerCall, residual: Tensor) -> Changes:
        """See `Donor`."""
        return Taken(self, layer, call, residual, call.watch(residual, {}, *watched(call)))

    def override(self, layer: int, members: Sequence[Component]) -> Override:
        """See `Donor`."""
        check_outputs(members)
        return _Taking(self, layer).override(members)

    def where(self, new: Tensor, old: Tensor) -> Tensor:
        """`new` at the tokens where patches act, `old` at the others; shapes `(row, token, ...)` or `(token, ...)`."""
        if self.mask is None:
            return new.expand_as(old)
        mask = self.mask.to(old.device)
        return torch.where(mask if old.ndim > 2 else mask[0], new, old)


def has_output(component: Component) -> bool:
    """Whether a component puts out something of its own, which another run's can replace; a set: all its members."""
    return all(
        one.unit not in _WITHOUT_OUTPUT and one.address not in ("norm", "unembed")
        for one in component.members or (component,)
    )


def check_outputs(members: Sequence[Component]) -> None:
    """Raise for components without an output of their own.

    Raises:
        ComponentError: norms, biases, the output head, alone or in a set.
    """
    if named := [str(member) for member in members if not has_output(member)]:
        raise ComponentError(
            f"{', '.join(named[:4])}: norms, biases and the head have no output of their own to take from the "
            "specialized run. Patch their weights (method='exact'), or name blocks, attns, mlps, heads, kvs, neurons."
        )


def _start(pair: ModelPair, packing: Packing, tokens: Tensor) -> Tensor:
    """The specialized model's residual stream entering layer 0, packed."""
    found: list[Tensor] = []
    walk(pair.specialized, tokens, 0, lambda _layer, rows, _args, _kwargs: found.append(packing.fold(rows)))
    return found[0].to(pair.base.device)


class Taken:
    """A layer of the recipient, and what its components put out in the specialized model's run."""

    def __init__(self, donor: Activations, layer: int, call: LayerCall, residual: Tensor, seen: Seen) -> None:
        self.donor = donor
        self.number = layer
        self.mask = donor.mask
        attention, self._mlp = watched(call)
        rows = (1, residual.shape[1], -1)
        self.heads_in, self.attention = seen[attention]
        self.neurons_in, self.mlp = (tensor.reshape(rows) for tensor in seen[self._mlp])
        self.leaving = seen[""][1]
        self._rows = rows
        self._heads_in_with = donor.seen(layer)[attention][0]

    @property
    def neurons_in_with(self) -> Tensor:
        """See `Changes`."""
        return self.donor.seen(self.number)[self._mlp][0].reshape(self._rows)

    def heads(self, unit: str) -> tuple[Tensor, bool] | None:
        """See `Changes`."""
        return (self._heads_in_with, True) if unit in ("heads", "heads.o") else None

    def override(self, members: Sequence[Component]) -> Override:
        """See `Changes`."""
        return self.donor.override(self.number, members)


class _Taking:
    """Overrides of one layer by what the specialized model's components put out there."""

    def __init__(self, donor: Activations, layer: int) -> None:
        self.donor = donor
        self.pair = donor.pair
        self.about = donor.pair.architecture
        self.family = self.about.family
        self.layer = layer
        self.prefix = self.about.layer_prefix(layer)
        self.call = donor.calls[layer]
        self.o, self.mlp = watched(self.call)
        self.seen = donor.seen(layer)

    def override(self, members: Sequence[Component]) -> Override:
        units: dict[str, list[Component]] = {}
        for member in members:
            unit = {"heads.o": "heads"}.get(member.unit, member.unit)
            units.setdefault(f"{unit} of experts" if member.expert is not None else unit, []).append(member)
        edits: dict[str, list[Callable[[nn.Module, Tensor, Any], Any]]] = {}
        written: dict[str, Tensor] = {}
        heads, neurons = (
            [one.index or 0 for one in units.get("heads", ())],
            [one.index or 0 for one in units.get("neurons", ())],
        )
        is_whole = "blocks" in units
        for path, slices in self._projected(units).items():
            edits.setdefault(path, []).append(self._sliced(path, slices))
        if "routers" in units and self.family.experts:
            edits.setdefault(self.family.experts.router, []).append(self._routed)
        if heads:
            inputs = self._inputs_of_heads(heads)
            edits.setdefault(self.o, []).append(self._columns(self.o, inputs))
            written |= hybrid(self.pair, [self._output_of(head) for head in heads], prefix=self.prefix)
        if "attns" in units:
            edits.setdefault(self.o, []).append(self._whole(self.o))
        if neurons:
            edits.setdefault(self.mlp, []).append(self._columns(self.mlp, neurons))
            written |= hybrid(self.pair, units["neurons"], prefix=self.prefix)
        for expert in (*units.get("experts", ()), *units.get("neurons of experts", ())):
            edits.setdefault(self.mlp, []).append(self._expert(expert))
        if "mlps" in units:
            edits.setdefault(self.mlp, []).append(self._whole(self.mlp))
        if is_whole:
            edits.setdefault("", []).append(self._block)
        every = layer_weights(self.pair, self.call, self.layer) if {"attns", "mlps", "blocks"} & units.keys() else {}
        for unit, path in (("attns", self.o), ("mlps", self.mlp)):
            written |= {name: weight for name, weight in every.items() if unit in units and name.startswith(f"{path}.")}
        return Override(
            edits={path: _in_turn(changes) for path, changes in edits.items()},
            written=every if is_whole else written,
            delivered=lambda parts: self._delivered(parts, heads, neurons, units.keys()),
        )

    def _delivered(self, parts: Parts, heads: Sequence[int], neurons: Sequence[int], units: Any) -> Parts:
        """What the components did at the readout positions, where patches always act."""
        theirs = self.donor.parts(self.layer)
        if "blocks" in units:
            return replace(theirs, leaving=parts.leaving)
        heads_in, neurons_in = parts.heads_in, parts.neurons_in
        if "attns" in units:
            heads_in = theirs.heads_in
        elif heads:
            heads_in = heads_in.clone()
            heads_in[..., self._inputs_of_heads(heads)] = theirs.heads_in[..., self._inputs_of_heads(heads)]
        if "mlps" in units:
            neurons_in = theirs.neurons_in
        elif neurons:
            neurons_in = neurons_in.clone()
            neurons_in[..., neurons] = theirs.neurons_in[..., neurons]
        return replace(parts, heads_in=heads_in, neurons_in=neurons_in)

    def _projected(self, units: Mapping[str, Sequence[Component]]) -> dict[str, list[int]]:
        """Outputs of the query, key and value modules that are taken, by module."""
        wanted = [("q", one) for one in units.get("heads.q", ())]
        wanted += [(name, one) for one in units.get("kvs", ()) for name in "kv"]
        found: dict[str, list[int]] = {}
        for name, one in wanted:
            places = range(*self.about.head_outputs(name, one.index or 0))
            found.setdefault(getattr(self.family, name), []).extend(places)
        return found

    def _output_of(self, head: int) -> Component:
        return Component(address=f"L{self.layer}.H{head}.o", unit="heads.o", layer=self.layer, index=head)

    def _inputs_of_heads(self, heads: Sequence[int]) -> list[int]:
        size = self.about.head_dim
        return [place for head in heads for place in range(head * size, (head + 1) * size)]

    def _sliced(self, path: str, places: Sequence[int]) -> Callable[[nn.Module, Tensor, Any], Any]:
        def edit(_module: nn.Module, _entering: Tensor, output: Tensor) -> Tensor:
            changed = output.clone()
            changed[..., places] = self.donor.where(
                self.seen[path][1].view_as(output)[..., places], output[..., places]
            )
            return changed

        return edit

    def _whole(self, path: str) -> Callable[[nn.Module, Tensor, Any], Any]:
        def edit(_module: nn.Module, _entering: Tensor, output: Any) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            new = self.donor.where(self.seen[path][1].view_as(whole), whole)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return edit

    def _routed(self, _module: nn.Module, _entering: Tensor, output: Any) -> Any:
        theirs = self.donor.routing(self.layer)
        if isinstance(output, Tensor):
            return self.donor.where(theirs.view_as(output), output)
        return tuple(self.donor.where(new.view_as(old), old) for new, old in zip(theirs, output, strict=True))

    def _columns(self, path: str, inputs: Sequence[int]) -> Callable[[nn.Module, Tensor, Any], Any]:
        """The part of a write that some inputs of its matrix make: the donor's instead of the one that is there."""

        def edit(_module: nn.Module, entering: Tensor, output: Tensor) -> Tensor:
            ours, theirs = (
                columns(self.pair, f"{self.prefix}{path}.weight", inputs, specialized=side) for side in (False, True)
            )
            taken = self.seen[path][0].view_as(entering)[..., inputs]
            return self.donor.where(output + taken @ theirs - entering[..., inputs] @ ours, output)

        return edit

    def _block(self, _module: nn.Module, entering: Tensor, output: Any) -> Any:
        ours, theirs = (output[0] if isinstance(output, tuple) else output), self.seen[""]
        new = self.donor.where(entering + (theirs[1] - theirs[0]), ours)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def _expert(self, member: Component) -> Callable[[nn.Module, Tensor, Any], Any]:
        experts = self.family.experts
        if experts is None:
            raise TypeError("a family without experts has no expert")
        name = experts.matrix_out.removeprefix(f"{self.mlp}.")

        def only(weight: Tensor) -> Tensor:
            """A last matrix by which this expert, or this neuron of it, alone writes."""
            expert = (member.index if member.unit == "experts" else member.expert) or 0
            kept = torch.zeros_like(weight)
            if member.unit == "experts":
                kept[expert] = weight[expert]
            else:
                kept[expert, :, member.index or 0] = weight[expert, :, member.index or 0]
            return kept

        every = layer_weights(self.pair, self.call, self.layer)
        taken = self.call.finish_at(
            self.mlp,
            self.seen[""][0],
            every | {experts.matrix_out: only(every[experts.matrix_out])},
            attention=self.seen[self.o][1],
        )[1]

        def edit(module: nn.Module, entering: Tensor, output: Any) -> Any:
            ours = self.pair.base.get_parameter(self.prefix + experts.matrix_out).detach()
            found = functional_call(module, {name: only(ours)}, (entering,))
            part = found[0] if isinstance(found, tuple) else found
            whole = output[0] if isinstance(output, tuple) else output
            new = self.donor.where(whole - part + taken.view_as(whole), whole)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return edit


def _in_turn(changes: Sequence[Callable[[nn.Module, Tensor, Any], Any]]) -> Callable[[nn.Module, Tensor, Any], Any]:
    def edit(module: nn.Module, entering: Tensor, output: Any) -> Any:
        for change in changes:
            output = change(module, entering, output)
        return output

    return edit
