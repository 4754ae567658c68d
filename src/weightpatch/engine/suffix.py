"""The fast exact engine: one base prefix, each specialized layer once, then only the layers up to the anchor.

For a fixed input, changing a component of layer l changes nothing below l and first changes the component's own write
into the residual stream. So the base runs once, layer by layer. At each layer, hybrid calls (base module, some
specialized weights) give what every head and neuron would write; each difference is added to the base's own write, and
many components side by side on the batch axis run through layers l+1 up to the anchor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightpatch.anchor import Anchor
from weightpatch.architecture import embedding_weight, layers_of
from weightpatch.component import Component, Slice, components, slices
from weightpatch.engine import Measured
from weightpatch.errors import ArchitectureError
from weightpatch.pair import ModelPair
from weightpatch.residuals import at_positions, batches, evaluating, pad, readout_index, walk

Weights = dict[str, Tensor]


def sweep(
    pair: ModelPair,
    token_ids: Sequence[Sequence[int]],
    anchor: Anchor,
    components: Sequence[Component],
    *,
    batch_tokens: int,
    skip: Set[Component],
) -> Iterator[Measured]:
    """Measure through the suffix of the model; see `engine.Sweep`."""
    _refuse_hooks(pair)
    with evaluating(pair.base):
        runs = [
            _Run.start(pair, [token_ids[index] for index in batch], batch, anchor)
            for batch in batches(token_ids, batch_tokens)
        ]
    base = _gather([run.base for run in runs], runs)
    for layer, members in groupby(components, key=lambda component: component.layer):
        for chunk in _chunks(list(members), runs, batch_tokens):
            if skip >= set(chunk):
                continue
            with evaluating(pair.base):  # left before anything is handed out: the caller's own mode is not ours
                parts = [run.measure(chunk, layer) for run in runs]
            for place, component in enumerate(chunk):
                readout = _gather([part[place] for part in parts], runs)
                yield Measured(component=component, readout=readout, base=base)


def _refuse_hooks(pair: ModelPair) -> None:
    """Raise for hooks on whole layers: the end of a layer is done here by hand, so they would not see it."""
    hooked = [place for place, layer in enumerate(layers_of(pair.base)) if layer._forward_hooks]
    if hooked:
        raise ArchitectureError(
            f"layer {hooked[0]} of the base has forward hooks, which the suffix engine would pass by. Remove them, or "
            'use engine="swap".'
        )


def _chunks(group: Sequence[Component], runs: Sequence[_Run], batch_tokens: int) -> Iterator[list[Component]]:
    """Components of one layer that share a forward call; which ones depends on nothing but the settings."""
    width = max(1, batch_tokens // max(run.residual.shape[0] * run.residual.shape[1] for run in runs))
    for start in range(0, len(group), width):
        yield list(group[start : start + width])


def _gather(parts: Sequence[Tensor], runs: Sequence[_Run]) -> Tensor:
    """Results of the batches of prompts, put back into the order of the prompts."""
    order = torch.tensor([index for run in runs for index in run.prompts])
    return torch.cat(list(parts))[order.argsort()]


@dataclass(kw_only=True)
class _Run:
    """One batch of prompts on its way up the base.

    Attributes:
        pair: The two models.
        anchor: Where and along what to read.
        prompts: Places of its prompts in the whole list.
        index: Readout positions, shape `(prompt, position)`.
        tokens: Right-padded token ids, shape `(prompt, token)`.
        calls: What the base hands to each layer beside the residual stream.
        base: Readout of the base, shape `(prompt,)`.
        layer: The layer that the residual enters.
        residual: Base residual stream entering `layer`, shape `(prompt, token, feature)`.
    """

    pair: ModelPair
    anchor: Anchor
    prompts: list[int]
    index: Tensor
    tokens: Tensor
    calls: list[_Call]
    base: Tensor
    residual: Tensor
    layer: int = 0
    _writes: _Writes | None = field(default=None)

    @classmethod
    def start(cls, pair: ModelPair, token_ids: Sequence[Sequence[int]], prompts: list[int], anchor: Anchor) -> _Run:
        tokens = pad(token_ids, embedding_weight(pair.base).device)
        calls, residual, last = _record(pair, tokens, anchor.layer)
        index = readout_index(token_ids, anchor.positions)
        return cls(
            pair=pair,
            anchor=anchor,
            prompts=prompts,
            index=index,
            tokens=tokens,
            calls=calls,
            base=anchor.read(at_positions(last, index)),
            residual=residual,
        )

    def measure(self, chunk: Sequence[Component], layer: int | None) -> Tensor:
        """Patched readouts of components of one layer, not below that of earlier calls; `(component, prompt)`."""
        if layer is None:
            leaving, above = torch.stack([self._embedded(component) for component in chunk]), 0
        else:
            while self.layer < layer:
                self.residual = self.calls[self.layer](self.residual)
                self.layer += 1
                self._writes = None
            self._writes = self._writes or _Writes(self.pair, self.layer, self.calls[self.layer], self.residual)
            leaving, above = self._writes.leaving(chunk), self.layer + 1
        rows = leaving.flatten(0, 1)
        for call in self.calls[above : self.anchor.layer]:
            rows = call.widened(len(chunk), len(self.prompts))(rows)
        read = self.anchor.read(at_positions(rows, self.index.repeat(len(chunk), 1)))
        return read.view(len(chunk), len(self.prompts))

    def _embedded(self, component: Component) -> Tensor:
        weights = _hybrid(self.pair, [component], prefix="")
        return _record(self.pair, self.tokens, 0, weights=weights)[1]


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A layer of the base with everything it is called with beside the residual stream."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, residual: Tensor, weights: Weights | None = None) -> Tensor:
        """What leaves the layer, with some weights replaced; shapes `(row, token, feature)`."""
        arguments = (residual, *self.args)
        output = (
            functional_call(self.layer, weights, arguments, self.kwargs)
            if weights
            else self.layer(*arguments, **self.kwargs)
        )
        leaving: Tensor = output[0] if isinstance(output, tuple) else output
        return leaving

    def widened(self, n_components: int, n_prompts: int) -> _Call:
        """The same call for rows that repeat the prompts once for each component."""

        def widen(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == n_prompts > 1:
                return value.repeat(n_components, *[1] * (value.ndim - 1))
            if isinstance(value, tuple):
                return tuple(widen(item) for item in value)
            return value

        if n_components == 1:
            return self
        return _Call(
            layer=self.layer,
            args=tuple(widen(value) for value in self.args),
            kwargs={name: widen(value) for name, value in self.kwargs.items()},
        )


class _Done(Exception):
    """All that was wanted of a layer has been seen."""


def _record(
    pair: ModelPair, tokens: Tensor, last: int, *, weights: Weights | None = None
) -> tuple[list[_Call], Tensor, Tensor]:
    """Run the base up to the residual entering layer `last`.

    Returns:
        The calls of the layers below `last`; the residuals entering layer 0 and layer `last`.
    """
    layers = layers_of(pair.base)
    calls: list[_Call] = []
    ends: dict[bool, Tensor] = {}

    def see(layer: int, residual: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ends.setdefault(False, residual)
        ends[True] = residual
        if layer < last:
            calls.append(_Call(layer=layers[layer], args=args, kwargs=kwargs))

    walk(pair.base, tokens, last, see, weights=weights)
    return calls, ends[False], ends[True]


def _hybrid(pair: ModelPair, members: Sequence[Component], *, prefix: str) -> Weights:
    """Parameters with the members' specialized slices in the base's tensors, named relative to `prefix`."""
    weights: Weights = {}
    owned = [piece for member in members for piece in slices(pair.architecture, member)]
    for piece in owned:
        name = piece.parameter.removeprefix(prefix)
        ours = pair.base.get_parameter(piece.parameter)
        if name not in weights:
            weights[name] = ours.detach().clone()
        piece.of(weights[name]).copy_(piece.of(pair.specialized_weight(piece.parameter)))
    return weights


class _Writes:
    """What the components of one layer would write, from one base call and a few hybrid calls of that layer."""

    def __init__(self, pair: ModelPair, layer: int, call: _Call, residual: Tensor) -> None:
        self.pair = pair
        self.layer = layer
        self.call = call
        self.residual = residual
        self.family = pair.architecture.family
        self.prefix = pair.architecture.layer_prefix(layer)
        seen = self._watch({}, self.family.o, self.family.mlp_out)
        self.heads_in, self.attention_write = seen[self.family.o]
        self.neurons_in, _ = seen[self.family.mlp_out]
        self.base_leaving = seen[""][1]
        self.residual = residual.to(self.attention_write.device)
        self._hybrid_inputs: dict[str, Tensor] = {}

    def leaving(self, chunk: Sequence[Component]) -> Tensor:
        """Residual that leaves the layer with each component patched: `(component, prompt, token, feature)`."""
        leaving = self.base_leaving.new_empty((len(chunk), *self.base_leaving.shape))
        through_mlp = [place for place, c in enumerate(chunk) if c.unit in ("heads", "heads.q", "heads.o", "kvs")]
        if through_mlp:
            writes = torch.stack([self.attention_write + self._attention_change(chunk[place]) for place in through_mlp])
            residual = self.residual.expand(len(through_mlp), *self.residual.shape)
            rows = self.family.after_attention(self.call.layer, residual.flatten(0, 1), writes.flatten(0, 1))
            leaving[through_mlp] = rows.view_as(writes)
        for place, component in enumerate(chunk):
            if component.unit == "neurons":
                leaving[place] = self.base_leaving + self._neuron_change(component)
            elif place not in through_mlp:
                leaving[place] = self.call(self.residual, _hybrid(self.pair, [component], prefix=self.prefix))
        return leaving

    def _attention_change(self, component: Component) -> Tensor:
        """Change of the attention's write, shape `(prompt, token, feature)`."""
        index = component.index or 0
        match component.unit:
            case "heads.o":
                return self._head(self.heads_in, index) @ (self._columns(index, True) - self._columns(index, False))
            case "heads.q":
                new = self._head(self._inputs_with("heads.q"), index)
                return (new - self._head(self.heads_in, index)) @ self._columns(index, False)
            case "heads":
                new = self._head(self._inputs_with("heads.q"), index) @ self._columns(index, True)
                return new - self._head(self.heads_in, index) @ self._columns(index, False)
            case _:
                size = self.pair.architecture.heads_per_kv
                readers = range(index * size, (index + 1) * size)
                new = self._inputs_with("kvs")
                changes = [
                    (self._head(new, head) - self._head(self.heads_in, head)) @ self._columns(head, False)
                    for head in readers
                ]
                return torch.stack(changes).sum(dim=0)

    def _neuron_change(self, component: Component) -> Tensor:
        index = component.index or 0
        column = self._piece(f"{self.prefix}{self.family.mlp_out}.weight", component)
        ours = self.pair.base.get_parameter(column.parameter).detach()
        theirs = self.pair.specialized_weight(column.parameter)
        base_write = self.neurons_in[..., index, None] * column.of(ours).flatten()
        return self._inputs_with("neurons")[..., index, None] * column.of(theirs).flatten().to(ours) - base_write

    def _inputs_with(self, unit: str) -> Tensor:
        """Input of `o` (or, for neurons, of the out-matrix) when every component of a unit is specialized.

        Heads read only their own queries, groups feed only their own heads and a neuron only itself, so one call
        serves all of them.
        """
        if unit not in self._hybrid_inputs:
            module = self.family.mlp_out if unit == "neurons" else self.family.o
            if unit == "neurons":  # all of them: whole matrices instead of thousands of slices
                weights = {
                    f"{path}.{name}": self.pair.specialized_weight(f"{self.prefix}{path}.{name}").to(ours.device)
                    for path in self.family.mlp_in
                    for name, ours in self.call.layer.get_submodule(path).named_parameters()
                }
            else:
                members = [c for c in components(self.pair.architecture, unit) if c.layer == self.layer]
                weights = _hybrid(self.pair, members, prefix=self.prefix)
            self._hybrid_inputs[unit] = self._watch(weights, module, stop=True)[module][0]
        return self._hybrid_inputs[unit]

    def _head(self, heads_in: Tensor, head: int) -> Tensor:
        size = self.pair.architecture.head_dim
        return heads_in[..., head * size : (head + 1) * size]

    def _columns(self, head: int, specialized: bool) -> Tensor:
        """The head's columns of `o`, as `(head feature, feature)`."""
        component = Component(address=f"L{self.layer}.H{head}.o", unit="heads.o", layer=self.layer, index=head)
        piece = self._piece(f"{self.prefix}{self.family.o}.weight", component)
        weight = self.pair.specialized_weight(piece.parameter) if specialized else None
        ours = self.pair.base.get_parameter(piece.parameter).detach()
        cut = piece.of(ours if weight is None else weight.to(ours))
        return cut if piece.axis == 0 else cut.T

    def _piece(self, parameter: str, component: Component) -> Slice:
        owned = slices(self.pair.architecture, component)
        return next(piece for piece in owned if piece.parameter == parameter)

    def _watch(self, weights: Weights, *modules: str, stop: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
        """Call the layer and note input and output of some of its modules (`""`: the layer's own output)."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = []
        for path in modules:

            def before(_module: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
                seen[path] = (args[0], args[0])
                if stop:
                    raise _Done

            def after(_module: nn.Module, args: tuple[Any, ...], output: Tensor, path: str = path) -> None:
                seen[path] = (args[0], output)

            module = self.call.layer.get_submodule(path)
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        try:
            leaving = self.call(self.residual, weights)
            seen[""] = (self.residual, leaving)
        except _Done:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen
