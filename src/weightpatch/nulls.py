"""What effects look like where weights differ as much but mean nothing: the null that roles are judged against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from weightpatch.anchor import Anchor
from weightpatch.component import Component
from weightpatch.effects import Effects
from weightpatch.engine.activations import has_output
from weightpatch.estimation import Estimation
from weightpatch.localization import Method, sweep
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompts
from weightpatch.shuffling import shuffled
from weightpatch.statistics import Floats, check_gap

N_SHUFFLES = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Null:
    """Recoveries of components of shuffled pairs, by unit, over the true pair's gap.

    Attributes:
        weights: Unit -> recoveries by weight patching, shape `(shuffle x component,)`.
        activation: Unit -> recoveries by activation patching.
        n_shuffles: How often the differences were shuffled.
    """

    weights: Mapping[str, Floats]
    activation: Mapping[str, Floats]
    n_shuffles: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Draw:
    """One shuffle.

    Attributes:
        seed: Of the shuffle.
        weights: Recovery of each component by weight patching, shape `(component,)`.
        activation: By activation patching, likewise; NaN for components without an output.
    """

    seed: int
    weights: Floats
    activation: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Plain:
    """What components do on the same queries without their instruction: drift does much the same there.

    Attributes:
        weights: Component -> effect by weight patching, prompt by prompt, shape `(prompt,)`, in the readout's unit.
        activation: The same by activation patching.
    """

    weights: Mapping[Component, Tensor]
    activation: Mapping[Component, Tensor]


def measure_plain(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Anchor,
    *,
    weights: Sequence[Component],
    activation: Sequence[Component],
    method: Method = "exact",
    batch_tokens: int | None = None,
) -> Plain:
    """Patch components on the queries without their instruction.

    Args:
        pair: The two models.
        prompts: Those of the effects.
        anchor: The anchor, no contrast.
        weights: What to patch by weights, ordered by layer.
        activation: What to patch by activation, likewise.
        method: `exact` or `first-order`: how weights are patched.
        batch_tokens: Most tokens of one call.
    """
    alone = prompts.without_instructions(pair.tokenizer)

    def measured(chosen: Sequence[Component], how: Method) -> dict[Component, Tensor]:
        found = sweep(pair, alone, anchor, chosen, method=how, batch_tokens=batch_tokens) if chosen else ()
        return {effect.component: effect.per_prompt for effect in found}

    return Plain(weights=measured(weights, method), activation=measured(activation, "activation"))


def draw_null(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Anchor,
    effects: Effects,
    *,
    seeds: Sequence[int] = tuple(range(N_SHUFFLES)),
    exact: bool = False,
    batch_tokens: int | None = None,
) -> Iterator[Draw]:
    """Localize on pairs whose weight differences are shuffled within each tensor.

    Args:
        pair: The true pair.
        prompts: Those of the effects.
        anchor: The anchor.
        effects: Of the true pair: says which components, and gives the gap that recoveries are shares of.
        seeds: One to a shuffle.
        exact: Patch; else estimate to first order, by outputs: two passes for all components of a shuffle.
        batch_tokens: Most tokens of one call.

    Raises:
        NoGapError: the true pair does not differ measurably in the readout.
    """
    gap = check_gap(effects.gap.numpy(), groups=effects.queries).estimate
    with_output = [one for one in effects.components if has_output(one)]
    places = [effects.components.index(one) for one in with_output]
    how = None if exact else Estimation()
    for seed in seeds:
        null = shuffled(pair, seed=seed)
        found = np.full((2, len(effects.components)), np.nan)
        found[0] = [
            float(effect.per_prompt.mean()) / gap
            for effect in sweep(
                null,
                prompts,
                anchor,
                effects.components,
                method="exact" if exact else "first-order",
                estimation=how,
                batch_tokens=batch_tokens,
            )
        ]
        found[1, places] = [
            float(effect.per_prompt.mean()) / gap
            for effect in sweep(
                null, prompts, anchor, with_output, method="activation", estimation=how, batch_tokens=batch_tokens
            )
        ]
        yield Draw(seed=seed, weights=found[0], activation=found[1])


def pooled(draws: Sequence[Draw], components: Sequence[Component]) -> Null:
    """Draws put together by unit."""
    units = [component.unit for component in components]
    by_unit: list[dict[str, Floats]] = []
    for values in ([draw.weights for draw in draws], [draw.activation for draw in draws]):
        stacked = np.stack(values) if values else np.zeros((0, len(units)))
        found = {}
        for unit in dict.fromkeys(units):
            own = stacked[:, [place for place, other in enumerate(units) if other == unit]].flatten()
            found[unit] = own[~np.isnan(own)]
        by_unit.append(found)
    return Null(weights=by_unit[0], activation=by_unit[1], n_shuffles=len(draws))
