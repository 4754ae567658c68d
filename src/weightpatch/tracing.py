"""Tracing backwards from the anchor: which components supply the routers, and which supply these."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress

from weightpatch.anchor import Anchor
from weightpatch.component import Component, encloses
from weightpatch.effects import Effects
from weightpatch.engine.activations import has_output
from weightpatch.errors import AnchorError, NoGapError
from weightpatch.executors import Executors, find_executors
from weightpatch.graph import OUTPUT, Edge, Graph, Node, Round, Share, nodes_in_order
from weightpatch.hierarchy import Hierarchy, find_roles, find_suspects
from weightpatch.jsonable import finite
from weightpatch.localization import localize
from weightpatch.nulls import N_SHUFFLES, Plain, draw_null, measure_plain, pooled
from weightpatch.pair import ModelPair
from weightpatch.paths import ANCHOR
from weightpatch.prompts import ContrastPrompts
from weightpatch.stability import Overlap
from weightpatch.suppliers import Tracer, TraceSettings, fewest

_CAN_BE_TARGETS = ("heads", "attns", "mlps", "neurons")


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
    tracer = Tracer(pair=pair, prompts=prompts, anchor=anchor, how=how, seed=seed, batch_tokens=batch_tokens)
    routers = fewest(_innermost(roles.of_role("router")), _values(roles, "activation"), how.share, how.n_targets)
    edges = [*tracer.delivered(routers, method="activation"), *tracer.relayed(routers)]
    rounds: list[Round] = []
    targets: Sequence[Component] = routers
    overlap: tuple[tuple[Overlap, ...], tuple[Overlap, ...]] = ((), ())
    while targets and len(rounds) < how.n_rounds:
        step = tracer.step(targets, is_first=not rounds)
        rounds.append(step.round)
        if len(rounds) == 1:
            overlap = tracer.overlaps(step.estimates, _others(roles, routers, seed=seed))
        if step.round.stopped:
            break
        edges += step.edges
        if len(rounds) == 1:
            edges += tracer.delivered(step.suppliers, method="exact")
        targets = _innermost([one for one in step.suppliers if one.layer])[: max(1, how.n_targets // 2)]
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
    """Find roles with all that it takes: activation patching, what lies past the anchor, a null, and queries alone.

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
    null = pooled([*draws], effects.components)
    plain: Plain | None = None
    if not anchor.is_difference:
        suspects = find_suspects(effects, activation, null, seed=seed)
        plain = measure_plain(
            pair,
            prompts,
            anchor,
            weights=suspects.sources,
            activation=suspects.routers,
            method="exact" if effects.method == "exact" else "first-order",
            batch_tokens=batch_tokens,
        )
    return find_roles(
        effects,
        activation,
        null,
        plain,
        executors=executors,
        n_layers=pair.architecture.n_layers,
        seed=seed,
    )


def _values(roles: Hierarchy, column: str) -> dict[str, float]:
    return dict(zip(roles.table["component"], roles.table[column].astype(float), strict=True))


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
    leading = fewest(_innermost(roles.of_role("executor")), values, how.share, how.n_targets)
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
