"""A GGUF file is read as the model that it holds, and its header no more often than need be."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoConfig, PreTrainedModel

from conftest import build_model
from test_streaming import LINEAR, assert_same, in_memory, write_adapter
from weightpatch import ModelPair, sources
from weightpatch.checkpoint import find, load, read_config
from weightpatch.merging.inputs import Inputs


def write_gguf(model: PreTrainedModel, file: Path) -> None:
    """A model as a GGUF file in float32, queries and keys permuted as llama.cpp has them."""
    config = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", *(f"t{number}" for number in range(3, config.vocab_size))])
    writer.add_token_merges(["a b"])
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{names[name.rpartition('.')[0]]}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_converted_once(tmp_path: Path, conversions: list[PreTrainedModel]) -> None:
    for name, seed in (("base", 1), ("specialized", 2)):
        write_gguf(build_model("llama-mha", seed=seed), tmp_path / f"{name}.gguf")
    pair = ModelPair.from_pretrained(tmp_path / "base.gguf", tmp_path / "specialized.gguf")
    assert_same(pair, in_memory(pair))
    assert conversions == ["llama"]
    expected = build_model("llama-mha", seed=2)
    assert torch.equal(pair.specialized_weight("model.layers.1.self_attn.q_proj.weight"),
                       expected.get_parameter("model.layers.1.self_attn.q_proj.weight"))  # fmt: skip


def test_adapters_over_a_gguf_base_are_merged_over_the_base_that_was_converted(
    tmp_path: Path, conversions: list[PreTrainedModel]
) -> None:
    whole = in_memory(write_adapter(tmp_path, "llama-mha", target_modules=LINEAR)).specialized
    write_gguf(build_model("llama-mha", seed=1), tmp_path / "base.gguf")
    adapter = tmp_path / "adapter"
    merged = Inputs.open(tmp_path / "base.gguf", {"one": adapter, "other": adapter}, any_adapter_base=True)
    assert conversions == ["llama"]
    for name, parameter in whole.named_parameters():
        assert torch.equal(merged.theirs["other"].tensor(name), parameter)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_pair_with_an_adapter_reads_its_gguf_base_once(
    options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = in_memory(write_adapter(tmp_path, "llama-mha", target_modules=LINEAR, **options)).specialized
    write_gguf(build_model("llama-mha", seed=1), tmp_path / "base.gguf")
    read: list[str] = []
    monkeypatch.setattr(sources, "load", lambda one, **how: (read.append(one.kind), load(one, **how))[1])
    pair = ModelPair.from_pretrained(tmp_path / "base.gguf", tmp_path / "adapter", any_adapter_base=True)
    assert read == ["gguf"]
    for name, parameter in whole.named_parameters():
        assert torch.equal(pair.specialized_weight(name), parameter)


def test_the_header_of_a_gguf_file_is_parsed_once_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    parse = AutoConfig.from_pretrained
    spy = lambda *args, **kwargs: (parsed.append(kwargs["gguf_file"]), parse(*args, **kwargs))[1]  # noqa: E731
    monkeypatch.setattr(AutoConfig, "from_pretrained", spy)
    file = tmp_path / "model.gguf"
    write_gguf(build_model("llama-mha", seed=1), file)
    n_layers = read_config(find(file)).num_hidden_layers
    read_config(find(file)).num_hidden_layers = 7
    load(find(file), dtype=torch.float32)
    assert read_config(find(file)).num_hidden_layers == n_layers
    assert parsed == ["model.gguf"]
    os.utime(file, ns=(0, 0))
    read_config(find(file))
    assert len(parsed) == 2
