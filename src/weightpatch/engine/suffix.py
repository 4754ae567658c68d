"""The fast exact engine: one base prefix, each specialized layer once, then only the layers up to the anchor.

For a fixed input, changing a component of layer l changes nothing below l and first changes the component's own write
into the residual stream. So the base runs once, layer by layer. At each layer, hybrid calls (base module, some
specialized weights) give what every head and neuron would write; each difference is added to the base's own write, and
many components side by side on the batch axis run through layers l+1 up to the anchor. Prompts are packed behind the
starts they share, and the last layer below the anchor works at the readout positions only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from weightpatch.architecture import embedding_weight
from weightpatch.component import Component, Slice, slices
from weightpatch.engine import Measured
from weightpatch.engine.hybrids import Hybrids, embedded, hybrid
from weightpatch.packed.calls import LayerCall, record
from weightpatch.packed.packing import MOST_TOKENS, Packing, pack
from weightpatch.pair import ModelPair
from weightpatch.reader import Readable, Reader
from weightpatch.residuals import evaluating, pad

_ALONE = ("heads", "heads.q", "kvs")
"""Units whose members, all patched at once, do not disturb one another unless a norm spans them."""


def sweep(
    pair: ModelPair,
    token_ids: Sequence[Sequence[int]],
    anchor: Readable,
    components: Sequence[Component],
    *,
    batch_tokens: int,
    skip: Set[Component],
) -> Iterator[Measured]:
    """Measure through the suffix of the model; see `engine.Sweep`."""
    reader = anchor.reader(token_ids)
    with evaluating(pair.base):
        runs = [
            _Run.start(pair, packing, [token_ids[prompt] for prompt in packing.prompts], reader)
            for packing in pack(token_ids, most_tokens=min(batch_tokens, MOST_TOKENS))
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


def _chunks(group: Sequence[Component], runs: Sequence[_Run], batch_tokens: int) -> Iterator[list[Component]]:
    """Components of one layer that share a forward call; which ones depends on nothing but the settings."""
    width = max(1, batch_tokens // max(run.packing.n_tokens for run in runs))
    for start in range(0, len(group), width):
        yield list(group[start : start + width])


def _gather(parts: Sequence[Tensor], runs: Sequence[_Run]) -> Tensor:
    """Results of the packed rows, put back into the order of the prompts."""
    order = torch.tensor([prompt for run in runs for prompt in run.packing.prompts])
    return torch.cat(list(parts))[order.argsort()]


@dataclass(kw_only=True)
class _Run:
    """One packed row of prompts on its way up the base.

    Attributes:
        pair: The two models.
        reader: What is read, and where.
        packing: How the prompts lie in the row.
        tokens: Right-padded token ids, shape `(prompt, token)`.
        calls: The base's layers below the anchor.
        reads: Places of the row that are read, shape `(read,)`.
        index: For each prompt, the places where it is read among `reads`, shape `(position,)`.
        residual: Base residual stream entering `layer`, shape `(1, token, feature)`.
        base: Readout of the base, shape `(prompt,)`.
        layer: The layer that the residual enters.
    """

    pair: ModelPair
    reader: Reader
    packing: Packing
    tokens: Tensor
    calls: tuple[LayerCall, ...]
    reads: Tensor
    index: tuple[Tensor, ...]
    residual: Tensor
    base: Tensor = field(init=False)
    layer: int = 0
    _writes: _Writes | None = field(default=None)

    @classmethod
    def start(
        cls,
        pair: ModelPair,
        packing: Packing,
        token_ids: Sequence[Sequence[int]],
        reader: Reader,
    ) -> _Run:
        tokens = pad(token_ids, embedding_weight(pair.base).device)
        places = packing.paths_at([reader.places[prompt] for prompt in packing.prompts])
        wanted = sorted({place for row in places for place in row})
        reads, index = torch.tensor(wanted), tuple(torch.tensor([wanted.index(one) for one in row]) for row in places)
        calls, residual = record(pair.base, tokens, packing, reader.layer, reads)
        run = cls(
            pair=pair,
            reader=reader,
            packing=packing,
            tokens=tokens,
            calls=calls,
            reads=reads,
            index=index,
            residual=residual,
        )
        run.base = run._read(run._rise(residual, 0))[0]
        return run

    def measure(self, chunk: Sequence[Component], layer: int | None) -> Tensor:
        """Patched readouts of components of one layer, not below that of earlier calls; `(component, prompt)`."""
        if layer is None:
            rows = [embedded(self.pair, self.packing, self.tokens, one.members or (one,)) for one in chunk]
            return self._read(self._finish(torch.cat(rows), chunk, 0))
        while self.layer < layer:
            self.residual = self._writes.hybrids.leaving if self._writes else self.calls[self.layer](self.residual)
            self.layer += 1
            self._writes = None
        if self._writes is None:
            self._writes = _Writes(
                self.pair, layer, self.calls[layer], self.residual, only_reads=layer == self.reader.layer - 1
            )
        return self._read(self._finish(self._writes.leaving(chunk), chunk, layer + 1))

    def _finish(self, rows: Tensor, chunk: Sequence[Component], above: int) -> Tensor:
        """What reaches the anchor of components that have been patched below layer `above`: `(row, read, feature)`."""
        later = [any((member.layer or 0) >= above for member in component.members) for component in chunk]
        if not any(later):
            return self._rise(rows, above)
        plain = [place for place, goes_on in enumerate(later) if not goes_on]
        found = dict(zip(plain, self._rise(rows[plain], above), strict=True)) if plain else {}
        for place, component in enumerate(chunk):
            if later[place]:
                found[place] = self._rise(rows[place : place + 1], above, component.members)[0]
        return torch.stack([found[place] for place in range(len(chunk))])

    def _rise(self, rows: Tensor, above: int, members: Sequence[Component] = ()) -> Tensor:
        """What reaches the anchor of rows that enter layer `above`, where members lie on the way specialized too.

        Returns:
            Shape `(row, read, feature)`.
        """
        if above == self.reader.layer:  # the layer below it, if there is one, gave the readout positions only
            return rows if above else rows[:, self.reads.to(rows.device)]
        for number, call in enumerate(self.calls[above:], above):
            here = [member for member in members if member.layer == number]
            if here:
                rows = call(rows, hybrid(self.pair, here, prefix=self.pair.architecture.layer_prefix(number)))
            elif number < self.reader.layer - 1:
                rows = call(rows)
            else:
                return call.last(rows)
        return rows[:, self.reads.to(rows.device)]

    def _read(self, rows: Tensor) -> Tensor:
        return self.reader.read_all(self.pair.base, rows.detach(), self.index, self.packing.prompts)


class _Writes:
    """What leaves one layer with each of its components patched, from one base call and a few hybrid calls of it.

    Args:
        pair: The two models.
        layer: The layer's number.
        call: The layer.
        residual: Base residual stream entering it, shape `(1, token, feature)`.
        only_reads: Whether what leaves it is wanted at the readout positions only.
    """

    def __init__(self, pair: ModelPair, layer: int, call: LayerCall, residual: Tensor, *, only_reads: bool) -> None:
        self.pair = pair
        self.layer = layer
        self.call = call
        self.residual = residual
        self.only_reads = only_reads
        self.family = pair.architecture.family
        self.prefix = pair.architecture.layer_prefix(layer)
        self.hybrids = Hybrids.of(pair, layer, call, residual)
        self.attention = self.hybrids.attention
        self.entering = residual.to(self.attention.device)

    def leaving(self, chunk: Sequence[Component]) -> Tensor:
        """Residual that leaves the layer with each component patched: `(component, token or read, feature)`."""
        rows: dict[int, Tensor] = {}
        attention = [place for place, component in enumerate(chunk) if self._changes_attention(component)]
        if attention:
            changes = torch.cat([self._attention_change(chunk[place]) for place in attention])
            writes = self._wanted(self.attention) + changes
            rows |= zip(attention, self._finish(writes).unsqueeze(1), strict=True)
        neurons = [place for place, component in enumerate(chunk) if self._is_plain_neuron(component)]
        if neurons:
            mlp = self._wanted(self.hybrids.mlp) + torch.cat([self._neuron_change(chunk[place]) for place in neurons])
            writes = self._wanted(self.attention).expand_as(mlp)
            rows |= zip(neurons, self._finish(writes, mlp=mlp).unsqueeze(1), strict=True)
        for place, component in enumerate(chunk):
            if place not in rows:
                rows[place] = self._hybrid_rows(component)
        return torch.cat([rows[place] for place in range(len(chunk))])

    def _wanted(self, tensor: Tensor) -> Tensor:
        """A tensor of the packed row where it is wanted: `(1, token, feature)` -> `(1, token or read, feature)`."""
        return self.call.at_reads(tensor) if self.only_reads else tensor

    def _finish(self, attention: Tensor, *, mlp: Tensor | None = None) -> Tensor:
        return self.call.finish(self._wanted(self.entering).expand_as(attention), {}, attention=attention, mlp=mlp)

    def _changes_attention(self, component: Component) -> bool:
        """Whether the component's change of the attention's write can be had from calls shared with its like."""
        return component.unit == "heads.o" or (
            component.unit in _ALONE and self.pair.architecture.heads_are_independent
        )

    def _is_plain_neuron(self, component: Component) -> bool:
        return component.unit == "neurons" and component.expert is None

    def _hybrid_rows(self, component: Component) -> Tensor:
        """What leaves the layer when it is called with the component's weights in it."""
        here = [one for one in component.members or (component,) if one.layer == self.layer]
        weights = hybrid(self.pair, here, prefix=self.prefix)
        attention = self.attention
        beside = tuple(f"{path}." for path in (*self.family.mlp, *self.family.norm_mlp))
        if not all(name.startswith(beside) for name in weights):
            attention = self.call.attend(self.residual, weights, only_reads=self.only_reads)
        return self.call.finish(self._wanted(self.entering), weights, attention=self._wanted(attention))

    def _attention_change(self, component: Component) -> Tensor:
        """Change of the attention's write, shape `(1, token or read, feature)`."""
        index = component.index or 0
        match component.unit:
            case "heads.o":
                return self._head("", index) @ (self._columns(index, True) - self._columns(index, False))
            case "heads.q":
                return (self._head("heads.q", index) - self._head("", index)) @ self._columns(index, False)
            case "heads":
                new = self._head("heads.q", index) @ self._columns(index, True)
                return new - self._head("", index) @ self._columns(index, False)
            case _:
                size = self.pair.architecture.heads_per_kv
                readers = range(index * size, (index + 1) * size)
                changes = [
                    (self._head("kvs", head) - self._head("", head)) @ self._columns(head, False) for head in readers
                ]
                return torch.stack(changes).sum(dim=0)

    def _head(self, unit: str, head: int) -> Tensor:
        """A head's part of the input of `o`, with all of a unit specialized (`""`: none), where it is wanted.

        Heads read only their own queries and groups feed only their own heads, so one call serves all of them.
        """
        size = self.pair.architecture.head_dim
        heads_in = self.hybrids.heads_in_with(unit) if unit else self.hybrids.heads_in
        return self._wanted(heads_in[..., head * size : (head + 1) * size])

    def _neuron_change(self, component: Component) -> Tensor:
        """Change of the MLP's write, shape `(1, token or read, feature)`."""
        index = component.index or 0
        column = self._piece(f"{self.prefix}{self.family.mlp_out}.weight", component)
        ours = column.of(self.pair.base.get_parameter(column.parameter).detach()).flatten()
        theirs = column.of(self.pair.specialized_weight(column.parameter)).flatten().to(ours.device)
        old, new = (
            self._wanted(inputs)[..., index, None] for inputs in (self.hybrids.neurons_in, self.hybrids.neurons_in_with)
        )
        return new * theirs - old * ours

    def _columns(self, head: int, specialized: bool) -> Tensor:
        """The head's columns of `o`, as `(head feature, feature)`."""
        component = Component(address=f"L{self.layer}.H{head}.o", unit="heads.o", layer=self.layer, index=head)
        piece = self._piece(f"{self.prefix}{self.family.o}.weight", component)
        ours = self.pair.base.get_parameter(piece.parameter).detach()
        cut = piece.of(self.pair.specialized_weight(piece.parameter).to(ours.device) if specialized else ours)
        return cut if piece.axis == 0 else cut.T

    def _piece(self, parameter: str, component: Component) -> Slice:
        owned = slices(self.pair.architecture, component)
        return next(piece for piece in owned if piece.parameter == parameter)
