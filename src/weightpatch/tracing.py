"""Tracing backwards from the anchor: which components supply the routers, and which supply these."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from weightpatch.anchor import Anchor
from weightpatch.component import Component, components, encloses
from weightpatch.effects import Effects
from weightpatch.engine.activations import has_output
from weightpatch.errors import AnchorError, ComponentError, NoGapError
from weightpatch.executors import Executors, find_executors
from weightpatch.flows import Flow, along_anchor, layer_calls, toward_specialized
from weightpatch.graph import ANCHOR, OUTPUT, Edge, Graph, Node, Round, Share, nodes_in_order
from weightpatch.hierarchy import Hierarchy, find_roles
from weightpatch.localization import deliver, localize, reaches, sweep
from weightpatch.nulls import N_SHUFFLES, draw_null, pooled
from weightpatch.packed.calls import LayerCall
from weightpatch.pair import ModelPair
from weightpatch.paths import direct_effects
from weightpatch.prompts import ContrastPrompts
from weightpatch.reading import Target, inputs
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


def trace(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Anchor,
    effects: Effects,
    *,
    hierarchy: Hierarchy | None = None,
    settings: TraceSettings | None = None,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Graph:
    """Find the routers' suppliers, and theirs, back to the bottom of the model.

    The first targets are the routers: what they write along the anchor's direction is read, candidates are estimated to
    first order, the best patched exactly. The suppliers found are the targets of the next round, where what is read is
    how far a target's own write has come to what it is in the specialized model (our choice: they need not write along
    the anchor). It ends when the suppliers of a round, patched together, restore less than `settings.least`, or when
    nothing lies below.

    Args:
        pair: The two models.
        prompts: Those of the effects.
        anchor: A projection.
        effects: By weight patching, of heads and MLPs at least.
        hierarchy: The roles; None: find them, with what that takes (activation patching, executors, a null).
        settings: How far to go.
        seed: Of bootstraps, shuffles and random controls.
        batch_tokens: Most tokens of one call; None: as many as suit the model and its device.

    Returns:
        The graph. Without a router it holds sources and executors only.

    Raises:
        AnchorError: a cosine or contrast, whose readout no single write adds to.
        NoGapError: the two models do not differ measurably in the readout.

    Source:
        Supplier-target tracing: Sun et al. 2026 (arXiv:2604.13694), in our reading; what suppliers of suppliers are
        read by, and every number in the settings, is ours.
    """
    if anchor.readout != "projection":
        raise AnchorError(f"a trace follows what is written along a direction, no {anchor.readout}: use a projection.")
    how = settings or TraceSettings()
    roles = hierarchy or hierarchy_of(pair, prompts, anchor, effects, seed=seed, batch_tokens=batch_tokens)
    tracer = _Tracer(pair=pair, prompts=prompts, anchor=anchor, how=how, seed=seed, batch_tokens=batch_tokens)
    routers = _fewest(_innermost(roles.of_role("router")), _values(roles, "activation"), how.share, how.n_targets)
    edges = [*tracer.delivered(routers, method="activation"), *tracer.relayed(routers)]
    rounds: list[Round] = []
    targets: Sequence[Component] = routers
    while targets and len(rounds) < how.n_rounds:
        step = tracer.step(targets, is_first=not rounds)
        rounds.append(step.round)
        if step.round.stopped:
            break
        edges += step.edges
        if len(rounds) == 1:
            edges += tracer.delivered(step.suppliers, method="exact")
        targets = _innermost([one for one in step.suppliers if one.layer])[: max(1, how.n_targets // 2)]
    overlap = tracer.overlaps(routers, _others(roles, routers, seed=seed)) if routers else ((), ())
    edges += _executed(roles, how)
    named = {name for edge in edges for name in (edge.source, edge.target)}
    named |= {str(one) for role in ("source", "router", "executor") for one in roles.of_role(role)}
    return Graph(
        nodes=nodes_in_order([_node(name, roles, anchor) for name in sorted(named)], anchor.layer),
        edges=tuple(edges),
        rounds=tuple(rounds),
        overlaps=overlap[0],
        control=overlap[1],
    )


def hierarchy_of(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Anchor,
    effects: Effects,
    *,
    n_shuffles: int = N_SHUFFLES,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Hierarchy:
    """Find roles with all that it takes: activation patching, components past the anchor, and a null.

    Args:
        pair: The two models.
        prompts: Those of the effects.
        anchor: The anchor.
        effects: By weight patching.
        n_shuffles: Of the null.
        seed: Of everything random.
        batch_tokens: Most tokens of one call.
    """
    units = sorted({one.unit for one in (*effects.components, *effects.past_anchor)} & set(_CAN_BE_TARGETS))
    activation = localize(
        pair,
        prompts,
        anchor,
        units=[one for one in effects.components if has_output(one)],
        method="activation",
        batch_tokens=batch_tokens,
    )
    executors: Executors | None = None
    if any(one.layer is not None and one.unit in units for one in effects.past_anchor):
        with suppress(NoGapError):
            executors = find_executors(pair, prompts, anchor, units=units, seed=seed, batch_tokens=batch_tokens)
    draws = draw_null(
        pair, prompts, anchor, effects, seeds=[seed + number for number in range(n_shuffles)], batch_tokens=batch_tokens
    )
    return find_roles(
        effects,
        activation,
        pooled([*draws], effects.components),
        executors=executors,
        n_layers=pair.architecture.n_layers,
        seed=seed,
    )


@dataclass(frozen=True, kw_only=True)
class _Step:
    round: Round
    suppliers: tuple[Component, ...] = ()
    edges: tuple[Edge, ...] = ()


@dataclass(kw_only=True)
class _Tracer:
    """Measures the edges of a trace."""

    pair: ModelPair
    prompts: ContrastPrompts
    anchor: Anchor
    how: TraceSettings
    seed: int
    batch_tokens: int | None
    calls: dict[int, tuple[LayerCall, ...]] = field(default_factory=dict)
    by_flow: dict[str, float] = field(default_factory=dict)

    @property
    def queries(self) -> tuple[str, ...]:
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

    def step(self, targets: Sequence[Component], *, is_first: bool) -> _Step:
        """One round: the suppliers of some targets."""
        flows = self.flows(targets, is_first=is_first)
        names = tuple(str(target) for target in targets)
        candidates = self.candidates(flows, targets)
        if not candidates:
            stop = "no candidate lies below these targets"
            return _Step(round=_round(names, (), None, (0, 0), stop))
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
            return _Step(round=_round(names, (), None, counts, stop))
        values = {str(one): share.value for one, share in zip(chosen, shares, strict=True)}
        clear = [one for one, share in zip(chosen, shares, strict=True) if share.low is not None and share.low > 0]
        suppliers = _fewest(clear, values, self.how.share, self.how.n_suppliers)
        if not suppliers:
            stop = "no candidate's interval lies above 0"
            return _Step(round=_round(names, (), None, counts, stop))
        together = suppliers[0] if len(suppliers) == 1 else Component.joint(suppliers)
        jointly, _ = self.measure(flows, (together,), is_first=is_first)
        joint = self.shares(sum(jointly.values(), torch.zeros(())), sum(gaps.values(), torch.zeros(())))[0]
        if joint.value < self.how.least:
            stop = f"patched together they restore less than {self.how.least:g} of what the targets write"
            return _Step(round=_round(names, suppliers, joint, counts, stop))
        edges = self.supplied(targets, chosen, suppliers, measured, gaps, is_first=is_first)
        return _Step(round=_round(names, suppliers, joint, counts, None), suppliers=suppliers, edges=edges)

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
            effects = self.effects(reaching, flow, method="first-order").mean(dim=1)
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
        universe = [one for one in self.candidates(flows, (*routers, *others)) if str(one) in self.by_flow]
        if not universe:
            return (), ()
        values = self.effects(universe, self.anchor, method="first-order").mean(dim=1).tolist()
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


def _values(roles: Hierarchy, column: str) -> dict[str, float]:
    return dict(zip(roles.table["component"], roles.table[column].astype(float), strict=True))


def _ranked(values: Mapping[str, float]) -> list[str]:
    return sorted(values, key=lambda name: -values[name])


def _fewest(chosen: Sequence[Component], values: Mapping[str, float], share: float, most: int) -> tuple[Component, ...]:
    """The fewest components that together have a share of what all of them have, the largest first."""
    ordered = sorted(chosen, key=lambda one: -values[str(one)])
    total = sum(values[str(one)] for one in ordered)
    found: list[Component] = []
    while ordered and len(found) < most and sum(values[str(one)] for one in found) < share * total:
        found.append(ordered[len(found)])
    return tuple(found)


def _innermost(chosen: Sequence[Component]) -> list[Component]:
    """Components that can be targets, without those that hold others of them."""
    able = [one for one in chosen if one.unit in _CAN_BE_TARGETS and one.expert is None]
    return [
        one for one in able if not any(other.layer == one.layer and encloses(one.unit, other.unit) for other in able)
    ]


def _others(roles: Hierarchy, routers: Sequence[Component], *, seed: int) -> list[Component]:
    """As many components of the routers' units and layers that are none, at random."""
    generator = random.Random(seed)  # noqa: S311  no secret
    found: list[Component] = []
    for router in routers:
        alike = [
            one
            for one, role in zip(roles.components, roles.roles, strict=True)
            if (one.unit, one.layer) == (router.unit, router.layer) and role != "router" and one not in found
        ]
        if alike:
            found.append(generator.choice(alike))
    return found


def _executed(roles: Hierarchy, how: TraceSettings) -> list[Edge]:
    """From the anchor to the leading executors, and from these to the output."""
    values = _values(roles, "loss")
    leading = _fewest(_innermost(roles.of_role("executor")), values, how.share, how.n_targets)
    rows = roles.table.set_index("component")
    found = []
    for one in leading:
        value, low, high = (rows[name].astype(float)[str(one)] for name in ("loss", "loss_low", "loss_high"))
        loss = Share(value=float(value), low=finite(low), high=finite(high))
        found.append(Edge(source=ANCHOR, target=str(one), kind="executes", total=loss, direct=None))
        found.append(Edge(source=str(one), target=OUTPUT, kind="executes", total=loss, direct=None))
    return found


def _node(name: str, roles: Hierarchy, anchor: Anchor) -> Node:
    if name in (ANCHOR, OUTPUT):
        return Node(component=name, role=None, layer=anchor.layer if name == ANCHOR else None)
    found = roles.table[roles.table["component"] == name]
    layer = Component.parse(name).layer
    if found.empty:  # a candidate that was not among the components whose effects were measured
        return Node(component=name, role=None, layer=layer)
    row = found.iloc[0]
    return Node(
        component=name,
        role=row["role"],
        layer=layer,
        recovery=finite(row["recovery"]),
        activation=finite(row["activation"]),
        loss=finite(row["loss"]),
    )


def _is_clear(share: Share, *, least: float) -> bool:
    """Whether an interval leaves out 0, and the share is large enough to be told."""
    if share.low is None or share.high is None:
        return False
    return (share.low > 0 or share.high < 0) and abs(share.value) >= least


def _by_direct(edge: Edge) -> float:
    return -abs(edge.direct.value) if edge.direct else 0.0
