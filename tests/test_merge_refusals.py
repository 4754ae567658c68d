"""What would make another model than was asked for is refused, and before anything is learned or written."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import build_model
from merges import BASE, decide
from weightpatch import cli
from weightpatch.errors import MergeError, RunError
from weightpatch.merging.coefficients import Coefficients
from weightpatch.merging.experts import Expert, doubts_of
from weightpatch.merging.inputs import Inputs
from weightpatch.merging.learning import Training
from weightpatch.merging.merge import merge
from weightpatch.merging.resolving import Rule, read_aims
from weightpatch.run import Run

UNIFORM = Rule(policy="uniform")


@pytest.fixture
def copied(experts: dict[str, Expert], tmp_path: Path) -> dict[str, Expert]:
    """The experts with copies of their runs, to be damaged."""
    found = {}
    for name, one in experts.items():
        assert one.run
        found[name] = replace(one, run=tmp_path / "runs" / name)
        shutil.copytree(one.run, tmp_path / "runs" / name)
    return found


def edit(run: Path | None, task: str, gates: bool) -> None:
    """Let every gate of an anchor have passed, or none."""
    assert run
    anchor = Run.open(run).anchor(task)
    assert anchor.report
    judged = tuple(replace(gate, passed=gates) for gate in anchor.report.gates)
    replace(anchor, report=replace(anchor.report, gates=judged)).save(Run.open(run).folder(task) / "anchor.safetensors")


def test_a_run_of_weights_that_changed_since_is_refused(copied: dict[str, Expert]) -> None:
    decide(copied, rule=Rule(policy="soft"))
    for side in ("base", "specialized"):
        first = next(iter(copied.values()))
        assert first.run
        file = first.run / "manifest.json"
        text = file.read_text()
        manifest = json.loads(text)
        manifest["fingerprints"][side] = "0" * 64
        file.write_text(json.dumps(manifest))
        for rule in (Rule(policy="soft"), UNIFORM):  # the model card would tell of that run
            with pytest.raises(MergeError, match=r"a run of other weights than .* holds now. Make it again"):
                decide(copied, rule=rule)
        file.write_text(text)


def test_a_run_that_is_measured_in_part_gives_no_ranks(copied: dict[str, Expert]) -> None:
    first = next(iter(copied.values()))
    assert first.run
    file = next(first.run.rglob("effects.jsonl"))
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(MergeError, match=r"9 components of sections have no effects yet.*weightpatch localize"):
        decide(copied, rule=Rule(policy="owner"))


def test_anchors_that_failed_their_gates_are_told_of(copied: dict[str, Expert], tmp_path: Path) -> None:
    for name, task, passed in (("below-groups-1", "sections", False), ("below-mlps-0", "quotation", True)):
        edit(copied[name].run, task, passed)
    rule = Rule(policy="streams", units="mlps", training=Training(n_steps=0))
    for one in (rule, Rule(policy="soft")):
        found = decide(copied, rule=one)
        assert found.resolved.doubts["below-mlps-0"] == {}
        assert "its anchor is unstable: it failed" in found.resolved.doubts["below-groups-1"]["sections"]
    card = found.write(tmp_path / "merged") / "README.md"
    assert "- below-groups-1, sections: counts, but its anchor is unstable" in card.read_text()


def test_a_task_without_effects_is_named_and_a_learned_merge_does_not_miss_them(copied: dict[str, Expert]) -> None:
    first, second = copied
    run = copied[first].run
    assert run
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["tasks"].append("title")
    (run / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(run / "tasks" / "sections", run / "tasks" / "title")
    (run / "tasks" / "title" / "effects.jsonl").unlink()
    doubts = decide(copied, rule=Rule(policy="soft")).resolved.doubts
    assert "left out: " in doubts[first]["title"]
    assert "title" not in doubts[second]
    assert "left out" not in doubts_of(Run.open(run), learned=True).get("title", "")


@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_weights_that_are_no_numbers_are_not_written(value: float, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "odd")):
        build_model("llama-gqa", seed=seed).save_pretrained(tmp_path / name)
    file = tmp_path / "odd" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(MergeError, match=r"model.layers.1.mlp.up_proj.weight would hold NaN or infinite numbers"):
        merge(tmp_path / "base", [str(tmp_path / "odd")], tmp_path / "out", rule=UNIFORM, dtype=torch.float16)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_run_that_is_none_is_found_before_weights_are_written(experts: dict[str, Expert], tmp_path: Path) -> None:
    odd = [replace(one, run=tmp_path / "none") for one in experts.values()]
    with pytest.raises(RunError, match="is no run folder"):
        merge(BASE, odd, tmp_path / "out", rule=UNIFORM, any_adapter_base=True)
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_written_are_named_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightpatch.merging.merge.prepare", lambda *_args, **_how: pytest.fail("something was read"))
    for option in ("--save-coefficients", "--emit-mergekit"):
        arguments = ["merge", BASE, "--expert", "x=y", option, str(tmp_path / "none" / "file"), "--json"]
        monkeypatch.setattr(sys, "argv", ["weightpatch", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        assert "cannot be written" in json.loads(capsys.readouterr().out)["error"]


def test_damaged_notes_of_a_merge_are_named_or_made_again(experts: dict[str, Expert], tmp_path: Path) -> None:
    every = [*experts.values()]
    rule = Rule(policy="streams", units="mlps", training=Training(n_steps=1))
    folder = merge(BASE, every, tmp_path / "out", rule=rule, any_adapter_base=True)
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "merge.learning").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    merge(BASE, every, folder, rule=rule, any_adapter_base=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == kept
    (folder / "merge.json").write_text("{")
    with pytest.raises(MergeError, match=r"merge.json is damaged .* delete the folder"):
        merge(BASE, every, folder, rule=rule, any_adapter_base=True)


def test_coefficients_that_were_edited_in_another_type_are_read(experts: dict[str, Expert], tmp_path: Path) -> None:
    given = decide(experts, rule=UNIFORM).resolved.coefficients
    halves = {name: tuple(own.bfloat16() for own in every) for name, every in given.tensors.items()}
    Coefficients(experts=given.experts, tensors=halves).save(tmp_path / "c")
    made = merge(BASE, [*experts.values()], tmp_path / "out", coefficients=tmp_path / "c", any_adapter_base=True)
    plain = merge(BASE, [*experts.values()], tmp_path / "plain", rule=UNIFORM, any_adapter_base=True)
    assert (made / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def test_a_base_on_several_devices_is_refused_for_learning(
    experts: dict[str, Expert], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("llama-gqa", seed=0)
    model.lm_head.to("meta")
    monkeypatch.setattr(Inputs, "load_base", lambda _self: model)
    inputs = decide(experts, rule=UNIFORM).merge.inputs
    with pytest.raises(MergeError, match="learned on one device, and the base lies on cpu, meta"):
        read_aims(inputs, {})


def test_a_decoder_of_an_unknown_family_is_merged_with_a_derived_row(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "starcoder2", hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=20, vocab_size=61, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    for seed, name in enumerate(("base", "one")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    experts = [str(tmp_path / "one")]
    with pytest.raises(Exception, match="--architecture auto"):
        merge(tmp_path / "base", experts, tmp_path / "out", rule=UNIFORM)
    made = merge(tmp_path / "base", experts, tmp_path / "out", rule=UNIFORM, architecture="auto")
    for name, tensor in load_file(tmp_path / "one" / "model.safetensors").items():
        torch.testing.assert_close(load_file(made / "model.safetensors")[name], tensor)
