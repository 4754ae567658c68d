"""Roles of components in the hierarchy, by a stated rule against a stated null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Literal

import numpy as np
from scipy.stats import false_discovery_control

from weightpatch.statistics import Floats, Recovery

Role = Literal["source", "router", "executor", "none"]
ROLES: tuple[Role, ...] = ("source", "router", "executor", "none")

LEVEL_OF_ROLES = 0.05
"""False discoveries allowed among the components that a test names (our choice)."""
SOURCE_SHARE = 0.5
"""Part of its activation effect that a source's own weights explain at least (our choice, method.md section 6)."""
N_PERMUTATIONS = 10_000
LEAST_FOR_BOUND = 30
"""Values of a null from which its mean and deviation are trusted beyond its range (our choice, from simulations)."""

_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True, eq=False)
class Roles:
    """Roles of components below the anchor, and what they were judged by; one entry to a component.

    Attributes:
        roles: The roles.
        p_weights: Chance that a null recovery by weights reaches the lower end of the component's interval.
        q_weights: The same after Benjamini-Hochberg over all components.
        p_activation: As `p_weights`, by activation patching.
        q_activation: As `q_weights`.
    """

    roles: tuple[Role, ...]
    p_weights: Floats
    q_weights: Floats
    p_activation: Floats
    q_activation: Floats


@dataclass(frozen=True, kw_only=True)
class DepthByRole:
    """Where in the model the components of each role lie.

    Attributes:
        mean: Role -> mean depth, 0 at the bottom and 1 at the top; only roles that occur.
        n: Role -> components.
        difference: Mean depth of routers minus that of sources; NaN where one of the two does not occur.
        p: Two-sided, under permutation of the two roles among their components; NaN likewise.
        n_permutations: Drawn, or all there are.
    """

    mean: Mapping[Role, float]
    n: Mapping[Role, int]
    difference: float
    p: float
    n_permutations: int


def assign_roles(
    weights: Recovery,
    activation: Recovery,
    *,
    units: Sequence[str],
    weights_null: Mapping[str, Floats],
    activation_null: Mapping[str, Floats],
    excess: tuple[Floats, Floats] | None = None,
    level: float = LEVEL_OF_ROLES,
    share: float = SOURCE_SHARE,
) -> Roles:
    """Tell sources and routers from the rest.

    Source: the interval of its recovery by weights lies above the null (q at most `level`), that recovery is at least
    `share` of its recovery by activation, in size, and it is larger than without the instruction. Router: the interval
    of its recovery by activation lies above the null, its recovery by weights is less than `share` of it, and it is
    larger than without the instruction. None: everything else, components that work against the behaviour among them.

    Args:
        weights: Recoveries by weight patching.
        activation: By activation patching; NaN for components without an output.
        units: The unit of each. Each is measured by the mean and deviation of its own unit's null; how rare the
            distance is, all units' nulls tell together.
        weights_null: Unit -> recoveries by weight patching where the differences mean nothing, any number of them.
        activation_null: The same by activation patching.
        excess: Lower ends of the intervals of what recoveries by weights, and by activation, have beyond the same
            component's on the same queries without their instruction; NaN where that was not measured, and then a
            component gets no role. None: recoveries are differences to these already.
        level: See above.
        share: See above.

    Raises:
        ValueError: sides of different lengths, or a unit without a null.

    Source:
        The roles: Sun et al. 2026 (arXiv:2604.13694). The rule, its thresholds and the null are ours; q values:
        Benjamini and Hochberg 1995 (doi:10.1111/j.2517-6161.1995.tb02031.x).
    """
    n = len(units)
    if not n == len(weights.ratio) == len(activation.ratio):
        raise ValueError(
            f"{len(weights.ratio)} recoveries by weights and {len(activation.ratio)} by activation for {n} units: "
            "give one of each to a component"
        )
    p_weights, p_activation = (
        _by_unit(found.low, units, null) for found, null in ((weights, weights_null), (activation, activation_null))
    )
    q_weights, q_activation = adjusted(p_weights), adjusted(p_activation)
    with np.errstate(invalid="ignore"):  # comparisons with NaN are False
        acts = np.nan_to_num(activation.ratio, nan=0.0)
        is_source = (q_weights <= level) & (weights.ratio >= share * np.abs(acts))
        is_router = (q_activation <= level) & (weights.ratio < share * acts)
        if excess:
            is_source, is_router = is_source & (excess[0] > 0), is_router & (excess[1] > 0)
    roles: list[Role] = [
        "source" if source else "router" if router else "none"
        for source, router in zip(is_source.tolist(), is_router.tolist(), strict=True)
    ]
    return Roles(
        roles=tuple(roles),
        p_weights=p_weights,
        q_weights=q_weights,
        p_activation=p_activation,
        q_activation=q_activation,
    )


def executors_among(
    low: Floats, null: Floats, *, level: float = LEVEL_OF_ROLES
) -> tuple[tuple[Role, ...], Floats, Floats]:
    """Tell executors from the rest of the components past the anchor.

    Args:
        low: Lower end of the interval of each component's loss.
        null: Losses where the base was pushed along random directions, any number of them.
        level: False discoveries allowed.

    Returns:
        Roles, p and q values, one to a component.
    """
    p = p_above(low, null)
    q = adjusted(p)
    found: list[Role] = ["executor" if value <= level else "none" for value in q.tolist()]
    return tuple(found), p, q


def p_above(low: Floats, null: Floats) -> Floats:
    """Chance that the null reaches the lower end of an interval, shape of `low`.

    Within the null's range by its ranks, `(1 + count) / (1 + size)`. Beyond all of it, where ranks cannot tell any
    more, the smaller of that and Cantelli's bound `1 / (1 + z * z)`, z being the distance from the null's mean in its
    standard deviations. The bound holds for every distribution whose mean and deviation are known; here they come from
    the same values, so it is used only with `LEAST_FOR_BOUND` of them, and a null without spread gives none.

    Args:
        low: Lower ends; NaN, where an interval is unknown, gives 1.
        null: Values under the null, shape `(value,)`.

    Raises:
        ValueError: a null of fewer than two values.

    Source:
        Ranks: Phipson and Smyth 2010 (doi:10.2202/1544-6115.1585). The bound beyond them is our approximation.
    """
    if len(null) < 2:
        raise ValueError(f"a null of {len(null)} values: draw more of it, for components of this unit")
    reached = len(null) - np.searchsorted(np.sort(null), low, side="left")
    found = (1 + reached) / (1 + len(null))
    deviation = float(null.std(ddof=1))
    if len(null) >= LEAST_FOR_BOUND and deviation > 0:
        with np.errstate(over="ignore"):
            bound = 1 / (1 + np.square((low - null.mean()) / deviation))
        found = np.where(low > null.max(), np.minimum(found, bound), found)
    whole: Floats = np.where(np.isnan(low), 1.0, found)
    return whole


def adjusted(p: Floats) -> Floats:
    """Benjamini-Hochberg q values, shape of `p`."""
    found: Floats = false_discovery_control(p) if len(p) else p
    return found


def depth_by_role(
    roles: Sequence[Role], depths: Floats, *, n_permutations: int = N_PERMUTATIONS, seed: int = 0
) -> DepthByRole:
    """Mean depth of each role, and whether sources and routers lie at different depths.

    Args:
        roles: One to a component.
        depths: Layer over number of layers, shape `(component,)`.
        n_permutations: Most permutations; where there are no more ways of dealing out the two roles, all are taken.
        seed: Of the permutations.

    Raises:
        ValueError: not one depth to a role.
    """
    if depths.shape != (len(roles),):
        raise ValueError(f"{len(roles)} roles for depths of shape {depths.shape}: give each component one of both")
    named = np.array(roles)
    present = [role for role in ROLES if (named == role).any()]
    mean = {role: float(depths[named == role].mean()) for role in present}
    n = {role: int((named == role).sum()) for role in present}
    if not {"source", "router"} <= mean.keys():
        return DepthByRole(mean=mean, n=n, difference=float("nan"), p=float("nan"), n_permutations=0)
    both = np.concatenate([depths[named == "source"], depths[named == "router"]])
    n_sources = n["source"]
    observed = mean["router"] - mean["source"]
    if comb(len(both), n_sources) <= n_permutations:
        sums = np.array([both[list(places)].sum() for places in combinations(range(len(both)), n_sources)])
        spare = 0
    else:
        generator = np.random.default_rng(seed)
        sums = np.array([generator.permutation(both)[:n_sources].sum() for _ in range(n_permutations)])
        spare = 1
    differences = (both.sum() - sums) / (len(both) - n_sources) - sums / n_sources
    extreme = int((np.abs(differences) >= abs(observed) * (1 - _ROUNDING) - _ROUNDING).sum())
    p = (spare + extreme) / (spare + len(sums))
    return DepthByRole(mean=mean, n=n, difference=observed, p=p, n_permutations=len(sums))


def _by_unit(low: Floats, units: Sequence[str], null: Mapping[str, Floats]) -> Floats:
    """Chance of each component's distance from its unit's null, in that null's deviations, among those of all units.

    Units differ in how large their effects are, hardly in how these spread; together they tell rarer events than the
    few components of one unit could.
    """
    found, distances = np.ones(len(low)), np.full(len(low), np.nan)
    pool: list[Floats] = []
    for unit in dict.fromkeys(units):
        places = [place for place, other in enumerate(units) if other == unit]
        if np.isnan(low[places]).all():  # nothing of this unit was measured
            continue
        if unit not in null:
            raise ValueError(f"no null for {unit}; the null has {', '.join(null) or 'nothing'}: draw it for {unit} too")
        if len(null[unit]) < LEAST_FOR_BOUND or null[unit].std() == 0:  # no scale that could be trusted
            found[places] = p_above(low[places], null[unit])
            continue
        centre, deviation = null[unit].mean(), null[unit].std(ddof=1)
        distances[places] = (low[places] - centre) / deviation
        pool.append((null[unit] - centre) / deviation)
    known = ~np.isnan(distances)
    if pool:
        found[known] = p_above(distances[known], np.concatenate(pool))
    return found
