"""Pairs without carriers are what they claim, and rates are the shares that counting by hand gives."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from conftest import build_pair
from weightpatch import ContrastPrompts, ModelPair
from weightpatch.component import Component, slices
from weightpatch.planted.calibration import KINDS, Calibrated, rates
from weightpatch.planted.emptied import emptied


@pytest.mark.parametrize("shape", ["llama-gqa", "gpt2", "mixtral"])
def test_an_emptied_pair_has_the_base_in_the_carriers_and_the_plant_elsewhere(shape: str) -> None:
    pair = build_pair(shape)
    out = [Component.parse("L0.H1"), Component.parse("L1.mlp"), Component.parse("L2.H3")]
    without = emptied(pair, out)
    expected = {name: pair.specialized_weight(name).clone() for name in pair.architecture.parameters}
    changed = set()
    for component in out:
        for piece in slices(pair.architecture, component):
            piece.of(expected[piece.parameter]).copy_(piece.of(pair.base.get_parameter(piece.parameter)))
            changed.add(piece.parameter)
    for name, wanted in expected.items():
        assert torch.equal(without.specialized_weight(name), wanted)
        assert torch.equal(wanted, pair.specialized_weight(name)) == (name not in changed)


def one_pair(**given: object) -> Calibrated:
    blank = Calibrated(plant="p", variant="below", unit="heads", kind=KINDS[0], refused=False, unstable=False, n=100)
    return replace(blank, **given)  # type: ignore[arg-type]


def test_rates_are_means_over_pairs_and_a_refused_pair_calls_nobody() -> None:
    found = [
        one_pair(sources=2, at_level=6, sources_shuffled=4, at_level_shuffled=10),
        one_pair(sources=0, at_level=2, n=50, unstable=True),
        one_pair(refused=True),
        one_pair(kind="plant", n_carriers=10, carriers=6, carriers_shuffled=9),
        one_pair(kind="plant", n_carriers=2, carriers=0, carriers_shuffled=1),
    ]
    empty, plant = rates(found)
    assert (empty.kind, empty.n_pairs, empty.n_refused, empty.n_unstable) == (KINDS[0], 3, 1, 1)
    assert empty.sources.estimate == pytest.approx(0.02 / 3)
    assert empty.at_level.estimate == pytest.approx((0.06 + 0.04) / 3)
    assert empty.sources_shuffled.estimate == pytest.approx(0.04 / 3)
    assert empty.at_level_shuffled.estimate == pytest.approx(0.1 / 3)
    assert empty.any_source == pytest.approx(1 / 3)
    assert math.isnan(empty.carriers)
    assert (plant.carriers, plant.carriers_shuffled) == (0.5, pytest.approx(10 / 12))


def test_queries_alone_are_the_other_side_of_the_prompts() -> None:
    pair = ModelPair.from_pretrained("tiny:base", "tiny:specialized")
    prompts = ContrastPrompts.load("instructions:title", n_queries=4).split("localize")
    alone = prompts.without_instructions(pair.tokenizer)
    both = prompts.tokenize(pair.tokenizer)
    found = alone.tokenize(None)
    assert found.with_instruction == found.without_instruction == both.without_instruction
    assert found.ids == both.ids
    assert [row.query for row in alone] == [row.query for row in prompts]
