"""Tiny random models of every family, and the settings that keep the suite offline and deterministic."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import flow_oracle
from weightpatch import ContrastPrompts, ModelPair, sources
from weightpatch.architecture import Architecture
from weightpatch.checkpoint import find, load
from weightpatch.component import UNITS, Component, components
from weightpatch.sources import FileSource

if TYPE_CHECKING:
    from weightpatch.merging.experts import Expert

_SIZES = {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "vocab_size": 61}
_GATED = {**_SIZES, "intermediate_size": 20, "max_position_embeddings": 64}
_GROUPED = {**_GATED, "num_key_value_heads": 2}
_GEMMA = {
    **_GROUPED,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2}
_NEOX_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.34}
torch.set_num_threads(1)  # the models are so small that threads only get in each other's way

SHAPES: dict[str, dict[str, object]] = {
    "llama-mha": {"model_type": "llama", **_GATED, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama-gqa": {"model_type": "llama", **_GROUPED, "attention_bias": True, "mlp_bias": True},
    "llama-mqa": {"model_type": "llama", **_GATED, "num_key_value_heads": 1, "head_dim": 8},
    "qwen2-gqa": {"model_type": "qwen2", **_GROUPED},
    "mistral-gqa": {"model_type": "mistral", **_GROUPED, "sliding_window": 5},
    "qwen3": {"model_type": "qwen3", **_GROUPED, "head_dim": 8},
    "gemma2": {"model_type": "gemma2", **_GEMMA, "attn_logit_softcapping": None},
    "gemma2-softcap": {"model_type": "gemma2", **_GEMMA, "attn_logit_softcapping": 2.0},
    "gemma3": {"model_type": "gemma3_text", **_GEMMA},
    "phi3": {"model_type": "phi3", **_GROUPED, "sliding_window": 5, "pad_token_id": None},
    "gpt2": {"model_type": "gpt2", "n_layer": 3, "n_embd": 24, "n_head": 4, "vocab_size": 61, "n_positions": 64},
    "gpt-neox": {"model_type": "gpt_neox", **_GATED, "rope_parameters": _NEOX_ROPE},
    "gpt-neox-serial": {"model_type": "gpt_neox", **_GATED, "use_parallel_residual": False},
    "opt": {"model_type": "opt", **_SIZES, "ffn_dim": 20, "max_position_embeddings": 64},
    "olmo2": {"model_type": "olmo2", **_GROUPED},
    "smollm3": {"model_type": "smollm3", **_GROUPED, "no_rope_layers": [1, 0, 1], "pad_token_id": None},
    "granite": {"model_type": "granite", **_GROUPED, "embedding_multiplier": 3.0, "residual_multiplier": 0.4},
    "mixtral": {"model_type": "mixtral", **_EXPERTS, "num_local_experts": 4, "sliding_window": 5},
    "qwen3-moe": {
        "model_type": "qwen3_moe", **_EXPERTS, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 12,
        "mlp_only_layers": [1],
    },
    "olmoe": {"model_type": "olmoe", **_EXPERTS, "num_experts": 4, "clip_qkv": 0.8, "pad_token_id": None},
}  # fmt: skip
"""A shape for each family, each way of sharing keys (mha, gqa, mqa), and each kind of mixture."""


@pytest.fixture(autouse=True, scope="session")
def no_float32_in_float64() -> Iterator[None]:
    """Eager attention takes its softmax in float32, whose last bit depends on how a CPU deals rows out to vectors.

    Tests in float64 are there to prove that differences are rounding, so there it stays float64.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", flow_oracle.exact_softmax)
        yield


CORE = ("llama-gqa", "qwen3", "gemma2", "gpt2", "gpt-neox", "olmo2", "granite", "mixtral")


def slow_unless(normal: bool) -> tuple[pytest.MarkDecorator, ...]:
    """Marks of a case that runs in the slow suite alone, unless it belongs to the normal one."""
    return () if normal else (pytest.mark.slow,)


EVERY_SHAPE = [pytest.param(shape, marks=slow_unless(shape in CORE)) for shape in SHAPES]
"""For tests that take long on all shapes: those that differ most in the normal suite, the others in the slow one."""


def build_model(shape: str, *, seed: int, dtype: torch.dtype = torch.float32, attention: str = "") -> PreTrainedModel:
    """A random model with weights large enough that every component matters, biases and norms included."""
    fields = dict(SHAPES[shape])
    attention = attention or ("eager" if fields.get("attn_logit_softcapping") else "sdpa")
    config = AutoConfig.for_model(str(fields.pop("model_type")), **fields)
    config.bos_token_id = config.eos_token_id = None
    torch.manual_seed(seed)
    # Gemma 2 cannot be built with sdpa, but runs with it where nothing caps its logits
    buildable = "eager" if config.model_type == "gemma2" else attention
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=buildable)
    model.config._attn_implementation = attention
    if dtype != torch.float32:  # grouped products want widths and dtypes that tiny models do not have
        model.config._experts_implementation = "eager"
    with torch.no_grad():
        for parameter in model.parameters():
            is_norm = parameter.ndim == 1 and bool((parameter == 1).all())
            parameter.copy_(torch.randn_like(parameter) * 0.25 + (1.0 if is_norm else 0.0))
    return model.to(dtype).eval()


def build_pair(shape: str, *, dtype: torch.dtype = torch.float32, attention: str = "") -> ModelPair:
    """Two random models of one shape: what no fine-tune would give, and so the harder test of exactness."""
    return ModelPair(
        base=build_model(shape, seed=1, dtype=dtype, attention=attention),
        specialized=build_model(shape, seed=2, dtype=dtype, attention=attention),
    )


def some_of_every_unit(pair: ModelPair, *, below: int) -> list[Component]:
    """Below a layer, all components of the units that a layer has once, and two to a layer of those it has many of."""
    drawn: dict[tuple[str, int | None], list[Component]] = {}
    for component in components(pair.architecture, UNITS):
        if component.address in ("norm", "unembed") or (component.layer or 0) >= below:
            continue
        drawn.setdefault((component.unit, component.layer), []).append(component)
    generator = random.Random(0)
    chosen = [generator.sample(group, min(2, len(group))) for group in drawn.values()]
    return sorted((c for group in chosen for c in group), key=lambda c: -1 if c.layer is None else c.layer)


@pytest.fixture(scope="session")
def token_prompts() -> ContrastPrompts:
    """Six prompts of ragged lengths."""
    torch.manual_seed(3)
    with_instruction = [torch.randint(0, 61, (length,)).tolist() for length in (7, 11, 4, 9, 11, 5)]
    return ContrastPrompts.from_token_ids(
        with_instruction=with_instruction, without_instruction=[ids[:-2] for ids in with_instruction]
    )


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[PreTrainedModel]:
    """One entry for each checkpoint that had to be converted to be streamed."""
    seen: list[PreTrainedModel] = []
    convert = sources._convert

    def spy(whole: PreTrainedModel) -> FileSource:
        seen.append(whole.config.model_type)
        return convert(whole)

    monkeypatch.setattr(sources, "_convert", spy)
    return seen


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Expert]:
    """Two planted adapters with their runs, for tests of merging."""
    from merges import make_experts  # brings all stages of a run, which other tests need not wait for

    return make_experts(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    """The bundled base, for the tests that have none of their own."""
    model = load(find("tiny:base"), dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    return model


@pytest.fixture(scope="module")
def architecture(base: LlamaForCausalLM) -> Architecture:
    return Architecture.of(base)
