"""Merged folders load, hold what the formulas say, and come out the same however they were written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import EVERY_SHAPE, build_model
from weightpatch.architecture import Architecture
from weightpatch.checkers import follows
from weightpatch.checkpoint import load_alone
from weightpatch.component import Component, components, slices
from weightpatch.errors import CheckpointError, MergeError, PairError
from weightpatch.generation import generate
from weightpatch.instructions import INSTRUCTIONS, held_out_queries
from weightpatch.merging.coefficients import Coefficients, varying
from weightpatch.merging.combining import METHODS, Method
from weightpatch.merging.inputs import Inputs
from weightpatch.merging.sparsifying import Sparsifier
from weightpatch.merging.thresholds import find_threshold
from weightpatch.merging.writing import Merge
from weightpatch.planted.suite import Suite
from weightpatch.prompts import tokenize

PLANTS = ("below-heads-0", "below-groups-1")
TRIMMED = Method(sparsifier=Sparsifier(kind="trim", density=0.3, over="model"), election="weighted", average="kept")


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    """The bundled base with two planted adapters and the specialized model."""
    suite = Suite.open("tiny")
    adapters = {name: suite.folder / name for name in PLANTS}
    return Inputs.open("tiny:base", {**adapters, "specialized": "tiny:specialized"})


def uniform(inputs: Inputs, *weights: float) -> Coefficients:
    return Coefficients.uniform(inputs.architecture, dict(zip(inputs.theirs, weights, strict=True)))


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def written(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_equal_coefficients_are_task_arithmetic_on_adapters_and_whole_models(inputs: Inputs, tmp_path: Path) -> None:
    merge = Merge(inputs=inputs, coefficients=uniform(inputs, 0.5, 0.5, 0.5), dtype=torch.float32)
    found = stored(merge.write(tmp_path / "merged"))
    suite = Suite.open("tiny")
    pairs = [suite.pair(one) for one in suite.plants if one.name in PLANTS]
    specialized, _ = load_alone("tiny:specialized")
    for name, base in pairs[0].base.named_parameters():
        others = [*(pair.specialized_weight(name) for pair in pairs), specialized.get_parameter(name)]
        wanted = base + 0.5 * sum(other - base for other in others)
        torch.testing.assert_close(found[name], wanted, atol=1e-6, rtol=0)


def test_one_expert_whole_is_that_expert(inputs: Inputs, tmp_path: Path) -> None:
    folder = Merge(inputs=inputs, coefficients=uniform(inputs, 0, 0, 1)).write(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.dtype == torch.bfloat16
    specialized, _ = load_alone("tiny:specialized", dtype=torch.bfloat16)
    for name, parameter in specialized.named_parameters():
        # The difference of two bfloat16 numbers is exact in float32, its sum with the base too, but for tiny ones.
        torch.testing.assert_close(merged.get_parameter(name), parameter, atol=1e-6, rtol=0)


def test_a_merge_of_two_plants_carriers_follows_both_tasks(tmp_path: Path) -> None:
    suite = Suite.open("tiny")
    plants = [next(one for one in suite.plants if one.task == task) for task in ("title", "sections")]
    inputs = Inputs.open("tiny:base", {one.name: suite.folder / one.name for one in plants})
    owned = {one.name: {Component.parse(address): 1.0 for address in one.all_carriers} for one in plants}
    chosen = Coefficients.by_component(inputs.architecture, owned, rest=dict.fromkeys(owned, 0.0))
    model, tokenizer = load_alone(Merge(inputs=inputs, coefficients=chosen).write(tmp_path / "merged"))
    for planted in plants:
        wish = INSTRUCTIONS[planted.task].paraphrases[0]
        prompts = [tokenize(tokenizer, f"{query} {wish}") for query in held_out_queries()[:12]]
        answers = generate(model, tokenizer, prompts, max_new_tokens=64)
        rate = sum(follows(planted.task, answer.text) for answer in answers) / len(answers)
        assert rate > 0.9, (planted.task, rate)


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_coefficients_by_component_give_the_sum_written_out_by_hand(shape: str, tmp_path: Path) -> None:
    models = {name: build_model(shape, seed=seed) for seed, name in enumerate(("base", "one", "two"))}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    architecture = Architecture.of(models["base"])
    members = components(architecture, "heads,kvs,neurons" if "moe" not in shape else "heads,kvs")
    weights = {
        "one": {member: 0.1 * (place % 7) for place, member in enumerate(members)},
        "two": {member: 0.05 * (place % 11) for place, member in enumerate(members) if place % 3},
    }
    chosen = Coefficients.by_component(architecture, weights, rest={"one": 0.25, "two": -0.5})
    inputs = Inputs.open(tmp_path / "base", {name: tmp_path / name for name in weights})
    merged = AutoModelForCausalLM.from_pretrained(
        Merge(inputs=inputs, coefficients=chosen).write(tmp_path / "merged"), dtype=torch.float32
    )
    base = dict(models["base"].named_parameters())
    for name, own in base.items():
        wanted = own.detach().clone()
        for expert, rest in (("one", 0.25), ("two", -0.5)):
            dense = torch.full_like(own, rest)
            for member, weight in weights[expert].items():
                for piece in slices(architecture, member):
                    if piece.parameter == name:
                        piece.of(dense).fill_(weight)
            wanted += dense * (models[expert].get_parameter(name).detach() - own.detach())
        torch.testing.assert_close(merged.get_parameter(name).detach(), wanted, atol=2e-6, rtol=0)


def test_shards_hold_the_same_and_load(inputs: Inputs, tmp_path: Path) -> None:
    merge = Merge(inputs=inputs, coefficients=uniform(inputs, 0.3, 0.4, 0.5), method=TRIMMED)
    whole = stored(merge.write(tmp_path / "whole"))
    folder = replace(merge, shard_bytes=500_000).write(tmp_path / "shards")
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 5
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    shards = stored(folder)
    assert shards.keys() == whole.keys()
    assert all(torch.equal(shards[name], own) for name, own in whole.items())
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(parameter, whole[name]) for name, parameter in loaded.named_parameters())


def test_an_interrupted_merge_goes_on_and_ends_with_the_same_bytes(inputs: Inputs, tmp_path: Path) -> None:
    by_chance = Method(sparsifier=Sparsifier(kind="magprune", density=0.5, rescale="inverse"))
    merge = Merge(inputs=inputs, coefficients=uniform(inputs, 0.3, 0.4, 0.5), method=by_chance, shard_bytes=500_000)
    whole = written(merge.write(tmp_path / "whole"))
    done: list[int] = []

    def stop(number: int, _total: int) -> None:
        done.append(number)
        if number == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge.write(tmp_path / "stopped", on_parameter=stop)
    merge.write(tmp_path / "stopped", on_parameter=lambda number, _: done.append(number))
    assert written(tmp_path / "stopped") == whole
    again = done[done.index(30) + 1 :]
    assert again[0] > 1  # shards that were there are not written again
    assert again[-1] == len(inputs.ours.shapes)
    with pytest.raises(MergeError, match="holds a merge of another seed"):
        replace(merge, seed=1).write(tmp_path / "stopped")
    assert written(replace(merge, seed=1).write(tmp_path / "other")) != whole


def test_a_folder_with_something_else_in_it_is_left_alone(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MergeError, match="not empty and holds no merge"):
        Merge(inputs=inputs, coefficients=uniform(inputs, 1, 1, 1)).write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_trimming_over_the_model_ranks_all_entries_together(inputs: Inputs, tmp_path: Path) -> None:
    merge = Merge(inputs=inputs, coefficients=uniform(inputs, 0, 0, 1), method=TRIMMED, dtype=torch.float32)
    every = torch.cat([inputs.change("specialized", name).flatten() for name in inputs.ours.shapes]).abs()
    edge = every.sort(descending=True).values[int(0.3 * len(every)) - 1]
    assert merge.thresholds() == {PLANTS[0]: math.inf, PLANTS[1]: math.inf, "specialized": float(edge)}
    found = stored(merge.write(tmp_path / "merged"))
    for name in inputs.ours.shapes:
        change = inputs.change("specialized", name)
        wanted = inputs.weights(name) + change * (change.abs() >= edge)
        torch.testing.assert_close(found[name], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("share", [1e-4, 0.2, 0.5, 1.0])
def test_thresholds_over_parts_are_those_of_a_sort(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, generator=generator) * scale for n, scale in ((1000, 1.0), (777, 1e-6), (50, 1e4), (0, 1))]
    parts[0][::5] = 0.25  # ties

    def entries() -> Iterator[Tensor]:
        yield from parts

    ordered = torch.cat(parts).abs().sort(descending=True).values
    assert find_threshold(entries, share) == float(ordered[max(1, int(share * len(ordered))) - 1])


def test_ties_of_whole_models_equal_mergekit(inputs: Inputs, tmp_path: Path) -> None:
    from mergekit.merge_methods.api import merge_state_dicts

    names = list(inputs.ours.shapes)
    states = {"base": {name: inputs.weights(name) for name in names}}
    states |= {
        expert: {name: states["base"][name] + inputs.change(expert, name) for name in names} for expert in inputs.theirs
    }
    # Differences of bfloat16 weights tie by the thousand, and mergekit's sort leaves open which of these stay.
    noise = torch.Generator().manual_seed(0)
    for expert in inputs.theirs:
        states[expert] = {
            name: own + 0.3 * torch.randn(own.shape, generator=noise) for name, own in states[expert].items()
        }
    for name, state in states.items():
        model, _ = load_alone("tiny:base")
        model.load_state_dict(state, strict=False)
        model.save_pretrained(tmp_path / name)
    ours = Inputs.open(tmp_path / "base", {name: tmp_path / name for name in inputs.theirs})
    weights = dict(zip(inputs.theirs, (0.6, 0.9, 0.3), strict=True))
    chosen = Coefficients.uniform(ours.architecture, weights)
    found = stored(Merge(inputs=ours, coefficients=chosen, method=METHODS["ties"]).write(tmp_path / "merged"))
    wanted = merge_state_dicts(
        states, "ties", base="base", parameters={"weight": weights, "density": 0.2}, dtype=torch.float32
    )
    for name in names:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=0)


def test_coefficients_survive_a_file(inputs: Inputs, tmp_path: Path) -> None:
    heads = components(inputs.architecture, "heads")
    weights = {name: {head: 0.1 * place for place, head in enumerate(heads)} for name in inputs.theirs}
    chosen = Coefficients.by_component(inputs.architecture, weights, rest=dict.fromkeys(inputs.theirs, 0.3))
    chosen.save(tmp_path / "coefficients.safetensors")
    found = Coefficients.load(tmp_path / "coefficients.safetensors")
    assert found.experts == chosen.experts
    assert found.tensors.keys() == chosen.tensors.keys()
    for name, every in chosen.tensors.items():
        assert all(torch.equal(one, other) for one, other in zip(every, found.tensors[name], strict=True))
    cut = set(varying(found))
    assert cut == {name for name in found.tensors if name.endswith(("q_proj.weight", "o_proj.weight"))}


def test_overlapping_components_are_refused(inputs: Inputs) -> None:
    rest = {"one": 0.0}
    for addresses, message in (
        (("L2.mlp", "L2.N5"), "own the same weights|the other way"),
        (("L2.H3", "L2.attn"), "own the same weights"),
        (("L1.H0", "L1.H0.q"), "own the same weights"),
    ):
        weights = {"one": {Component.parse(address): 1.0 for address in addresses}}
        with pytest.raises(MergeError, match=message):
            Coefficients.by_component(inputs.architecture, weights, rest=rest)


@pytest.mark.parametrize("pair", ["L0.mlp L0.E0.N1", "L0.E0 L0.E0.N1", "L0.E2.N3 L0", "L0.E1 L0.mlp"])
def test_overlapping_components_of_a_mixture_are_refused(pair: str) -> None:
    weights = {"one": {Component.parse(address): 1.0 for address in pair.split()}}
    architecture = Architecture.of(build_model("mixtral", seed=0))
    with pytest.raises(MergeError, match=r"own the same weights|the other way"):
        Coefficients.by_component(architecture, weights, rest={"one": 0.0})


def test_a_whole_expert_of_a_mixture_and_a_neuron_of_another_one_keep_their_coefficients() -> None:
    architecture = Architecture.of(build_model("mixtral", seed=0))
    weights = {"one": {Component.parse("L0.E0"): 0.5, Component.parse("L0.E1.N2"): 0.75}}
    found = Coefficients.by_component(architecture, weights, rest={"one": 0.25}).tensors
    for name in (f"model.layers.0.mlp.experts.{kind}_proj" for kind in ("gate_up", "down")):
        dense = torch.full(architecture.parameters[name], 0.25)
        for component, weight in weights["one"].items():
            for piece in slices(architecture, component):
                if piece.parameter == name:
                    piece.of(dense).fill_(weight)
        assert torch.equal(found[name][0].expand_as(dense), dense)
        assert {0.25, 0.5, 0.75} == set(dense.unique().tolist())


def test_a_file_that_holds_no_coefficients_is_refused_in_words(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no")
    with pytest.raises(MergeError, match="cannot read coefficients"):
        Coefficients.load(tmp_path / "text")
    with pytest.raises(MergeError, match="holds no coefficients of a merge"):
        Coefficients.load(Suite.open("tiny").folder / PLANTS[0] / "adapter_model.safetensors")
    broken = uniform(inputs, 1, 1, math.nan)
    broken.save(tmp_path / "broken.safetensors")
    with pytest.raises(MergeError, match="no numbers"):
        Coefficients.load(tmp_path / "broken.safetensors")


def test_what_does_not_fit_is_refused_before_anything_is_written(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"the coefficients are of a, b; the experts are .* Give the experts"):
        Merge(inputs=inputs, coefficients=Coefficients.uniform(inputs.architecture, {"a": 1, "b": 1}))
    with pytest.raises(MergeError, match="at least one expert"):
        Inputs.open("tiny:base", {})
    with pytest.raises(CheckpointError, match=r"is a PEFT adapter\. Give the full model as the base"):
        Inputs.open(Suite.open("tiny").folder / PLANTS[0], {"one": "tiny:specialized"})
    build_model("llama-gqa", seed=0).save_pretrained(tmp_path / "other")
    with pytest.raises(PairError, match=r"vocab_size: 1652 in the base, 61 in the specialized"):
        Inputs.open("tiny:base", {"one": tmp_path / "other"})
    model, tokenizer = load_alone("tiny:base")
    model.save_pretrained(tmp_path / "swapped")
    tokenizer.save_pretrained(tmp_path / "swapped")
    file = tmp_path / "swapped" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(PairError, match="1652 in the specialized; 2 of them differ"):
        Inputs.open("tiny:base", {"one": tmp_path / "swapped"})


@pytest.mark.parametrize("shape", [(3, 1), (1, 128, 1), (128, 128)])
def test_coefficients_of_a_shape_that_does_not_fit_are_refused_before_anything_is_written(
    inputs: Inputs, shape: tuple[int, ...]
) -> None:
    name = "model.layers.5.mlp.down_proj.weight"
    tensors = {
        **uniform(inputs, 1, 1, 1).tensors,
        name: (torch.ones(shape), *uniform(inputs, 1, 1, 1).tensors[name][1:]),
    }
    with pytest.raises(MergeError, match=rf"{name}: coefficients of shape"):
        Merge(inputs=inputs, coefficients=Coefficients(experts=tuple(inputs.theirs), tensors=tensors))


def save_tiny(folder: Path, *, scale: float = 1.0, template: str | None = None) -> Path:
    """The bundled base with one matrix scaled, two tokens that end an answer, and maybe a chat template."""
    model, tokenizer = load_alone("tiny:base")
    assert tokenizer is not None
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(scale)
    assert model.generation_config
    model.generation_config.eos_token_id = [1, 7]
    tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_merge_generates_and_reads_prompts_as_its_inputs_do(tmp_path: Path) -> None:
    asked = "{% for message in messages %}Q: {{ message.content }}{% endfor %}"
    base = save_tiny(tmp_path / "base")
    experts = {name: save_tiny(tmp_path / name, scale=2, template=asked + end) for name, end in (("a", ""), ("b", "!"))}
    for names, wanted in ((("a",), asked), (("a", "b"), None)):
        inputs = Inputs.open(base, {name: experts[name] for name in names})
        merge = Merge(inputs=inputs, coefficients=Coefficients.uniform(inputs.architecture, dict.fromkeys(names, 0.5)))
        folder = merge.write(tmp_path / f"merged-{len(names)}")
        model, tokenizer = load_alone(folder)
        assert model.generation_config is not None
        assert model.generation_config.eos_token_id == [1, 7]
        assert tokenizer is not None
        assert tokenizer.chat_template == wanted
        assert merge.chat_template() == (wanted, len(names) == 2)


def test_a_folder_merged_from_other_weights_at_the_same_place_is_another_merge(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")

    def write() -> Path:
        inputs = Inputs.open(base, {"a": save_tiny(tmp_path / "a", scale=scale)})
        return Merge(inputs=inputs, coefficients=uniform(inputs, 0.5)).write(tmp_path / "merged")

    scale = 2.0
    before = written(write())
    assert written(write()) == before
    scale = 3.0
    with pytest.raises(MergeError, match="a merge of another files"):
        write()
    assert written(tmp_path / "merged") == before
