"""Roles of components: what each restores by its weights, what by its activations, and what its role follows from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from weightpatch.component import Component
from weightpatch.effects import Effects
from weightpatch.errors import ComponentError
from weightpatch.executors import Executors
from weightpatch.nulls import Null, Plain
from weightpatch.roles import (
    LEVEL_OF_ROLES,
    SOURCE_SHARE,
    DepthByRole,
    Role,
    Roles,
    assign_roles,
    depth_by_role,
    executors_among,
)
from weightpatch.statistics import Recovery, recovery

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, eq=False)
class Hierarchy:
    """Roles, and all that they were judged by.

    Attributes:
        components: Below the anchor those that were patched, then those past it that were held.
        roles: One to a component.
        table: One row to a component: component, unit, layer, role; recovery, ci_low, ci_high by weights; activation,
            activation_low, activation_high; relay, their difference; beyond_plain, beyond_plain_low and
            activation_beyond_plain, activation_beyond_plain_low, what recoveries have beyond the same without the
            instruction and the lower end of its interval, where that was measured; loss, loss_low, loss_high past the
            anchor; p and q by weights (p_weights, q_weights), activation (p_activation, q_activation) and loss
            (p_loss, q_loss).
        depth: Mean depth of each role, 0 at the bottom and 1 at the top, and whether routers lie above sources.
        n_shuffles: Of the null.
        plain: Whether suspects were compared with themselves on the queries without the instruction.
        level: False discoveries that are allowed among the components called source, router or executor.
        share: Part of its activation effect that a source's weights have to explain.
    """

    components: tuple[Component, ...]
    roles: tuple[Role, ...]
    table: pd.DataFrame
    depth: DepthByRole
    n_shuffles: int
    plain: bool
    level: float
    share: float

    def of_role(self, role: Role) -> tuple[Component, ...]:
        """Components of a role, the largest first by what it is judged by."""
        column = {"source": "recovery", "router": "activation", "executor": "loss"}.get(role, "recovery")
        order = self.table[column].fillna(0).abs().sort_values(ascending=False, kind="stable").index
        return tuple(self.components[place] for place in order if self.roles[place] == role)


@dataclass(frozen=True, kw_only=True, eq=False)
class Suspects:
    """Components that roles are given to unless they do the same without the instruction.

    Attributes:
        sources: Lowest layer first.
        routers: Likewise.
    """

    sources: tuple[Component, ...]
    routers: tuple[Component, ...]


def find_suspects(
    effects: Effects,
    activation: Effects,
    null: Null,
    *,
    level: float = LEVEL_OF_ROLES,
    share: float = SOURCE_SHARE,
    seed: int = 0,
) -> Suspects:
    """Who has to be measured without the instruction (`nulls.measure_plain`) before `find_roles` can judge.

    Arguments and errors as in `find_roles`.
    """
    roles = _judge(effects, activation, null, None, level=level, share=share, seed=seed)[0].roles

    def named(role: Role) -> tuple[Component, ...]:
        return tuple(one for one, own in zip(effects.components, roles, strict=True) if own == role)

    return Suspects(sources=named("source"), routers=named("router"))


def find_roles(
    effects: Effects,
    activation: Effects,
    null: Null,
    plain: Plain | None,
    *,
    executors: Executors | None = None,
    n_layers: int,
    level: float = LEVEL_OF_ROLES,
    share: float = SOURCE_SHARE,
    seed: int = 0,
) -> Hierarchy:
    """Tell sources, routers and executors from the rest.

    Source: the interval of its recovery by weights lies above the null, its weights explain at least half of what its
    activation restores, and they do more with the instruction than without. Router: the interval of its recovery by
    activation lies above the null, its weights explain less, and its activation does more with the instruction than
    without. Executor: past the anchor, and the interval of its loss lies above what random directions of steering
    give; none where steering restores nothing of the output. Everything else is none.

    Args:
        effects: By weight patching.
        activation: By activation patching, of the same components, as far as they have an output, on the same prompts.
        null: From `draw_null` for these components.
        plain: From `measure_plain`, of all `find_suspects` names at least; None for a contrast readout, which has the
            effects without the instruction subtracted already.
        executors: What lies past the anchor; None: nothing was held.
        n_layers: Of the model.
        level: False discoveries allowed (Benjamini-Hochberg, within each of the three tests).
        share: See above.
        seed: Of bootstrap and permutations.

    Raises:
        ComponentError: activations of other components, or a suspect that was not measured without the instruction.
        NoGapError: the two models do not differ measurably in the readout.
    """
    import pandas as pd

    assigned, weights, acted, beyond = _judge(effects, activation, null, plain, level=level, share=share, seed=seed)
    if plain:
        suspects = find_suspects(effects, activation, null, level=level, share=share, seed=seed)
        left_out = [one for one in suspects.sources if one not in plain.weights]
        left_out += [one for one in suspects.routers if one not in plain.activation]
        if left_out:
            raise ComponentError(
                f"{', '.join(map(str, left_out[:4]))}: not measured without the instruction. Give measure_plain all "
                "that find_suspects names."
            )
    table = pd.DataFrame(
        {
            "component": [str(one) for one in effects.components],
            "unit": [one.unit for one in effects.components],
            "layer": pd.array([one.layer for one in effects.components], dtype="Int64"),
            "role": assigned.roles,
            "recovery": weights.ratio,
            "ci_low": weights.low,
            "ci_high": weights.high,
            "activation": acted.ratio,
            "activation_low": acted.low,
            "activation_high": acted.high,
            "relay": acted.ratio - weights.ratio,
            "beyond_plain": beyond[0].ratio,
            "beyond_plain_low": beyond[0].low,
            "activation_beyond_plain": beyond[1].ratio,
            "activation_beyond_plain_low": beyond[1].low,
            "p_weights": assigned.p_weights,
            "q_weights": assigned.q_weights,
            "p_activation": assigned.p_activation,
            "q_activation": assigned.q_activation,
        }
    )
    components, roles = effects.components, assigned.roles
    if executors:
        found = executors.table(seed=seed).rename(columns={"ci_low": "loss_low", "ci_high": "loss_high"})
        low = found["loss_low"].to_numpy() if executors.restored > 0 else np.full(len(found), np.nan)
        own, p, q = executors_among(low, executors.null_shares, level=level)
        found = found.assign(role=own, p_loss=p, q_loss=q)
        table = pd.concat([table, found], ignore_index=True)
        components, roles = (*components, *executors.components), (*roles, *own)
    else:
        table[["loss", "loss_low", "loss_high", "p_loss", "q_loss"]] = np.nan
    depths = np.array([(one.layer or 0) / n_layers for one in components])
    return Hierarchy(
        components=components,
        roles=roles,
        table=table,
        depth=depth_by_role(roles, depths, seed=seed),
        n_shuffles=null.n_shuffles,
        plain=plain is not None,
        level=level,
        share=share,
    )


def _judge(
    effects: Effects,
    activation: Effects,
    null: Null,
    plain: Plain | None,
    *,
    level: float,
    share: float,
    seed: int,
) -> tuple[Roles, Recovery, Recovery, tuple[Recovery, Recovery]]:
    """Roles below the anchor; recoveries by weights and by activation; what both have beyond plain queries."""
    places = {component: place for place, component in enumerate(activation.components)}
    if unknown := [str(one) for one in activation.components if one not in effects.components]:
        raise ComponentError(f"activations of {', '.join(unknown[:4])}, whose weights were not patched: patch both.")
    gap, queries = effects.gap.numpy(), effects.queries
    weights = recovery(effects.per_prompt.numpy(), gap, groups=queries, seed=seed)
    taken = recovery(activation.per_prompt.numpy(), gap, groups=queries, seed=seed)
    acted = _spread(taken, [places.get(one) for one in effects.components])

    def beyond(own: Effects, alone: Mapping[Component, Tensor]) -> Recovery:
        chosen = [place for place, one in enumerate(own.components) if one in alone]
        found = {own.components[place]: number for number, place in enumerate(chosen)}
        excess = np.stack(
            [(own.per_prompt[place] - alone[own.components[place]]).numpy() for place in chosen] or [np.zeros(len(gap))]
        )
        return _spread(recovery(excess, gap, groups=queries, seed=seed), [found.get(one) for one in effects.components])

    excess = (
        beyond(effects, plain.weights if plain else {}),
        beyond(activation, plain.activation if plain else {}),
    )
    roles = assign_roles(
        weights,
        acted,
        units=[one.unit for one in effects.components],
        weights_null=null.weights,
        activation_null=null.activation,
        excess=(excess[0].low, excess[1].low) if plain else None,
        level=level,
        share=share,
    )
    return roles, weights, acted, excess


def _spread(found: Recovery, places: Sequence[int | None]) -> Recovery:
    """Values by component; NaN where there is no place."""

    def spread(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([float("nan") if place is None else values[place] for place in places])

    return Recovery(
        ratio=spread(found.ratio),
        low=spread(found.low),
        high=spread(found.high),
        mean_of_ratios=spread(found.mean_of_ratios),
    )
