"""From runs to coefficients to a folder: what experts bring is what their runs say, and the command tells all of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from merges import BASE, PLANTS, decide
from weightpatch import cli
from weightpatch.component import Component, components, disjoint, slices
from weightpatch.errors import MergeError
from weightpatch.merging.coefficients import Coefficients
from weightpatch.merging.combining import METHODS
from weightpatch.merging.experts import Expert, named, read_scores
from weightpatch.merging.explaining import explain
from weightpatch.merging.exporting import mergekit_recipe
from weightpatch.merging.inputs import Inputs
from weightpatch.merging.merge import merge
from weightpatch.merging.resolving import Choice, Rule
from weightpatch.merging.writing import Merge
from weightpatch.planted.suite import SHIPPED
from weightpatch.run import Run


@pytest.mark.parametrize(
    ("text", "specialized", "run", "weight"),
    [
        ("model=run", "model", "run", 1.0),
        ("org/model=my/run:0.7", "org/model", "my/run", 0.7),
        ("tiny:specialized=run:-1", "tiny:specialized", "run", -1.0),
        ("tiny:specialized", "tiny:specialized", None, 1.0),
        ("a=b=run", "a=b", "run", 1.0),
        ("model:0.5", "model", None, 0.5),
        ("model=run:1e-3", "model", "run", 0.001),
    ],
)
def test_an_expert_is_written_as_checkpoint_run_and_weight(
    text: str, specialized: str, run: str | None, weight: float
) -> None:
    assert Expert.parse(text) == Expert(specialized=specialized, run=Path(run) if run else None, weight=weight)


def test_a_path_with_an_equals_sign_is_a_checkpoint_where_it_is_there_and_a_run_where_one_is(
    experts: dict[str, Expert], tmp_path: Path
) -> None:
    folder, run = tmp_path / "lr=3" / "step", tmp_path / "run=2"
    folder.mkdir(parents=True)
    assert Expert.parse(f"{folder}:0.5") == Expert(specialized=str(folder), weight=0.5)
    run.symlink_to(next(iter(experts.values())).run or "")
    assert Expert.parse(f"{folder}={run}") == Expert(specialized=str(folder), run=run)


@pytest.mark.parametrize("text", ["", "=run", "model=", ":0.5"])
def test_what_is_no_expert_is_refused_with_the_form_it_should_have(text: str) -> None:
    with pytest.raises(MergeError, match="SPECIALIZED=RUN"):
        Expert.parse(text)


def test_experts_of_one_name_are_numbered_and_one_named_twice_is_refused() -> None:
    assert [*named([Expert(specialized="a/x"), Expert(specialized="b/x/"), Expert(specialized="c/y")])] == [
        "x-1",
        "x-2",
        "y",
    ]
    for twice in ("a", "a/", "./a"):
        with pytest.raises(MergeError, match="more than once"):
            named([Expert(specialized="a"), Expert(specialized=twice, weight=0.5)])


def test_no_expert_is_lost_to_another_ones_number() -> None:
    every = [Expert(specialized=one) for one in ("p/x", "q/x", "r/x-1", "s/x-3", "t/y")]
    assert named(every) == dict(zip(["x-2", "x-4", "x-1", "x-3", "y"], every, strict=True))


def test_the_finest_of_nested_units_get_coefficients() -> None:
    assert disjoint(["blocks", "attns", "mlps", "heads", "kvs"]) == ("mlps", "heads", "kvs")
    assert disjoint(["blocks"]) == ("blocks",)


def test_a_run_of_other_models_is_refused(experts: dict[str, Expert]) -> None:
    first, second = experts.values()
    with pytest.raises(MergeError, match="is a run with the specialized model"):
        decide({"one": replace(first, run=second.run)}, rule=Rule(policy="soft"))


def test_an_expert_without_a_run_is_refused_unless_all_coefficients_are_alike(experts: dict[str, Expert]) -> None:
    alone = {name: replace(one, run=None) for name, one in experts.items()}
    with pytest.raises(MergeError, match="has no run to take scores from"):
        decide(alone, rule=Rule(policy="owner"))
    assert decide(alone, rule=Rule(policy="uniform")).resolved.weights == {}


def test_sources_need_a_trace(experts: dict[str, Expert]) -> None:
    with pytest.raises(MergeError, match="weightpatch trace"):
        decide(experts, rule=Rule(policy="sources"))


def test_the_owner_of_a_component_is_who_recovers_most_by_it_in_rank(experts: dict[str, Expert]) -> None:
    found = decide(experts, rule=Rule(policy="owner", rest="base"))
    chosen = set(components(found.merge.inputs.architecture, "attns,mlps"))
    scores = {name: read_scores(Run.open(Path(str(one.run))), chosen) for name, one in experts.items()}
    tensors = found.resolved.coefficients.tensors
    first, second = experts
    for component in scores[first]:
        alike = [one for one in scores[first] if one.unit == component.unit]
        beaten = {name: sum(own[one] < own[component] for one in alike) for name, own in scores.items()}
        owner = max(experts, key=lambda name: (beaten[name], scores[name][component]))
        for piece in slices(found.merge.inputs.architecture, component):
            assert [float(own) for own in tensors[piece.parameter]] == [owner == first, owner == second]
    assert float(tensors["model.norm.weight"][0]) == 0
    assert {one.layer for one in found.resolved.unscored["below-mlps-0"]} == {6, 7}


def test_weights_of_experts_multiply_what_a_policy_gives(experts: dict[str, Expert]) -> None:
    halved = {name: replace(one, weight=0.5) for name, one in experts.items()}
    whole, half = (decide(own, rule=Rule(policy="soft")).resolved.coefficients for own in (experts, halved))
    for name, every in whole.tensors.items():
        for one, other in zip(every, half.tensors[name], strict=True):
            torch.testing.assert_close(other, one / 2)


@pytest.mark.parametrize(
    ("policy", "changed"),
    [("soft", {"temperature": 1.0}), ("top", {"share": 0.6}), ("owner", {"rest": "base"}), ("soft", {"units": "mlps"})],
)
def test_every_setting_of_a_policy_changes_coefficients(
    experts: dict[str, Expert], policy: Choice, changed: dict[str, object]
) -> None:
    rule = Rule(policy=policy)
    other = replace(rule, **changed)  # type: ignore[arg-type]
    one, two = (decide(experts, rule=own).resolved.coefficients.tensors for own in (rule, other))
    assert any(
        not torch.equal(first, second) for name in one for first, second in zip(one[name], two[name], strict=True)
    )


def test_one_base_in_memory_serves_the_pairs_of_all_experts_pickled_ones_too(tmp_path: Path) -> None:
    plain, folder = SHIPPED["tiny"] / "below-mlps-0", tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(plain / "adapter_config.json", folder)
    torch.save(load_file(plain / "adapter_model.safetensors"), folder / "adapter_model.bin")
    found = Inputs.open(BASE, {"plain": plain, "pickled": folder}, allow_pickle=True, any_adapter_base=True)
    base = found.load_base()
    pairs = [found.pair(name, base) for name in found.experts]
    assert all(pair.base is base and pair.tokenizer is not None for pair in pairs)
    name = "model.layers.2.mlp.up_proj.weight"
    one, other = (pair.specialized_weight(name) for pair in pairs)
    assert torch.equal(one, other)
    torch.testing.assert_close(one - base.get_parameter(name), found.change("plain", name))


def test_the_plan_tells_what_is_added_before_anything_is_written(experts: dict[str, Expert]) -> None:
    found = decide(experts, rule=Rule(policy="owner"))
    told = explain(found.merge, found.resolved.weights)
    merged = found.merge
    name = "model.layers.2.mlp.up_proj.weight"
    for place, expert in enumerate(experts):
        change = merged.inputs.change(expert, name)
        added = merged.coefficients.tensors[name][place] * change
        assert told.tensors[name][place].norm == pytest.approx(float(added.norm()), rel=1e-5)
        assert told.tensors[name][place].kept == pytest.approx(float((added != 0).float().mean()))
    one, other = experts
    whole = [
        torch.cat(
            [
                (merged.coefficients.tensors[key][place] * merged.inputs.change(expert, key)).flatten()
                for key in merged.inputs.ours.shapes
            ]
        )
        for place, expert in enumerate(experts)
    ]
    cosine = float(torch.nn.functional.cosine_similarity(whole[0], whole[1], dim=0))
    assert told.cosines[one, other] == pytest.approx(cosine, abs=1e-4)
    both = (whole[0] != 0) & (whole[1] != 0)
    opposed = float((whole[0].sign() != whole[1].sign())[both].float().mean())
    assert told.opposed[one, other] == pytest.approx(opposed, abs=1e-4)
    assert told.overlaps[one, other] == 0  # what one owns the other does not bring
    halved = explain(replace(merged, method=replace(merged.method, scale=0.5)))
    assert halved.total[one].norm == pytest.approx(told.total[one].norm / 2, rel=1e-5)
    assert halved.total[one].whole_norm == pytest.approx(told.total[one].whole_norm, rel=1e-5)


@pytest.mark.slow
def test_mergekit_makes_the_same_checkpoints_from_the_recipes(experts: dict[str, Expert], tmp_path: Path) -> None:
    folders = {}
    # Whole models, because mergekit applies adapters to the base that they name; float32, where hardly any sizes tie.
    for name, one in experts.items():
        alone, rule = [Expert(specialized=one.specialized)], Rule(policy="uniform")
        made = merge(BASE, alone, tmp_path / name, rule=rule, dtype=torch.float32, any_adapter_base=True)
        folders[name] = str(made)
    inputs = Inputs.open(str(Inputs.open(BASE, folders).base.path), folders)
    modules = components(inputs.architecture, "mlps,attns")
    weights = {
        name: {one: 0.1 * place + 0.2 * number for place, one in enumerate(modules)}
        for number, name in enumerate(folders)
    }
    coefficients = Coefficients.by_component(
        inputs.architecture, weights, rest=dict(zip(folders, (0.5, 0), strict=True))
    )
    for method in ("task-arithmetic", "ties", "breadcrumbs"):
        made = Merge(inputs=inputs, coefficients=coefficients, method=METHODS[method], dtype=torch.float32)
        recipe, averaged = mergekit_recipe(made)
        assert averaged == ()
        assert all(one["parameters"]["weight"][-1] == {"value": 0.0} for one in yaml.safe_load(recipe)["models"])
        (tmp_path / f"{method}.yml").write_text(recipe)
        made.write(tmp_path / "ours" / method)
    program = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
for name in sys.argv[2:]:
    recipe = yaml.safe_load(open(f"{sys.argv[1]}/{name}.yml"))
    run_merge(MergeConfiguration.model_validate(recipe), f"{sys.argv[1]}/theirs/{name}", MergeOptions(quiet=True))
"""
    methods = ("task-arithmetic", "ties", "breadcrumbs")
    subprocess.run([sys.executable, "-c", program, str(tmp_path), *methods], check=True, capture_output=True)
    for method in methods:
        ours, theirs = (load_file(tmp_path / who / method / "model.safetensors") for who in ("ours", "theirs"))
        for name, tensor in ours.items():
            odd = (theirs[name] - tensor).abs() > 1e-6
            sizes = [inputs.change(expert, name).abs() for expert in folders]
            # Of entries of the very same size it is open which is kept; nothing else may differ.
            assert all(any((own == own[at]).sum() > 1 for own in sizes) for at in map(tuple, odd.nonzero().tolist()))
            assert int(odd.sum()) <= (0 if method == "task-arithmetic" else 2)


def test_a_recipe_names_the_tensors_whose_finer_coefficients_it_averages(experts: dict[str, Expert]) -> None:
    found = decide(experts, rule=Rule(policy="uniform")).merge
    weights = {name: {Component.parse("L1.H2"): 1.0} for name in experts}
    fine = Coefficients.by_component(found.inputs.architecture, weights, rest=dict.fromkeys(experts, 0.0))
    recipe, averaged = mergekit_recipe(replace(found, coefficients=fine))
    assert set(averaged) == {f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qo"}
    filters = yaml.safe_load(recipe)["models"][0]["parameters"]["weight"]
    means = {own["filter"]: own["value"] for own in filters if "filter" in own}
    assert means["model.layers.1.self_attn.q_proj.weight"] == pytest.approx(1 / 8)
    with pytest.raises(MergeError, match="mergekit has no method"):
        mergekit_recipe(replace(found, method=METHODS["localize-and-stitch"]))


def test_the_command_merges_resumes_and_passes_eval(
    experts: dict[str, Expert], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["weightpatch", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(str(left.value.code)), out, err

    given = [text for one in experts.values() for text in ("--expert", f"{one.specialized}={one.run}:0.9")]
    told = ["merge", BASE, *given, "--policy", "soft", "--any-adapter-base"]
    code, out, _ = run(*told, "--plan", "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["experts"] == [*experts]
    assert len(plan["overlaps"]) == 2
    file, recipe, folder = (tmp_path / name for name in ("c.safetensors", "recipe.yml", "merged"))
    code, out, err = run(*told, "--out", str(folder), "--save-coefficients", str(file), "--emit-mergekit", str(recipe))
    assert code == 0
    assert f"merged: {folder}" in out
    assert "WARNING" not in err
    card = (folder / "README.md").read_text()
    assert all(str(one.run) in card for one in experts.values())
    assert "policy soft" in card
    before = {one.name: one.read_bytes() for one in folder.iterdir()}
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert run(*told, "--out", str(folder))[0] == 0
    assert {one.name: one.read_bytes() for one in folder.iterdir()} == before
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    bare = [text.removesuffix(":0.9") for text in given]
    again = ["merge", BASE, *bare, "--coefficients", str(file), "--any-adapter-base", "--out", str(tmp_path / "again")]
    assert run(*again)[0] == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == before["model.safetensors"]
    AutoModelForCausalLM.from_pretrained(folder)
    code, out, _ = run("eval", str(folder), "--suite", "instruct", "--n", "2", "--json")
    assert code == 0
    assert set(PLANTS.values()) <= json.loads(out)["types"].keys()
    code, out, _ = run(*told, "--method", "tise", "--out", str(tmp_path / "x"), "--json")
    assert code == 2
    assert "tise" in json.loads(out)["error"]
    assert not (tmp_path / "x").exists()
    code, out, _ = run("merge", "no/such/base", "--expert", "x=y", "--out", str(folder.parent), "--json")
    assert code == 2
    assert "is not empty and holds no merge" in json.loads(out)["error"]  # before anything is read


@pytest.mark.parametrize(
    ("way", "option", "value"),
    [
        ("--policy=soft", "--density", "0.5"),
        ("--policy=soft", "--share", "0.5"),
        ("--policy=top", "--temperature", "2"),
        ("--policy=uniform", "--units", "mlps"),
        ("--policy=uniform", "--rest", "base"),
        ("--policy=owner", "--steps", "3"),
        ("--policy=streams", "--temperature", "2"),
        ("--coefficients=c", "--penalty", "2"),
        ("--method=ties", "--gamma", "0.1"),
        ("--method=dare-linear", "--epsilon", "0.1"),
        ("--method=breadcrumbs", "--over", "model"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    way: str, option: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["merge", BASE, "--expert", "x=y", way, option, value, "--plan", "--json"]
    monkeypatch.setattr(sys, "argv", ["weightpatch", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    error = json.loads(capsys.readouterr().out)["error"]
    assert f"does not read {option}, so it would change nothing" in error
