"""Suppliers of given targets: estimated, patched, and the edges between them; one step of a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from weightpatch.anchor import Anchor
from weightpatch.component import Component, components
from weightpatch.errors import ComponentError, NoGapError
from weightpatch.flows import Flow, along_anchor, layer_calls, toward_specialized
from weightpatch.graph import Edge, Round, Share
from weightpatch.jsonable import finite
from weightpatch.localization import deliver, reaches, sweep
from weightpatch.packed.calls import LayerCall
from weightpatch.pair import ModelPair
from weightpatch.paths import ANCHOR, direct_changes
from weightpatch.prompts import ContrastPrompts
from weightpatch.reading import Target, inputs, reference
from weightpatch.stability import Overlap, overlaps
from weightpatch.statistics import orientation, recovery


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """How far a trace goes. All of these are our choice.

    Attributes:
        candidates: Units and addresses among which suppliers are looked for.
        n_targets: Most targets of the first round; half as many of the others.
        n_exact: Candidates with the largest estimates that are patched exactly, in each round.
        n_suppliers: Most suppliers of a round.
        share: Targets and suppliers are the fewest that together have this share of what all found have.
        least: A round whose suppliers, patched together, restore less of the targets ends the trace; an edge between
            routers below it is left out.
        n_rounds: Most rounds.
    """

    candidates: str = "neurons,heads"
    n_targets: int = 8
    n_exact: int = 32
    n_suppliers: int = 16
    share: float = 0.8
    least: float = 0.05
    n_rounds: int = 2


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step backwards: what goes into the graph, the suppliers found, and all estimates."""

    round: Round
    estimates: Mapping[Component, float] = field(default_factory=dict)
    suppliers: tuple[Component, ...] = ()
    edges: tuple[Edge, ...] = ()


@dataclass(kw_only=True)
class Tracer:
    """Measures the edges of a trace.

    Attributes:
        pair: The two models.
        prompts: Those of the effects.
        anchor: A projection.
        how: How far to go.
        seed: Of bootstraps.
        batch_tokens: Most tokens of one call.
        calls: Layers on each prompt alone, by number, as far as they were needed.
        known_gaps: What targets write more along the anchor in the specialized model, as far as it was read.
    """

    pair: ModelPair
    prompts: ContrastPrompts
    anchor: Anchor
    how: TraceSettings
    seed: int
    batch_tokens: int | None
    calls: dict[int, tuple[LayerCall, ...]] = field(default_factory=dict)
    known_gaps: dict[Component, Tensor] = field(default_factory=dict)

    @property
    def queries(self) -> tuple[str, ...]:
        """The base query of each prompt."""
        return tuple(row.query for row in self.prompts)

    @cached_property
    def gap(self) -> Tensor:
        """Specialized minus base readout of the anchor, `(prompt,)`."""
        base, specialized = reference(self.pair, self.prompts, self.anchor)
        return specialized - base

    def delivered(self, suppliers: Sequence[Component], *, method: Literal["exact", "activation"]) -> tuple[Edge, ...]:
        """What components write along the anchor's direction themselves, where the anchor is read."""
        if not suppliers:
            return ()
        ordered, changes = self.direct(suppliers, ANCHOR, method=method)
        total = self.effects(ordered, self.anchor, method=method)
        direct, whole = (self.shares(values, self.gap) for values in (changes, total))
        found = [
            Edge(source=str(one), target=ANCHOR, kind="delivers", total=whole[place], direct=direct[place])
            for place, one in enumerate(ordered)
            if _is_clear(direct[place], least=self.how.least * abs(whole[place].value))
        ]
        return tuple(sorted(found, key=_by_direct))

    def relayed(self, routers: Sequence[Component]) -> tuple[Edge, ...]:
        """What routers write to routers above them."""
        found = []
        gaps = self.gaps(routers)
        for target in routers:
            lower = [one for one in routers if (one.layer or 0) < (target.layer or 0)]
            if not lower:
                continue
            ordered, changes = self.direct(lower, target, method="activation")
            with suppress(NoGapError):
                direct = self.shares(changes, gaps[target])
                found += [
                    Edge(source=str(one), target=str(target), kind="relays", total=None, direct=share)
                    for one, share in zip(ordered, direct, strict=True)
                    if _is_clear(share, least=self.how.least)
                ]
        return tuple(sorted(found, key=_by_direct))

    def step(self, targets: Sequence[Component], *, is_first: bool) -> Step:
        """One round: the suppliers of some targets."""
        flows = self.flows(targets, is_first=is_first)
        candidates = self.candidates(flows, targets)
        found = Round(
            targets=tuple(map(str, targets)), suppliers=(), joint=None, n_candidates=0, n_exact=0, stopped=None
        )
        if not candidates:
            return Step(round=replace(found, stopped="no candidate lies below these targets"))
        estimates = self.estimates(flows, candidates, is_first=is_first)
        best = sorted(candidates, key=lambda one: -estimates[one])[: self.how.n_exact]
        chosen = tuple(one for one in candidates if one in best)
        found = replace(found, n_candidates=len(candidates), n_exact=len(chosen))
        measured, gaps = self.measure(flows, chosen, is_first=is_first)
        gap = _added(gaps)
        try:
            shares = self.shares(_added(measured), gap)
        except NoGapError:
            stopped = "what these targets write does not differ measurably between the two models"
            return Step(round=replace(found, stopped=stopped), estimates=estimates)
        values = {str(one): share.value for one, share in zip(chosen, shares, strict=True)}
        clear = [one for one, share in zip(chosen, shares, strict=True) if share.low is not None and share.low > 0]
        suppliers = fewest(clear, values, self.how.share, self.how.n_suppliers)
        if not suppliers:
            return Step(round=replace(found, stopped="no candidate's interval lies above 0"), estimates=estimates)
        together = suppliers[0] if len(suppliers) == 1 else Component.joint(suppliers)
        jointly, _ = self.measure(flows, (together,), is_first=is_first)
        joint = self.shares(_added(jointly), gap)[0]
        found = replace(found, suppliers=tuple(map(str, suppliers)), joint=joint)
        if joint.value < self.how.least:
            stopped = f"patched together they restore less than {self.how.least:g} of what the targets write"
            return Step(round=replace(found, stopped=stopped), estimates=estimates)
        edges = self.supplied(targets, chosen, suppliers, measured, gaps, is_first=is_first)
        return Step(round=found, estimates=estimates, suppliers=suppliers, edges=edges)

    def flows(self, targets: Sequence[Component], *, is_first: bool) -> dict[Component, Flow]:
        """What is read of each target: along the anchor, or, of suppliers, toward the specialized model's write."""
        token_ids = inputs(self.pair, self.prompts, self.anchor)
        along = along_anchor(self.anchor, token_ids)
        found = {}
        for one in targets:
            layer = one.layer or 0
            if layer not in self.calls:
                self.calls[layer] = layer_calls(self.pair, token_ids, layer)
            calls = self.calls[layer]
            toward = along if is_first else toward_specialized(self.pair, token_ids, one, calls)
            found[one] = Flow(pair=self.pair, targets=(one,), toward=toward, calls=calls)
        return found

    def candidates(self, flows: Mapping[Component, Flow], targets: Sequence[Component]) -> tuple[Component, ...]:
        """Components that reach one of the flows, the targets left out."""
        return tuple(
            one
            for one in components(self.pair.architecture, self.how.candidates)
            if one not in targets and any(reaches(one, flow) for flow in flows.values())
        )

    def estimates(
        self, flows: Mapping[Component, Flow], candidates: Sequence[Component], *, is_first: bool
    ) -> dict[Component, float]:
        """Effects on all targets together in the gap's direction, to first order, mean over prompts.

        Targets of one layer that are read alike share a pass.
        """
        sign = orientation(self.gap.numpy()) if is_first else 1  # else read toward the specialized model's write
        found = dict.fromkeys(candidates, 0.0)
        for flow in _by_layer(flows):
            reaching = [one for one in candidates if reaches(one, flow)]
            if not reaching:
                continue
            effects = sign * self.effects(reaching, flow, method="first-order").mean(dim=1)
            for one, effect in zip(reaching, effects.tolist(), strict=True):
                found[one] += effect
        return found

    def measure(
        self, flows: Mapping[Component, Flow], chosen: Sequence[Component], *, is_first: bool
    ) -> tuple[dict[Component, Tensor], dict[Component, Tensor]]:
        """Exact effects of components on each target, `(component, prompt)`, and the target's gap, `(prompt,)`."""
        if is_first:  # what is written along the anchor is read on the way up to it, all targets at once
            return self.measure_at_once(tuple(flows), chosen)
        found, gaps = {}, {}
        for target, flow in flows.items():
            values = torch.zeros(len(chosen), len(self.prompts), dtype=torch.float64)
            places = [place for place, one in enumerate(chosen) if reaches(one, flow)]
            if places:
                values[places] = self.effects([chosen[place] for place in places], flow, method="exact")
            found[target] = values
            gaps[target] = torch.tensor([float(rows.any()) for rows in flow.toward], dtype=torch.float64)
        return found, gaps

    def measure_at_once(
        self, targets: tuple[Component, ...], chosen: Sequence[Component]
    ) -> tuple[dict[Component, Tensor], dict[Component, Tensor]]:
        """The same for what targets write along the anchor, from one sweep."""
        targets = components(self.pair.architecture, targets)
        ordered = components(self.pair.architecture, list(chosen))
        swept = {
            effect.component: effect.per_target
            for effect in sweep(
                self.pair, self.prompts, self.anchor, ordered, targets=targets, batch_tokens=self.batch_tokens
            )
        }
        rows = [values for one in chosen if (values := swept[one]) is not None]
        found = {target: torch.stack([values[place] for values in rows]) for place, target in enumerate(targets)}
        return found, self.gaps(targets)

    def gaps(self, targets: Sequence[Component]) -> dict[Component, Tensor]:
        """What each target writes more along the anchor in the specialized model, `(prompt,)`; read once."""
        if missing := [target for target in targets if target not in self.known_gaps]:
            ordered = components(self.pair.architecture, missing)
            base, specialized = deliver(self.pair, self.prompts, self.anchor, ordered, batch_tokens=self.batch_tokens)
            self.known_gaps |= zip(ordered, specialized - base, strict=True)
        return {target: self.known_gaps[target] for target in targets}

    def direct(
        self, suppliers: Sequence[Component], target: Component | str, *, method: Literal["exact", "activation"]
    ) -> tuple[tuple[Component, ...], Tensor]:
        """Suppliers upstream of a target, and what it then writes more, seeing them alone: `(supplier, prompt)`."""
        return direct_changes(
            self.pair,
            self.prompts,
            self.anchor,
            suppliers=suppliers,
            target=target,
            method=method,
            batch_tokens=self.batch_tokens,
        )

    def supplied(
        self,
        targets: Sequence[Component],
        chosen: Sequence[Component],
        suppliers: Sequence[Component],
        measured: Mapping[Component, Tensor],
        gaps: Mapping[Component, Tensor],
        *,
        is_first: bool,
    ) -> tuple[Edge, ...]:
        """Edges from suppliers to each target whose total effect has an interval above 0."""
        edges = []
        for target in targets:
            try:
                total = self.shares(measured[target], gaps[target])
            except NoGapError:
                continue
            direct: dict[Component, Share] = {}
            with suppress(ComponentError):
                if is_first:
                    ordered, changes = self.direct(suppliers, target, method="exact")
                    direct = dict(zip(ordered, self.shares(changes, gaps[target]), strict=True))
            for one in suppliers:
                share = total[chosen.index(one)]
                if share.low is not None and share.low > 0:
                    edges.append(
                        Edge(source=str(one), target=str(target), kind="supplies", total=share, direct=direct.get(one))
                    )
        return tuple(sorted(edges, key=lambda edge: -edge.total.value if edge.total else 0))

    def overlaps(
        self, estimates: Mapping[Component, float], others: Sequence[Component]
    ) -> tuple[tuple[Overlap, ...], tuple[Overlap, ...]]:
        """Rankings of suppliers against the ranking by effects of weights.

        Args:
            estimates: Of the routers' suppliers, from the first step.
            others: Components that are no routers, as a control.
        """
        universe = [one for one in estimates if one not in others]
        if not universe:
            return (), ()
        values = (
            orientation(self.gap.numpy()) * self.effects(universe, self.anchor, method="first-order").mean(dim=1)
        ).tolist()
        by_weights = _ranked(dict(zip(universe, values, strict=True)))
        of_routers = _ranked({one: estimates[one] for one in universe})
        if not others:
            return overlaps(of_routers, by_weights), ()
        flows = self.flows(others, is_first=True)
        of_others = _ranked(self.estimates(flows, universe, is_first=True))
        return overlaps(of_routers, by_weights), overlaps(of_others, by_weights)

    def effects(
        self, chosen: Sequence[Component], target: Target, *, method: Literal["exact", "activation", "first-order"]
    ) -> Tensor:
        """Effects of components in the order given, `(component, prompt)`."""
        ordered = components(self.pair.architecture, list(chosen))
        found = sweep(self.pair, self.prompts, target, ordered, method=method, batch_tokens=self.batch_tokens)
        values = {effect.component: effect.per_prompt for effect in found}
        return torch.stack([values[one] for one in chosen])

    def shares(self, values: Tensor, gap: Tensor) -> list[Share]:
        """Ratios of means with intervals: `(component, prompt)` over `(prompt,)`."""
        found = recovery(values.numpy(), gap.numpy(), groups=self.queries, seed=self.seed)
        bounds = zip(found.ratio.tolist(), found.low.tolist(), found.high.tolist(), strict=True)
        return [Share(value=value, low=finite(low), high=finite(high)) for value, low, high in bounds]


def _by_layer(flows: Mapping[Component, Flow]) -> list[Flow]:
    """Flows of one layer that are read along the same directions, put together."""
    groups: dict[tuple[int, int], list[Flow]] = {}
    for flow in flows.values():
        groups.setdefault((flow.layer, id(flow.toward)), []).append(flow)
    return [
        replace(group[0], targets=tuple(target for flow in group for target in flow.targets))
        for group in groups.values()
    ]


def _added(by_target: Mapping[Component, Tensor]) -> Tensor:
    return torch.stack([*by_target.values()]).sum(dim=0)


def _ranked(values: Mapping[Component, float]) -> list[str]:
    return [str(one) for one in sorted(values, key=lambda one: -values[one])]


def fewest(chosen: Sequence[Component], values: Mapping[str, float], share: float, most: int) -> tuple[Component, ...]:
    """The fewest components that together have a share of what all of them have, the largest first."""
    ordered = sorted(chosen, key=lambda one: -values[str(one)])
    total = sum(values[str(one)] for one in ordered)
    found: list[Component] = []
    while ordered and len(found) < most and sum(values[str(one)] for one in found) < share * total:
        found.append(ordered[len(found)])
    return tuple(found)


def _is_clear(share: Share, *, least: float) -> bool:
    """Whether an interval leaves out 0, and the share is large enough to be told."""
    if share.low is None or share.high is None:
        return False
    return (share.low > 0 or share.high < 0) and abs(share.value) >= least


def _by_direct(edge: Edge) -> float:
    return -abs(edge.direct.value) if edge.direct else 0.0
