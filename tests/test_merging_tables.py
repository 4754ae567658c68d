"""Tables of the merging comparison: chosen on validation, judged on test, with intervals that mean what they say."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

FOLDER = Path(__file__).parent.parent / "benchmarks" / "merging"
N_PROBLEMS = 40
SPLITS = ("validation", "test")
Case = Mapping[str, Mapping[str, object]]


@pytest.fixture(scope="module")
def table() -> Iterator[ModuleType]:
    """benchmarks/merging/table.py, which finds its neighbours beside it."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("table")
    sys.path.remove(str(FOLDER))


def case(rates: Mapping[tuple[str, str, int], float], draw: np.random.Generator) -> Case:
    """Results of two experts that solve everything, a base that solves nothing, and methods with true pass rates.

    Args:
        rates: (method, split, number of the configuration) -> its rate.
        draw: What its problems come out by.
    """
    known = {}
    fixed = {(name, split, 0): float(name != "base") for name in ("base", "expert x", "expert y") for split in SPLITS}
    for (method, split, number), rate in {**fixed, **rates}.items():
        config = {} if (method, split, number) in fixed else {"number": number}
        passed = {expert: (draw.random(N_PROBLEMS) < rate).astype(int).tolist() for expert in ("x", "y")}
        record = {"method": method, "config": config, "split": split, "passed": passed, "plain_loss": 1.0}
        known[json.dumps([method, config, split], sort_keys=True)] = record
    return known


def cases(first: float, second: float, n: int, *, spread: float = 0.0, seed: int = 0) -> Sequence[Case]:
    draw = np.random.default_rng(seed)
    return [
        case(
            {
                (method, split, 0): rate + shift
                for method, rate, shift in (("a", first, draw.normal(0, spread)), ("b", second, 0.0))
                for split in SPLITS
            },
            draw,
        )
        for _ in range(n)
    ]


def test_the_configuration_that_is_judged_is_the_best_on_validation_and_not_the_best_on_test(table: ModuleType) -> None:
    rates = {("a", "validation", 0): 0.0, ("a", "validation", 1): 1.0, ("a", "test", 0): 1.0, ("a", "test", 1): 0.0}
    found = table.chosen(case(rates, np.random.default_rng(0)), "a")
    assert (found["selected"]["config"], found["oracle"]["config"]) == ({"number": 1}, {"number": 0})


def test_a_method_minus_itself_is_nothing_and_minus_one_that_solves_nothing_is_its_rate(table: ModuleType) -> None:
    every = cases(0.7, 0.0, 5)
    assert table.differences(every, "a", "a").tolist() == [0.0] * 5
    assert table.bootstrap(every, "a", "a") == (0.0, 0.0)
    solved = [np.mean([*map(np.mean, table.chosen(known, "a")["selected"]["passed"].values())]) for known in every]
    np.testing.assert_allclose(table.differences(every, "a", "b"), solved, atol=1e-12)


def test_students_interval_of_the_cases_is_scipys_paired_one(table: ModuleType) -> None:
    values = table.differences(cases(0.7, 0.5, 6, spread=0.1), "a", "b")
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose(table.student(values), (expected.low, expected.high), atol=1e-12)


@pytest.mark.parametrize("interval", ["bootstrap", "student"])
def test_intervals_hold_the_true_difference_about_as_often_as_they_say(
    table: ModuleType, monkeypatch: pytest.MonkeyPatch, interval: str
) -> None:
    monkeypatch.setattr(table, "N_DRAWS", 400)
    held = []
    for seed in range(200):
        every = cases(0.6, 0.5, 6, spread=0.1, seed=seed)
        if interval == "bootstrap":
            low, high = table.bootstrap(every, "a", "b")
        else:
            low, high = table.student(table.differences(every, "a", "b"))
        held.append(low <= 0.1 <= high)
    assert 0.9 <= np.mean(held) < 1.0


def test_the_overview_has_each_cases_recovery_and_a_mean_only_where_a_method_has_all_cases(table: ModuleType) -> None:
    draw = np.random.default_rng(0)
    rates = {(name, split, 0): rate for name, rate in (("a", 0.5), ("b", 0.75)) for split in SPLITS}
    both, alone = case(rates, draw), case({key: rate for key, rate in rates.items() if key[0] == "a"}, draw)
    a, b = (table.mean_recovery(table.chosen(both, name)["selected"], both) for name in "ab")
    other = table.mean_recovery(table.chosen(alone, "a")["selected"], alone)
    assert table.overview({"x": both, "y": alone}) == [
        "| method | x | y | mean |",
        "| --- | ---: | ---: | ---: |",
        f"| a | {a:.3f} | {other:.3f} | {(a + other) / 2:.3f} |",
        f"| b | {b:.3f} |  |  |",
    ]


def test_a_method_is_compared_with_each_other_one_where_a_case_has_both(table: ModuleType) -> None:
    x, y = (cases(0.6, 0.5, 1, spread=0.1, seed=seed)[0] for seed in (1, 2))
    lacking = {key: record for key, record in y.items() if record["method"] != "b"}
    (low, high), difference = table.bootstrap([x], "a", "b"), table.differences([x], "a", "b")[0]
    assert table.comparison({"x": x, "y": lacking}, "a") == [
        "| a minus | x | y |",
        "| --- | --- | --- |",
        f"| b | {difference:+.3f} ({low:.3f} to {high:.3f}) |  |",
    ]


def test_the_docs_show_what_the_results_on_smollm2_say(table: ModuleType) -> None:
    results = FOLDER / "results" / "smollm2"
    folders = sorted(file.parent for file in results.glob("*/results.jsonl"))
    assert folders
    every = {folder.name: table.read_case(folder) for folder in folders}
    written = (results / "README.md").read_text(encoding="utf-8").splitlines()
    told = table.page(every, "streams and KL")
    assert written[-len(told) :] == told
    docs = (FOLDER.parent.parent / "docs" / "merging.md").read_text(encoding="utf-8").splitlines()
    shown = told[: told.index(f"## {folders[0].name}")]
    assert [line for line in shown if line.startswith("|") and line not in docs] == []


def test_the_docs_say_of_small_experts_what_those_results_say_that_were_kept(table: ModuleType) -> None:
    every = [table.read_case(folder) for folder in sorted((FOLDER / "results" / "tiny").iterdir())]
    assert len(every) == 3

    def told(*values: float) -> list[str]:
        return [f"{value:.3f}".lstrip("0") for value in values]

    first, second = "streams and KL", "activation-informed"
    means = {
        name: np.mean([table.mean_recovery(table.chosen(known, name)["selected"], known) for known in every])
        for name in (second, "task arithmetic", first)
    }
    own = table.differences(every, first, second)
    informed, arithmetic, learned, more, low, high, least, most = told(
        *means.values(), own.mean(), *table.bootstrap(every, first, second), *table.student(own)
    )
    assert (
        f"it has {informed}, task arithmetic {arithmetic}, `streams+outputs` {learned}: {more} more ({low} to {high}, "
        f"Student {least} to {most})"
    ) in (FOLDER.parent.parent / "docs" / "merging.md").read_text(encoding="utf-8")
