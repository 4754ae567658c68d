"""Plants are what their designs say, and scores of methods are the ones that ranking by hand gives."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from plants import ANCHOR_LAYER, design_of, weights_of
from weightpatch import Anchor, ContrastPrompts, ModelPair, localize
from weightpatch.architecture import Architecture
from weightpatch.checkpoint import find, read_tokenizer
from weightpatch.cli import main
from weightpatch.component import Component, slices
from weightpatch.errors import ComponentError, RunError
from weightpatch.planted.designs import TINY_SIZES, UNITS, VARIANTS, Design, Unit, Variant, draw_design
from weightpatch.planted.figure import score_figure
from weightpatch.planted.language import texts_of
from weightpatch.planted.low_rank import LowRank
from weightpatch.planted.making import make_suite
from weightpatch.planted.methods import METHODS, Case
from weightpatch.planted.planting import Plant
from weightpatch.planted.scoring import (
    Score,
    average_precision,
    precision_at,
    read_scores,
    score_suite,
    summarize,
)
from weightpatch.planted.suite import Suite, finish_suite, make_plant, places, write_plant


def untrained(base: LlamaForCausalLM, architecture: Architecture, design: Design) -> Plant:
    """A plant of random differences, with the norms and places of its design."""
    groups = [*design.carriers, design.distractors, design.drifting]
    parts = [
        LowRank.start(
            architecture,
            weights_of(base),
            {one: design.norms[one] for one in group},
            rank=4 if number == len(groups) - 1 else 8,
            seed=number,
        )
        for number, group in enumerate(groups)
    ]
    return Plant(design=design, parts=tuple(parts), checks=())


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_design_deals_every_component_one_part(architecture: Architecture, variant: Variant, unit: Unit) -> None:
    for seed in range(5):
        design = design_of(architecture, variant, unit, seed)
        parts = [*design.all_carriers, *design.distractors, *design.drifting]
        assert len(parts) == len(set(parts)) == len(design.norms)
        owned = [piece for one in design.norms for piece in slices(architecture, one)]
        covered = dict.fromkeys(architecture.parameters, 0)
        for piece in owned:
            shape = architecture.parameters[piece.parameter]
            covered[piece.parameter] += (piece.stop - piece.start) * (shape[1] if piece.axis == 0 else shape[0])
        for name, count in covered.items():
            matrix = "layers" in name and "norm" not in name
            assert count == (int(np.prod(architecture.parameters[name])) if matrix else 0), name
        size = TINY_SIZES[unit]
        assert all(size.low <= norm <= size.high for norm in design.norms.values())
        layers = [one.layer or 0 for one in design.all_carriers]
        assert max(one.layer or 0 for one in [*design.all_carriers, *design.distractors]) < ANCHOR_LAYER
        assert len(design.carriers) == (2 if variant in ("redundant", "joint") else 1)
        if variant == "split":
            assert min(layers) < architecture.n_layers // 2 <= max(layers)
        else:
            assert max(layers) < architecture.n_layers // 2
        assert design.task != design.other


def test_a_seed_and_a_name_decide_the_design(architecture: Architecture) -> None:
    one, same, other = (design_of(architecture, "below", "heads", seed) for seed in (1, 1, 2))
    assert one == same
    assert one.carriers != other.carriers


def test_a_model_too_small_for_the_design_is_refused(architecture: Architecture) -> None:
    sizes = {**TINY_SIZES, "mlps": replace(TINY_SIZES["mlps"], n_carriers=5)}
    with pytest.raises(ComponentError, match="too few for 5 carriers and 2 distractors"):
        draw_design(
            architecture,
            name="one",
            variant="below",
            unit="mlps",
            seed=0,
            anchor_layer=ANCHOR_LAYER,
            sizes=sizes,
        )


@pytest.mark.parametrize("unit", UNITS)
def test_differences_have_the_norms_of_the_design_and_touch_nothing_else(
    base: LlamaForCausalLM, architecture: Architecture, unit: Unit
) -> None:
    design = design_of(architecture, "below", unit)
    weights = weights_of(base)
    norms = {one: design.norms[one] for one in design.all_carriers}
    part = LowRank.start(architecture, weights, norms, rank=8, seed=0)
    dense = {name: change.detach() for name, change in part.dense(weights).items()}
    left = {name: change.clone() for name, change in dense.items()}
    for one, share in norms.items():
        for name in {piece.parameter for piece in slices(architecture, one)}:
            pieces = [piece for piece in slices(architecture, one) if piece.parameter == name]
            changed = sum(float(piece.of(dense[name]).square().sum()) for piece in pieces) ** 0.5
            whole = sum(float(piece.of(weights[name]).square().sum()) for piece in pieces) ** 0.5
            assert changed == pytest.approx(share * whole, rel=1e-4)
            for piece in pieces:
                piece.of(left[name]).zero_()
    assert not any(change.any() for change in left.values())


@pytest.fixture(scope="module")
def suite(base: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Two plants of random differences."""
    folder = tmp_path_factory.mktemp("suite")
    architecture = Architecture.of(base)
    units: tuple[Unit, ...] = ("heads", "groups")
    for unit in units:
        own = folder / f"below-{unit}-0"
        own.mkdir()
        found = untrained(base, architecture, design_of(architecture, "below", unit))
        write_plant(own, base, found, base="tiny:base", name=own.name, attempt=0, anchor_layer=ANCHOR_LAYER)
    return finish_suite(folder, base="tiny:base", seed=0, names=[f"below-{unit}-0" for unit in units])


def case_of(suite: Suite, number: int) -> Case:
    """A plant with an anchor along a random direction, whose gap is real whatever the plant does."""
    planted = suite.plants[number]
    generator = torch.Generator().manual_seed(0)
    pair = suite.pair(planted)
    addresses = [Component.parse(one) for one in (*planted.candidates, *planted.others)]
    return Case(
        pair=pair,
        prompts=ContrastPrompts.load("instructions:title", n_queries=2).split("localize"),
        anchor=Anchor(layer=ANCHOR_LAYER, direction=torch.randn(128, generator=generator)),
        components=tuple(sorted(addresses, key=lambda one: one.layer or 0)),
        seed=0,
    )


def test_a_written_plant_is_the_base_plus_its_differences(base: LlamaForCausalLM, suite: Suite) -> None:
    architecture = Architecture.of(base)
    for planted in suite.plants:
        found = untrained(base, architecture, design_of(architecture, "below", planted.unit))
        weights = weights_of(base)
        pair = suite.pair(planted)
        for name, ours in weights.items():
            parts = [part.dense(weights)[name].detach() for part in found.parts if name in part.factors]
            change = pair.specialized_weight(name) - ours
            assert bool(parts) == bool(change.any())
            if parts:
                wanted = torch.stack(parts).sum(dim=0)
                assert float((change - wanted).norm() / wanted.norm()) < 0.01  # factors are written in bfloat16


def test_relative_norms_of_a_written_plant_are_those_of_its_design(architecture: Architecture, suite: Suite) -> None:
    case = case_of(suite, 1)
    design = design_of(architecture, "below", "groups")
    found = METHODS["|delta| relative"](case)
    assert found == pytest.approx([design.norms[one] for one in case.components], rel=0.02)


def test_exact_scores_are_mean_effects_towards_the_gap_and_none_past_the_anchor(suite: Suite) -> None:
    case = case_of(suite, 0)
    below = [one for one in case.components if (one.layer or 0) < ANCHOR_LAYER]
    effects = localize(case.pair, case.prompts, case.anchor, units=below)
    sign = 1 if float(effects.gap.mean()) > 0 else -1
    wanted = {
        one: sign * float(value) for one, value in zip(effects.components, effects.per_prompt.mean(1), strict=True)
    }
    assert METHODS["exact"](case) == pytest.approx([wanted.get(one, 0.0) for one in case.components], abs=1e-9)


@pytest.mark.slow
def test_every_method_gives_every_component_a_number_and_leaves_the_models(suite: Suite) -> None:
    case = case_of(suite, 1)
    before = case.pair.digests()
    tables = {name: score(case) for name, score in METHODS.items()}
    for name, values in tables.items():
        assert values.shape == (len(case.components),), name
        assert np.isfinite(values).all(), name
        assert len(np.unique(values)) > len(values) // 2, name
    assert case.pair.digests() == before


def test_fisher_and_gradients_equal_autograd_on_the_plain_model(suite: Suite) -> None:
    case = case_of(suite, 0)
    one = next(place for place, member in enumerate(case.components) if member.unit == "mlps")
    row = case.prompts.tokenize(case.pair.tokenizer).with_instruction
    fisher = product = 0.0
    with case.pair.materialized() as model:
        for ids in row:
            model.zero_grad()
            for parameter in model.parameters():
                parameter.requires_grad_()
            log_p = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            log_p[log_p.argmax()].backward()
            mlp = model.model.layers[case.components[one].layer].mlp
            fisher += sum(float(p.grad.square().sum()) for p in mlp.parameters()) / len(row)
            product += sum(float((p.detach() * p.grad).abs().sum()) for p in mlp.parameters()) / len(row)
            model.zero_grad(set_to_none=True)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
    assert METHODS["Fisher"](case)[one] == pytest.approx(fisher, rel=1e-4)
    assert METHODS["gradient x weight"](case)[one] == pytest.approx(product, rel=1e-4)


def test_ranks_count_ties_as_chance() -> None:
    truth = np.array([True, False, True, False])
    assert average_precision(np.array([4.0, 3, 2, 1]), truth) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.ones(4), truth) == pytest.approx(0.5)
    assert precision_at(np.array([4.0, 3, 2, 1]), truth, 2) == 0.5
    assert precision_at(np.array([4.0, 3, 3, 3]), truth, 2) == pytest.approx((1 + 1 / 3) / 2)
    assert precision_at(np.ones(4), truth, 2) == 0.5


def test_rows_hold_means_and_paired_differences_over_plants() -> None:
    def score(plant: str, method: str, auroc: float) -> Score:
        return Score(
            plant=plant,
            variant="below",
            unit="heads",
            method=method,
            among="unit",
            auroc=auroc,
            average_precision=auroc / 2,
            precision=auroc / 4,
        )

    rows = summarize(
        [score("a", "exact", 1.0), score("b", "exact", 0.9), score("a", "other", 0.8), score("b", "other", 0.7)]
    )
    other = next(row for row in rows if row.method == "other" and row.variant == row.unit == "all")
    assert (other.n_plants, other.auroc, other.average_precision) == (2, pytest.approx(0.75), pytest.approx(0.375))
    assert (other.behind, other.behind_low, other.behind_high) == pytest.approx((0.2, 0.2, 0.2))


def test_scores_of_another_tool_stand_in_the_same_table(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "weightpatch.planted.scoring.open_case", lambda suite, planted, **_: case_of(suite, suite.plants.index(planted))
    )
    file = tmp_path / "oracle.csv"
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(["plant", "component", "score"])
        for planted in suite.plants:
            for address in (*planted.candidates, *planted.others):
                writer.writerow([planted.name, address, int(address in planted.all_carriers)])
    found = score_suite(suite, methods=["random"], others={"oracle": read_scores(file)})
    assert {one.auroc for one in found if one.method == "oracle"} == {1.0}
    assert all(0 < one.auroc < 1 for one in found if one.method == "random")
    file.write_text("plant,component,score\n" + "\n".join(file.read_text().splitlines()[3:]), encoding="utf-8")
    with pytest.raises(RunError, match="gives no score for 2 of"):
        score_suite(suite, methods=["random"], others={"oracle": read_scores(file)})


def test_a_file_that_holds_no_scores_is_refused_in_words(tmp_path: Path) -> None:
    file = tmp_path / "wrong.csv"
    file.write_text("component,score\nL0.mlp,1\n", encoding="utf-8")
    with pytest.raises(RunError, match="columns plant, component and score"):
        read_scores(file)


def test_a_plant_that_is_there_is_not_made_again(base: LlamaForCausalLM, suite: Suite) -> None:
    tokenizer = read_tokenizer(find("tiny:base"))
    assert tokenizer is not None
    planted = suite.plants[0]
    made = make_plant(
        base,
        tokenizer,
        suite.folder,
        base="tiny:base",
        name=planted.name,
        variant=planted.variant,
        unit=planted.unit,
        seed=0,
        texts=texts_of(tokenizer),
    )
    assert list(made) == []


def test_the_tiny_suite_has_forty_plants_of_all_kinds() -> None:
    wanted = places()
    assert len(wanted) == len({name for name, _, _ in wanted}) == 40
    assert {(variant, unit) for _, variant, unit in wanted} == {(v, u) for v in VARIANTS for u in UNITS}


def test_a_folder_without_a_suite_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="bench planted --make"):
        Suite.open(tmp_path)


def test_loading_a_pair_by_hand_gives_the_same_plant(suite: Suite) -> None:
    planted = suite.plants[0]
    by_hand = ModelPair.from_pretrained("tiny:base", suite.folder / planted.name)
    assert by_hand.digests() == suite.pair(planted).digests()


@pytest.mark.slow
def test_a_made_suite_goes_on_where_it_stopped_and_does_not_depend_on_that(tmp_path: Path) -> None:
    counts: dict[Variant, dict[Unit, int]] = {"below": {"kvs": 1, "heads": 1}}
    list(make_suite(tmp_path / "whole", seed=5, counts=counts, jobs=2))
    making = make_suite(tmp_path / "stopped", seed=5, counts=counts, jobs=1)
    next(making)
    making.close()
    list(make_suite(tmp_path / "stopped", seed=5, counts=counts, jobs=1))
    files = [
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (tmp_path / "whole", tmp_path / "stopped")
    ]
    assert files[0] == files[1]
    suite = Suite.open(tmp_path / "whole")
    assert all(check.passed for planted in suite.plants for check in planted.checks)
    found = {(one.method, one.plant): one.auroc for one in score_suite(suite, methods=["exact"]) if one.among == "unit"}
    assert min(found.values()) > 0.85
    with pytest.raises(RunError, match="holds plants of seed 5, not 6"):
        next(make_suite(tmp_path / "whole", seed=6, counts=counts, jobs=1))


def test_the_command_says_what_it_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, wanted in (
        ([], "--make, --score"),
        (["--make", "--suite", "huge"], "cannot be made"),
        (["--score", "--scores", "file.csv"], "NAME=FILE"),
        (["--score", "--methods", "guess"], "unknown methods guess"),
    ):
        monkeypatch.setattr("sys.argv", ["weightpatch", "bench", "planted", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == 2
        assert wanted in " ".join(capsys.readouterr().err.split())


def test_the_figure_has_a_panel_to_a_variant_and_every_method_in_it() -> None:
    scores = [
        Score(
            plant=f"{variant}-{unit}-{number}",
            variant=variant,
            unit=unit,
            method=method,
            among="unit",
            auroc=0.5 + number / 10,
            average_precision=0.5,
            precision=0.5,
        )
        for variant in ("below", "joint")
        for unit in ("heads", "groups")
        for method in ("exact", "random")
        for number in range(3)
    ]
    figure = score_figure(summarize(scores))
    assert len(figure.data) == 2 * 3  # two units and all together, in each panel
    assert {text for trace in figure.data for text in trace.y} == {"exact", "random"}
    assert {round(value, 6) for trace in figure.data for value in trace.x} == {0.6}
