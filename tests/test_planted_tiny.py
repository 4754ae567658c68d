"""The shipped suite of plants is what its datasheet says, and the bars of the benchmark hold on it."""

from __future__ import annotations

import re

import pytest

from plants import check_answers, check_page, check_parts
from weightpatch.planted.designs import TINY_SIZES, UNITS, VARIANTS
from weightpatch.planted.scoring import ALL, score_suite, summarize
from weightpatch.planted.suite import TINY_COUNTS, Suite, places


@pytest.fixture(scope="module")
def suite() -> Suite:
    return Suite.open("tiny")


def test_the_suite_has_its_forty_plants_in_ten_megabytes(suite: Suite) -> None:
    assert [(one.name, one.variant, one.unit) for one in suite.plants] == places(TINY_COUNTS)
    assert suite.version
    files = [file for file in suite.folder.rglob("*") if file.is_file() and file.name != "README.md"]
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    assert sum(file.stat().st_size for file in files) <= 10_000_000


def test_every_plant_has_the_parts_of_its_design(suite: Suite) -> None:
    for planted in suite.plants:
        size = TINY_SIZES[planted.unit]
        n_sets = 2 if planted.variant in ("redundant", "joint") else 1
        wanted = 2 * size.n_redundant if planted.variant == "redundant" else size.n_carriers // n_sets * n_sets
        check_parts(suite, planted, n_carriers=wanted, n_distractors=size.n_distractors)


def test_every_check_of_every_plant_passed(suite: Suite) -> None:
    for planted in suite.plants:
        check_page(planted)


def test_the_datasheet_names_version_seed_and_redrawn_designs(suite: Suite) -> None:
    sheet = (suite.folder / "README.md").read_text(encoding="utf-8")
    redrawn = sum(len(attempts) for attempts in suite.failures.values())
    assert f"version {suite.version}" in sheet
    assert f"--seed {suite.seed}" in sheet
    assert re.search(rf"\b{redrawn} further designs", sheet)


@pytest.mark.parametrize("name", ["below-kvs-0"])
def test_a_shipped_plant_does_what_its_page_says(suite: Suite, name: str) -> None:
    check_answers(suite, next(one for one in suite.plants if one.name == name))


@pytest.mark.slow
def test_every_fourth_shipped_plant_does_what_its_page_says(suite: Suite) -> None:
    for planted in suite.plants[::4]:
        check_answers(suite, planted)


@pytest.mark.slow
def test_exact_weight_patching_finds_carriers_below_where_shortcuts_do_not(suite: Suite) -> None:
    """The benchmark's bars: on `below`, among all components with a difference."""
    below = [one for one in suite.plants if one.variant == "below"]
    chosen = Suite(folder=suite.folder, base=suite.base, seed=suite.seed, plants=tuple(below), failures={})
    found = summarize(score_suite(chosen, methods=("exact", "activation", "|delta|"), jobs=None))
    rows = {(row.method, row.among): row for row in found if (row.variant, row.unit) == ("below", ALL)}
    for among in ("unit", ALL):
        assert rows["exact", among].auroc >= 0.95
        assert rows["|delta|", among].auroc <= 0.6
        assert rows["activation", among].behind_low > 0


def test_variants_and_units_are_all_there(suite: Suite) -> None:
    assert {(one.variant, one.unit) for one in suite.plants} == {(v, u) for v in VARIANTS for u in UNITS}
