"""The stage `trace` of a run, the edges of the command line, and how both go on or say why not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from conftest import slow_unless
from weightpatch import ContrastPrompts, ModelPair
from weightpatch.cli import main
from weightpatch.errors import RunError
from weightpatch.localization import sweep
from weightpatch.report import render
from weightpatch.report.verdict import claims, verdict
from weightpatch.run import Run, RunConfig
from weightpatch.stages import fit_anchors, measure_effects, start
from weightpatch.suppliers import TraceSettings
from weightpatch.traces import TraceStage, trace_run

TASK = "sections"
SETTINGS = TraceStage(
    trace=TraceSettings(candidates="heads,L0.N3", n_targets=2, n_exact=6, n_rounds=1),
    n_shuffles=2,
    n_executor_prompts=2,
)
FILES = (
    "activation.jsonl",
    "null.jsonl",
    "plain.json",
    "executors.json",
    "roles.parquet",
    "trace.graphml",
    "trace.json",
)

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.from_pretrained("tiny:base", "tiny:specialized")


@pytest.fixture(scope="module")
def fitted(pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = ContrastPrompts.load(f"instructions:{TASK}", n_queries=4)
    config = RunConfig(base="tiny:base", specialized="tiny:specialized", units="heads,mlps", layer=6, gates="readout")
    run = start(config, pair, prompts, tmp_path_factory.mktemp("fitted") / "run")
    list(fit_anchors(run, pair))
    list(measure_effects(run, pair))
    return run.path


@pytest.fixture(scope="module")
def done(fitted: Path, pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.open(shutil.copytree(fitted, tmp_path_factory.mktemp("done") / "run"))
    list(trace_run(run, pair, SETTINGS))
    return run


@pytest.fixture
def run(fitted: Path, tmp_path: Path) -> Run:
    return Run.open(shutil.copytree(fitted, tmp_path / "run"))


@pytest.fixture
def weightpatch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["weightpatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return call


def contents(run: Run) -> dict[str, bytes]:
    return {name: (run.folder(TASK) / name).read_bytes() for name in FILES}


def test_a_trace_writes_what_patching_activations_gives_and_a_role_for_every_component(
    done: Run, pair: ModelPair
) -> None:
    prompts = done.prompts().of_task(TASK).split("localize")
    truth = list(sweep(pair, prompts, done.anchor(TASK), done.effects(TASK).components, method="activation"))
    lines = [json.loads(line) for line in (done.folder(TASK) / "activation.jsonl").read_text().splitlines()]
    assert [line["component"] for line in lines] == [str(one.component) for one in truth]
    expected = [one.per_prompt.tolist() for one in truth]
    np.testing.assert_allclose([line["effects"] for line in lines], expected, rtol=0, atol=1e-6)
    table = done.roles(TASK)
    assert table is not None
    assert len(table) == 2 * 9 + 6 * 9  # past the anchor, and below it
    assert set(table["role"]) <= {"source", "router", "executor", "none"}
    below = table[table["recovery"].notna()]
    np.testing.assert_allclose(below["relay"], below["activation"] - below["recovery"])
    assert set(below["role"]) <= {"source", "router", "none"}
    assert set(table[table["recovery"].isna()]["role"]) <= {"executor", "none"}


def test_the_matrix_of_a_run_adds_up_to_its_recoveries(done: Run) -> None:
    matrix, table = done.matrix(TASK), done.effects(TASK).table()
    assert matrix is not None
    np.testing.assert_allclose(matrix.sum(axis=1).to_numpy(), table["recovery"], atol=1e-5)
    found = done.reference(TASK)
    gap = np.mean(found["specialized"]) - np.mean(found["base"])
    delivered = np.array(found["delivered"]["specialized"]) - np.array(found["delivered"]["base"])
    assert delivered.sum() == pytest.approx(gap, rel=1e-5)


@pytest.mark.parametrize("n_steps", [pytest.param(n, marks=slow_unless(n == 30)) for n in (1, 30, 56, 58, 59)])
def test_a_trace_that_was_stopped_goes_on_and_ends_with_the_same_bytes(
    run: Run, done: Run, pair: ModelPair, n_steps: int
) -> None:
    steps = trace_run(run, pair, SETTINGS)
    for _ in range(n_steps):
        next(steps)
    steps.close()
    for name in ("activation.jsonl", "null.jsonl"):  # as if it had been killed within a line
        with suppress(FileNotFoundError), (run.folder(TASK) / name).open("r+b") as file:
            file.seek(0, 2)
            file.write(b'{"component": "L')
    list(trace_run(run, pair, SETTINGS))
    assert contents(run) == contents(done)


def test_a_finished_trace_is_not_measured_again_and_other_settings_are_refused(done: Run, pair: ModelPair) -> None:
    before = contents(done)
    assert [step.stage for step in trace_run(done, pair, SETTINGS)] == []
    with pytest.raises(RunError, match="n_shuffles: 2 then, 3 now"):
        list(trace_run(done, pair, TraceStage(trace=SETTINGS.trace, n_shuffles=3, n_executor_prompts=2)))
    assert contents(done) == before


def test_a_trace_of_missing_effects_says_how_to_get_them(run: Run, pair: ModelPair) -> None:
    file = run.folder(TASK) / "effects.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:-3]) + "\n")
    with pytest.raises(RunError, match=f"3 effects of '{TASK}' are missing: weightpatch localize"):
        list(trace_run(run, pair, SETTINGS))
    with pytest.raises(RunError, match="no task poem"):
        list(trace_run(run, pair, SETTINGS, tasks=("poem",)))


def test_the_verdict_names_what_the_table_says_and_the_report_holds_it(done: Run) -> None:
    text, table = " ".join(verdict(done, TASK)), done.roles(TASK)
    assert table is not None
    n_sources = int((table["role"] == "source").sum())
    assert f"{n_sources} of {int(table['recovery'].notna().sum())} components" in text or n_sources == 0
    assert len(claims(done, TASK)) == 4
    assert {claim.answer for claim in claims(done, TASK)} <= {"agrees", "disagrees", "open"}
    assert "Routers lie deeper than sources" in render(done)


def test_components_without_an_output_are_left_without_a_trace(pair: ModelPair, tmp_path: Path) -> None:
    prompts = ContrastPrompts.load(f"instructions:{TASK}", n_queries=4)
    config = RunConfig(base="tiny:base", specialized="tiny:specialized", units="norms", layer=6, gates="readout")
    run = start(config, pair, prompts, tmp_path / "run")
    list(fit_anchors(run, pair))
    list(measure_effects(run, pair))
    list(trace_run(run, pair, SETTINGS))
    assert run.trace(TASK) is None
    assert "Roles" not in render(run)


def test_a_run_without_a_trace_has_no_verdict(run: Run) -> None:
    assert verdict(run, TASK) == ()
    assert claims(run, TASK) == ()


def test_edges_of_the_command_line_are_shares_of_the_gap_and_direct_is_part_of_total(
    weightpatch: Cli, done: Run
) -> None:
    code, out, err = weightpatch("trace", done.path, "--from", "L4.mlp,L2.H1", "--to", "anchor", "--json")
    assert code == 0, err
    rows = {row["supplier"]: row for row in json.loads(out)["tasks"][TASK]}
    table = done.effects(TASK).table().set_index("component")
    for name, row in rows.items():
        assert row["total"] == pytest.approx(table.loc[name, "recovery"], rel=1e-4)
    code, out, _ = weightpatch("trace", done.path, "--from", "L2.H1", "--to", "L5.H3", "--input", "q")
    assert code == 0
    assert "L2.H1" in out
    assert "L5.H3" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from", "L2.H1"), "--from and --to belong together"),
        (("--from", "L5.H1", "--to", "L2.H1"), "none of L5.H1 lies upstream of L2.H1"),
        (("--from", "L1.H1", "--to", "L7.H1"), "cannot be the target of an edge"),
        (("--from", "L1.H1", "--to", "L4.mlp", "--input", "q"), "only heads and attentions have inputs q, k, v"),
        (("--task", "poem"), "no task poem"),
    ],
)
def test_a_wrong_edge_is_refused_with_the_reason_and_exit_code_2(
    weightpatch: Cli, done: Run, arguments: tuple[str, ...], message: str
) -> None:
    code, out, _ = weightpatch("trace", done.path, *arguments, "--json")
    assert code == 2
    assert message in json.loads(out)["error"]
