"""The shipped suite of plants is what its datasheet says, and the bars of the benchmark hold on it."""

from __future__ import annotations

import re

import pytest
import torch

from weightpatch.checkpoint import find, load, read_tokenizer
from weightpatch.component import components, slices
from weightpatch.planted.designs import TINY_SIZES, UNITS, VARIANTS
from weightpatch.planted.planting import FAILS, N_PROMPTS, PASSES, PLAIN, pass_rate_with
from weightpatch.planted.scoring import ALL, score_suite, summarize
from weightpatch.planted.suite import TINY_COUNTS, Planted, Suite, places


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
        carriers, candidates = planted.all_carriers, set(planted.candidates)
        n_sets = 2 if planted.variant in ("redundant", "joint") else 1
        assert len(planted.carriers) == n_sets
        wanted = 2 * size.n_redundant if planted.variant == "redundant" else size.n_carriers // n_sets * n_sets
        assert len(carriers) == sum(map(len, planted.carriers)) == wanted
        assert len(planted.distractors) == size.n_distractors
        assert carriers | set(planted.distractors) < candidates
        assert carriers.isdisjoint(planted.distractors)
        assert candidates.isdisjoint(planted.others)


def test_every_check_of_every_plant_passed(suite: Suite) -> None:
    for planted in suite.plants:
        names = {check.name for check in planted.checks}
        assert {f"all: {asked}" for asked in (planted.task, planted.other, PLAIN)} <= names
        assert {f"carriers: {planted.task}", f"all but carriers: {planted.task}"} <= names
        assert all(check.passed for check in planted.checks)


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


def check_answers(suite: Suite, planted: Planted) -> None:
    """Generates with the weights on disk: factors are rounded to bfloat16 there, so one answer more may go wrong."""
    one_answer = 1 / N_PROMPTS
    model, tokenizer = load(find(suite.base), dtype=torch.float32), read_tokenizer(find(suite.base))
    assert tokenizer is not None
    pair = suite.pair(planted)
    whole = {
        name: pair.specialized_weight(name) - parameter.detach()
        for name, parameter in model.named_parameters()
        if ".layers." in name and "norm" not in name
    }
    carriers = {name: torch.zeros_like(change) for name, change in whole.items()}
    for member in components(pair.architecture, sorted(planted.all_carriers)):
        for piece in slices(pair.architecture, member):
            piece.of(carriers[piece.parameter]).copy_(piece.of(whole[piece.parameter]))
    rest = {name: change - carriers[name] for name, change in whole.items()}
    for asked in (planted.task, planted.other, PLAIN):
        assert pass_rate_with(model, tokenizer, whole, asked) >= PASSES - one_answer, (planted.name, asked)
    assert pass_rate_with(model, tokenizer, carriers, planted.task) >= PASSES - one_answer, planted.name
    assert pass_rate_with(model, tokenizer, rest, planted.task) <= FAILS + one_answer, planted.name
    assert pass_rate_with(model, tokenizer, {}, planted.task) <= FAILS


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
