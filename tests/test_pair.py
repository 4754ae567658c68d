"""Every bad pair is refused with what was found, what was needed and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import build_model
from weightpatch import ContrastPrompts, ModelPair
from weightpatch.checkpoint import find, weight_files
from weightpatch.difference import weight_differences
from weightpatch.errors import CheckpointError, PairError, PromptError, WeightpatchError
from weightpatch.pair import _same_name, check_prompts

Save = Callable[..., Path]


def write_tokenizer(folder: Path, extra: str = "") -> None:
    words = ["<unk>", *"abcdefghijklmnopqrstuvwxyz", "1", "2", "3", ".", ";", *([extra] if extra else [])]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(name: str, shape: str = "llama-gqa", *, seed: int = 1, **options: object) -> Path:
        build_model(shape, seed=seed).save_pretrained(tmp_path / name, **options)  # type: ignore[arg-type]
        write_tokenizer(tmp_path / name)
        return tmp_path / name

    return write


def refuse(kind: type[WeightpatchError], base: object, specialized: object, **options: object) -> str:
    with pytest.raises(kind) as caught:
        ModelPair.from_pretrained(str(base), str(specialized), **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_two_folders_load_in_one_dtype_whatever_they_were_saved_in(save: Save) -> None:
    base = save("base")
    build_model("llama-gqa", seed=2).to(torch.bfloat16).save_pretrained(base.parent / "half")
    pair = ModelPair.from_pretrained(base, base.parent / "half")
    assert {parameter.dtype for model in (pair.base, pair.specialized) for parameter in model.parameters()} == {
        torch.float32
    }
    assert pair.tokenizer is not None


def test_sharded_safetensors_load_like_a_single_file(save: Save) -> None:
    whole, shards = save("whole", seed=1), save("shards", seed=2, max_shard_size="12KB")
    assert len(weight_files(find(shards))) > 1
    pair = ModelPair.from_pretrained(whole, shards)
    expected = build_model("llama-gqa", seed=2)
    assert all(torch.equal(pair.specialized_weight(name), p) for name, p in expected.named_parameters())


def test_every_difference_of_two_architectures_is_listed_at_once(save: Save, tmp_path: Path) -> None:
    base = save("base")
    config = build_model("llama-gqa", seed=2).config
    config.vocab_size, config.intermediate_size, config.rms_norm_eps = 50, 28, 0.5
    type(build_model("llama-gqa", seed=2))(config).save_pretrained(tmp_path / "other")
    message = refuse(PairError, base, tmp_path / "other")
    for part in (
        "no pair",
        "vocab_size: 61 in the base, 50 in the specialized",
        "intermediate_size: 20 in the base, 28 in the specialized",
        "rms_norm_eps",
        "model.embed_tokens.weight: shape [61, 24] in the base, [50, 24] in the specialized",
    ):
        assert part in message


def test_two_families_are_no_pair(save: Save) -> None:
    message = refuse(PairError, save("base"), save("other", "gpt2"))
    assert "architecture: llama in the base, gpt2 in the specialized" in message


def test_no_weight_is_read_before_the_pair_is_known_to_be_one(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_args: object, **_options: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("weightpatch.sources.load", read)
    assert "no pair" in refuse(PairError, save("base"), save("other", "gpt2"))


def test_another_vocabulary_is_refused_with_its_first_tokens(save: Save) -> None:
    base, other = save("base"), save("other", seed=2)
    write_tokenizer(other, extra="Q")
    message = refuse(PairError, base, other)
    assert "vocabulary: 32 tokens in the base, 33 in the specialized; 1 of them differ, first 'Q'" in message


def test_prompts_that_the_two_tokenizers_cut_differently_are_refused(save: Save, tmp_path: Path) -> None:
    base, other = save("base"), save("other", seed=2)
    file = other / "tokenizer.json"
    record = json.loads(file.read_text())
    record["normalizer"] = {"type": "Replace", "pattern": {"String": "zz"}, "content": "z"}
    file.write_text(json.dumps(record))
    ModelPair.from_pretrained(base, other)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "buzz", "instruction": "now"}\n')
    prompts = ContrastPrompts.load(tmp_path / "prompts.jsonl")
    assert "tokenization: 1 of 4 texts get other tokens, first 'buzz now'" in refuse(
        PairError, base, other, prompts=prompts
    )


def test_identical_checkpoints_are_refused(save: Save) -> None:
    assert "hold the same weights, so there is nothing to localize" in refuse(PairError, save("a"), save("b"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(save: Save, value: float) -> None:
    base, other = save("base"), save("other", seed=2)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    message = refuse(CheckpointError, base, other)
    assert "NaN or infinite" in message
    assert "model.layers.1.mlp.up_proj.weight of the specialized: 1 of 480 values" in message


def test_a_truncated_file_is_named_before_anything_loads(save: Save) -> None:
    base, other = save("base"), save("other", seed=2)
    file = other / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors in other is truncated or damaged" in refuse(CheckpointError, base, other)


def test_a_missing_shard_is_named(save: Save) -> None:
    base, other = save("base"), save("other", seed=2, max_shard_size="12KB")
    gone = weight_files(find(other))[1]
    gone.unlink()
    assert f"lacks {gone.name}" in refuse(CheckpointError, base, other)


def test_a_checkpoint_that_lacks_a_parameter_is_refused_instead_of_filled_at_random(save: Save) -> None:
    base, other = save("base"), save("other", seed=2)
    tensors = load_file(other / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    message = refuse(CheckpointError, base, other)
    assert "lacks 1 of the model's parameters" in message
    assert "model.layers.2.mlp.down_proj.weight" in message


def test_pickled_weights_need_permission(save: Save) -> None:
    base, other = save("base"), save("other", seed=2)
    torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    message = refuse(CheckpointError, base, other)
    assert "pickled weights only (pytorch_model.bin)" in message
    assert "--allow-pickle" in message
    pair = ModelPair.from_pretrained(base, other, allow_pickle=True)
    expected = build_model("llama-gqa", seed=2).get_parameter("model.norm.weight")
    assert torch.equal(pair.specialized_weight("model.norm.weight"), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "neither a folder, a .gguf file nor a model on the hub that can be reached"),
        ("no/such-model-here", "neither a folder, a .gguf file nor a model on the hub that can be reached"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(save: Save, name: str, message: str) -> None:
    assert message in refuse(CheckpointError, save("base"), name)


def test_a_folder_without_a_model_says_what_it_lacks(save: Save, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds neither config.json nor adapter_config.json" in refuse(CheckpointError, save("b"), tmp_path / "empty")


def test_a_hub_id_is_read_from_its_snapshot(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--org--tuned" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    save("tuned", seed=2).rename(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = find("org/tuned")
    assert found.from_hub
    assert found.path == snapshot
    pair = ModelPair.from_pretrained(save("base"), "org/tuned")
    expected = build_model("llama-gqa", seed=2).get_parameter("model.norm.weight")
    assert torch.equal(pair.specialized_weight("model.norm.weight"), expected)


@pytest.mark.parametrize("n_bytes", [24, 60, -100], ids=["header", "metadata", "tensors"])
def test_a_truncated_gguf_file_is_refused(save: Save, tmp_path: Path, n_bytes: int) -> None:
    writer = GGUFWriter(tmp_path / "whole.gguf", "llama")
    for number in range(4):
        writer.add_string(f"general.note{number}", "text " * 9)
    writer.add_tensor("token_embd.weight", np.ones((40, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:n_bytes])
    message = refuse(CheckpointError, save("base"), tmp_path / "cut.gguf")
    assert "cut.gguf is truncated, damaged or of an unknown kind" in message
    assert "Download or copy it again" in message


def test_an_unknown_dtype_is_refused(save: Save) -> None:
    assert "unknown dtype 'auto'" in refuse(CheckpointError, save("base"), save("other", seed=2), dtype="auto")


def write_adapter(model: PreTrainedModel, folder: Path, *, base_name: str) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    targets = ["q_proj", "v_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base_name}))


def test_a_peft_adapter_is_applied_to_the_base(save: Save, tmp_path: Path) -> None:
    base = save("base")
    write_adapter(build_model("llama-gqa", seed=1), tmp_path / "adapter", base_name=str(base))
    pair = ModelPair.from_pretrained(base, tmp_path / "adapter")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    path = "base_model.model.model.layers.1.self_attn.q_proj"
    delta = factors[f"{path}.lora_B.weight"] @ factors[f"{path}.lora_A.weight"] * 2
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(pair.specialized_weight(name), pair.base.get_parameter(name) + delta)
    moved = {str(row.component) for row in weight_differences(pair, "ends,norms,mlps,kvs") if row.norm > 0}
    assert moved == {f"L{layer}.{part}" for layer in range(3) for part in ("mlp", "KV0", "KV1")}


def test_an_adapter_of_another_base_is_refused_unless_it_is_told_to_fit(save: Save, tmp_path: Path) -> None:
    base = save("base")
    write_adapter(build_model("llama-gqa", seed=1), tmp_path / "adapter", base_name="org/Other-7B")
    message = refuse(PairError, base, tmp_path / "adapter")
    assert "the adapter was trained on 'org/Other-7B'" in message
    assert "--any-adapter-base" in message
    assert ModelPair.from_pretrained(base, tmp_path / "adapter", any_adapter_base=True).tokenizer is not None


def test_an_adapter_whose_shapes_do_not_fit_is_refused_before_anything_loads(save: Save, tmp_path: Path) -> None:
    base = save("base", "llama-mqa")
    write_adapter(build_model("llama-gqa", seed=1), tmp_path / "adapter", base_name=str(base))
    message = refuse(PairError, base, tmp_path / "adapter")
    assert "does not fit the base's model.layers.0.self_attn.q_proj, [32, 24]" in message


def test_an_adapter_that_lacks_some_of_its_weights_is_refused_instead_of_filled_at_random(
    save: Save, tmp_path: Path
) -> None:
    base = save("base")
    write_adapter(build_model("llama-gqa", seed=1), tmp_path / "adapter", base_name=str(base))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "layers.1" not in name}, file)
    message = refuse(CheckpointError, base, tmp_path / "adapter")
    assert "incomplete or does not fit its config" in message
    assert "layers.1.mlp.down_proj.lora_A.weight" in message


@pytest.mark.parametrize(
    ("trained_on", "base", "same"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "models/SmolLM2-135M-Instruct.Q4_1.gguf", True),
        ("org/Model", "/somewhere/model/", True),
        ("org/Llama-2-7b", "org/Llama-2-7b-chat-hf", False),
        ("org/Llama-3", "org/Llama-3.1", False),
    ],
)
def test_names_of_two_models_that_only_begin_alike_are_not_the_same(trained_on: str, base: str, same: bool) -> None:
    assert _same_name(trained_on, base) == same


def test_a_pickled_adapter_needs_permission_and_then_works(save: Save, tmp_path: Path) -> None:
    base = save("base")
    write_adapter(build_model("llama-gqa", seed=1), tmp_path / "adapter", base_name=str(base))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert "--allow-pickle" in refuse(CheckpointError, base, tmp_path / "adapter")
    assert ModelPair.from_pretrained(base, tmp_path / "adapter", allow_pickle=True).architecture.n_layers == 3


def test_parameters_that_the_config_has_no_place_for_are_refused_instead_of_dropped(save: Save) -> None:
    base, other = save("base"), save("other", seed=2)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(6)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert "has no place for: model.layers.0.self_attn.q_norm.weight" in refuse(CheckpointError, base, other)


def test_a_damaged_index_of_shards_is_named(save: Save) -> None:
    base, other = save("base"), save("other", seed=2, max_shard_size="12KB")
    index = other / "model.safetensors.index.json"
    index.write_text(index.read_text()[:50])
    assert "model.safetensors.index.json in other is truncated or damaged" in refuse(CheckpointError, base, other)


def test_a_pair_follows_its_modules_when_they_are_moved_or_changed() -> None:
    pair = ModelPair(base=build_model("llama-gqa", seed=1), specialized=build_model("llama-gqa", seed=2))
    name = "model.layers.0.mlp.up_proj.weight"
    pair.specialized.double()
    with torch.no_grad():
        pair.specialized.get_parameter(name)[0, 0] = 7
    assert pair.specialized_weight(name)[0, 0] == 7
    assert pair.specialized_weight(name).dtype == torch.float64


def test_what_is_no_model_or_not_in_memory_is_no_pair() -> None:
    base = build_model("llama-gqa", seed=1)
    with pytest.raises(PairError, match="the specialized is a NoneType"):
        ModelPair(base=base, specialized=None)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="are not in memory"):
        ModelPair(base=base, specialized=build_model("llama-gqa", seed=2).to("meta"))  # type: ignore[arg-type]


def test_a_prompt_longer_than_a_learned_position_table_is_refused() -> None:
    pair = ModelPair(base=build_model("gpt2", seed=1), specialized=build_model("gpt2", seed=2))
    prompts = ContrastPrompts.from_token_ids(with_instruction=[[1] * 65], without_instruction=[[1]])
    with pytest.raises(PromptError, match="prompt p0 has 65 tokens; this model reads 64"):
        check_prompts(pair, prompts)


def test_an_adapter_cannot_be_the_base(save: Save, tmp_path: Path) -> None:
    base = save("base")
    write_adapter(build_model("llama-gqa", seed=1), tmp_path / "adapter", base_name=str(base))
    assert "Give the full model as the base" in refuse(CheckpointError, tmp_path / "adapter", base)


def test_modules_in_memory_are_held_to_the_same_rules() -> None:
    base = build_model("llama-gqa", seed=1)
    with pytest.raises(PairError, match=r"dtype: torch\.float32 in the base, torch\.bfloat16 in the specialized"):
        ModelPair(base=base, specialized=build_model("llama-gqa", seed=2, dtype=torch.bfloat16))
    with pytest.raises(PairError, match="architecture: llama in the base, mistral in the specialized"):
        ModelPair(base=base, specialized=build_model("mistral-gqa", seed=2))
    with pytest.raises(PairError, match="hold the same weights"):
        ModelPair(base=base, specialized=build_model("llama-gqa", seed=1))


def test_text_needs_a_tokenizer_and_ids_must_be_in_the_vocabulary(tmp_path: Path) -> None:
    pair = ModelPair(base=build_model("llama-gqa", seed=1), specialized=build_model("llama-gqa", seed=2))
    ids = ContrastPrompts.from_token_ids(with_instruction=[[1, 61]], without_instruction=[[1]])
    with pytest.raises(PromptError, match="prompt p0: token id 61 is outside the vocabulary of 61 tokens"):
        check_prompts(pair, ids)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "instruction": "b"}\n')
    with pytest.raises(PromptError, match="the pair has no tokenizer"):
        check_prompts(pair, ContrastPrompts.load(tmp_path / "p.jsonl"))
