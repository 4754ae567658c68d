"""The stages `screen` and `drill` of a run, `validate` by a screening, and the commands for them."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weightpatch import Anchor, ContrastPrompts, ModelPair
from weightpatch.cli import main
from weightpatch.component import Component, encloses
from weightpatch.curves import CurveSettings, validate
from weightpatch.drilling import drill
from weightpatch.drills import DrillSettings, drill_run
from weightpatch.errors import ComponentError, NoGapError, RunError, WeightpatchError
from weightpatch.estimation import Estimation
from weightpatch.localization import localize
from weightpatch.run import Progress, Run, RunConfig
from weightpatch.screening import screen
from weightpatch.screens import ScreenSettings, screen_run
from weightpatch.stages import fit_anchors, measure_effects, start

TASK = "sections"
SCREEN = ScreenSettings(units="heads,kvs", budget=12)
DRILL = DrillSettings(budget=16, n_groups=3)
CURVE = CurveSettings(
    recipients=("base",),
    ranking="screen",
    controls=("random", "largest differences"),
    shares=(0.1, 0.25),
    n_prompts=2,
    answers="none",
)

Stage = Callable[[Run, ModelPair, Any], Iterator[Progress]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A stage with its settings; files of that name are its own."""

    name: str
    stage: Stage
    settings: Any

    def work(self, run: Run, pair: ModelPair) -> Iterator[Progress]:
        return self.stage(run, pair, self.settings)


CASES = (Case(name="screen", stage=screen_run, settings=SCREEN), Case(name="drill", stage=drill_run, settings=DRILL))
each_stage = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.from_pretrained("tiny:base", "tiny:specialized")


@pytest.fixture(scope="module")
def fitted(pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of few queries that has its anchor and the effects of its MLPs."""
    prompts = ContrastPrompts.load(f"instructions:{TASK}", n_queries=4)
    config = RunConfig(base="tiny:base", specialized="tiny:specialized", units="mlps", layer=2, gates="readout")
    run = start(config, pair, prompts, tmp_path_factory.mktemp("fitted") / "run")
    take(fit_anchors(run, pair))
    take(measure_effects(run, pair))
    return run.path


@pytest.fixture
def run(fitted: Path, tmp_path: Path) -> Run:
    return Run.open(shutil.copytree(fitted, tmp_path / "run"))


@pytest.fixture(scope="module")
def done(fitted: Path, pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was screened and drilled without an interruption; not to be changed."""
    run = Run.open(shutil.copytree(fitted, tmp_path_factory.mktemp("done") / "run"))
    take(screen_run(run, pair, SCREEN))
    take(drill_run(run, pair, DRILL))
    return run


def take(steps: Iterator[Progress]) -> list[Progress]:
    return list(steps)


def files(run: Run, stage: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(run.folder(TASK).glob(f"{stage}.*"))}


def test_a_screening_writes_its_lines_its_table_and_its_verdicts(done: Run, pair: ModelPair) -> None:
    assert list(files(done, "screen")) == ["screen.json", "screen.jsonl", "screen.parquet", "screen.settings.json"]
    prompts = done.prompts().of_task(TASK).split("localize")
    expected = screen(pair, prompts, done.anchor(TASK), units="heads,kvs", budget=12)
    table, truth = done.screen_table(TASK), expected.table()
    spans = [name for name in table.columns if name.startswith("span.")]
    assert list(table.columns) == [*truth.columns, *spans]
    assert list(table["component"]) == list(truth["component"])
    assert list(table["chosen"]) == list(truth["chosen"])
    for column in ("recovery", "exact_recovery", "ci_low", "ci_high"):
        np.testing.assert_allclose(table[column], truth[column], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(table[spans].sum(axis=1), table["recovery"], rtol=1e-4, atol=1e-7)
    lines = [json.loads(line) for line in files(done, "screen")["screen.jsonl"].splitlines()]
    assert [line["component"] for line in lines] == [str(one) for one in expected.exact.components]
    assert all(len(line["effects"]) == len(prompts) for line in lines)
    assert table["exact_effect"].notna().sum() == len(lines) <= 12
    record = done.screening(TASK)
    assert record is not None
    assert record["settings"]["budget"] == 12
    assert {unit: about["n"] for unit, about in record["units"].items()} == {"kvs": 8, "heads": 16}
    for unit, about in record["units"].items():
        assert about["verdict"].startswith(f"{unit}: ")
        assert about["missed_at_most"] == expected.units[unit].missed_at_most
        assert about["moved"] == pytest.approx(expected.units[unit].moved)


def test_the_map_of_tokens_is_of_the_largest_exact_effects_on_the_first_prompt(done: Run) -> None:
    record = done.screening(TASK)
    assert record is not None
    tokens = record["tokens"]
    assert tokens["prompt"] == done.prompts().of_task(TASK).split("localize").rows[0].id
    assert len(tokens["texts"]) == len(tokens["spans"]) == len(tokens["values"][0])
    table = done.screen_table(TASK).dropna(subset="exact_effect")
    leading = table.reindex(table["exact_effect"].abs().sort_values(ascending=False, kind="stable").index)
    assert tokens["components"] == list(leading["component"][: len(tokens["components"])])
    assert len(tokens["values"]) == len(tokens["components"])


def test_a_drill_down_writes_its_lines_and_its_tree(done: Run, pair: ModelPair) -> None:
    assert list(files(done, "drill")) == ["drill.json", "drill.jsonl", "drill.settings.json"]
    prompts = done.prompts().of_task(TASK).split("localize")
    expected = drill(pair, prompts, done.anchor(TASK), budget=16, n_groups=3)
    record = done.drill(TASK)
    assert record is not None
    assert record["settings"] == {"budget": 16, "n_groups": 3}
    assert record["tree"] == str(expected)
    table = expected.table().set_index("component")
    assert [row["component"] for row in record["components"]] == list(table.index)
    for row in record["components"]:
        assert row["recovery"] == pytest.approx(table.loc[row["component"], "recovery"], rel=1e-4, abs=1e-6)
        assert row["inside"] == table.loc[row["component"], "inside"]
        assert (row["parts"] is None) == math.isnan(table.loc[row["component"], "parts"])
    measured = [json.loads(line)["component"] for line in files(done, "drill")["drill.jsonl"].splitlines()]
    assert sorted(measured) == sorted(table.index)
    assert len(measured) <= 16


@each_stage
def test_a_second_call_measures_nothing_and_leaves_the_same_bytes(
    case: Case, done: Run, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file: file.read_bytes() for file in done.path.rglob("*") if file.is_file()}

    def forbidden(*_arguments: object, **_options: object) -> None:
        pytest.fail("a model was run")

    monkeypatch.setattr(pair.base, "forward", forbidden)
    monkeypatch.setattr(pair.specialized, "forward", forbidden)
    steps = take(case.work(done, pair))
    assert [step.done for step in steps] == [0]
    assert {file: file.read_bytes() for file in done.path.rglob("*") if file.is_file()} == before
    assert files(done, case.name)


@pytest.mark.parametrize("n_steps", [1, 2, 6, 12])
@each_stage
def test_interrupted_it_goes_on_and_ends_with_the_bytes_of_the_uninterrupted(
    case: Case, n_steps: int, done: Run, run: Run, pair: ModelPair
) -> None:
    steps = case.work(run, pair)
    for _ in range(n_steps):
        next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert not (run.folder(TASK) / f"{case.name}.json").exists()
    file = run.folder(TASK) / f"{case.name}.jsonl"
    begun = file.read_bytes() if file.exists() else b""
    if begun:  # killed while it wrote, too
        file.write_bytes(begun + b'{"component": "L1.H')
    n_known = begun.count(b"\n")
    again = take(case.work(run, pair))
    assert files(run, case.name) == files(done, case.name)
    n_lines = files(done, case.name)[f"{case.name}.jsonl"].count(b"\n")
    assert len(again) == 2 + n_lines - n_known
    assert not list(run.path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("stage", "settings", "difference"),
    [
        (screen_run, ScreenSettings(units="heads", budget=12), "units: 'heads,kvs' then, 'heads' now"),
        (screen_run, ScreenSettings(units="heads,kvs", budget=13, threshold=0.1), "budget: 12 then, 13 now"),
        (screen_run, ScreenSettings(units="heads,kvs", budget=13, threshold=0.1), "threshold: None then, 0.1 now"),
        (
            screen_run,
            ScreenSettings(units="heads,kvs", budget=12, estimation=Estimation(approximation="ig")),
            "'approximation': 'outputs'.* then, .*'approximation': 'ig'.* now",
        ),
        (drill_run, DrillSettings(budget=17, n_groups=3), "budget: 16 then, 17 now"),
        (drill_run, DrillSettings(budget=16), "n_groups: 3 then, 8 now"),
    ],
)
def test_other_settings_are_refused_and_named(
    stage: Stage, settings: Any, difference: str, done: Run, pair: ModelPair
) -> None:
    before = {file: file.read_bytes() for file in done.path.rglob("*") if file.is_file()}
    with pytest.raises(RunError, match=difference):
        take(stage(done, pair, settings))
    assert {file: file.read_bytes() for file in done.path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("stage", "wrong", "right"),
    [
        (screen_run, ScreenSettings(units="headz"), SCREEN),
        (screen_run, ScreenSettings(units="heads,kvs", budget=2), SCREEN),
        (drill_run, DrillSettings(budget=1), DRILL),
    ],
)
def test_settings_that_could_not_be_met_do_not_stand_in_the_way_of_others(
    stage: Stage, wrong: Any, right: Any, run: Run, pair: ModelPair
) -> None:
    with pytest.raises(ComponentError):
        take(stage(run, pair, wrong))
    assert next(stage(run, pair, right)).done == 0
    steps = stage(run, pair, right)
    assert [next(steps).task for _ in range(2)] == [TASK, TASK]


@each_stage
def test_before_there_is_an_anchor_that_is_said_and_nothing_written(
    case: Case, fitted: Path, tmp_path: Path, pair: ModelPair
) -> None:
    run = Run.open(shutil.copytree(fitted, tmp_path / "run"))
    shutil.rmtree(run.path / "tasks")
    with pytest.raises(WeightpatchError):
        take(case.work(run, pair))
    assert not files(run, case.name)


def test_a_layer_without_any_exact_effect_does_not_stop_the_screening(run: Run, pair: ModelPair) -> None:
    settings = ScreenSettings(units="heads,kvs", budget=48)  # all of them
    take(screen_run(run, pair, settings))
    folder = run.folder(TASK)
    records = [json.loads(line) for line in (folder / "screen.jsonl").read_text().splitlines()]
    for record in records:
        if record["component"].startswith("L1."):
            record["effects"] = [0.0] * len(record["effects"])
    (folder / "screen.json").unlink()
    (folder / "screen.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    take(screen_run(run, pair, settings))
    assert run.screening(TASK)["units"]["heads"]["poor_layers"] == [{"layer": 1, "n": 8, "error": None}]  # type: ignore[index]


def test_a_setting_that_an_earlier_version_did_not_have_is_no_difference_at_its_default(
    run: Run, pair: ModelPair
) -> None:
    take(screen_run(run, pair, SCREEN))
    file = run.folder(TASK) / "screen.settings.json"
    noted = json.loads(file.read_text())
    del noted["threshold"]
    file.write_text(json.dumps(noted))
    assert [step.done for step in take(screen_run(run, pair, SCREEN))] == [0]


def test_a_task_without_a_gap_is_left_out(run: Run, pair: ModelPair) -> None:
    record = json.loads((run.folder(TASK) / "reference.json").read_text())
    (run.folder(TASK) / "reference.json").write_text(json.dumps({**record, "failure": "no gap"}))
    for case in CASES:
        assert take(case.work(run, pair)) == []
    assert run.screening(TASK) is None
    assert run.drill(TASK) is None


def test_without_a_gap_nothing_is_patched(run: Run, pair: ModelPair) -> None:
    (run.folder(TASK) / "reference.json").unlink()  # a run that only has its anchor, so that no gap was looked for
    anchors = [Anchor(layer=2, direction=row) for row in torch.eye(pair.architecture.n_features)[:2]]
    prompts = run.prompts().of_task(TASK).split("localize")
    first, second = (localize(pair, prompts, anchor, units="L0").gap.mean().float() for anchor in anchors)
    direction = anchors[0].direction * second - anchors[1].direction * first  # along which the mean gap is 0
    Anchor(layer=2, direction=direction).save(run.folder(TASK) / "anchor.safetensors")
    with suppress(NoGapError):
        take(screen_run(run, pair, SCREEN))
    assert run.screening(TASK) is None, "there is a gap"
    assert files(run, "screen").get("screen.jsonl", b"") == b""


def test_a_validation_by_a_screening_ranks_by_what_is_exact_where_that_is_known(
    done: Run, pair: ModelPair, tmp_path: Path
) -> None:
    run = Run.open(shutil.copytree(done.path, tmp_path / "run"))
    table = run.screen_table(TASK).set_index("component")
    # Planted: what the estimate puts last is first by its exact effect, and the other way round.
    by_estimate = list(table["recovery"].sort_values(ascending=False).index)
    table.loc[by_estimate[-1], "exact_recovery"], table.loc[by_estimate[0], "exact_recovery"] = 0.5, -0.5
    table.reset_index().to_parquet(run.folder(TASK) / "screen.parquet", index=False)
    take(validate(run, pair, CURVE))
    points = run.validation(TASK)["points"]
    best = {
        name: row["recovery"] if math.isnan(row["exact_recovery"]) else row["exact_recovery"]
        for name, row in table.iterrows()
    }
    order = sorted(best, key=lambda name: -best[name])
    assert (order[0], order[-1]) == (by_estimate[-1], by_estimate[0])
    assert [(point["arm"], point["k"]) for point in points] == [
        ("top", 0),
        ("top", 2), ("random 1", 2), ("largest differences", 2),
        ("top", 6), ("random 1", 6), ("largest differences", 6),
    ]  # fmt: skip
    for point in points:
        assert len(set(point["patch"])) == len(point["patch"]) == point["k"]
        if point["arm"] == "top":
            assert set(point["patch"]) == set(order[: point["k"]])
        top = next(one["patch"] for one in points if one["arm"] == "top" and one["k"] == point["k"])
        assert units(point["patch"]) == units(top)
    arms = {tuple(sorted(point["patch"])) for point in points if point["k"] == 6}
    assert len(arms) == 3
    whole = (run.folder(TASK) / "validation.json").read_bytes()
    assert [step.done for step in take(validate(run, pair, CURVE))] == [7]
    assert (run.folder(TASK) / "validation.json").read_bytes() == whole


def units(addresses: list[str]) -> Counter[str]:
    return Counter(Component.parse(address).unit for address in addresses)


def test_the_largest_differences_are_those_whose_weights_moved_most(done: Run, pair: ModelPair) -> None:
    from weightpatch.difference import weight_differences
    from weightpatch.validation import by_difference, leading_like

    pool = [Component.parse(name) for name in done.screen_table(TASK)["component"]]
    norms = {one.component: one.norm for one in weight_differences(pair, pool)}
    moved = by_difference(pair, pool[::-1])
    assert set(moved) == set(pool)
    assert [norms[one] for one in moved] == sorted(norms.values(), reverse=True)
    chosen = [one for one in pool if one.unit == "heads"][:3] + [one for one in pool if one.unit == "kvs"][:2]
    like = leading_like(chosen, moved)
    assert Counter(one.unit for one in like) == {"heads": 3, "kvs": 2}
    for one in like:
        assert sum(norms[other] > norms[one] for other in pool if other.unit == one.unit) < 3


def test_without_a_screening_the_command_to_make_one_is_named(run: Run, pair: ModelPair) -> None:
    with pytest.raises(RunError, match=rf"no screening of '{TASK}'\. Do it first: weightpatch screen {run.path}"):
        take(validate(run, pair, CURVE))
    assert not (run.folder(TASK) / "validation.json").exists()


def test_no_weight_is_patched_twice_by_a_screening_of_nested_units(run: Run, pair: ModelPair) -> None:
    take(screen_run(run, pair, ScreenSettings(units="attns,heads", budget=6)))
    take(validate(run, pair, CurveSettings(ranking="screen", shares=(1.0,), n_prompts=2, answers=False, n_random=0)))
    found = set().union(*(units(point["patch"]) for point in run.validation(TASK)["points"]))
    assert not [(one, other) for one in found for other in found if encloses(one, other)]


def test_estimates_in_the_table_are_those_of_localize(done: Run, pair: ModelPair) -> None:
    prompts = done.prompts().of_task(TASK).split("localize")
    found = localize(pair, prompts, done.anchor(TASK), units="heads,kvs", method="first-order")
    np.testing.assert_allclose(
        done.screen_table(TASK)["effect"], found.per_prompt.mean(dim=1).numpy(), rtol=1e-4, atol=1e-6
    )


Program = Callable[..., tuple[int, str, str]]


@pytest.fixture
def weightpatch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """The program's own entry point, in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["weightpatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return call


def test_screen_prints_one_json_object_or_verdicts_in_words(weightpatch: Program, done: Run) -> None:
    same = ("--units", "heads,kvs", "--budget", 12)
    code, out, _ = weightpatch("screen", done.path, *same, "--json")
    assert code == 0
    assert len(out.splitlines()) == 1
    record = json.loads(out)
    assert record["run"] == str(done.path)
    found = record["tasks"][TASK]
    assert list(found["units"]) == ["kvs", "heads"]
    for unit, top in found["top"].items():
        assert units([row["component"] for row in top]) == Counter({unit: len(top)})
        best = [row["recovery"] if row["exact_recovery"] is None else row["exact_recovery"] for row in top]
        assert best == sorted(best, reverse=True)
    code, out, _ = weightpatch("screen", done.path, *same)
    assert code == 0
    assert "heads: 16 estimated, " in out
    assert "estimated recovery  " in out
    code, out, _ = weightpatch("screen", done.path, "--units", "heads", "--budget", 12, "--json")
    assert code == 2
    assert "units: 'heads,kvs' then, 'heads' now" in json.loads(out)["error"]


def test_drill_prints_one_json_object_or_the_tree(weightpatch: Program, run: Run, done: Run) -> None:
    code, out, err = weightpatch("drill", run.path, "--budget", 16, "--groups", 3, "--json")
    assert code == 0, err
    assert len(out.splitlines()) == 1
    assert json.loads(out) == {"run": str(run.path), "tasks": {TASK: done.drill(TASK)}}
    assert files(run, "drill") == files(done, "drill")
    code, out, _ = weightpatch("drill", run.path, "--budget", 16, "--groups", 3)
    record = done.drill(TASK)
    assert record is not None
    assert record["tree"] in out


def test_validate_by_a_screening_prints_every_arm(weightpatch: Program, done: Run, run: Run, tmp_path: Path) -> None:
    both = Run.open(shutil.copytree(done.path, tmp_path / "both"))
    options = ("--ranking", "screen", "--n-prompts", 2, "--answers", "none", "--json")
    code, out, err = weightpatch("validate", both.path, *options)
    assert code == 0, err
    points = json.loads(out)["tasks"][TASK]
    assert {point["arm"] for point in points} == {"top", "random 1", "layer-matched 1", "largest differences", "bottom"}
    code, out, _ = weightpatch("validate", run.path, *options)
    assert code == 2
    assert f"weightpatch screen {run.path}" in json.loads(out)["error"]


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["screen", "--approximation", "gradients"], ["--approximation", "'outputs'", "'weights'", "'ig'"]),
        (["screen", "--budget", 1], ["--budget"]),
        (["screen", "--n-steps", 0], ["--n-steps"]),
        (["screen", "--units", "headz"], ["unknown units: 'headz'. Name some of blocks"]),
        (["drill", "--groups", 1], ["--groups"]),
        (["drill", "--budget", 1], ["a budget of 1", "2 blocks lie below the anchor. Give at least 2"]),
        (["validate", "--ranking", "size"], ["--ranking", "effects", "screen"]),
    ],
)
def test_a_users_mistake_exits_with_2_and_names_the_choices(
    arguments: list[Any], messages: list[str], weightpatch: Program, run: Run
) -> None:
    command, *options = arguments
    code, out, err = weightpatch(command, run.path, *options, "--json")
    assert code == 2, err
    error = json.loads(out)["error"]
    assert [message for message in messages if message not in error] == []
    assert "Traceback" not in err
