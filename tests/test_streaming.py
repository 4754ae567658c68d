"""A streamed specialized model computes what a loaded one does, bit for bit, with one layer of it in memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from conftest import build_model
from weightpatch import Anchor, ContrastPrompts, ModelPair, localize, patched
from weightpatch.checkpoint import find, load
from weightpatch.errors import PairError
from weightpatch.residuals import evaluating, walk
from weightpatch.sources import AdapterSource, FileSource
from weightpatch.streaming import PIECE, is_streamed, materialized

TOKENS = torch.tensor([[5, 60, 0, 17, 5, 33, 8]])


def save(folder: Path, shape: str = "llama-gqa", *, dtype: torch.dtype = torch.float32, **options: object) -> ModelPair:
    """Save two models and give them as a streamed pair."""
    for name, seed in (("base", 1), ("specialized", 2)):
        build_model(shape, seed=seed, dtype=dtype).save_pretrained(folder / name, **options)  # type: ignore[arg-type]
    return ModelPair.from_pretrained(folder / "base", folder / "specialized")


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found


def in_memory(pair: ModelPair, dtype: torch.dtype = torch.float32) -> ModelPair:
    """The same pair with both models loaded whole."""
    below = load(find(pair.base_name), dtype=dtype)
    specialized = load(find(pair.specialized_name), dtype=dtype, base=below)
    return ModelPair(base=below, specialized=specialized)


def assert_same(pair: ModelPair, expected: ModelPair) -> None:
    assert is_streamed(pair.specialized)
    assert not is_streamed(expected.specialized)
    for name, parameter in expected.specialized.named_parameters():
        assert torch.equal(pair.specialized_weight(name), parameter), name
    assert torch.equal(logits(pair.specialized), logits(expected.specialized))
    assert pair.digests() == expected.digests()
    with pair.materialized() as model:
        assert torch.equal(logits(model), logits(expected.specialized))
    assert all(parameter.is_meta or parameter.isnan().all() for parameter in pair.specialized.parameters())


@pytest.mark.parametrize("shape", ["llama-mha", "llama-gqa", "gemma3", "opt", "gpt2", "gpt-neox"])
def test_a_streamed_model_is_the_loaded_one(shape: str, tmp_path: Path, conversions: list[PreTrainedModel]) -> None:
    pair = save(tmp_path, shape)
    assert_same(pair, in_memory(pair))
    assert not conversions


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_shards_of_another_dtype_are_converted_layer_by_layer(
    stored: torch.dtype, tmp_path: Path, conversions: list[PreTrainedModel]
) -> None:
    pair = save(tmp_path, dtype=stored, max_shard_size="12KB")
    assert len(list((tmp_path / "specialized").glob("*.safetensors"))) > 1
    assert_same(pair, in_memory(pair))
    assert pair.specialized_weight("model.norm.weight").dtype == torch.float32
    assert not conversions


def test_names_without_the_prefix_and_left_over_masks_are_read_as_transformers_reads_them(
    tmp_path: Path, conversions: list[PreTrainedModel]
) -> None:
    save(tmp_path, "gpt2")
    file = tmp_path / "specialized" / "model.safetensors"
    old = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file({**old, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, file, metadata={"format": "pt"})
    pair = ModelPair.from_pretrained(tmp_path / "base", tmp_path / "specialized")
    assert_same(pair, in_memory(pair))
    assert not conversions


def test_a_tied_head_may_be_stored_as_well_if_it_is_the_same(
    tmp_path: Path, conversions: list[PreTrainedModel]
) -> None:
    save(tmp_path, "llama-mha")
    file = tmp_path / "specialized" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    pair = ModelPair.from_pretrained(tmp_path / "base", tmp_path / "specialized")
    assert_same(pair, in_memory(pair))
    assert torch.equal(pair.specialized_weight("lm_head.weight"), tensors["lm_head.weight"])
    assert not conversions
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(PairError, match=r"missing in the base: lm_head\.weight"):
        ModelPair.from_pretrained(tmp_path / "base", tmp_path / "specialized")


def write_adapter(folder: Path, shape: str, *, dtype: torch.dtype = torch.float32, **options: object) -> ModelPair:
    model = build_model(shape, seed=1)
    model.save_pretrained(folder / "base")
    torch.manual_seed(7)
    save_embeddings: Any = options.pop("save_embedding_layers", "auto")
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **options)  # type: ignore[arg-type]
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name or "modules_to_save" in name:
                parameter.mul_(1.3)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=save_embeddings)
    return ModelPair.from_pretrained(folder / "base", folder / "adapter", dtype=dtype, any_adapter_base=True)


LINEAR = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize(
    ("shape", "options", "is_direct"),
    [
        ("llama-gqa", {"target_modules": LINEAR}, True),
        ("llama-gqa", {"target_modules": LINEAR, "use_rslora": True}, True),
        ("llama-gqa", {"target_modules": LINEAR, "use_dora": True}, True),
        ("llama-gqa", {"target_modules": LINEAR, "lora_bias": True}, True),
        ("llama-gqa", {"target_modules": ["embed_tokens", "o_proj"]}, False),
        ("llama-gqa", {"target_modules": ["embed_tokens", "o_proj"], "save_embedding_layers": False}, True),
        ("llama-gqa", {"target_modules": LINEAR, "modules_to_save": ["lm_head", "norm"]}, True),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, True),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}, True),
        ("llama-mha", {"target_modules": ["embed_tokens", "q_proj"]}, False),
        ("llama-gqa", {"target_modules": LINEAR, "bias": "all"}, False),
        ("llama-gqa", {"target_modules": LINEAR, "trainable_token_indices": [3, 4]}, False),
    ],
    ids=[
        "lora",
        "rslora",
        "dora",
        "bias",
        "embed-saved",
        "embed",
        "save",
        "conv1d",
        "conv1d-dora",
        "tied",
        "biases",
        "tokens",
    ],
)
def test_an_adapter_is_merged_matrix_by_matrix_as_peft_merges_the_whole(
    shape: str, options: dict[str, object], is_direct: bool, tmp_path: Path, conversions: list[PreTrainedModel]
) -> None:
    pair = write_adapter(tmp_path, shape, **options)
    assert_same(pair, in_memory(pair))
    assert bool(conversions) != is_direct


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_adapter_is_merged_in_the_wanted_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    pair = write_adapter(tmp_path, "llama-gqa", dtype=dtype, target_modules=LINEAR, use_dora=True)
    assert_same(pair, in_memory(pair, dtype))


def test_an_adapter_does_not_see_what_is_patched_into_the_base(tmp_path: Path) -> None:
    pair = write_adapter(tmp_path, "llama-gqa", target_modules=LINEAR)
    assert isinstance(pair.specialized.weightpatch_stream._source, AdapterSource)  # type: ignore[union-attr]
    expected = logits(in_memory(pair).specialized)
    with patched(pair, "L0.mlp,L1,L0,L2.H0,L2,ends") as model:
        assert torch.equal(logits(pair.specialized), expected)
        assert torch.equal(logits(model), expected)


def test_pissa_changes_the_base_and_so_is_converted(tmp_path: Path, conversions: list[PreTrainedModel]) -> None:
    model = build_model("llama-gqa", seed=1)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=LINEAR, init_lora_weights="pissa")
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    pair = ModelPair.from_pretrained(tmp_path / "base", tmp_path / "adapter", any_adapter_base=True)
    assert_same(pair, in_memory(pair))
    assert conversions == ["llama"]


def test_experts_stored_one_by_one_are_converted_once_into_a_folder_that_goes_with_the_pair(
    tmp_path: Path, conversions: list[PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pair = save(tmp_path, "mixtral")
    assert any("experts.0.w1" in name for name in load_file(tmp_path / "specialized" / "model.safetensors"))
    assert_same(pair, in_memory(pair))
    assert conversions == ["mixtral"]
    assert len(list(tmp_path.glob("weightpatch-*/*.safetensors"))) == 5
    del pair
    gc.collect()
    assert not list(tmp_path.glob("weightpatch-*"))


def real_layers(model: PreTrainedModel) -> list[int]:
    """Decoder layers that have a parameter in memory."""
    layers: nn.ModuleList = model.model.layers
    return [place for place, layer in enumerate(layers) if not all(one.is_meta for one in layer.parameters())]


@pytest.fixture
def pair(tmp_path: Path) -> ModelPair:
    return save(tmp_path)


def test_only_the_layer_that_runs_is_in_memory(pair: ModelPair) -> None:
    seen: list[list[int]] = []

    def look(*_: object) -> None:
        seen.append(real_layers(pair.specialized))

    for layer in pair.specialized.model.layers:
        layer.mlp.down_proj.register_forward_hook(look)
    logits(pair.specialized)
    assert seen == [[0], [1], [2]]
    assert real_layers(pair.specialized) == []


def test_a_forward_pass_that_ends_early_leaves_nothing_behind_and_reads_no_layer_in_vain(
    pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    tensor = FileSource.tensor
    monkeypatch.setattr(FileSource, "tensor", lambda source, name: read.append(name) or tensor(source, name))
    with evaluating(pair.specialized):
        walk(pair.specialized, TOKENS, 2, lambda *_: None)
    assert real_layers(pair.specialized) == []
    assert {name.split(".")[2] for name in read if "layers" in name} == {"0", "1"}
    assert not any(name.startswith(("model.norm", "lm_head")) for name in read)

    def fail(*_: object) -> None:
        raise RuntimeError("inside")

    handle = pair.specialized.model.layers[1].self_attn.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        logits(pair.specialized)
    handle.remove()
    assert real_layers(pair.specialized) == []
    assert torch.equal(logits(pair.specialized), logits(build_model("llama-gqa", seed=2)))


def test_the_weights_of_one_layer_are_kept_for_whoever_asks_next(pair: ModelPair) -> None:
    pair = ModelPair.from_pretrained(pair.base_name, pair.specialized_name, dtype="float64")
    stream = pair.specialized.weightpatch_stream
    first = pair.specialized_weight("model.layers.0.mlp.up_proj.weight")
    assert pair.specialized_weight("model.layers.0.mlp.up_proj.weight") is first
    pair.specialized_weight("model.layers.2.mlp.up_proj.weight")
    pair.specialized_weight("model.embed_tokens.weight")
    assert list(stream._held) == ["model.layers.2.mlp.up_proj.weight"]  # type: ignore[union-attr]
    with pytest.raises(AttributeError, match=r"no parameter 'model\.layers\.9\.x'"):
        pair.specialized_weight("model.layers.9.x")


def test_generation_and_writing_work_while_it_is_materialized(pair: ModelPair) -> None:
    expected = in_memory(pair)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = expected.specialized.generate(TOKENS, **options)
    assert torch.equal(pair.specialized.generate(TOKENS, **options), wanted)  # slower, but right
    with pair.materialized() as model:
        assert real_layers(model) == [0, 1, 2]
        assert torch.equal(model.generate(TOKENS, **options), wanted)
        with materialized(model), torch.no_grad():
            model.get_parameter("model.norm.weight").zero_()
        assert not pair.specialized_weight("model.norm.weight").any()
    assert real_layers(pair.specialized) == []
    assert torch.equal(logits(pair.specialized), logits(expected.specialized))


def test_a_streamed_recipient_is_whole_only_while_it_is_patched(pair: ModelPair) -> None:
    expected = in_memory(pair)
    for patch in ("L0.H1,L2.mlp", "blocks,ends"):
        with patched(pair, patch, recipient="specialized") as ours, patched(expected, patch, recipient="specialized"):
            assert torch.equal(logits(ours), logits(expected.specialized))
        assert real_layers(pair.specialized) == []
    assert torch.equal(logits(pair.specialized), logits(expected.specialized))


def test_a_patched_adapter_leaves_the_base_alone(tmp_path: Path) -> None:
    pair = write_adapter(tmp_path, "llama-gqa", target_modules=LINEAR)
    before = {name: parameter.clone() for name, parameter in pair.base.named_parameters()}
    with pair.materialized() as model, torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(parameter, before[name]) for name, parameter in pair.base.named_parameters())
    assert_same(pair, in_memory(pair))


def test_a_streamed_model_given_as_a_base_is_loaded_for_good(pair: ModelPair) -> None:
    reverse = ModelPair(base=pair.specialized, specialized=pair.base)
    assert real_layers(pair.specialized) == [0, 1, 2]
    assert not is_streamed(reverse.base)
    with patched(reverse, "blocks,ends") as model:
        assert torch.equal(logits(model), logits(build_model("llama-gqa", seed=1)))


def test_config_and_generation_settings_are_the_specialized_models_own(pair: ModelPair) -> None:
    folder = Path(pair.specialized_name)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [7, 9]}))
    again = ModelPair.from_pretrained(pair.base_name, folder)
    assert again.specialized.generation_config.eos_token_id == [7, 9]  # type: ignore[union-attr]
    assert again.specialized.config.name_or_path == str(folder)
    assert again.specialized.config._attn_implementation == again.base.config._attn_implementation
    file.unlink()
    assert ModelPair.from_pretrained(pair.base_name, folder).specialized.generation_config is not None


@pytest.mark.parametrize("engine", ["swap", "suffix"])
def test_localizing_with_a_streamed_pair_gives_the_same_numbers(
    engine: str, pair: ModelPair, token_prompts: ContrastPrompts
) -> None:
    expected = in_memory(pair)
    anchor = Anchor(layer=2, direction=torch.ones(24))
    ours, theirs = (
        localize(one, token_prompts, anchor, units="heads,kvs,mlps,norms,ends", engine=engine)  # type: ignore[arg-type]
        for one in (pair, expected)
    )
    assert torch.equal(ours.per_prompt, theirs.per_prompt)
    assert torch.equal(ours.gap, theirs.gap)


def test_large_tensors_are_checked_and_hashed_in_pieces(monkeypatch: pytest.MonkeyPatch, pair: ModelPair) -> None:
    whole = pair.digests()
    assert PIECE > 1000
    monkeypatch.setattr("weightpatch.streaming.PIECE", 100)
    assert pair.digests() == whole == in_memory(pair).digests()


MEASURE = """
import gc, json, sys, threading, time
import torch
from transformers.utils import logging
from weightpatch import ModelPair
from weightpatch.checkpoint import find, load
from weightpatch.residuals import read_residuals

logging.disable_progress_bar()
torch.set_num_threads(1)
folder = sys.argv[1]

def anonymous():
    gc.collect()
    return now()

def now():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def use(base, specialized):
    pair = ModelPair.from_pretrained(f"{folder}/{base}", f"{folder}/{specialized}", any_adapter_base=True)
    for model in (pair.base, pair.specialized):
        read_residuals(model, [[1, 2, 3], [4, 5]], layers=[0, model.config.num_hidden_layers], positions=[-1])
    pair.digests()

for specialized in ("tiny2", "tiny-adapter"):  # so that libraries have claimed what they claim once
    use("tiny", specialized)
before = anonymous()
base = load(find(f"{folder}/base"), dtype=torch.float32)
found = {"base": anonymous() - before}
del base
for specialized in ("specialized", "adapter"):
    peak = before = anonymous()
    running = True

    def watch():
        global peak
        while running:
            peak = max(peak, now())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    use("base", specialized)
    running = False
    thread.join()
    found[specialized] = peak - before
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_the_base_and_one_layer(tmp_path: Path) -> None:
    """Anonymous memory (no file's cache) of a process that loads a pair, checks it, reads all residuals and hashes it.

    All files are bfloat16 and wanted as float32, so that each tensor read is a copy in anonymous memory. The peak is
    sampled all the time. `malloc` is told to give freed tensors back to the system at once, for what it would keep for
    the next one is not in use. The slack, half a layer, is for activations and the pieces that are hashed (4 MB): the
    embedding, of the size of two layers, and a second model, of ten, would not go unnoticed.
    """
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 700, "tie_word_embeddings": True}

    def write(name: str, seed: int, *, n_layers: int, vocab_size: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = AutoConfig.for_model("llama", **sizes, num_hidden_layers=n_layers, vocab_size=vocab_size)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        return model

    def adapt(name: str, model: PreTrainedModel) -> None:
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
        get_peft_model(model, config).save_pretrained(tmp_path / name)

    adapt("tiny-adapter", write("tiny", 1, n_layers=1, vocab_size=64))
    write("tiny2", 2, n_layers=1, vocab_size=64)
    whole = write("base", 1, n_layers=8, vocab_size=8192)
    layer = sum(parameter.numel() for parameter in whole.model.layers[0].parameters()) * 4
    adapt("adapter", whole)
    write("specialized", 2, n_layers=8, vocab_size=8192)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], check=True, capture_output=True, text=True, env=environment
    )
    found = json.loads(done.stdout)
    assert found["base"] > 9 * layer
    assert found["specialized"] < found["base"] + 1.5 * layer
    assert found["adapter"] < found["base"] + 1.5 * layer
