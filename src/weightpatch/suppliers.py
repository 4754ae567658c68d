"""Suppliers of given targets: estimated, patched, and the edges between them; one step of a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from weightpatch.anchor import Anchor
from weightpatch.component import Component, components
from weightpatch.errors import ComponentError, NoGapError
from weightpatch.flows import Flow, along_anchor, layer_calls, toward_specialized
from weightpatch.graph import ANCHOR, Edge, Round, Share
from weightpatch.localization import deliver, reaches, sweep
from weightpatch.packed.calls import LayerCall
from weightpatch.pair import ModelPair
from weightpatch.paths import direct_effects
from weightpatch.prompts import ContrastPrompts
from weightpatch.reading import Target, inputs, reference
from weightpatch.stability import Overlap, overlaps
from weightpatch.statistics import finite, recovery

_CAN_BE_TARGETS = ("heads", "attns", "mlps", "neurons")


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
    """One step backwards: what goes into the graph, and the suppliers found."""

    round: Round
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
        by_flow: Estimates of the first round, by address.
        sign: Of the gap of what is read: -1 where the specialized model reads lower.
    """

    pair: ModelPair
    prompts: ContrastPrompts
    anchor: Anchor
    how: TraceSettings
    seed: int
    batch_tokens: int | None
    calls: dict[int, tuple[LayerCall, ...]] = field(default_factory=dict)
    by_flow: dict[str, float] = field(default_factory=dict)
    sign: int = 1

    @property
    def queries(self) -> tuple[str, ...]:
        """The base query of each prompt."""
        return tuple(row.query for row in self.prompts)

    def delivered(self, suppliers: Sequence[Component], *, method: Literal["exact", "activation"]) -> tuple[Edge, ...]:
        """What components write along the anchor's direction themselves, where the anchor is read."""
        if not suppliers:
            return ()
        edges = direct_effects(
            self.pair,
            self.prompts,
            self.anchor,
            suppliers=suppliers,
            target=ANCHOR,
            method=method,
            batch_tokens=self.batch_tokens,
        )
        total = self.effects(edges.suppliers, self.anchor, method=method)
        direct, whole = (self.shares(values, edges.gap) for values in (edges.per_prompt, total))
        found = [
            Edge(source=str(one), target=ANCHOR, kind="delivers", total=whole[place], direct=direct[place])
            for place, one in enumerate(edges.suppliers)
            if _is_clear(direct[place], least=self.how.least * abs(whole[place].value))
        ]
        return tuple(sorted(found, key=_by_direct))

    def relayed(self, routers: Sequence[Component]) -> tuple[Edge, ...]:
        """What routers write to routers above them."""
        found = []
        for target in routers:
            lower = [one for one in routers if (one.layer or 0) < (target.layer or 0)]
            if not lower:
                continue
            edges = direct_effects(
                self.pair,
                self.prompts,
                self.anchor,
                suppliers=lower,
                target=target,
                method="activation",
                batch_tokens=self.batch_tokens,
            )
            with suppress(NoGapError):
                direct = self.shares(edges.per_prompt, edges.target_gap)
                found += [
                    Edge(source=str(one), target=str(target), kind="relays", total=None, direct=share)
                    for one, share in zip(edges.suppliers, direct, strict=True)
                    if _is_clear(share, least=self.how.least)
                ]
        return tuple(sorted(found, key=_by_direct))

    def step(self, targets: Sequence[Component], *, is_first: bool) -> Step:
        """One round: the suppliers of some targets."""
        flows = self.flows(targets, is_first=is_first)
        names = tuple(str(target) for target in targets)
        candidates = self.candidates(flows, targets)
        if not candidates:
            stop = "no candidate lies below these targets"
            return Step(round=_round(names, (), None, (0, 0), stop))
        if is_first:
            base, specialized = reference(self.pair, self.prompts, self.anchor)
            self.sign = -1 if float((specialized - base).mean()) < 0 else 1
        else:
            self.sign = 1  # toward the specialized model's write
        estimates = self.estimates(flows, candidates)
        if is_first:
            self.by_flow = estimates
        best = sorted(candidates, key=lambda one: -estimates[str(one)])[: self.how.n_exact]
        chosen = tuple(one for one in candidates if one in best)
        counts = len(candidates), len(chosen)
        measured, gaps = self.measure(flows, chosen, is_first=is_first)
        try:
            shares = self.shares(sum(measured.values(), torch.zeros(())), sum(gaps.values(), torch.zeros(())))
        except NoGapError:
            stop = "what these targets write does not differ measurably between the two models"
            return Step(round=_round(names, (), None, counts, stop))
        values = {str(one): share.value for one, share in zip(chosen, shares, strict=True)}
        clear = [one for one, share in zip(chosen, shares, strict=True) if share.low is not None and share.low > 0]
        suppliers = fewest(clear, values, self.how.share, self.how.n_suppliers)
        if not suppliers:
            stop = "no candidate's interval lies above 0"
            return Step(round=_round(names, (), None, counts, stop))
        together = suppliers[0] if len(suppliers) == 1 else Component.joint(suppliers)
        jointly, _ = self.measure(flows, (together,), is_first=is_first)
        joint = self.shares(sum(jointly.values(), torch.zeros(())), sum(gaps.values(), torch.zeros(())))[0]
        if joint.value < self.how.least:
            stop = f"patched together they restore less than {self.how.least:g} of what the targets write"
            return Step(round=_round(names, suppliers, joint, counts, stop))
        edges = self.supplied(targets, chosen, suppliers, measured, gaps, is_first=is_first)
        return Step(round=_round(names, suppliers, joint, counts, None), suppliers=suppliers, edges=edges)

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

    def estimates(self, flows: Mapping[Component, Flow], candidates: Sequence[Component]) -> dict[str, float]:
        """Effects on all targets together, to first order, mean over prompts. Targets of one layer share a pass."""
        found = dict.fromkeys(map(str, candidates), 0.0)
        for flow in _by_layer(flows):
            reaching = [one for one in candidates if reaches(one, flow)]
            if not reaching:
                continue
            effects = self.sign * self.effects(reaching, flow, method="first-order").mean(dim=1)
            for one, effect in zip(reaching, effects.tolist(), strict=True):
                found[str(one)] += effect
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
        base, specialized = deliver(self.pair, self.prompts, self.anchor, targets, batch_tokens=self.batch_tokens)
        found = {target: torch.stack([values[place] for values in rows]) for place, target in enumerate(targets)}
        return found, {target: specialized[place] - base[place] for place, target in enumerate(targets)}

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
                    straight = direct_effects(
                        self.pair,
                        self.prompts,
                        self.anchor,
                        suppliers=suppliers,
                        target=target,
                        batch_tokens=self.batch_tokens,
                    )
                    found = self.shares(straight.per_prompt, gaps[target])
                    direct = dict(zip(straight.suppliers, found, strict=True))
            for one in suppliers:
                share = total[chosen.index(one)]
                if share.low is not None and share.low > 0:
                    edges.append(
                        Edge(source=str(one), target=str(target), kind="supplies", total=share, direct=direct.get(one))
                    )
        return tuple(sorted(edges, key=lambda edge: -edge.total.value if edge.total else 0))

    def overlaps(
        self, routers: Sequence[Component], others: Sequence[Component]
    ) -> tuple[tuple[Overlap, ...], tuple[Overlap, ...]]:
        """Rankings of suppliers, of the routers and of others, against the ranking by effects of weights."""
        flows = self.flows(routers, is_first=True)
        base, specialized = reference(self.pair, self.prompts, self.anchor)
        self.sign = -1 if float((specialized - base).mean()) < 0 else 1
        universe = [one for one in self.candidates(flows, (*routers, *others)) if str(one) in self.by_flow]
        if not universe:
            return (), ()
        values = (self.sign * self.effects(universe, self.anchor, method="first-order").mean(dim=1)).tolist()
        by_weights = _ranked(dict(zip(map(str, universe), values, strict=True)))
        of_routers = _ranked({str(one): self.by_flow[str(one)] for one in universe})
        if not others:
            return overlaps(of_routers, by_weights), ()
        of_others = _ranked(self.estimates(self.flows(others, is_first=True), universe))
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


def _round(
    targets: tuple[str, ...],
    suppliers: Sequence[Component],
    joint: Share | None,
    counts: tuple[int, int],
    stopped: str | None,
) -> Round:
    return Round(
        targets=targets,
        suppliers=tuple(map(str, suppliers)),
        joint=joint,
        n_candidates=counts[0],
        n_exact=counts[1],
        stopped=stopped,
    )


def _ranked(values: Mapping[str, float]) -> list[str]:
    return sorted(values, key=lambda name: -values[name])


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
