"""How well methods find planted carriers: ranks within each plant, then means and intervals over plants."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from weightpatch.component import components
from weightpatch.errors import NoGapError, RunError
from weightpatch.fitting import fit_anchor
from weightpatch.planted.methods import METHODS, Case
from weightpatch.planted.pooling import in_processes
from weightpatch.planted.suite import Planted, Suite
from weightpatch.prompts import ContrastPrompts
from weightpatch.reading import reference
from weightpatch.statistics import Floats, area_under_curve, check_gap, mean_interval

if TYPE_CHECKING:
    import pandas as pd

N_QUERIES = 12
ALL = "all"
"""Variant or unit of a row that takes all together; as a unit of candidates: components of every unit compete."""
BEST = "exact"
"""The method that the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How one method did on one plant.

    Attributes:
        plant: The plant.
        variant: Its variant.
        unit: Its unit.
        method: The method.
        among: Which components compete: `unit`, those of the plant's unit; `all`, everything with a difference.
        auroc: Chance that a carrier is ranked above another component, ties half.
        average_precision: Area under precision over recall.
        precision: Share of carriers among as many of the highest as there are carriers.
    """

    plant: str
    variant: str
    unit: str
    method: str
    among: str
    auroc: float
    average_precision: float
    precision: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method on all plants of one variant and unit.

    Attributes:
        method: The method.
        variant: The variant, or `all`.
        unit: The plants' unit, or `all`.
        among: As in `Score`.
        n_plants: How many.
        auroc: Mean over them.
        ci_low: Its 95 % interval over plants; NaN for a single one.
        ci_high: The other end.
        average_precision: Mean over plants.
        precision: Mean precision at the number of carriers.
        behind: By how much exact weight patching's AUROC is higher, mean over the same plants.
        behind_low: Its 95 % interval, paired by plant.
        behind_high: The other end.
    """

    method: str
    variant: str
    unit: str
    among: str
    n_plants: int
    auroc: float
    ci_low: float
    ci_high: float
    average_precision: float
    precision: float
    behind: float
    behind_low: float
    behind_high: float


def score_suite(
    suite: Suite,
    *,
    methods: Sequence[str] = tuple(METHODS),
    n_queries: int = N_QUERIES,
    seed: int = 0,
    others: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    jobs: int | None = 1,
    on_plant: Callable[[str], None] | None = None,
) -> list[Score]:
    """Score methods on every plant of a suite.

    Args:
        suite: The plants.
        methods: Names out of `METHODS`.
        n_queries: Queries that anchors are fitted on, and as many others that are measured.
        seed: Deals the queries, and draws for the method `random`.
        others: Scores that other tools gave: method -> plant -> address -> score. See `read_scores`.
        jobs: Processes, each with one thread; None: as many as the machine has cores; 1: this one.
        on_plant: Called with the name of each plant when it is done.

    Raises:
        RunError: scores of another tool that leave out a component.
    """
    work = partial(_score, suite, methods=tuple(methods), n_queries=n_queries, seed=seed)
    given = [
        (number, {name: own.get(planted.name, {}) for name, own in (others or {}).items()})
        for number, planted in enumerate(suite.plants)
    ]
    found: dict[int, list[Score]] = {}
    for number, scores in in_processes(work, given, jobs=jobs):
        found[number] = scores
        if on_plant:
            on_plant(suite.plants[number].name)
    return [score for number in sorted(found) for score in found[number]]


def _score(
    suite: Suite,
    number: int,
    others: Mapping[str, Mapping[str, float]],
    *,
    methods: Sequence[str],
    n_queries: int,
    seed: int,
) -> tuple[int, list[Score]]:
    """One plant, by its place in the suite."""
    planted = suite.plants[number]
    case = open_case(suite, planted, n_queries=n_queries, seed=seed + number)
    addresses = [str(one) for one in case.components]
    values: dict[str, Floats] = {name: METHODS[name](case) for name in methods}
    values |= {name: _of_other(name, planted, given, addresses) for name, given in others.items()}
    return number, list(_scores(planted, addresses, values))


def open_case(suite: Suite, planted: Planted, *, n_queries: int = N_QUERIES, seed: int = 0) -> Case:
    """Load a plant and fit its anchor.

    Raises:
        NoGapError: the plant does not differ from its base in the anchor's readout.
    """
    pair = suite.pair(planted)
    prompts = ContrastPrompts.load(f"instructions:{planted.task}", n_queries=n_queries, seed=seed)
    anchor = fit_anchor(pair, prompts.split("fit"), layer=planted.anchor_layer)
    rows = prompts.split("localize")
    base, specialized = reference(pair, rows, anchor)
    try:
        check_gap((specialized - base).numpy(), groups=[row.query for row in rows])
    except NoGapError as error:
        raise NoGapError(f"{planted.name}: {error}") from error
    chosen = components(pair.architecture, [*planted.candidates, *planted.others])
    return Case(pair=pair, prompts=rows, anchor=anchor, components=chosen, seed=seed)


def summarize(scores: Iterable[Score]) -> list[Row]:
    """Means and intervals over plants: by variant and unit, by variant, and over everything."""
    every = list(scores)
    rows: list[Row] = []
    methods = list(dict.fromkeys(one.method for one in every))
    for among in dict.fromkeys(one.among for one in every):
        for variant in [*dict.fromkeys(one.variant for one in every), ALL]:
            for unit in [*dict.fromkeys(one.unit for one in every), ALL]:
                chosen = [
                    one
                    for one in every
                    if one.among == among and variant in (one.variant, ALL) and unit in (one.unit, ALL)
                ]
                rows += [_row(chosen, method, variant, unit, among) for method in methods if chosen]
    return rows


def tabulate(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows as a table."""
    import pandas as pd

    return pd.DataFrame([asdict(row) for row in rows])


def read_scores(file: str | Path) -> dict[str, dict[str, float]]:
    """Scores of another tool: a CSV file with the columns plant, component, score.

    Returns:
        Plant -> address -> score.

    Raises:
        RunError: the file cannot be read so.
    """
    try:
        with Path(file).open(encoding="utf-8", newline="") as lines:
            read = [(row["plant"], row["component"], float(row["score"])) for row in csv.DictReader(lines)]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise RunError(
            f"cannot read scores from {file} ({error}). It has to be a CSV file with the columns plant, component and "
            "score, a number that is higher for likelier carriers."
        ) from error
    read.sort(key=lambda row: row[0])
    return {plant: {address: score for _, address, score in own} for plant, own in groupby(read, lambda row: row[0])}


def precision_at(scores: Floats, truth: np.ndarray, k: int) -> float:
    """Expected share of carriers among the k highest, ties broken at random."""
    order = np.sort(scores)[::-1]
    above, tied = scores > order[k - 1], scores == order[k - 1]
    left = k - int(above.sum())
    return float((truth[above].sum() + left * truth[tied].mean()) / k)


def average_precision(scores: Floats, truth: np.ndarray) -> float:
    """Area under precision over recall; tied scores count as one step."""
    found, last = 0.0, 0
    for threshold in np.unique(scores)[::-1]:
        chosen = scores >= threshold
        right = int(truth[chosen].sum())
        found += (right - last) / truth.sum() * right / chosen.sum()
        last = right
    return float(found)


def _scores(planted: Planted, addresses: Sequence[str], values: Mapping[str, Floats]) -> Iterator[Score]:
    carriers, unit = planted.all_carriers, set(planted.candidates)
    truth = np.array([address in carriers for address in addresses])
    for among, chosen in (
        ("unit", np.array([address in unit for address in addresses])),
        (ALL, np.ones(len(addresses), dtype=bool)),
    ):
        for method, scores in values.items():
            own, right = scores[chosen], truth[chosen]
            yield Score(
                plant=planted.name,
                variant=planted.variant,
                unit=planted.unit,
                method=method,
                among=among,
                auroc=area_under_curve(own[right], own[~right]),
                average_precision=average_precision(own, right),
                precision=precision_at(own, right, int(right.sum())),
            )


def _row(scores: Sequence[Score], method: str, variant: str, unit: str, among: str) -> Row:
    own = {one.plant: one for one in scores if one.method == method}
    best = {one.plant: one.auroc for one in scores if one.method == BEST}
    auroc = mean_interval(np.array([one.auroc for one in own.values()]))
    nan = float("nan")
    behind, low, high = nan, nan, nan
    if best:
        difference = mean_interval(np.array([best[plant] - one.auroc for plant, one in own.items()]))
        behind, low, high = difference.estimate, difference.low, difference.high
    return Row(
        method=method,
        variant=variant,
        unit=unit,
        among=among,
        n_plants=len(own),
        auroc=auroc.estimate,
        ci_low=auroc.low,
        ci_high=auroc.high,
        average_precision=float(np.mean([one.average_precision for one in own.values()])),
        precision=float(np.mean([one.precision for one in own.values()])),
        behind=behind,
        behind_low=low,
        behind_high=high,
    )


def _of_other(name: str, planted: Planted, given: Mapping[str, float], addresses: Sequence[str]) -> Floats:
    if missing := [address for address in addresses if address not in given]:
        raise RunError(
            f"{name} gives no score for {len(missing)} of {len(addresses)} components of {planted.name}, the first "
            f"{missing[0]}: give one to every component with a difference (candidates and others in its plant.json)."
        )
    return np.array([given[address] for address in addresses])
