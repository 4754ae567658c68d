from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from weightpatch import ContrastPrompts, ModelPair, fit_anchor, localize
from weightpatch.anchor import Anchor
from weightpatch.curves import CurveSettings, validate
from weightpatch.errors import AnchorError, RunError
from weightpatch.robustness import robustness
from weightpatch.run import Run, RunConfig
from weightpatch.stability import across, between, split_halves
from weightpatch.stages import fit_anchors, measure_effects, start

TASK = "sections"
CONFIG = RunConfig(
    base="tiny:base",
    specialized="tiny:specialized",
    prompts="instructions:sections",
    n_queries=12,
    units="mlps,heads",
    layer=4,
    gates="readout",
)
FIELDS = {"n", "spearman", "spearman_low", "spearman_high", "jaccard"}


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.from_pretrained("tiny:base", "tiny:specialized")


@pytest.fixture(scope="module")
def run(pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with effects: twelve queries, so that every paraphrase has two prompts."""
    prompts = ContrastPrompts.load(CONFIG.prompts, n_queries=CONFIG.n_queries)
    begun = start(CONFIG, pair, prompts, tmp_path_factory.mktemp("run") / "run")
    for stage in (fit_anchors, measure_effects):
        for _ in stage(begun, pair):
            pass
    return begun


@pytest.fixture(scope="module")
def found(run: Run, pair: ModelPair) -> dict[str, Any]:
    return robustness(run, pair, TASK)


def planted(run: Run, folder: Path, effects: NDArray[np.float64], **reference: Any) -> Run:
    """A copy of a run that has these effects, shape `(component, prompt)`, and other entries in its reference."""
    copy = Run.open(shutil.copytree(run.path, folder))
    names = [str(one) for one in run.effects(TASK).components]
    lines = [json.dumps({"component": name, "effects": row}) for name, row in zip(names, effects.tolist(), strict=True)]
    (copy.folder(TASK) / "effects.jsonl").write_text("\n".join(lines) + "\n")
    (copy.folder(TASK) / "reference.json").write_text(json.dumps(run.reference(TASK) | reference))
    return copy


def instructions(run: Run) -> list[str]:
    by_id = {row.id: row.instruction for row in run.prompts()}
    return [by_id[name] for name in run.effects(TASK).prompt_ids]


def numbers(record: dict[str, Any]) -> list[float]:
    return [*(record[name] for name in ("spearman", "spearman_low", "spearman_high")), *record["jaccard"].values()]


def without_seed(config: RunConfig, folder: Path) -> None:
    """Note in a run's manifest that its prompts came from a file: there are no other queries of their kind."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"] = config.model_copy(update={"prompts": "prompts.jsonl"}).model_dump(mode="json")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_every_figure_is_a_correlation_or_an_index_and_json_takes_it(found: dict[str, Any]) -> None:
    assert list(found) == ["halves", "paraphrases", "seed"]
    assert [record["n"] for record in found.values()] == [100, 15, 1]  # fifteen pairs of six paraphrases
    for name, record in found.items():
        assert set(record) == FIELDS | ({"cosine"} if name == "seed" else set())
        assert all(-1 <= value <= 1 for value in numbers(record))
        assert record["spearman_low"] <= record["spearman"] <= record["spearman_high"]
        assert set(record["jaccard"]) == {"10", "20"}  # of 36 components
        assert all(value >= 0 for value in record["jaccard"].values())
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_effects_that_are_alike_on_every_prompt_are_perfectly_stable(run: Run, pair: ModelPair, tmp_path: Path) -> None:
    n_components, n_prompts = run.effects(TASK).per_prompt.shape
    alike = np.repeat(np.random.default_rng(0).normal(size=(n_components, 1)), n_prompts, axis=1)
    found = robustness(planted(run, tmp_path / "run", alike), pair, TASK)
    assert numbers(found["halves"]) == pytest.approx([1.0] * 5)
    assert numbers(found["paraphrases"]) == pytest.approx([1.0] * 5)
    assert abs(found["seed"]["spearman"]) < 0.5  # such effects have nothing to do with the models


def test_halves_and_paraphrases_are_those_of_the_effects_on_queries_and_instructions(
    run: Run, found: dict[str, Any]
) -> None:
    effects = run.effects(TASK)
    sign = 1 if float(effects.gap.mean()) > 0 else -1
    values = sign * effects.per_prompt.numpy()
    for name, expected in (
        ("halves", split_halves(values, groups=effects.queries, seed=CONFIG.seed)),
        ("paraphrases", across(values, instructions(run))),
    ):
        assert found[name]["spearman"] == pytest.approx(expected.spearman)
        assert found[name]["jaccard"] == {str(k): pytest.approx(value) for k, value in expected.jaccard.items()}


def test_a_ranking_that_turns_round_with_the_paraphrase_is_seen_whatever_the_halves_say(
    run: Run, pair: ModelPair, tmp_path: Path
) -> None:
    labels = instructions(run)
    once = labels[1]  # one prompt alone has it in what follows
    kept = [0 if label == labels[0] else 1 for label in labels]
    ranks = np.arange(36, dtype=float)
    effects = np.stack([ranks if label == labels[0] else -ranks for label in labels], axis=1)
    two = planted(run, tmp_path / "two", effects)
    lines = [json.loads(line) for line in (two.path / "prompts.jsonl").read_text().splitlines()]
    place = {name: number for number, name in enumerate(run.effects(TASK).prompt_ids)}
    for line in lines:
        number = place.get(line["id"])
        if number is not None:
            line["instruction"] = once if number == 1 else labels[0] if kept[number] == 0 else labels[2]
    (two.path / "prompts.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    without_seed(CONFIG, two.path)
    found = robustness(Run.open(two.path), pair, TASK)
    assert found["paraphrases"]["n"] == 1  # the third label has a single prompt
    assert found["paraphrases"]["spearman"] == pytest.approx(-1)
    assert found["paraphrases"]["jaccard"]["10"] == 0
    assert found["halves"]["spearman"] > 0.5


def test_a_readout_that_falls_instead_of_rising_changes_nothing(
    run: Run, pair: ModelPair, found: dict[str, Any], tmp_path: Path
) -> None:
    effects, reference = run.effects(TASK), run.reference(TASK)
    fallen = {name: [-value for value in reference[name]] for name in ("base", "specialized")}
    assert robustness(planted(run, tmp_path / "run", -effects.per_prompt.numpy(), **fallen), pair, TASK) == found


def test_the_seed_compares_with_estimates_on_the_queries_of_the_next_seed(
    run: Run, pair: ModelPair, found: dict[str, Any], tmp_path: Path
) -> None:
    other = ContrastPrompts.load(CONFIG.prompts, seed=CONFIG.seed + 1, n_queries=CONFIG.n_queries)
    fit, measured = other.split("fit"), other.split("localize")
    assert {row.query for row in measured} != set(run.effects(TASK).queries)
    anchor = fit_anchor(pair, fit, layer=4)
    estimates = localize(pair, measured, replace(anchor, report=None), units=CONFIG.units, method="first-order")
    assert estimates.components == run.effects(TASK).components
    same = {"base": estimates.base.tolist(), "specialized": estimates.specialized.tolist()}
    copy = planted(run, tmp_path / "run", estimates.per_prompt.numpy(), **same)
    anchor.save(copy.folder(TASK) / "anchor.safetensors")
    again = robustness(copy, pair, TASK)["seed"]
    assert numbers(again) == pytest.approx([1.0] * 5)
    assert again["cosine"] == pytest.approx(1)
    assert found["seed"]["cosine"] == pytest.approx(float(run.anchor(TASK).direction @ anchor.direction))
    assert 0 < found["seed"]["cosine"] < 1
    means = [
        own.per_prompt.mean(dim=1).numpy() * np.sign(float(own.gap.mean())) for own in (run.effects(TASK), estimates)
    ]
    expected = between(*means)
    assert found["seed"]["spearman"] == pytest.approx(expected.spearman)
    assert found["seed"]["spearman"] < 1
    assert found["seed"]["jaccard"] == {str(k): pytest.approx(value) for k, value in expected.jaccard.items()}


def test_what_cannot_be_compared_is_null(run: Run, pair: ModelPair, tmp_path: Path) -> None:
    shape = run.effects(TASK).per_prompt.shape
    constant = planted(run, tmp_path / "constant", np.ones(shape), queries=["one and the same"] * shape[1])
    without_seed(CONFIG, constant.path)
    found = robustness(Run.open(constant.path), pair, TASK)
    assert (found["halves"], found["seed"]) == (None, None)
    assert [found["paraphrases"][name] for name in ("spearman", "spearman_low", "spearman_high")] == [None] * 3
    each_its_own = Run.open(shutil.copytree(constant.path, tmp_path / "own"))
    lines = [json.loads(line) for line in (constant.path / "prompts.jsonl").read_text().splitlines()]
    text = "\n".join(json.dumps(line | {"instruction": f"Way {number}."}) for number, line in enumerate(lines))
    (each_its_own.path / "prompts.jsonl").write_text(text + "\n")
    assert robustness(each_its_own, pair, TASK) == {"halves": None, "paraphrases": None, "seed": None}


def test_queries_that_no_anchor_can_be_fitted_on_leave_the_rest(
    run: Run, pair: ModelPair, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Anchor:
        raise AnchorError("the differences of the two halves of the prompts cancel out.")

    monkeypatch.setattr("weightpatch.robustness.fit_anchor", fail)
    assert robustness(run, pair, TASK) == found | {"seed": None}


def test_without_effects_there_is_nothing_to_compare(run: Run, pair: ModelPair, tmp_path: Path) -> None:
    bare = Run.open(shutil.copytree(run.path, tmp_path / "run"))
    (bare.folder(TASK) / "effects.jsonl").unlink()
    with pytest.raises(RunError, match="has no effects of 'sections'"):
        robustness(bare, pair, TASK)


@pytest.mark.parametrize("units", ["blocks,mlps,heads,kvs,norms", "L0.N3,{L1.H0,L2.mlp},embed,L1.attn"])
@pytest.mark.parametrize("readout", ["projection", "cosine", "contrast"])
def test_any_unit_and_readout_that_a_run_measures_is_compared(
    units: str, readout: Any, pair: ModelPair, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"units": units, "readout": readout})
    prompts = ContrastPrompts.load(config.prompts, n_queries=config.n_queries)
    begun = start(config, pair, prompts, tmp_path / "run")
    for stage in (fit_anchors, measure_effects):
        for _ in stage(begun, pair):
            pass
    assert robustness(begun, pair, TASK)["seed"]["spearman"] > 0.3


def test_a_validation_keeps_the_stability_and_does_not_measure_it_twice(
    run: Run, pair: ModelPair, found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Run.open(shutil.copytree(run.path, tmp_path / "run"))
    settings = CurveSettings(shares=(0.1,), recipients=("base",), controls=(), n_prompts=2, answers="none")
    assert len(list(validate(copy, pair, settings))) == 3
    assert copy.validation(TASK)["stability"] == found
    monkeypatch.setattr("weightpatch.curves.robustness", lambda *_: pytest.fail("measured twice"))
    list(validate(copy, pair, settings))
    record = copy.validation(TASK)
    (copy.folder(TASK) / "validation.json").write_text(json.dumps(record | {"points": record["points"][:1]}))
    list(validate(copy, pair, settings))
    assert copy.validation(TASK) == record
