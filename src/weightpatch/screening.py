"""Screening: estimate every component, patch exactly where it counts, and say how far the estimate can be trusted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from weightpatch.agreement import Agreement, LayerError, agreement, is_poor, missed_at_most, poor_layers
from weightpatch.component import Component
from weightpatch.difference import weight_differences
from weightpatch.effects import ComponentEffect, Effects
from weightpatch.errors import ComponentError
from weightpatch.estimation import Estimation
from weightpatch.localization import Engine, localize, sweep
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompts
from weightpatch.reading import Target
from weightpatch.statistics import check_gap

if TYPE_CHECKING:
    import pandas as pd

BUDGET = 200
CONFIDENCE = 0.95
N_BEST = 10
"""Unless a threshold is given: how many of the best count as what should not have been missed."""

GOOD_UP_TO: Mapping[str, float] = {"neurons": 0.16, "heads": 0.16, "kvs": 0.16}
"""Median relative norm of modules' weight differences up to which `outputs` was off by a quarter at most, by unit."""

OTHERS_GOOD_UP_TO = 0.05
"""The same for larger components (docs/first-order.md)."""

MOST_ERROR = 0.25
"""A layer whose estimates are further off than this share of its exact effects is named (our choice)."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which components of one unit are patched exactly.

    Attributes:
        unit: The unit.
        members: All that were estimated.
        top: Those with the largest estimates by size, largest first.
        random: A uniform random sample of all members; some may be at the top too.
    """

    unit: str
    members: tuple[Component, ...]
    top: tuple[Component, ...]
    random: tuple[Component, ...]


@dataclass(frozen=True, kw_only=True)
class Screened:
    """What exact patching says about the estimates of one unit.

    Attributes:
        choice: What was patched.
        on_top: Agreement on the top of the list, where estimates were picked for being large.
        on_random: Agreement on the random sample, which speaks for all members.
        poor_layers: Layers where the estimate is off, judged on everything that was patched.
        threshold: Recovery by size, from which on a component counts as one that should not have been missed.
        missed_at_most: Upper bound on how many members above the threshold were not patched exactly.
        confidence: Of that bound.
        moved: How far the pair's weights moved: median relative norm of the difference over attentions and MLPs.
    """

    choice: Choice
    on_top: Agreement
    on_random: Agreement
    poor_layers: tuple[LayerError, ...]
    threshold: float
    missed_at_most: int
    confidence: float
    moved: float

    @property
    def good_up_to(self) -> float:
        """How far weights may move before estimates of this unit are no longer known to be good."""
        return GOOD_UP_TO.get(self.choice.unit, OTHERS_GOOD_UP_TO)

    @property
    def is_beyond(self) -> bool:
        """Whether the pair is beyond the range in which the estimate was found good."""
        return self.moved > self.good_up_to

    @property
    def is_poor(self) -> bool:
        """Whether the random sample says that the estimate cannot rank these components."""
        return is_poor(self.on_random)

    def __str__(self) -> str:
        """The verdict in words."""
        choice, sample = self.choice, self.on_random
        n_exact = len({*choice.top, *choice.random})
        lines = [
            f"{choice.unit}: {len(choice.members):,} estimated, {n_exact:,} patched exactly (top {len(choice.top)}, "
            f"random {len(choice.random)}). On the random sample: Pearson {sample.pearson:.3f}, Spearman "
            f"{sample.spearman:.3f}, same sign {sample.sign:.0%}, error {sample.error:.1%} of the exact effects.",
            f"With {self.confidence:.0%} confidence at most {self.missed_at_most:,} of the others reach a recovery of "
            f"{self.threshold:.4f} in size.",
        ]
        if self.is_poor:
            lines.append(
                "POOR: do not rank by this estimate. Patch these components exactly, or use another approximation."
            )
        if self.is_beyond:
            lines.append(
                f"BEYOND THE KNOWN RANGE: the weights moved by {self.moved:.0%} (median over modules); estimates of "
                f"{choice.unit} were found good up to {self.good_up_to:.0%}. Go by the agreement above."
            )
        if self.poor_layers:
            named = ", ".join(f"L{one.layer} ({one.error:.0%} of {one.n})" for one in self.poor_layers[:8])
            lines.append(f"Off by more than {MOST_ERROR:.0%} in: {named}.")
        return " ".join(lines)


@dataclass(frozen=True, kw_only=True, eq=False)
class Screening:
    """Estimates of all components, exact effects of some, and what these say of the others.

    Attributes:
        estimates: Estimated effects of all components.
        exact: Exact effects of those that were chosen.
        units: What was found out, by unit.
    """

    estimates: Effects
    exact: Effects
    units: Mapping[str, Screened]

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row for each component.

        Args:
            seed: Of the bootstrap over queries.

        Returns:
            The columns of `Effects.table` of the estimates; exact_effect and exact_recovery (NaN where not patched);
            chosen: `top`, `random`, `both` or empty.
        """
        table = self.estimates.table(seed=seed)
        gap = check_gap(self.estimates.gap.numpy(), groups=self.estimates.queries).estimate
        exact = dict(zip(map(str, self.exact.components), self.exact.per_prompt.mean(dim=1).tolist(), strict=True))
        table["exact_effect"] = table["component"].map(exact).astype(float)
        table["exact_recovery"] = table["exact_effect"] / gap
        top = {str(one) for screened in self.units.values() for one in screened.choice.top}
        drawn = {str(one) for screened in self.units.values() for one in screened.choice.random}
        table["chosen"] = [
            "both" if name in top and name in drawn else "top" if name in top else "random" if name in drawn else ""
            for name in table["component"]
        ]
        return table

    def __str__(self) -> str:
        """The verdicts in words, one line to a unit."""
        return "\n".join(str(screened) for screened in self.units.values())


def screen(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Target,
    *,
    units: str | Sequence[str | Component] = "neurons,heads,kvs",
    budget: int = BUDGET,
    random_share: float = 0.5,
    estimation: Estimation | None = None,
    threshold: float | None = None,
    confidence: float = CONFIDENCE,
    engine: Engine = "suffix",
    seed: int = 0,
    batch_tokens: int | None = None,
    on_effect: Callable[[ComponentEffect], None] | None = None,
) -> Screening:
    """Estimate all components, patch the most promising and a random sample exactly, and compare.

    Args:
        pair: The two models.
        prompts: All of them are used, with their instruction.
        anchor: What to read.
        units: Units and addresses, as in `localize`.
        budget: Components to patch exactly, dealt out evenly to the units; what is at the top and drawn counts twice.
        random_share: Share of the budget that is drawn at random.
        estimation: How to estimate; None: by outputs.
        threshold: Recovery by size that should not be missed; None: the tenth largest exact one of a unit's top list.
        confidence: Of the bound on what was missed.
        engine: Of the exact patches.
        seed: Of the random sample.
        batch_tokens: As in `localize`.
        on_effect: Called with each exact effect as it is measured.

    Raises:
        ComponentError: an unknown unit or address, a confidence that is none, or a budget too small for the units.
        AnchorError: the anchor does not fit the pair, or nothing asked for lies below it.
        NoGapError: the two models do not differ measurably in the readout.
    """
    if not 0 < confidence < 1:
        raise ComponentError(f"a confidence of {confidence}: give a probability between 0 and 1, such as 0.95.")
    estimates = localize(
        pair, prompts, anchor, units=units, method="first-order", estimation=estimation, batch_tokens=batch_tokens
    )
    check_gap(estimates.gap.numpy(), groups=estimates.queries)
    choices = choose(estimates, budget=budget, random_share=random_share, seed=seed)
    found: dict[Component, Tensor] = {}
    chosen = to_measure(estimates, choices)
    for effect in sweep(pair, prompts, anchor, chosen, engine=engine, batch_tokens=batch_tokens):
        found[effect.component] = effect.per_prompt
        if on_effect:
            on_effect(effect)
    return compare(
        estimates,
        choices,
        found,
        engine=engine,
        moved=how_far(one.relative_norm for one in weight_differences(pair, "attns,mlps")),
        threshold=threshold,
        confidence=confidence,
    )


def how_far(relative_norms: Iterable[float]) -> float:
    """How far a pair's weights moved, from the relative norms of its modules' differences: their median."""
    return float(np.median([*relative_norms]))


def choose(estimates: Effects, *, budget: int, random_share: float = 0.5, seed: int = 0) -> tuple[Choice, ...]:
    """What to patch exactly: of every unit the largest estimates by size, and a uniform random sample.

    Units too small for their part of the budget leave the rest to the others.

    Raises:
        ComponentError: a budget that leaves a unit without a component at the top and one at random.
    """
    by_unit: dict[str, list[int]] = {}
    for place, component in enumerate(estimates.components):
        by_unit.setdefault(component.unit, []).append(place)
    if budget < 2 * len(by_unit) or not 0 < random_share < 1:
        raise ComponentError(
            f"a budget of {budget} with a random share of {random_share} cannot serve {len(by_unit)} units: give at "
            f"least {2 * len(by_unit)} and a share between 0 and 1."
        )
    sizes = estimates.per_prompt.mean(dim=1).abs()
    draw = random.Random(seed)  # noqa: S311  no secret
    choices = []
    for n_done, (unit, places) in enumerate(sorted(by_unit.items(), key=lambda item: len(item[1]))):
        part = min(budget // (len(by_unit) - n_done), 2 * len(places))
        budget -= part
        n_random = min(len(places), part - 1, max(1, round(part * random_share)))
        n_top = min(len(places), part - n_random)
        order = sizes[places].argsort(descending=True, stable=True)[:n_top].tolist()
        choices.append(
            Choice(
                unit=unit,
                members=tuple(estimates.components[place] for place in places),
                top=tuple(estimates.components[places[rank]] for rank in order),
                random=tuple(estimates.components[place] for place in sorted(draw.sample(places, n_random))),
            )
        )
    return tuple(choices)


def to_measure(estimates: Effects, choices: Sequence[Choice]) -> tuple[Component, ...]:
    """What choices name, each once, in the order of the estimates."""
    wanted = {component for choice in choices for component in (*choice.top, *choice.random)}
    return tuple(component for component in estimates.components if component in wanted)


def compare(
    estimates: Effects,
    choices: Sequence[Choice],
    found: Mapping[Component, Tensor],
    *,
    engine: Engine,
    moved: float,
    threshold: float | None = None,
    confidence: float = CONFIDENCE,
) -> Screening:
    """Compare estimates with exact effects, unit by unit.

    Args:
        estimates: Of all components.
        choices: What was chosen.
        found: Exact effects of all that was chosen, each of shape `(prompt,)`.
        engine: That measured them.
        moved: How far the pair's weights moved, from `how_far`.
        threshold: As in `screen`.
        confidence: As in `screen`.
    """
    gap = check_gap(estimates.gap.numpy(), groups=estimates.queries).estimate
    recovery = dict(zip(estimates.components, (estimates.per_prompt.mean(dim=1) / gap).tolist(), strict=True))
    exact = {component: float(effects.mean()) / gap for component, effects in found.items()}
    if estimates.engine.endswith("sizes"):  # of grad_drop
        recovery, exact = ({one: abs(value) for one, value in side.items()} for side in (recovery, exact))
    measured = to_measure(estimates, choices)
    return Screening(
        estimates=estimates,
        exact=replace(
            estimates,
            components=measured,
            per_prompt=torch.stack([found[component] for component in measured]),
            method="exact",
            engine=engine,
            per_span={},
        ),
        units={
            choice.unit: _screened(choice, recovery, exact, moved=moved, threshold=threshold, confidence=confidence)
            for choice in choices
        },
    )


def _screened(
    choice: Choice,
    recovery: Mapping[Component, float],
    exact: Mapping[Component, float],
    *,
    moved: float,
    threshold: float | None,
    confidence: float,
) -> Screened:
    def values(
        members: Sequence[Component], of: Mapping[Component, float]
    ) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([of[member] for member in members])

    both = tuple(dict.fromkeys((*choice.top, *choice.random)))
    if threshold is None:  # from the top list alone: the sample must not have a say in it
        threshold = float(np.sort(np.abs(values(choice.top, exact)))[::-1][:N_BEST][-1])
    top = set(choice.top)
    outside = [member for member in choice.random if member not in top]
    return Screened(
        choice=choice,
        on_top=agreement(values(choice.top, recovery), values(choice.top, exact)),
        on_random=agreement(values(choice.random, recovery), values(choice.random, exact)),
        poor_layers=poor_layers(
            values(both, recovery),
            values(both, exact),
            np.array([-1 if member.layer is None else member.layer for member in both]),
            most_error=MOST_ERROR,
        ),
        threshold=threshold,
        missed_at_most=missed_at_most(
            n_rest=len(choice.members) - len(choice.top),
            n_sampled=len(outside),
            n_found=sum(abs(exact[member]) >= threshold for member in outside),
            confidence=confidence,
        ),
        confidence=confidence,
        moved=moved,
    )
