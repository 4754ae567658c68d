"""The fast exact engine: one base prefix, each specialized layer once, then only the layers up to the anchor.

For a fixed input, changing a component of layer l changes nothing below l and first changes the component's own write
into the residual stream. So the base runs once, layer by layer. At each layer, a few calls give what every head and
neuron would write once it is patched; each difference is added to the base's own write, and many components side by
side on the batch axis run through layers l+1 up to the anchor. Prompts are packed behind the starts they share, and the
last layer below the anchor works at the readout positions only. Weights and activations are patched alike: they differ
in the donor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from weightpatch.architecture import embedding_weight
from weightpatch.component import Component
from weightpatch.engine import Measured
from weightpatch.engine.activations import Activations, Source, Where
from weightpatch.engine.changes import Donor
from weightpatch.engine.deliveries import Deliveries, by_prompt, check_sum
from weightpatch.engine.hybrids import Weights, layer_weights
from weightpatch.engine.leaving import Leaving
from weightpatch.packed.calls import LayerCall, record
from weightpatch.packed.packing import MOST_TOKENS, Packing, pack, side_by_side
from weightpatch.pair import ModelPair
from weightpatch.reader import Readable, Reader
from weightpatch.residuals import evaluating, pad


def sweep(
    pair: ModelPair,
    token_ids: Sequence[Sequence[int]],
    anchor: Readable,
    components: Sequence[Component],
    *,
    batch_tokens: int,
    skip: Set[Component],
    source: Source = "weights",
    where: Where = "all",
    deliveries: Deliveries | None = None,
) -> Iterator[Measured]:
    """Measure through the suffix of the model; see `engine.Sweep`.

    Args:
        pair: The two models.
        token_ids: Unpadded prompts.
        anchor: What to read, and where.
        components: What to patch; ordered by layer.
        batch_tokens: Most tokens of one forward call.
        skip: Components already known.
        source: What is patched: components' weights, or what they put out.
        where: At which tokens activations are.
        deliveries: Whose writes along the anchor's direction are read on the way up.
    """
    with evaluating(pair.base, pair.specialized):
        runs = start(
            pair, token_ids, anchor, batch_tokens=batch_tokens, source=source, where=where, deliveries=deliveries
        )
    yield from measure_all(pair, runs, components, batch_tokens=batch_tokens, skip=skip)


def measure_all(
    pair: ModelPair, runs: Sequence[Run], components: Sequence[Component], *, batch_tokens: int, skip: Set[Component]
) -> Iterator[Measured]:
    """Patch components one after another in runs that `start` began; arguments as in `sweep`."""
    base = gather([run.base for run in runs], runs)
    for layer, members in groupby(components, key=lambda component: component.layer):
        for chunk in chunks(list(members), runs, batch_tokens):
            if skip >= set(chunk):
                continue
            # Left before anything is handed out: the caller's own mode is not ours.
            with evaluating(pair.base, pair.specialized):
                parts = [run.measure(chunk, layer) for run in runs]
            for place, component in enumerate(chunk):
                delivered = None
                if parts[0][1] is not None:
                    delivered = gather([part[1][place] for part in parts if part[1] is not None], runs)
                readout = gather([part[0][place] for part in parts], runs)
                yield Measured(component=component, readout=readout, base=base, delivered=delivered)


def start(
    pair: ModelPair,
    token_ids: Sequence[Sequence[int]],
    anchor: Readable,
    *,
    batch_tokens: int,
    source: Source = "weights",
    where: Where = "all",
    deliveries: Deliveries | None = None,
) -> list[Run]:
    """Run the base on packed prompts up to the anchor; arguments as in `sweep`."""
    reader = anchor.reader(token_ids)
    rows = pack(token_ids, most_tokens=min(batch_tokens, MOST_TOKENS))
    if where == "readouts" and any(_meet(row, reader) for row in rows):
        rows = side_by_side(token_ids, most_tokens=min(batch_tokens, MOST_TOKENS))
    return [
        Run.start(
            pair,
            packing,
            [token_ids[prompt] for prompt in packing.prompts],
            reader,
            source=source,
            where=where,
            deliveries=deliveries,
        )
        for packing in rows
    ]


def delivered(
    pair: ModelPair,
    token_ids: Sequence[Sequence[int]],
    anchor: Readable,
    deliveries: Deliveries,
    *,
    batch_tokens: int,
) -> tuple[Tensor, Tensor]:
    """What targets write along the anchor's direction in the base and in the specialized model.

    Args:
        pair: The two models.
        token_ids: Unpadded prompts.
        anchor: Where it is read.
        deliveries: Whose writes.
        batch_tokens: Most tokens of one forward call.

    Returns:
        Each of shape `(target, prompt)`, float64.
    """
    with evaluating(pair.base, pair.specialized):
        runs = start(pair, token_ids, anchor, batch_tokens=batch_tokens, source="activations", deliveries=deliveries)
        found = [run.delivered_by_both() for run in runs]
    base, specialized = (gather([part[side] for part in found], runs) for side in (0, 1))
    return base, specialized


def _meet(packing: Packing, reader: Reader) -> bool:
    """Whether a prompt is read at a token that another one has too, but is not read at."""
    places = packing.paths_at([reader.places[prompt] for prompt in packing.prompts])
    reads = {place for row in places for place in row}
    return any(reads & set(path) != set(own) for path, own in zip(packing.paths, places, strict=True))


def reads_of(packing: Packing, reader: Reader) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Where a packed row is read, `(read,)`, and for each prompt which of these places are its own, `(position,)`."""
    places = packing.paths_at([reader.places[prompt] for prompt in packing.prompts])
    wanted = sorted({place for row in places for place in row})
    return torch.tensor(wanted), tuple(torch.tensor([wanted.index(one) for one in row]) for row in places)


def chunks(group: Sequence[Component], runs: Sequence[Run], batch_tokens: int) -> Iterator[list[Component]]:
    """Components of one layer that share a forward call; which ones depends on nothing but the settings."""
    width = max(1, batch_tokens // max(run.packing.n_tokens for run in runs))
    for begin in range(0, len(group), width):
        yield list(group[begin : begin + width])


def gather(parts: Sequence[Tensor], runs: Sequence[Run]) -> Tensor:
    """Results of the packed rows, put back into the order of the prompts: `(..., prompt)`."""
    order = torch.tensor([prompt for run in runs for prompt in run.packing.prompts])
    return torch.cat(list(parts), dim=-1)[..., order.argsort()]


@dataclass(kw_only=True)
class Run:
    """One packed row of prompts on its way up the base.

    Attributes:
        pair: The two models.
        reader: What is read, and where.
        packing: How the prompts lie in the row.
        calls: The base's layers below the anchor.
        donor: What gives patches.
        reads: Places of the row that are read, shape `(read,)`.
        index: For each prompt, the places where it is read among `reads`, shape `(position,)`.
        residual: Base residual stream entering `layer`, shape `(1, token, feature)`.
        deliveries: Whose writes are read on the way, if any.
        layer: The layer that the residual enters.
        base: Readout of the base, shape `(prompt,)`.
        delivered: What the targets deliver in the base, shape `(target, prompt)`.
    """

    pair: ModelPair
    reader: Reader
    packing: Packing
    calls: tuple[LayerCall, ...]
    donor: Donor
    reads: Tensor
    index: tuple[Tensor, ...]
    residual: Tensor
    deliveries: Deliveries | None = None
    layer: int = 0
    base: Tensor = field(init=False)
    delivered: Tensor | None = field(init=False)
    _here: Leaving | None = field(default=None)

    def __post_init__(self) -> None:
        heard: _Heard = {}
        if self.deliveries and self.layer == 0:
            heard[None] = self.deliveries.embedded(self.residual[:, self.reads.to(self.residual.device)])
        rows = self._rise(self.residual, self.layer, heard=heard, is_base=True)
        self.base = self.read(rows)[0]
        self.delivered = None
        if self.deliveries:
            self.delivered = torch.zeros(len(self.deliveries.targets), len(self.index), dtype=torch.float64)
            self.delivered = self._changes(heard, 1)[0]

    @classmethod
    def start(
        cls,
        pair: ModelPair,
        packing: Packing,
        token_ids: Sequence[Sequence[int]],
        reader: Reader,
        *,
        source: Source,
        where: Where,
        deliveries: Deliveries | None,
    ) -> Run:
        """Run the base on one row up to the anchor."""
        tokens = pad(token_ids, embedding_weight(pair.base).device)
        reads, index = reads_of(packing, reader)
        calls, residual = record(pair.base, tokens, packing, reader.layer, reads)
        donor: Donor = Weights(pair=pair, packing=packing, tokens=tokens)
        if source == "activations":
            donor = Activations.of(pair, packing, tokens, calls, packing.mask(reads) if where == "readouts" else None)
        return cls(
            pair=pair,
            reader=reader,
            packing=packing,
            calls=calls,
            donor=donor,
            reads=reads,
            index=index,
            residual=residual,
            deliveries=deliveries,
        )

    def measure(self, chunk: Sequence[Component], layer: int | None) -> tuple[Tensor, Tensor | None]:
        """Patch components of one layer, not below that of earlier calls.

        Returns:
            Readouts `(component, prompt)`, and what the targets deliver more than in the base, `(component, target,
            prompt)`, if there are targets.
        """
        heard: _Heard = {}
        if layer is None:
            rows = torch.cat([self.embedded(one.members or (one,)) for one in chunk])
            if self.deliveries:
                heard[None] = self.deliveries.embedded(rows[:, self.reads.to(rows.device)])
            leaving = self._finish(rows, chunk, 0, heard)
        else:
            here = self.at(layer, only_reads=layer == self.reader.layer - 1)
            if self.deliveries:
                own = [here.parts(component) for component in chunk]
                rows = torch.cat([parts.leaving for parts, _ in own])
                heard[layer] = torch.cat(
                    [self.deliveries.of(layer, here.call, parts, override.written) for parts, override in own]
                )
            else:
                rows = here.rows(chunk)
            leaving = self._finish(rows, chunk, layer + 1, heard)
        return self.read(leaving), self._changes(heard, len(chunk)) if self.deliveries else None

    def embedded(self, members: Sequence[Component]) -> Tensor:
        """The row that enters layer 0 with some components patched that lie in no layer, `(1, token, feature)`."""
        rows = self.donor.embedded(members)
        return self.donor.where(rows, self.residual) if isinstance(self.donor, Activations) else rows

    def delivered_by_both(self) -> tuple[Tensor, Tensor]:
        """What the targets deliver in the base and in the specialized model, each `(target, prompt)`."""
        donor, deliveries = self.donor, self.deliveries
        if deliveries is None or self.delivered is None or not isinstance(donor, Activations):
            raise TypeError("only runs with targets and with activations know what both models deliver")
        heard: _Heard = {None: deliveries.embedded(donor.entering(0)[:, self.reads.to(self.residual.device)])}
        for layer, call in enumerate(self.calls):
            heard[layer] = deliveries.of(layer, call, donor.parts(layer), layer_weights(self.pair, call, layer))
        return self.delivered, self.delivered + self._changes(heard, 1)[0]

    def at(self, layer: int, *, only_reads: bool) -> Leaving:
        """The base's layer, which is not below that of earlier calls; see `Leaving`."""
        while self.layer < layer:
            self.residual = self._here.changes.leaving if self._here else self.calls[self.layer](self.residual)
            self.layer += 1
            self._here = None
        if self._here is None:
            self._here = Leaving(
                self.pair,
                self.donor,
                layer,
                self.calls[layer],
                self.residual,
                only_reads=only_reads,
            )
        return self._here

    def _finish(self, rows: Tensor, chunk: Sequence[Component], above: int, heard: _Heard) -> Tensor:
        """What reaches the anchor of components that have been patched below layer `above`: `(row, read, feature)`."""
        later = [any((member.layer or 0) >= above for member in component.members) for component in chunk]
        if not any(later):
            return self._rise(rows, above, heard=heard)
        found = []
        heard_later: list[_Heard] = []
        for place, component in enumerate(chunk):
            heard_later.append({})
            members = component.members if later[place] else ()
            found.append(self._rise(rows[place : place + 1], above, members, heard=heard_later[-1])[0])
        heard |= {layer: torch.cat([own[layer] for own in heard_later]) for layer in heard_later[0]}
        return torch.stack(found)

    def _rise(
        self,
        rows: Tensor,
        above: int,
        members: Sequence[Component] = (),
        *,
        heard: _Heard,
        is_base: bool = False,
    ) -> Tensor:
        """What reaches the anchor of rows that enter layer `above`, where members lie on the way patched too.

        Args:
            rows: Shape `(row, token, feature)`.
            above: The layer.
            members: What else is patched.
            heard: Takes up what the targets of each layer deliver.
            is_base: Whether nothing is patched, so that layers can be checked to add up.

        Returns:
            Shape `(row, read, feature)`.
        """
        if above == self.reader.layer:  # the layer below it, if there is one, gave the readout positions only
            return rows if above else rows[:, self.reads.to(rows.device)]
        for number, call in enumerate(self.calls[above:], above):
            is_last = number == self.reader.layer - 1
            here = [member for member in members if member.layer == number]
            if self.deliveries is None and not here:
                rows = call.last(rows) if is_last else call(rows)
                continue
            override = self.donor.override(number, here) if here else None
            weights, edits = (override.weights, override.edits) if override else ({}, {})
            if self.deliveries is None:
                rows = call.watch(rows, weights, edits=edits)[""][1]
                rows = call.at_reads(rows) if is_last else rows
                continue
            parts = call.parts(rows, weights, last=is_last, edits=edits)
            if is_base:
                at_reads = parts if is_last else replace(parts, leaving=call.at_reads(parts.leaving))
                check_sum(call, call.at_reads(rows).to(parts.attention.device), at_reads)
            if override:
                parts = override.delivered(parts)
            written = override.written if override else {}
            heard[number] = self.deliveries.of(number, call, parts, written)
            rows = parts.leaving
        return rows

    def read(self, rows: Tensor) -> Tensor:
        """Readouts of what reaches the anchor: `(row, read, feature)` -> `(row, prompt)`."""
        return self.reader.read_all(self.pair.base, rows.detach(), self.index, self.packing.prompts)

    def _changes(self, heard: _Heard, n_rows: int) -> Tensor:
        """What the targets deliver more than in the base, `(row, target, prompt)`."""
        if self.deliveries is None or self.delivered is None:
            raise TypeError("nothing is delivered to nobody")
        found = torch.zeros(n_rows, *self.delivered.shape, dtype=torch.float64)
        for layer, values in heard.items():
            places = self.deliveries.at(layer)
            found[:, places] = by_prompt(values, self.index) - self.delivered[places]
        return found


_Heard = dict[int | None, Tensor]
"""Layer (None: the embedding) -> what its targets deliver, `(row, target of the layer, read)`."""
