from __future__ import annotations

import inspect
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weightpatch import ContrastPrompts, ModelPair, cli_run, fit_anchor, localize, patched
from weightpatch.behaviour import Answering
from weightpatch.component import Component, components, encloses
from weightpatch.curves import CONTROLS, CurveSettings, validate
from weightpatch.errors import NoGapError, PromptError, RunError
from weightpatch.report import write_report
from weightpatch.run import Run, RunConfig
from weightpatch.stability import areas
from weightpatch.stages import fit_anchors, measure_effects, start
from weightpatch.terminal import print_validation
from weightpatch.validation import (
    SHARES,
    References,
    by_effects,
    forced_log_probs,
    layer_matched_like,
    measure_patch,
    random_like,
    rank,
    read_references,
)

EVERYTHING = "blocks,ends"


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.from_pretrained("tiny:base", "tiny:specialized")


@pytest.fixture(scope="module")
def prompts() -> ContrastPrompts:
    return ContrastPrompts.load("instructions:sections", n_queries=6)


@pytest.fixture(scope="module")
def references(pair: ModelPair, prompts: ContrastPrompts) -> References:
    anchor = fit_anchor(pair, prompts.split("fit"), layer=6)
    return read_references(pair, prompts.split("validate"), anchor, n_response_tokens=12)


@pytest.mark.parametrize("recipient", ["base", "specialized"])
def test_patching_everything_gives_the_other_model_and_nothing_changes_nothing(
    pair: ModelPair, references: References, recipient: str
) -> None:
    answering = Answering(max_new_tokens=40)
    nothing, everything = (
        measure_patch(pair, references, patch, recipient=recipient, answering=answering)  # type: ignore[arg-type]
        for patch in ((), EVERYTHING)
    )
    like_base, like_specialized = (nothing, everything) if recipient == "base" else (everything, nothing)
    assert like_base.recovery.estimate == pytest.approx(0, abs=1e-12)
    assert like_specialized.recovery.estimate == pytest.approx(1, abs=1e-12)
    assert like_base.kl_recovery == pytest.approx(0, abs=1e-12)
    assert like_specialized.kl.estimate == 0
    assert (like_base.n_passed, like_specialized.n_passed) == (0, 6)


def test_a_joint_patch_over_many_layers_recovers_more_than_its_best_member(
    pair: ModelPair, references: References
) -> None:
    members = ["L0", "L1", "L2", "L3"]
    single = [measure_patch(pair, references, [member]).recovery.estimate for member in members]
    joint = measure_patch(pair, references, members)
    assert joint.recovery.low > max(single)
    assert joint.kl_recovery > 0.5
    assert joint.passed is None
    assert joint.patch == tuple(members)


def test_forced_log_probs_are_those_of_one_prompt_at_a_time(pair: ModelPair, references: References) -> None:
    together = list(forced_log_probs(pair.base, references.token_ids, references.responses))
    for ids, response, found in zip(references.token_ids, references.responses, together, strict=True):
        with torch.no_grad():
            logits = pair.base(input_ids=torch.tensor([[*ids, *response]])).logits[0]
        expected = torch.log_softmax(logits[len(ids) - 1 : len(ids) - 1 + len(response)], dim=-1)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_kl_is_the_textbooks(pair: ModelPair, references: References) -> None:
    found = measure_patch(pair, references, "L0,L1")
    with patched(pair, "L0,L1") as model:
        other = list(forced_log_probs(model, references.token_ids, references.responses))
    by_prompt = [
        torch.nn.functional.kl_div(theirs.double(), own.double(), log_target=True, reduction="none").sum(-1).mean()
        for own, theirs in zip(references.log_probs, other, strict=True)
    ]
    assert found.kl.estimate == pytest.approx(float(torch.stack(by_prompt).mean()))
    assert found.kl.low < found.kl.estimate < found.kl.high


def test_an_empty_response_is_compared_at_the_first_token(pair: ModelPair, references: References) -> None:
    (found,) = forced_log_probs(pair.base, references.token_ids[:1], [()])
    assert found.shape == (1, pair.base.config.vocab_size)


def test_without_a_tokenizer_there_are_no_responses(pair: ModelPair, prompts: ContrastPrompts) -> None:
    mute = ModelPair(base=pair.base, specialized=pair.specialized)
    anchor = fit_anchor(pair, prompts.split("fit"), layer=6)
    with pytest.raises(PromptError, match="give the pair a tokenizer"):
        read_references(mute, prompts, anchor)


def test_the_ranking_is_by_effect_and_leaves_out_what_encloses_another_unit(
    pair: ModelPair, prompts: ContrastPrompts, references: References
) -> None:
    effects = localize(pair, prompts.split("localize"), references.anchor, units="blocks,mlps,kvs,heads")
    ranked = rank(effects)
    assert {member.unit for member in ranked} == {"mlps", "kvs", "heads"}
    means = dict(zip(effects.components, effects.per_prompt.mean(dim=1).tolist(), strict=True))
    assert [means[member] for member in ranked] == sorted((means[member] for member in ranked), reverse=True)
    assert encloses("blocks", "heads.q")
    assert not encloses("mlps", "heads")
    assert not encloses("heads", "heads")


def test_random_sets_have_as_many_components_of_every_unit(pair: ModelPair) -> None:
    pool = components(pair.architecture, "mlps,heads")
    chosen = [Component.parse("L0.mlp"), Component.parse("L1.mlp"), Component.parse("L3.H1")]
    drawn = random_like(chosen, pool, seed=0)
    assert [member.unit for member in drawn] == ["mlps", "mlps", "heads"]
    assert len(set(drawn)) == 3
    assert drawn != random_like(chosen, pool, seed=1)


def layers(members: Iterable[Component]) -> Counter[tuple[str, int | None]]:
    return Counter((member.unit, member.layer) for member in members)


def units(members: Iterable[Component]) -> Counter[str]:
    return Counter(member.unit for member in members)


@pytest.mark.parametrize("seed", range(5))
def test_layer_matched_sets_have_as_many_of_every_unit_in_every_layer_and_none_of_the_chosen(
    pair: ModelPair, seed: int
) -> None:
    pool = components(pair.architecture, "heads,neurons")
    by_place = {place: [one for one in pool if (one.unit, one.layer) == place] for place in layers(pool)}
    draw = random.Random(seed)
    chosen = [one for own in by_place.values() for one in draw.sample(own, draw.randint(0, len(own) // 2))]
    drawn = layer_matched_like(chosen, pool, seed=seed)
    assert layers(drawn) == layers(chosen)
    assert not set(drawn) & set(chosen)
    assert len(set(drawn)) == len(drawn)
    assert drawn == layer_matched_like(chosen, pool, seed=seed)
    assert set(drawn) != set(layer_matched_like(chosen, pool, seed=seed + 1))


def test_whatever_is_chosen_a_layer_matched_set_is_as_large_and_leaves_its_layers_no_more_than_it_must() -> None:
    pool = [
        Component.parse(name) for name in ("L0.mlp", "L1.mlp", "L2.mlp", "L0.H0", "L0.H1", "L0.H2", "L1.H0", "embed")
    ]
    for size in range(len(pool) + 1):
        for chosen in combinations(pool, size):
            drawn = layer_matched_like(chosen, pool, seed=size)
            assert len(set(drawn)) == len(drawn)
            assert set(drawn) <= set(pool)
            assert units(drawn) == units(chosen)
            for unit, count in units(chosen).items():
                shared = [one for one in drawn if one in chosen and one.unit == unit]
                assert len(shared) == max(0, 2 * count - units(pool)[unit])
            for place, count in layers(chosen).items():
                others = layers(pool)[place] - count
                assert layers(drawn)[place] >= min(count, others)


def test_where_a_layer_has_no_others_the_nearest_layers_give() -> None:
    pool = [Component.parse(f"L{layer}.mlp") for layer in range(6)]
    drawn = {layer_matched_like([pool[2]], pool, seed=seed)[0].layer for seed in range(40)}
    assert drawn == {1, 3}
    assert {one.layer for one in layer_matched_like([pool[0], pool[1]], pool, seed=0)} == {2, 3}


def test_an_order_by_effects_follows_the_gap_and_puts_what_has_none_last_in_no_order_of_the_pool() -> None:
    pool = [Component.parse(f"L0.H{index}") for index in range(12)]
    effects = {"L0.H3": [1.0, 2.0], "L0.H1": [4.0, 0.0], "L0.H0": [-9.0, 1.0]}
    for sign, expected in ((1, ["L0.H1", "L0.H3", "L0.H0"]), (-1, ["L0.H0", "L0.H3", "L0.H1"])):
        order = by_effects(pool, effects, sign=sign)
        assert [str(one) for one in order[:3]] == expected
        assert set(order) == set(pool)
        rest = list(order[3:])
        assert rest not in (sorted(rest, key=pool.index), sorted(rest, key=pool.index, reverse=True))
    assert by_effects(pool, effects, seed=1) != by_effects(pool, effects, seed=0)


CONFIG = RunConfig(
    base="tiny:base",
    specialized="tiny:specialized",
    prompts="instructions:sections",
    n_queries=6,
    units="mlps,heads",
    layer=4,
    gates="readout",
)
TASK = "sections"
SETTINGS = CurveSettings(shares=(0.1, 0.25, 1.0), n_prompts=4, max_new_tokens=24)


def begin(config: RunConfig, pair: ModelPair, folder: Path) -> Run:
    prompts = ContrastPrompts.load(config.prompts, n_queries=config.n_queries)
    run = start(config, pair, prompts, folder)
    for stage in (fit_anchors, measure_effects):
        for _ in stage(run, pair):
            pass
    return run


@pytest.fixture(scope="module")
def measured(pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with effects, and effects by activation patching: of its heads the higher the index, the higher."""
    run = begin(CONFIG, pair, tmp_path_factory.mktemp("measured") / "run")
    lines = [
        json.dumps({"component": str(one), "effects": [float(place) if one.unit == "heads" else 0.0] * 6})
        for place, one in enumerate(run.effects(TASK).components)
    ]
    (run.folder(TASK) / "activation.jsonl").write_text("\n".join(lines) + "\n")
    return run


@pytest.fixture(scope="module")
def done(measured: Run, pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.open(shutil.copytree(measured.path, tmp_path_factory.mktemp("done") / "run"))
    list(validate(run, pair, SETTINGS))
    return run


def point_of(run: Run, arm: str, k: int, *, recipient: str = "base") -> dict[str, Any]:
    wanted = (recipient, arm, k)
    (found,) = (one for one in run.validation(TASK)["points"] if (one["recipient"], one["arm"], one["k"]) == wanted)
    return dict(found)


def patch_of(run: Run, arm: str, k: int) -> list[Component]:
    return [Component.parse(address) for address in point_of(run, arm, k)["patch"]]


def test_every_arm_stands_beside_every_set_with_as_many_components_of_every_unit(done: Run) -> None:
    points = done.validation(TASK)["points"]
    arms = ["top", "random 1", "layer-matched 1", "largest differences", "activation", "bottom"]
    curve = [("top", 0), *((arm, k) for k in (4, 9) for arm in arms), ("top", 36)]
    assert [(point["recipient"], point["arm"], point["k"]) for point in points] == [
        (recipient, arm, k) for recipient in ("base", "specialized") for arm, k in curve
    ]
    for arm, k in curve:
        assert units(patch_of(done, arm, k)) == units(patch_of(done, "top", k))
        assert len(set(point_of(done, arm, k)["patch"])) == k
        assert point_of(done, arm, k)["patch"] == point_of(done, arm, k, recipient="specialized")["patch"]


def test_the_bottom_has_the_lowest_effects_of_each_unit_and_shares_nothing_with_the_top(done: Run) -> None:
    effects = done.effects(TASK)
    sign = 1 if float(effects.gap.mean()) > 0 else -1
    means = dict(zip(effects.components, (sign * effects.per_prompt.mean(dim=1)).tolist(), strict=True))
    halved = 0
    for k in (4, 9):
        bottom, top = patch_of(done, "bottom", k), patch_of(done, "top", k)
        for unit, count in units(top).items():
            own = sorted(value for one, value in means.items() if one.unit == unit)
            assert sorted(means[one] for one in bottom if one.unit == unit) == own[:count]
            assert sorted(means[one] for one in top if one.unit == unit) == own[-count:]
            if 2 * count <= len(own):
                halved += 1
                assert not {one for one in bottom if one.unit == unit} & set(top)
    assert halved


def test_the_activation_arm_follows_its_file(done: Run, measured: Run, pair: ModelPair, tmp_path: Path) -> None:
    heads = [one for one in done.effects(TASK).components if one.unit == "heads"]
    sign = 1 if float(done.effects(TASK).gap.mean()) > 0 else -1
    for k in (4, 9):
        count = units(patch_of(done, "top", k))["heads"]
        found = {one for one in patch_of(done, "activation", k) if one.unit == "heads"}
        assert found == set(heads[::-sign][:count])
    assert any(units(patch_of(done, "top", k))["heads"] for k in (4, 9))
    without = Run.open(shutil.copytree(measured.path, tmp_path / "without"))
    traced = measured.folder(TASK) / "activation.jsonl"
    for part in ("", "".join(traced.read_text().splitlines(keepends=True)[:-1])):
        (without.folder(TASK) / "activation.jsonl").write_text(part)  # not traced, or not to the end
        (without.folder(TASK) / "validation.json").unlink(missing_ok=True)
        list(validate(without, pair, CurveSettings(shares=(0.1,), n_prompts=2, recipients=("base",), answers="none")))
        assert "activation" not in {point["arm"] for point in without.validation(TASK)["points"]}
    few = CurveSettings(shares=(0.1,), n_prompts=2, recipients=("base",), answers="none")
    shutil.copy(traced, without.folder(TASK))
    assert [step.done for step in validate(without, pair, few)] == [6, 7]  # traced later: only that arm is measured
    assert without.validation(TASK)["points"][-1]["arm"] == "activation"


def test_answers_are_generated_with_the_sets_that_were_named(
    done: Run, measured: Run, pair: ModelPair, tmp_path: Path
) -> None:
    answered = {point["arm"] for point in done.validation(TASK)["points"] if point["passed"] is not None}
    assert answered == {"top", "random 1"}
    few = CurveSettings(shares=(0.1,), n_prompts=2, recipients=("base",), controls=("bottom",), max_new_tokens=4)
    for answers, expected in (("all", {"top", "bottom"}), ("none", set())):
        run = Run.open(shutil.copytree(measured.path, tmp_path / answers))
        list(validate(run, pair, replace(few, answers=answers)))  # type: ignore[arg-type]
        points = run.validation(TASK)["points"]
        assert {point["arm"] for point in points} == {"top", "bottom"}
        assert {point["arm"] for point in points if point["passed"] is not None} == expected
        assert run.validation(TASK)["areas"] == []  # not all components were patched


def test_areas_are_those_of_every_curve_and_necessity_is_what_was_lost(done: Run) -> None:
    record = done.validation(TASK)
    found = {(one["recipient"], one["arm"], one["measure"]): (one["cpr"], one["cmd"]) for one in record["areas"]}
    arms = ("top", "random 1", "layer-matched 1", "largest differences", "activation", "bottom")
    for recipient in ("base", "specialized"):
        for arm in arms:
            points = [
                point_of(done, name, k, recipient=recipient)
                for name, k in (("top", 0), (arm, 4), (arm, 9), ("top", 36))
            ]
            shares = np.array([0, 4 / 36, 9 / 36, 1])
            for measure in ("recovery", "kl_recovery"):
                values = np.array(
                    [point[measure]["estimate"] if measure == "recovery" else point[measure] for point in points]
                )
                expected = areas(shares, values if recipient == "base" else 1 - values)
                assert found.pop((recipient, arm, measure)) == pytest.approx((expected.cpr, expected.cmd))
    assert found == {}


def test_both_curves_rise_from_nothing_to_the_donor_where_everything_below_the_anchor_is_patched(
    pair: ModelPair, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"units": "embed,blocks", "layer": pair.architecture.n_layers})
    run = begin(config, pair, tmp_path / "run")
    list(validate(run, pair, CurveSettings(shares=(0.5, 1.0), controls=(), n_prompts=4, answers="none")))
    n = len(run.effects(TASK).components)
    for area in run.validation(TASK)["areas"]:
        if area["measure"] != "recovery":
            continue
        half = point_of(run, "top", round(n / 2), recipient=area["recipient"])
        share, value = half["share"], half["recovery"]["estimate"]
        value = value if area["recipient"] == "base" else 1 - value
        assert area["cpr"] == pytest.approx(share * value / 2 + (1 - share) * (value + 1) / 2, abs=1e-6)


def test_few_components_are_patched_by_default_and_each_number_once(pair: ModelPair, tmp_path: Path) -> None:
    for n, counts in ((40, [0, 1, 2, 4, 8, 20, 40]), (3, [0, 1, 2, 3]), (1, [0, 1])):
        config = CONFIG.model_copy(update={"units": ",".join(f"L0.N{index}" for index in range(n))})
        run = begin(config, pair, tmp_path / str(n))
        list(validate(run, pair, CurveSettings(recipients=("base",), controls=(), n_prompts=2, answers="none")))
        assert [point["k"] for point in run.validation(TASK)["points"]] == counts
    assert CurveSettings().shares == SHARES == (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def test_a_validation_goes_on_where_it_stopped(done: Run, pair: ModelPair, tmp_path: Path) -> None:
    run = Run.open(shutil.copytree(done.path, tmp_path / "run"))
    file = run.folder(TASK) / "validation.json"
    whole = file.read_bytes()
    assert [(step.done, step.total) for step in validate(run, pair, SETTINGS)] == [(28, 28)]
    assert file.read_bytes() == whole
    record = json.loads(whole)
    file.write_text(json.dumps({"settings": record["settings"], "points": record["points"][:25]}))
    assert [step.done for step in validate(run, pair, SETTINGS)] == [25, 26, 27, 28]
    assert file.read_bytes() == whole
    file.write_text(json.dumps({"settings": record["settings"], "points": record["points"]}))
    assert [step.done for step in validate(run, pair, SETTINGS)] == [28]  # stopped before the areas
    assert file.read_bytes() == whole


def test_other_settings_and_another_ranking_are_refused(done: Run, pair: ModelPair, tmp_path: Path) -> None:
    run = Run.open(shutil.copytree(done.path, tmp_path / "run"))
    file = run.folder(TASK) / "validation.json"
    whole = file.read_text()
    with pytest.raises(RunError, match=r"other settings \(n_prompts: 4 then, 3 now\)"):
        list(validate(run, pair, replace(SETTINGS, n_prompts=3)))
    record = json.loads(whole)
    settings = {name: value for name, value in record["settings"].items() if name != "controls"}
    old = settings | {"largest_differences": False, "answers": True}
    file.write_text(json.dumps({"settings": old, "points": record["points"]}))
    with pytest.raises(RunError, match=r"largest_differences: False then, None now.*or delete the file"):
        list(validate(run, pair, SETTINGS))
    file.write_text(whole)
    lines = (run.folder(TASK) / "activation.jsonl").read_text().splitlines()
    swapped = [json.loads(line) for line in lines]
    for line in swapped:
        line["effects"] = [-value for value in line["effects"]]
    (run.folder(TASK) / "activation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in swapped))
    with pytest.raises(RunError, match="another ranking"):
        list(validate(run, pair, SETTINGS))


def test_effects_that_are_missing_or_others_are_no_ranking(done: Run, pair: ModelPair, tmp_path: Path) -> None:
    run = Run.open(shutil.copytree(done.path, tmp_path / "run"))
    file = run.folder(TASK) / "effects.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(RunError, match=r"1 effects of 'sections' are missing: weightpatch localize"):
        list(validate(run, pair, SETTINGS))
    file.write_text("".join([*lines[1:], lines[0]]))
    with pytest.raises(RunError, match=r"other settings \(effects.jsonl: "):
        list(validate(run, pair, SETTINGS))


def test_a_task_without_a_gap_on_its_split_leaves_the_others_to_be_validated(
    measured: Run, pair: ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(shutil.copytree(measured.path, tmp_path / "run"))
    few = CurveSettings(shares=(0.1,), n_prompts=2, recipients=("base",), controls=(), answers="none")

    def none(*_args: object, **_how: object) -> None:
        raise NoGapError("no gap on two prompts")

    with monkeypatch.context() as patch:
        patch.setattr("weightpatch.curves.check_gap", none)
        patch.setattr(Run, "chosen", lambda _run, _names: (TASK, TASK))
        with pytest.raises(NoGapError, match=f"{TASK}: no gap on two prompts {TASK}: no gap"):
            list(validate(run, pair, few))
    assert run.validation(TASK)["points"] == []


def test_what_was_found_before_a_validation_failed_is_reported(
    measured: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> Iterator[object]:
        raise NoGapError("no gap here")
        yield

    monkeypatch.setattr("weightpatch.curves.validate", fail)
    run = Run.open(shutil.copytree(measured.path, tmp_path / "run"))
    with pytest.raises(NoGapError, match="no gap here"):
        cli_run.do_stages(run.config, run.path, stages=("validate", "report"), as_json=True, resumed=True)
    assert "sections" in run.report.read_text()


def test_unknown_controls_are_refused_with_the_choices() -> None:
    with pytest.raises(RunError, match=r"unknown controls: 'largest'\. Name some of random, layer-matched"):
        CurveSettings(controls=("random", "largest"))


def test_the_command_line_has_the_defaults_of_the_library() -> None:
    options = inspect.signature(cli_run.validate).parameters
    settings = CurveSettings()
    assert tuple(options["controls"].default.split(",")) == settings.controls == CONTROLS
    assert options["necessity"].default is (settings.recipients == ("base", "specialized"))
    for name in ("ranking", "n_random", "n_prompts", "answers", "max_new_tokens"):
        assert options[name].default == getattr(settings, name)


def test_the_report_and_the_table_read_what_was_validated(done: Run, capsys: pytest.CaptureFixture[str]) -> None:
    print_validation(done, as_json=False)
    assert "layer-matched 1 into the specialized" in capsys.readouterr().out
    assert b"Patched together" in write_report(done).read_bytes()
