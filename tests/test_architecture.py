"""Rows of the architecture table: proven on every family, refused when wrong, derived where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import SHAPES, build_model
from weightpatch.architecture import FAMILIES, Architecture
from weightpatch.derivation import adopt_row
from weightpatch.errors import ArchitectureError
from weightpatch.proof import prove_row

SMALL = {
    "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61,
    "intermediate_size": 20, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    """Put the table back as it was."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_row_of_every_family_is_proven_and_the_model_left_alone(shape: str, dtype: torch.dtype) -> None:
    model = build_model(shape, seed=1, dtype=dtype).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    implementation = model.config._attn_implementation
    prove_row(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("shape", "wrong", "message"),
    [
        ("gpt-neox", {"interleaved": False}, "query_key_value move only the part of L0.H1"),
        ("gpt2", {"interleaved": True}, "c_attn move only the part of L0.H1"),
        ("llama-mha", {"q": "self_attn.k_proj", "k": "self_attn.q_proj"}, "k_proj for L0.H0 are queries"),
        ("llama-gqa", {"k": "self_attn.v_proj", "v": "self_attn.k_proj"}, "v_proj for group 0 are keys"),
        ("llama-mha", {"q": "self_attn.o_proj", "o": "self_attn.q_proj"}, "self_attn writes what self_attn.q_proj"),
        (
            "llama-gqa",
            {"mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")},
            "it cannot be called as the row says",
        ),
        ("phi3", {"mlp_in": ("mlp.gate_up_proj",)}, r"gate_up_proj.weight is \[40, 24\], axis 0 should be 20"),
        ("qwen3", {"attn_rest": ()}, "nothing in the row owns model.layers.0.self_attn.q_norm.weight"),
        ("gpt2", {"mlp_out": "mlp.c_fc", "mlp_in": ("mlp.c_proj",)}, "L0.N0 is one row of each in-matrix"),
        ("opt", {"norm_mlp": ("mlp_norm",)}, "there is no model.decoder.layers.0.mlp_norm"),
    ],
)
def test_a_wrong_row_is_refused_before_anything_is_measured(shape: str, wrong: dict[str, object], message: str) -> None:
    model = build_model(shape, seed=1)
    FAMILIES[model.config.model_type] = replace(FAMILIES[model.config.model_type], **wrong)  # type: ignore[arg-type]
    with pytest.raises(ArchitectureError, match=message):
        prove_row(model)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in ("mixtral", "qwen3-moe", "olmoe")])
def test_every_plain_row_of_the_table_could_have_been_derived(shape: str) -> None:
    fields = dict(SHAPES[shape])
    config = AutoConfig.for_model(str(fields.pop("model_type")), **fields)
    known = FAMILIES.pop(config.model_type)
    adopt_row(config)
    assert FAMILIES[config.model_type] == known


@pytest.mark.parametrize("model_type", ["stablelm", "starcoder2", "cohere", "exaone4", "glm", "apertus"])
def test_rows_of_unknown_plain_decoders_are_derived_and_proven(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **SMALL)
    adopt_row(config)
    model = AutoModelForCausalLM.from_config(config).eval()
    prove_row(model)
    assert Architecture.of(model).n_neurons_of(1) == 20


def test_a_norm_is_never_given_to_the_wrong_side() -> None:
    """GLM 4 declares the norms before both sublayers first, then those behind them."""
    adopt_row(AutoConfig.for_model("glm4", **SMALL))
    assert FAMILIES["glm4"].norm_attn == ("input_layernorm", "post_self_attn_layernorm")
    assert FAMILIES["glm4"].norm_mlp == ("post_attention_layernorm", "post_mlp_layernorm")
    model = build_model("gemma2", seed=1)
    swapped = ("pre_feedforward_layernorm", "post_attention_layernorm")
    FAMILIES["gemma2"] = replace(FAMILIES["gemma2"], norm_attn=("input_layernorm", swapped[0]), norm_mlp=swapped[1:])
    FAMILIES["gemma2"] = replace(FAMILIES["gemma2"], norm_mlp=(swapped[1], "post_feedforward_layernorm"))
    with pytest.raises(ArchitectureError, match="pre_feedforward_layernorm is a norm of the attention"):
        prove_row(model)


@pytest.mark.parametrize("model_type", ["mamba", "falcon", "gpt_oss", "bloom"])
def test_what_is_no_plain_decoder_is_refused(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **SMALL)
    with pytest.raises(ArchitectureError, match=f"no row could be derived for model_type '{model_type}'"):
        adopt_row(config)
    assert model_type not in FAMILIES
