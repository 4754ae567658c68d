"""How often roles are given where nothing carries the task, and how often intervals of recoveries cover the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import numpy as np

from weightpatch.anchor import Anchor
from weightpatch.component import Component, components
from weightpatch.engine.activations import has_output
from weightpatch.errors import NoGapError
from weightpatch.fitting import fit_anchor
from weightpatch.hierarchy import Hierarchy, find_roles
from weightpatch.localization import localize, reaches
from weightpatch.nulls import N_SHUFFLES, draw_null, measure_plain, pooled
from weightpatch.pair import ModelPair
from weightpatch.planted.emptied import emptied
from weightpatch.planted.pooling import in_processes
from weightpatch.planted.suite import Planted, Suite
from weightpatch.prompts import ContrastPrompts
from weightpatch.roles import LEVEL_OF_ROLES, SOURCE_SHARE
from weightpatch.statistics import Interval, mean_interval, recovery

Kind = Literal["emptied, own anchor", "emptied, the plant's anchor", "plant"]
"""Pair and anchor: the plant without its carriers, with an anchor fitted on that or on the plant; the plant itself."""
KINDS: tuple[Kind, ...] = get_args(Kind)
N_QUERIES = 16
"""Queries to fit each anchor on, and as many others to measure."""
N_DRAWS = 200
"""Samples of queries that coverage is measured with."""
SAMPLE_SIZES = (6, 12, 24)
N_POPULATION = 96
"""Queries that stand for all."""


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Who was called source on one pair. Components: those below the anchor that carry nothing.

    Attributes:
        plant: The plant.
        variant: Its variant.
        unit: Its unit.
        kind: Pair and anchor.
        refused: There is no gap, so nobody is called anything.
        unstable: A gate of the anchor failed, which is reported, but does not keep anybody from being called.
        n: Components.
        sources: Called source by the rule.
        at_level: With p at most the level, before Benjamini and Hochberg's correction; the rest of the rule as it is.
        sources_shuffled: Called source without the comparison with queries that lack the instruction.
        at_level_shuffled: With p at most the level, likewise.
        n_carriers: Carriers below the anchor; none are in an emptied pair.
        carriers: Called source among them.
        carriers_shuffled: Likewise without the comparison.
    """

    plant: str
    variant: str
    unit: str
    kind: Kind
    refused: bool
    unstable: bool
    n: int
    sources: int = 0
    at_level: int = 0
    sources_shuffled: int = 0
    at_level_shuffled: int = 0
    n_carriers: int = 0
    carriers: int = 0
    carriers_shuffled: int = 0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Shares over pairs of one kind, each with its 95 % interval over pairs.

    Attributes:
        kind: Pair and anchor.
        n_pairs: How many.
        n_refused: Those without a gap.
        n_unstable: Those whose anchor failed a gate.
        sources: Called source by the rule, of components that carry nothing.
        at_level: With p at most the level before the correction, likewise.
        sources_shuffled: Without the comparison with queries that lack the instruction.
        at_level_shuffled: Likewise.
        any_source: Pairs on which any component that carries nothing was called source.
        carriers: Carriers called source; NaN where there are none.
        carriers_shuffled: Likewise without the comparison.
    """

    kind: Kind
    n_pairs: int
    n_refused: int
    n_unstable: int
    sources: Interval
    at_level: Interval
    sources_shuffled: Interval
    at_level_shuffled: Interval
    any_source: float
    carriers: float
    carriers_shuffled: float


@dataclass(frozen=True, kw_only=True)
class Covered:
    """How often intervals from few queries hold the truth.

    Attributes:
        plant: The plant.
        n: Queries in a sample.
        n_population: Queries over which the truth was measured.
        covered: Share of intervals that hold it, over components and samples.
    """

    plant: str
    n: int
    n_population: int
    covered: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was found on a suite.

    Attributes:
        found: Pair by pair.
        rates: By kind of pair.
        coverage: Of one plant of each unit.
    """

    found: tuple[Calibrated, ...]
    rates: tuple[Rates, ...]
    coverage: tuple[Covered, ...]


def calibrate(
    suite: Suite,
    *,
    n_queries: int = N_QUERIES,
    n_shuffles: int = N_SHUFFLES,
    seed: int = 0,
    jobs: int | None = 1,
    on_plant: Callable[[str], None] | None = None,
) -> Calibration:
    """Give roles on every plant, with its carriers and without; and sample queries on the first plant of each unit.

    Args:
        suite: The plants.
        n_queries: Queries to fit each anchor on, and as many others to measure.
        n_shuffles: Of the null.
        seed: Of prompts, shuffles, samples and bootstraps.
        jobs: As in `scoring.score_suite`.
        on_plant: Called with the name of each plant when it is done.
    """
    work = partial(_calibrate, suite, n_queries=n_queries, n_shuffles=n_shuffles, seed=seed)
    numbers = [(number,) for number in range(len(suite.plants))]
    found: dict[int, tuple[list[Calibrated], list[Covered]]] = {}
    for number, own, covered in in_processes(work, numbers, jobs=jobs):
        found[number] = own, covered
        if on_plant:
            on_plant(suite.plants[number].name)
    every = tuple(one for number in sorted(found) for one in found[number][0])
    return Calibration(
        found=every,
        rates=tuple(rates(every)),
        coverage=tuple(one for number in sorted(found) for one in found[number][1]),
    )


def rates(found: Iterable[Calibrated]) -> list[Rates]:
    """Shares by kind of pair."""
    every = list(found)
    rows: list[Rates] = []
    for kind in KINDS:
        own = [one for one in every if one.kind == kind]
        if not own:
            continue
        n_carriers = sum(one.n_carriers for one in own)

        def share(name: str, own: Sequence[Calibrated] = own) -> Interval:
            return mean_interval(np.array([getattr(one, name) / one.n for one in own]))

        rows.append(
            Rates(
                kind=kind,
                n_pairs=len(own),
                n_refused=sum(one.refused for one in own),
                n_unstable=sum(one.unstable for one in own),
                sources=share("sources"),
                at_level=share("at_level"),
                sources_shuffled=share("sources_shuffled"),
                at_level_shuffled=share("at_level_shuffled"),
                any_source=float(np.mean([one.sources > 0 for one in own])),
                carriers=sum(one.carriers for one in own) / n_carriers if n_carriers else float("nan"),
                carriers_shuffled=sum(one.carriers_shuffled for one in own) / n_carriers
                if n_carriers
                else float("nan"),
            )
        )
    return rows


def coverage(
    suite: Suite,
    planted: Planted,
    *,
    sizes: Sequence[int] = SAMPLE_SIZES,
    n_population: int = N_POPULATION,
    n_draws: int = N_DRAWS,
    seed: int = 0,
) -> list[Covered]:
    """How often a 95 % interval from few queries holds the recovery over all queries, over components of a plant.

    The queries that are measured stand for a population; samples are drawn from it with replacement, and the interval
    of every component's recovery is compared with its recovery over the population.

    Args:
        suite: The suite.
        planted: One of its plants.
        sizes: Queries in a sample.
        n_population: Queries that are measured.
        n_draws: Samples of each size.
        seed: Of prompts, samples and bootstraps.

    Returns:
        One to a size.
    """
    pair = suite.pair(planted)
    prompts = ContrastPrompts.load(f"instructions:{planted.task}", n_queries=n_population // 2, seed=seed)
    anchor = fit_anchor(pair, prompts.split("fit"), layer=planted.anchor_layer)
    rows = ContrastPrompts((*prompts.split("localize"), *prompts.split("validate")))
    chosen = [one for one in _components(pair, planted) if reaches(one, anchor)]
    effects = localize(pair, rows, anchor, units=chosen)
    per_prompt, gap = effects.per_prompt.numpy(), effects.gap.numpy()
    acting = np.abs(per_prompt).max(axis=1) > 0
    truth = per_prompt[acting].mean(axis=1) / gap.mean()
    rng = np.random.default_rng(seed)
    found: list[Covered] = []
    for n in sizes:
        covered: list[float] = []
        for draw in range(n_draws):
            places = rng.integers(len(gap), size=n)
            interval = recovery(per_prompt[acting][:, places], gap[places], seed=draw)
            covered.append(float(np.mean((interval.low <= truth) & (truth <= interval.high))))
        share = float(np.mean(covered))
        found.append(Covered(plant=planted.name, n=n, n_population=len(gap), covered=share))
    return found


def _calibrate(
    suite: Suite, number: int, *, n_queries: int, n_shuffles: int, seed: int
) -> tuple[int, list[Calibrated], list[Covered]]:
    planted = suite.plants[number]
    is_first = planted == next(one for one in suite.plants if one.unit == planted.unit)
    covered = coverage(suite, planted, seed=seed) if is_first else []
    pair = suite.pair(planted)
    carriers = [Component.parse(address) for address in sorted(planted.all_carriers)]
    without = emptied(pair, carriers)
    prompts = ContrastPrompts.load(f"instructions:{planted.task}", n_queries=n_queries, seed=seed + number)
    fit, rows = prompts.split("fit"), prompts.split("localize")
    on_plant, own = (fit_anchor(one, fit, layer=planted.anchor_layer) for one in (pair, without))
    cases = zip(KINDS, (without, without, pair), (own, on_plant, on_plant), strict=True)
    found = [
        _judged(planted, kind, chosen, anchor, rows, n_shuffles=n_shuffles, seed=seed) for kind, chosen, anchor in cases
    ]
    return number, found, covered


def _judged(
    planted: Planted,
    kind: Kind,
    pair: ModelPair,
    anchor: Anchor,
    rows: ContrastPrompts,
    *,
    n_shuffles: int,
    seed: int,
) -> Calibrated:
    below = [one for one in _components(pair, planted) if reaches(one, anchor)]
    is_carrier = np.array([str(one) in planted.all_carriers for one in below])
    blank = Calibrated(
        plant=planted.name,
        variant=planted.variant,
        unit=planted.unit,
        kind=kind,
        refused=True,
        unstable=anchor.report is not None and not anchor.report.stable,
        n=int((~is_carrier).sum()),
        n_carriers=int(is_carrier.sum()) if kind == "plant" else 0,
    )
    anchor = replace(anchor, report=None)  # counted above, so that nobody has to be warned
    try:
        hierarchy = _roles(pair, anchor, rows, below, n_shuffles=n_shuffles, seed=seed)
    except NoGapError:
        return blank
    table = hierarchy.table
    is_carrier = table["component"].isin(planted.all_carriers).to_numpy()
    beyond = table["beyond_plain_low"].to_numpy() > 0
    explains = table["recovery"].to_numpy() >= SOURCE_SHARE * np.abs(np.nan_to_num(table["activation"].to_numpy()))
    is_source = np.array([role == "source" for role in hierarchy.roles])
    by_p = (table["p_weights"].to_numpy() <= LEVEL_OF_ROLES) & explains
    by_q = (table["q_weights"].to_numpy() <= LEVEL_OF_ROLES) & explains

    def count(chosen: np.ndarray) -> int:
        return int(chosen.sum())

    return replace(
        blank,
        refused=False,
        sources=count(is_source & ~is_carrier),
        at_level=count(by_p & beyond & ~is_carrier),
        sources_shuffled=count(by_q & ~is_carrier),
        at_level_shuffled=count(by_p & ~is_carrier),
        carriers=count(is_source & is_carrier),
        carriers_shuffled=count(by_q & is_carrier),
    )


def _roles(
    pair: ModelPair,
    anchor: Anchor,
    rows: ContrastPrompts,
    below: Sequence[Component],
    *,
    n_shuffles: int,
    seed: int,
) -> Hierarchy:
    """Roles by the default rule, every component compared with the queries alone."""
    effects = localize(pair, rows, anchor, units=below)
    acting = [one for one in effects.components if has_output(one)]
    activation = localize(pair, rows, anchor, units=acting, method="activation")
    draws = draw_null(pair, rows, anchor, effects, seeds=[seed + number for number in range(n_shuffles)])
    null = pooled([*draws], effects.components)
    plain = measure_plain(pair, rows, anchor, weights=effects.components, activation=activation.components)
    return find_roles(effects, activation, null, plain, n_layers=pair.architecture.n_layers, seed=seed)


def _components(pair: ModelPair, planted: Planted) -> Iterator[Component]:
    yield from components(pair.architecture, [*planted.candidates, *planted.others])
