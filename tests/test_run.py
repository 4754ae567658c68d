"""The run folder: what it holds, how it goes on, and that nothing is lost or half-written."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from conftest import build_pair
from weightpatch import Anchor, ContrastPrompts, ModelPair
from weightpatch.component import Component
from weightpatch.effects import ComponentEffect
from weightpatch.errors import NoGapError, PromptError, RunError, WeightpatchError
from weightpatch.prompts import SPLITS, ContrastPrompt
from weightpatch.recording import append_effects, read_effects
from weightpatch.run import Run, RunConfig, alone, check_folder, settle
from weightpatch.stages import fit_anchors, measure_effects, start

CONFIG = RunConfig(base="b", specialized="s", units="heads,mlps", layer=2, gates="readout")


class Letters:
    """A tokenizer of one token to a letter, for pairs in memory."""

    chat_template = None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 61 for letter in text]


def letter_pair() -> ModelPair:
    pair = build_pair("llama-gqa")
    object.__setattr__(pair, "tokenizer", Letters())
    return pair


def letter_prompts(tasks: tuple[str, ...] = ("title",)) -> ContrastPrompts:
    rows = [
        ContrastPrompt(
            id=f"{task}-{n}", task=task, prompt=f"Tell {n} of tea.", instruction="Add {title}!", split=SPLITS[n % 3]
        )
        for task in tasks
        for n in range(18)
    ]
    return ContrastPrompts(tuple(rows))


def finish(run: Run, pair: ModelPair) -> None:
    for _ in fit_anchors(run, pair):
        pass
    for _ in measure_effects(run, pair):
        pass


def measured_run(tmp_path: Path, prompts: ContrastPrompts | None = None) -> tuple[Run, ModelPair]:
    pair = letter_pair()
    run = start(CONFIG, pair, prompts or letter_prompts(), tmp_path / "run")
    try:
        finish(run, pair)
    except NoGapError:
        pytest.fail("the random pair has no gap; choose another seed")
    return run, pair


def test_a_run_holds_what_the_contract_says_and_reads_back_as_effects(tmp_path: Path) -> None:
    run, pair = measured_run(tmp_path, letter_prompts(("title", "quotation")))
    assert run.tasks == ("title", "quotation")
    for task in run.tasks:
        effects = run.effects(task)
        assert [str(c) for c in effects.components][:3] == ["L0.H0", "L0.H1", "L0.H2"]
        assert effects.per_prompt.shape == (10, 6)
        table = pd.read_parquet(run.folder(task) / "effects.parquet")
        pd.testing.assert_frame_equal(table, effects.table(), check_dtype=False)
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["config"] == CONFIG.model_dump(mode="json")
    assert manifest["digests"] == {**pair.digests(), "prompts": run.prompts().digest()}
    assert not [file for file in run.path.rglob("*") if file.suffix in (".pkl", ".pt", ".partial")]


def test_a_run_on_token_ids_goes_on_like_any_other(tmp_path: Path) -> None:
    rows = tuple(
        ContrastPrompt(id=f"p{n}", with_instruction=(n, 7, 50), without_instruction=(n, 7, 9), split=SPLITS[n % 3])
        for n in range(18)
    )
    run, pair = measured_run(tmp_path, ContrastPrompts(rows))
    assert run.prompts().rows == rows
    before = (run.folder("task") / "effects.jsonl").read_bytes()
    finish(start(CONFIG, pair, ContrastPrompts(rows), run.path), pair)
    assert (run.folder("task") / "effects.jsonl").read_bytes() == before


def test_a_half_written_last_line_is_dropped_and_measured_again(tmp_path: Path) -> None:
    run, pair = measured_run(tmp_path)
    file = run.folder("title") / "effects.jsonl"
    whole = file.read_bytes()
    for cut in (1, 40, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        for _ in measure_effects(run, pair):
            pass
        assert file.read_bytes() == whole


def test_reading_a_run_that_is_still_going_ignores_the_half_line_and_leaves_it(tmp_path: Path) -> None:
    run, _ = measured_run(tmp_path)
    file = run.folder("title") / "effects.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    before = file.read_bytes()
    assert len(run.effects("title").components) == 9
    assert file.read_bytes() == before


def test_a_finished_run_repeated_changes_no_byte_of_its_data(tmp_path: Path) -> None:
    run, pair = measured_run(tmp_path)
    before = {file: file.read_bytes() for file in sorted(run.path.rglob("*")) if file.is_file()}
    finish(start(CONFIG, pair, letter_prompts(), run.path), pair)
    assert {file: file.read_bytes() for file in sorted(run.path.rglob("*")) if file.is_file()} == before


def test_a_changed_setting_is_refused_with_every_field_that_differs(tmp_path: Path) -> None:
    run, pair = measured_run(tmp_path)
    other = CONFIG.model_copy(update={"units": "heads", "seed": 3})
    with pytest.raises(RunError) as caught:
        start(other, pair, letter_prompts(), run.path)
    for part in ("units: 'heads,mlps' then, 'heads' now", "seed: 0 then, 3 now"):
        assert part in str(caught.value)
    with torch.no_grad():
        pair.base.model.norm.weight[0] += 1
    with pytest.raises(RunError) as caught:
        start(CONFIG, pair, letter_prompts(("quotation",)), run.path)
    for part in ("the contents of base changed", "the contents of prompts changed"):
        assert part in str(caught.value)


def test_settings_may_change_as_long_as_nothing_was_found_with_them(tmp_path: Path) -> None:
    pair = letter_pair()
    start(CONFIG, pair, letter_prompts(), tmp_path / "run")
    run = start(CONFIG.model_copy(update={"seed": 3}), pair, letter_prompts(), tmp_path / "run")
    assert run.config.seed == 3


def test_a_run_whose_own_files_were_changed_is_not_continued(tmp_path: Path) -> None:
    run, pair = measured_run(tmp_path)
    prompts, effects = run.path / "prompts.jsonl", run.folder("title") / "effects.jsonl"
    whole = prompts.read_text()
    prompts.write_text(whole.replace("tea", "rum"))
    with pytest.raises(RunError, match=r"prompts\.jsonl changed since"):
        start(CONFIG, pair, letter_prompts(), run.path)
    prompts.write_text(whole)
    lines = effects.read_text()
    for wrong in ('{"component": "L2.mlp", "effects": [1, 2, 3, 4, 5, 6]}', '{"component": "L0.mlp", "effects": [1]}'):
        effects.write_text(lines.splitlines()[0] + "\n" + wrong + "\n")
        with pytest.raises(RunError, match="which is not what this run measures"):
            list(measure_effects(run, pair))
    effects.write_text(lines)
    Anchor(layer=2, direction=torch.ones(24)).save(run.folder("title") / "anchor.safetensors")
    with pytest.raises(RunError, match="the anchor of 'title' changed"):
        list(measure_effects(run, pair))


def test_two_processes_cannot_work_on_one_run(tmp_path: Path) -> None:
    with alone(tmp_path / "run"), pytest.raises(RunError, match="another process is at work"), alone(tmp_path / "run"):
        pytest.fail("the second got in")


def test_a_folder_that_cannot_be_made_is_refused_before_any_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        check_folder(tmp_path / "file" / "run", CONFIG)
    with pytest.raises(RunError, match="cannot"), alone(Path("/proc/nowhere/run")):
        pytest.fail("it was made")


def test_a_task_that_a_run_does_not_have_is_named_with_those_it_has(tmp_path: Path) -> None:
    run, _ = measured_run(tmp_path)
    with pytest.raises(RunError, match=r"has no task 'titel'\. Its tasks: title"):
        run.reference("titel")


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"not empty \(it holds thesis.tex\)"):
        start(CONFIG, letter_pair(), letter_prompts(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_record_is_named_by_its_line(tmp_path: Path) -> None:
    run, _ = measured_run(tmp_path)
    file = run.folder("title") / "effects.jsonl"
    lines = file.read_text().splitlines()
    lines[2] = "{broken"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match=r"line 3 of .* is no record"):
        run.effects("title")


def test_damaged_notes_and_short_records_are_named_with_what_to_do(tmp_path: Path) -> None:
    run, _ = measured_run(tmp_path)
    folder = run.folder("title")
    reads: dict[str, Callable[[str], object]] = {
        "reference.json": run.reference,
        "trace.json": run.trace,
        "drill.json": run.drill,
        "screen.json": run.screening,
        "validation.json": run.validation,
    }
    for name, read in reads.items():
        kept = (folder / name).read_bytes() if (folder / name).is_file() else None
        (folder / name).write_text('{"half')
        with pytest.raises(RunError, match=rf"{name} is damaged .* Delete it and repeat the stage"):
            read("title")
        (folder / name).unlink() if kept is None else (folder / name).write_bytes(kept)
    file = folder / "effects.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["effects"].pop()
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunError, match=rf"5 effects of {lines[1]['component']} and the run 6 prompts"):
        run.effects("title")


def test_results_whose_settings_are_gone_are_not_taken_for_those_of_others(tmp_path: Path) -> None:
    run, _ = measured_run(tmp_path)
    assert not settle(run, "title", "drill", {"budget": 40})
    (run.folder("title") / "drill.json").write_text("{}")
    assert settle(run, "title", "drill", {"budget": 40})
    (run.folder("title") / "drill.settings.json").unlink()
    with pytest.raises(RunError, match="budget: None then, 77 now"):
        settle(run, "title", "drill", {"budget": 77})


def test_effects_that_are_no_numbers_are_refused_and_those_before_them_kept(tmp_path: Path) -> None:
    good, bad = (
        ComponentEffect(component=Component.parse(address), per_prompt=torch.tensor([1.0, value]))
        for address, value in (("L0.H0", 2.0), ("L0.H1", float("nan")))
    )
    file = tmp_path / "effects.jsonl"
    with pytest.raises(RunError, match=r"the effect of L0.H1 is NaN or infinite"):
        list(append_effects(file, [good, bad], set()))
    assert read_effects(file) == {"L0.H0": [1.0, 2.0]}


def test_a_negative_seed_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        RunConfig(base="b", specialized="s", seed=-1)


def test_a_task_without_a_gap_says_so_and_the_others_go_on(tmp_path: Path) -> None:
    pair = letter_pair()
    with torch.no_grad():
        pair.specialized.model.embed_tokens.weight.copy_(pair.base.model.embed_tokens.weight)
    config = CONFIG.model_copy(update={"units": "embed,heads,mlps"})
    run = start(config, pair, letter_prompts(("title", "same")), tmp_path / "run")
    for _ in fit_anchors(run, pair):
        pass
    # Both models enter layer 0 with the same embeddings, so an anchor there has no gap.
    Anchor(layer=0, direction=torch.ones(24)).save(run.folder("same") / "anchor.safetensors")
    for _ in measure_effects(run, pair):
        pass
    assert "do not differ measurably" in (run.failure("same") or "")
    assert run.failure("title") is None
    assert len(run.effects("title").components) == 11
    with pytest.raises(RunError, match="no effects of 'same': the two models do not differ"):
        run.effects("same")


def test_a_run_in_which_nothing_could_be_measured_is_an_error(tmp_path: Path) -> None:
    pair = letter_pair()
    run = start(CONFIG, pair, letter_prompts(), tmp_path / "run")
    for _ in fit_anchors(run, pair):
        pass
    record = {"prompts": [], "base": [], "specialized": [], "past_anchor": [], "failure": "no gap"}
    (run.folder("title") / "reference.json").write_text(json.dumps(record))
    with pytest.raises(NoGapError, match=r"no task could be measured\. title: no gap"):
        for _ in measure_effects(run, pair):
            pass


def test_prompts_that_cannot_be_split_are_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    rows = tuple(row for row in letter_prompts() if row.split == "fit")
    with pytest.raises(PromptError, match="no prompts in split 'localize'"):
        start(CONFIG, letter_pair(), ContrastPrompts(rows), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 7}, "this model has residual streams 0 to 3"),
        ({"positions": (-40,)}, "too few for readout positions"),
        ({"units": "L9"}, "this model has layers L0 to L2"),
    ],
)
def test_settings_that_a_later_stage_would_stumble_over_are_refused_before_the_folder_is_made(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightpatchError, match=message):
        start(CONFIG.model_copy(update=changes), letter_pair(), letter_prompts(), tmp_path / "run")
    few = ContrastPrompts(tuple(row for row in letter_prompts() if int(row.id.split("-")[1]) < 9))
    with pytest.raises(WeightpatchError, match="3 different queries of title are too few"):
        start(CONFIG, letter_pair(), few, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_path_without_a_manifest_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run folder"):
        Run.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "weightpatch.run/99", "config": {}}')
    with pytest.raises(RunError, match=r"this version reads weightpatch\.run/1"):
        Run.open(tmp_path)


@pytest.mark.slow
def test_a_run_killed_at_ten_random_moments_ends_with_the_same_bytes(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "from weightpatch.cli import main; main()"]
    settings = ["--prompts", "instructions", "--units", "attns,mlps,heads", "--n-queries", "12", "--until", "localize"]
    command = [*program, "run", "tiny:base", "tiny:specialized", *settings, "--out"]
    whole = tmp_path / "whole"
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    n_total = count_lines(whole)
    dice = random.Random(0)
    struck = []
    for attempt in range(10):
        folder = tmp_path / f"killed{attempt}"
        process = subprocess.Popen([*command, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # The first two die on the way to their anchors, the others once a random share of the lines is there.
        wait_for_lines(folder, 0 if attempt < 2 else dice.randrange(n_total), process)
        time.sleep(dice.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        struck.append(count_lines(folder))
        subprocess.run([*command, str(folder)], check=True, capture_output=True)
        for file in sorted((whole / "tasks").rglob("*.*")):
            again = folder / file.relative_to(whole)
            assert again.read_bytes() == file.read_bytes(), f"kill {attempt}: {again.name}"
        assert not list(folder.rglob("*.partial"))
    assert len({lines for lines in struck if lines < n_total}) > 4, f"the kills came too late: {struck} of {n_total}"


def count_lines(folder: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in folder.rglob("effects.jsonl"))


def wait_for_lines(folder: Path, n_lines: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a run has begun and measured so many lines, or has ended."""
    while process.poll() is None and not ((folder / "manifest.json").exists() and count_lines(folder) >= n_lines):
        time.sleep(0.002)
