"""Tiny random models of every family, and the settings that keep the suite offline and deterministic."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from weightpatch import ContrastPrompts, ModelPair

_SIZES = {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "vocab_size": 61}
_GATED = {**_SIZES, "intermediate_size": 20, "max_position_embeddings": 64}
torch.set_num_threads(1)  # the models are so small that threads only get in each other's way

SHAPES: dict[str, dict[str, object]] = {
    "llama-mha": {"model_type": "llama", **_GATED, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama-gqa": {"model_type": "llama", **_GATED, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "llama-mqa": {"model_type": "llama", **_GATED, "num_key_value_heads": 1, "head_dim": 8},
    "qwen2-gqa": {"model_type": "qwen2", **_GATED, "num_key_value_heads": 2},
    "mistral-gqa": {"model_type": "mistral", **_GATED, "num_key_value_heads": 2, "sliding_window": 5},
    "gpt2": {"model_type": "gpt2", "n_layer": 3, "n_embd": 24, "n_head": 4, "vocab_size": 61, "n_positions": 64},
}
"""A shape for each family and each way of sharing keys (mha, gqa, mqa)."""


def build_model(
    shape: str, *, seed: int, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> PreTrainedModel:
    """A random model with weights large enough that every component matters, biases and norms included."""
    fields = dict(SHAPES[shape])
    config = AutoConfig.for_model(str(fields.pop("model_type")), **fields)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            is_norm = parameter.ndim == 1 and bool((parameter == 1).all())
            parameter.copy_(torch.randn_like(parameter) * 0.25 + (1.0 if is_norm else 0.0))
    return model.to(dtype).eval()


def build_pair(shape: str, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> ModelPair:
    """Two random models of one shape: what no fine-tune would give, and so the harder test of exactness."""
    return ModelPair(
        base=build_model(shape, seed=1, dtype=dtype, attention=attention),
        specialized=build_model(shape, seed=2, dtype=dtype, attention=attention),
    )


@pytest.fixture(scope="session")
def token_prompts() -> ContrastPrompts:
    """Six prompts of ragged lengths."""
    torch.manual_seed(3)
    with_instruction = [torch.randint(0, 61, (length,)).tolist() for length in (7, 11, 4, 9, 11, 5)]
    return ContrastPrompts.from_token_ids(
        with_instruction=with_instruction, without_instruction=[ids[:-2] for ids in with_instruction]
    )
