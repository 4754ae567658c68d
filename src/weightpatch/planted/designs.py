"""What a plant is to be: which components carry the task, which distract, and by how much every one is moved."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from weightpatch.architecture import Architecture
from weightpatch.component import Component, components
from weightpatch.errors import ComponentError
from weightpatch.instructions import TASKS

Variant = Literal["below", "split", "redundant", "joint"]
"""How carriers relate: all in the lower half; early and late ones; two sets of which each suffices, or neither does."""
Unit = Literal["heads", "kvs", "mlps", "groups"]
"""What carriers are; `groups` are sets of neurons, into which every MLP is dealt at random."""
VARIANTS: tuple[Variant, ...] = get_args(Variant)
UNITS: tuple[Unit, ...] = get_args(Unit)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of one unit takes part.

    Attributes:
        n_carriers: Components that carry the task; half of them, rounded down, in each of two joint sets.
        n_redundant: Components in each of two redundant sets, which have to do it alone.
        n_distractors: Components that carry another task.
        low: Least norm of a difference, as a share of the norm of the weights that it changes.
        high: The greatest. Carriers, distractors and everything that drifts, of whatever unit, are drawn from this
            range, so that the relative size of a difference says nothing.
    """

    n_carriers: int
    n_redundant: int
    n_distractors: int
    low: float
    high: float


TINY_SIZES: Mapping[Unit, Size] = {
    "heads": Size(n_carriers=12, n_redundant=9, n_distractors=8, low=0.3, high=0.45),
    "kvs": Size(n_carriers=7, n_redundant=6, n_distractors=6, low=0.3, high=0.45),
    "mlps": Size(n_carriers=2, n_redundant=1, n_distractors=2, low=0.16, high=0.26),
    "groups": Size(n_carriers=10, n_redundant=7, n_distractors=8, low=0.25, high=0.4),
}
"""For the bundled base: least sizes with which most plants take (LOG.md, 2026-11-23)."""
N_GROUPS = 16
"""Groups that the neurons of one MLP are dealt into."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """What to plant.

    Attributes:
        name: Of the plant, unique in its suite.
        variant: How its carriers relate.
        unit: What they are.
        task: The task they carry.
        other: The task of the distractors.
        carriers: The carriers, as one set, or as two where the variant has two.
        distractors: Disjoint from them.
        candidates: All components of the unit, carriers and distractors among them.
        norms: Component -> norm of its difference, as a share of the norm of its weights, in every matrix; candidates
            and all components of other units.
        seed: Of everything that is drawn.
    """

    name: str
    variant: Variant
    unit: Unit
    task: str
    other: str
    carriers: tuple[tuple[Component, ...], ...]
    distractors: tuple[Component, ...]
    candidates: tuple[Component, ...]
    norms: Mapping[Component, float]
    seed: int

    @property
    def all_carriers(self) -> tuple[Component, ...]:
        """Carriers of all sets."""
        return tuple(one for group in self.carriers for one in group)

    @property
    def drifting(self) -> tuple[Component, ...]:
        """Everything that carries nothing."""
        taken = {*self.all_carriers, *self.distractors}
        return tuple(one for one in self.norms if one not in taken)


def draw_design(
    architecture: Architecture,
    *,
    name: str,
    variant: Variant,
    unit: Unit,
    seed: int,
    anchor_layer: int,
    sizes: Mapping[Unit, Size] = TINY_SIZES,
    tasks: Sequence[str] = TASKS,
    target: str | None = None,
) -> Design:
    """Draw a design at random.

    Args:
        architecture: Of the model that is planted in.
        name: Of the plant.
        variant: How carriers relate.
        unit: What they are.
        seed: Of all that is drawn; with it, name, variant and unit decide.
        anchor_layer: Carriers and distractors lie below this layer, where they can be measured.
        sizes: How many of them, and how much they are moved.
        tasks: Two of these are drawn.
        target: What carriers carry, so that only the distractors' task is drawn.

    Raises:
        ComponentError: the model has too few components of the unit.
    """
    draw = random.Random(f"{seed} {name} {variant} {unit}")  # noqa: S311  not for secrets
    task, other = draw.sample(list(tasks), 2)
    if target and task != target:
        task, other = target, (task if other == target else other)
    size = sizes[unit]
    candidates = _candidates(architecture, unit, draw)
    half = architecture.n_layers // 2
    early = [one for one in candidates if _layer(one) < (half if variant != "split" else max(half - 1, 1))]
    late = [one for one in candidates if half <= _layer(one) < anchor_layer]
    in_one = size.n_redundant if variant == "redundant" else size.n_carriers // 2
    try:
        if variant == "below":
            carriers: tuple[list[Component], ...] = (draw.sample(early, size.n_carriers),)
        elif variant == "split":
            carriers = (draw.sample(early, size.n_carriers - in_one) + draw.sample(late, in_one),)
        else:
            both = draw.sample(early, 2 * in_one)
            carriers = (both[:in_one], both[in_one:])
        taken = {one for group in carriers for one in group}
        free = [one for one in candidates if one not in taken and _layer(one) < anchor_layer]
        distractors = draw.sample(free, size.n_distractors)
    except ValueError as error:
        raise ComponentError(
            f"{len(candidates)} {unit} in {architecture.n_layers} layers are too few for {size.n_carriers} carriers "
            f"and {size.n_distractors} distractors of the variant {variant!r} below layer {anchor_layer}: give smaller "
            "sizes, or a larger model."
        ) from error
    norms = {one: draw.uniform(size.low, size.high) for one in candidates}
    for rest in _others(architecture, unit):
        norms[rest] = draw.uniform(size.low, size.high)
    return Design(
        name=name,
        variant=variant,
        unit=unit,
        task=task,
        other=other,
        carriers=tuple(tuple(group) for group in carriers),
        distractors=tuple(distractors),
        candidates=candidates,
        norms=norms,
        seed=seed,
    )


def _candidates(architecture: Architecture, unit: Unit, draw: random.Random) -> tuple[Component, ...]:
    if unit != "groups":
        return components(architecture, unit)
    found: list[Component] = []
    neurons = components(architecture, "neurons")
    for layer in range(architecture.n_layers):
        own = [one for one in neurons if one.layer == layer]
        draw.shuffle(own)
        found += [Component.joint(own[place::N_GROUPS]) for place in range(N_GROUPS)]
    return tuple(found)


def _others(architecture: Architecture, unit: Unit) -> tuple[Component, ...]:
    """Components of the other units, so that with the candidates every head, group and MLP is there once."""
    units = [one for one in ("heads", "kvs", "mlps") if one != ("mlps" if unit == "groups" else unit)]
    return components(architecture, units)


def _layer(component: Component) -> int:
    return component.layer or 0
