"""Direct edges: only the target sees what a patched supplier writes; everything between stays what it is in the base.

For each supplier the change of its module's contribution to the residual stream is added to the stream that enters the
target's layer, and the target's own sublayer is called once on many such rows. No layer between is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from weightpatch.component import Component
from weightpatch.engine.activations import Source
from weightpatch.engine.deliveries import Deliveries, by_prompt
from weightpatch.engine.leaving import Leaving, is_plain_neuron
from weightpatch.engine.suffix import Run, chunks, gather, start
from weightpatch.errors import ComponentError
from weightpatch.packed.calls import Edits, LayerCall, Parts
from weightpatch.pair import ModelPair
from weightpatch.reader import Readable
from weightpatch.residuals import evaluating

Receives = Literal["all", "q", "k", "v"]
"""Which of an attention's inputs see the supplier: all, or the queries', keys' or values' projection alone."""

_OF_ATTENTION = ("attns", "heads", "heads.q", "heads.o", "kvs")
_OF_MLP = ("mlps", "neurons", "experts", "routers")


def sublayer(component: Component) -> Literal["embed", "attention", "mlp", "block"]:
    """The module by whose write a component acts.

    Raises:
        ComponentError: a set, the last norm or the output head, which have no single write below the output.
    """
    if component.address == "embed":
        return "embed"
    if component.unit in _OF_ATTENTION or component.address.endswith((".norm.attn", ".attn.rest")):
        return "attention"
    if component.unit in _OF_MLP or component.address.endswith((".norm.mlp", ".mlp.rest")):
        return "mlp"
    if component.unit == "blocks":
        return "block"
    raise ComponentError(f"{component} has no single write that an edge could start from. Name its members one by one.")


def direct(
    pair: ModelPair,
    token_ids: Sequence[Sequence[int]],
    anchor: Readable,
    suppliers: Sequence[Component],
    target: Component | None,
    *,
    direction: Tensor,
    receives: Receives,
    source: Source,
    batch_tokens: int,
) -> Iterator[tuple[Component, Tensor]]:
    """Measure the direct edge from each supplier into one target.

    Args:
        pair: The two models.
        token_ids: Unpadded prompts.
        anchor: Where it is read.
        suppliers: Upstream of the target, ordered by layer.
        target: A head, an attention, an MLP or a neuron of one; None: the anchor itself.
        direction: The anchor's, shape `(feature,)`.
        receives: Which inputs of the target's attention see the supplier.
        source: What is patched in the supplier.
        batch_tokens: Most tokens of one call.

    Yields:
        Each supplier with the change of what the target writes along the direction, shape `(prompt,)`, float64.
    """
    if receives not in get_args(Receives):
        raise ComponentError(f"unknown input {receives!r}. Choose one of {', '.join(get_args(Receives))}.")
    if receives != "all" and (target is None or sublayer(target) != "attention"):
        raise ComponentError(
            f"{target or 'the anchor'} has no {receives}: only heads and attentions have inputs q, k, v."
        )
    deliveries = Deliveries(pair=pair, targets=(target,) if target else (), direction=direction)
    with evaluating(pair.base, pair.specialized):
        runs = start(pair, token_ids, anchor, batch_tokens=batch_tokens, source=source)
        ends = [_End(run, deliveries, target, receives) for run in runs]
    for layer, group in groupby(suppliers, key=lambda one: one.layer):
        for chunk in chunks(list(group), runs, batch_tokens):
            with evaluating(pair.base, pair.specialized):
                parts = [end.change(torch.cat(_added(run, chunk, layer))) for run, end in zip(runs, ends, strict=True)]
            found = gather(parts, runs)
            yield from zip(chunk, found, strict=True)


def is_upstream(supplier: Component, target: Component | None, *, is_parallel: bool) -> bool:
    """Whether what a supplier writes enters the target.

    Args:
        supplier: A component of `sublayer`.
        target: As in `direct`.
        is_parallel: Whether attention and MLP of one layer do not see one another.
    """
    if target is None or supplier.layer is None or target.layer is None:
        return True
    before = sublayer(supplier) == "attention" and sublayer(target) == "mlp" and not is_parallel
    return supplier.layer < target.layer or (supplier.layer == target.layer and before)


def is_parallel(pair: ModelPair, token_ids: Sequence[Sequence[int]], anchor: Readable) -> bool:
    """Whether the MLP of a layer leaves alone what the attention of that layer writes, as in GPT-NeoX."""
    with evaluating(pair.base, pair.specialized):
        run = start(pair, token_ids[:1], anchor, batch_tokens=1)[0]
        if not run.calls:
            return False
        call, residual = run.calls[0], run.residual
        probe = torch.linspace(-1, 1, residual.shape[-1]).to(residual).expand_as(residual).contiguous()
        seen = [call.mlp_behind(residual, attention)[0] for attention in (probe, -probe)]
    return bool(torch.equal(seen[0], seen[1]))


def _added(run: Run, chunk: Sequence[Component], layer: int | None) -> list[Tensor]:
    """What each of some patched components of a layer adds to the residual stream: `(1, token, feature)` each."""
    if layer is None:
        return [run.embedded((one,)) - run.residual for one in chunk]
    here, call = run.at(layer, only_reads=False), run.calls[layer]
    base = {
        "attention": call.alone(here.entering, {}, attention=here.changes.attention, mlp=None),
        "mlp": call.alone(here.entering, {}, attention=None, mlp=here.changes.mlp),
        "block": here.changes.leaving - here.entering,
    }
    return [_contribution(here, one) - base[sublayer(one)] for one in chunk]


def _contribution(here: Leaving, component: Component) -> Tensor:
    """What the component's sublayer adds to the residual stream once it is patched, `(1, token, feature)`."""
    call, kind = here.call, sublayer(component)
    if here.changes.heads(component.unit):
        write = here.changes.attention + here.attention_change(component)
        return call.alone(here.entering, {}, attention=write, mlp=None)
    if is_plain_neuron(component):
        return call.alone(here.entering, {}, attention=None, mlp=here.changes.mlp + here.neuron_change(component))
    override = here.changes.override([component])
    seen = call.watch(here.residual, override.weights, call.family.o, call.mlp_path, edits=override.edits)
    if kind == "block":
        return seen[""][1] - here.entering
    if kind == "attention":
        return call.alone(here.entering, override.weights, attention=seen[call.family.o][1], mlp=None)
    write = seen[call.mlp_path][1].view_as(here.changes.mlp)
    return call.alone(here.entering, override.weights, attention=None, mlp=write)


class _End:
    """The target in one packed row."""

    def __init__(self, run: Run, deliveries: Deliveries, target: Component | None, receives: Receives) -> None:
        self.run = run
        self.deliveries = deliveries
        self.target = target
        self.edits: Edits = {}
        if target is None or target.layer is None:
            return
        residual = run.residual
        for call in run.calls[: target.layer]:
            residual = call(residual)
        self.layer = target.layer
        self.call = run.calls[target.layer]
        self.residual = residual
        self.parts = self.call.parts(residual, {})
        if receives != "all":
            self.edits = _kept(run.pair, self.call, residual, receives)
        self.base = self._read(self.parts)

    def change(self, added: Tensor) -> Tensor:
        """What the target then writes more along the direction, `(row, token, feature)` -> `(row, prompt)`."""
        if self.target is None:
            along = self.deliveries.direction.to(added.dtype).to(added.device)
            at_reads = added.index_select(1, self.run.reads.to(added.device)) @ along
            return by_prompt(at_reads[:, None], self.run.index)[:, 0]
        rows = self.residual + added.to(self.residual.device)
        parts = {
            name: getattr(self.parts, name).expand(len(rows), -1, -1)
            for name in ("heads_in", "attention", "neurons_in", "mlp", "leaving")
        }
        if sublayer(self.target) == "attention":
            parts["heads_in"], parts["attention"] = self.call.attend_at_reads(rows, self.edits)
        else:
            attention = parts["attention"]
            at_reads = self.call.at_reads(rows).to(attention.device)
            parts["neurons_in"], parts["mlp"], _ = self.call.mlp_behind(at_reads, attention)
        return self._read(Parts(**parts)) - self.base

    def _read(self, parts: Parts) -> Tensor:
        delivered = self.deliveries.of(self.layer, self.call, parts, {})
        return by_prompt(delivered, self.run.index)[:, 0]


def _kept(pair: ModelPair, call: LayerCall, residual: Tensor, receives: Receives) -> Edits:
    """Edits by which all projections but one put out what they do in the base."""
    family, about = pair.architecture.family, pair.architecture
    paths = dict.fromkeys((family.q, family.k, family.v))
    seen = call.watch(residual, {}, *paths)
    n_parts = about.n_heads if receives == "q" else about.n_kv_heads
    received = [place for index in range(n_parts) for place in range(*about.head_outputs(receives, index))]

    def edit_of(path: str) -> Any:
        base = seen[path][1].detach().clone()
        is_received = path == getattr(family, receives)

        def edit(_module: nn.Module, _entering: Tensor, output: Tensor) -> Tensor:
            kept = base.expand_as(output).clone()
            if is_received:
                kept[..., received] = output[..., received]
            return kept

        return edit

    return {path: edit_of(path) for path in paths}
