"""Drill-down: whole blocks first, then the parts of those that matter, exact at every level."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightpatch.architecture import Architecture
from weightpatch.component import Component, components
from weightpatch.effects import ComponentEffect, Effects
from weightpatch.errors import ComponentError
from weightpatch.localization import Engine, localize, sweep
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompts
from weightpatch.reading import Target
from weightpatch.statistics import check_gap

if TYPE_CHECKING:
    import pandas as pd

BUDGET = 300
N_GROUPS = 8
"""Into how many groups neurons are dealt at each level; so many or fewer are patched one by one."""

_AT_ONCE = 4
"""Components opened at a time, since a sweep's start is shared."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A component whose parts were patched too.

    Attributes:
        whole: The component.
        parts: Disjoint components that together own all that it owns.
    """

    whole: Component
    parts: tuple[Component, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class DrillDown:
    """Exact effects from blocks down to where they sit.

    Attributes:
        effects: Of everything that was patched, in the order of layers.
        opened: What was looked into, in the order in which it was.
    """

    effects: Effects
    opened: tuple[Opened, ...]

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row for each component.

        Args:
            seed: Of the bootstrap over queries.

        Returns:
            The columns of `Effects.table`; inside (what it was found in, empty for a block), n_parts (0: not opened)
            and parts (sum of its parts' recoveries, NaN likewise). Where parts and whole differ, effects do not add up.
        """
        table = self.effects.table(seed=seed)
        recovery = dict(zip(table["component"], table["recovery"], strict=True))
        inside = {str(part): str(one.whole) for one in self.opened for part in one.parts}
        sums = {str(one.whole): sum(recovery[str(part)] for part in one.parts) for one in self.opened}
        counts = {str(one.whole): len(one.parts) for one in self.opened}
        table["inside"] = [inside.get(name, "") for name in table["component"]]
        table["n_parts"] = [counts.get(name, 0) for name in table["component"]]
        table["parts"] = table["component"].map(sums).astype(float)
        return table

    def __str__(self) -> str:
        """The tree in words, largest first, with recoveries; sums of parts behind what was opened."""
        table = self.table().set_index("component")
        parts = {str(one.whole): [str(part) for part in one.parts] for one in self.opened}
        lines: list[str] = []

        def tell(name: str, depth: int) -> None:
            row = table.loc[name]
            adds_up = f", its {row['n_parts']} parts {row['parts']:.4f}" if name in parts else ""
            lines.append(f"{'  ' * depth}{short(name)} {row['recovery']:.4f}{adds_up}")
            for part in sorted(parts.get(name, ()), key=lambda part: -abs(table.loc[part, "recovery"])):
                tell(part, depth + 1)

        roots = [name for name in table.index if not table.loc[name, "inside"]]
        for root in sorted(roots, key=lambda name: -abs(table.loc[name, "recovery"])):
            tell(root, 0)
        return "\n".join(lines)


def short(address: str) -> str:
    """An address as people read it: long sets by their size."""
    members = address[1:-1].split(",") if address.startswith("{") else []
    return f"{len(members)} of {members[0].split('.')[0]}" if len(members) > 3 else address


def drill(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Target,
    *,
    budget: int = BUDGET,
    n_groups: int = N_GROUPS,
    engine: Engine = "suffix",
    batch_tokens: int | None = None,
    on_effect: Callable[[ComponentEffect], None] | None = None,
) -> DrillDown:
    """Patch all blocks below the anchor, then open what has the largest effect, again and again.

    A block opens into attention, MLP and norms; attention into heads, key/value groups and the rest; a mixture into
    experts and router; an MLP or expert into groups of neurons of similar first-order estimate, groups into smaller
    ones and at last neurons.

    Args:
        pair: The two models.
        prompts: All of them are used, with their instruction.
        anchor: What to read.
        budget: Components and groups to patch exactly, blocks included.
        n_groups: Groups that neurons are dealt into at each level.
        engine: That measures.
        batch_tokens: As in `localize`.
        on_effect: Called with each effect as it is measured.

    Raises:
        ComponentError: a budget smaller than the number of blocks, or fewer than two groups.
        AnchorError: the anchor does not fit the pair, or no block lies below it.
        NoGapError: the two models do not differ measurably in the readout.
    """
    walk = steps(
        pair, prompts, anchor, budget=budget, n_groups=n_groups, engine=engine, batch_tokens=batch_tokens, known={}
    )
    while True:
        try:
            effect = next(walk)
        except StopIteration as end:
            found: DrillDown = end.value
            return found
        if on_effect:
            on_effect(effect)


def steps(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Target,
    *,
    budget: int,
    n_groups: int,
    engine: Engine,
    batch_tokens: int | None,
    known: Mapping[Component, Tensor],
) -> Generator[ComponentEffect, None, DrillDown]:
    """A drill-down effect by effect; returns what `drill` returns.

    Arguments as for `drill`; `known`: effects that an interrupted one measured, which are not yielded again.
    """
    estimates = localize(pair, prompts, anchor, units="blocks,neurons", method="first-order", batch_tokens=batch_tokens)
    check_gap(estimates.gap.numpy(), groups=estimates.queries)
    blocks = tuple(one for one in estimates.components if one.unit == "blocks")
    if budget < len(blocks) or n_groups < 2:
        raise ComponentError(
            f"a budget of {budget} in {n_groups} groups cannot open anything: {len(blocks)} blocks lie below the "
            f"anchor. Give at least {len(blocks)}, and two groups."
        )
    neurons = _Neurons.of(estimates, n_groups)
    found: dict[Component, Tensor] = {}
    opened: list[Opened] = []
    closed: dict[Component, None] = {}
    batch: list[Opened] = []
    wanted = blocks
    while wanted:
        ordered = sorted(wanted, key=_layer)
        found |= {component: known[component] for component in ordered if component in known}
        for effect in sweep(
            pair, prompts, anchor, ordered, engine=engine, batch_tokens=batch_tokens, skip=frozenset(known)
        ):
            if effect.component not in known:
                found[effect.component] = effect.per_prompt
                yield effect
        closed |= dict.fromkeys(wanted)
        opened += batch
        for one in batch:
            del closed[one.whole]
        batch = _next_to_open(pair.architecture, closed, found, neurons, budget - len(found))
        wanted = tuple(part for one in batch for part in one.parts)
    ordered = sorted(found, key=_layer)
    return DrillDown(
        effects=replace(
            estimates,
            components=tuple(ordered),
            per_prompt=torch.stack([found[component] for component in ordered]),
            past_anchor=tuple(one for one in estimates.past_anchor if one.unit == "blocks"),
            method="exact",
            engine=engine,
            per_span={},
        ),
        opened=tuple(opened),
    )


def _layer(component: Component) -> int:
    return -1 if component.layer is None else component.layer


_Homes = dict[tuple[int | None, int | None], list[Component]]
"""Layer and expert -> the neurons there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Neurons:
    """Neurons, and how they are dealt into groups.

    Attributes:
        homes: Where they are.
        sizes: Their estimated mean effects.
        n_groups: Into how many groups.
    """

    homes: _Homes
    sizes: Mapping[Component, float]
    n_groups: int

    @classmethod
    def of(cls, estimates: Effects, n_groups: int) -> _Neurons:
        homes: _Homes = {}
        for component in estimates.components:
            if component.unit == "neurons":
                homes.setdefault((component.layer, component.expert), []).append(component)
        sizes = dict(zip(estimates.components, estimates.per_prompt.mean(dim=1).tolist(), strict=True))
        return cls(homes=homes, sizes=sizes, n_groups=n_groups)

    def groups(self, members: Sequence[Component]) -> tuple[Component, ...]:
        """Members dealt into groups of similar estimates, the highest first; one by one where they are few."""
        ordered = sorted(members, key=lambda one: -self.sizes[one])
        if len(ordered) <= self.n_groups:
            return tuple(ordered)
        bounds = [round(number * len(ordered) / self.n_groups) for number in range(self.n_groups + 1)]
        parts = (ordered[low:high] for low, high in pairwise(bounds))
        return tuple(part[0] if len(part) == 1 else Component.joint(part) for part in parts)


def _next_to_open(
    architecture: Architecture,
    closed: Mapping[Component, None],
    found: Mapping[Component, Tensor],
    neurons: _Neurons,
    left: int,
) -> list[Opened]:
    """What to look into next: the largest effects that can be opened within what is left of the budget."""
    batch: list[Opened] = []
    for whole in sorted(closed, key=lambda one: -abs(float(found[one].mean()))):
        parts = _parts(architecture, whole, neurons)
        if 1 < len(parts) <= left:
            batch.append(Opened(whole=whole, parts=parts))
            left -= len(parts)
        if len(batch) == _AT_ONCE:
            break
    return batch


def _parts(architecture: Architecture, whole: Component, neurons: _Neurons) -> tuple[Component, ...]:
    """Disjoint parts of a component, together all of it; nothing where it cannot be opened."""
    layer = whole.layer
    match whole.unit:
        case "blocks":
            return _of_layer(architecture, layer, "attns,mlps,norms")
        case "attns":
            members = _of_layer(architecture, layer, "heads,kvs,rests")
            return tuple(one for one in members if not one.address.endswith(".mlp.rest"))
        case "mlps" if layer is not None and architecture.n_experts_of(layer):
            return _of_layer(architecture, layer, "experts,routers")
        case "mlps":
            rests = _of_layer(architecture, layer, "rests")
            groups = neurons.groups(neurons.homes[layer, None])
            return (*groups, *(one for one in rests if one.address.endswith(".mlp.rest")))
        case _:
            own = neurons.homes[layer, whole.index] if whole.unit == "experts" else whole.members
            return neurons.groups(own)


def _of_layer(architecture: Architecture, layer: int | None, units: str) -> tuple[Component, ...]:
    """Components of some units in one layer; a unit that the model does not have gives none."""
    found: list[Component] = []
    for unit in units.split(","):
        with suppress(ComponentError):
            found += [one for one in components(architecture, unit) if one.layer == layer]
    return tuple(found)
