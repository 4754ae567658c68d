"""Where q, k, v, o, the MLP's matrices and the norms live, one table row to a model family.

This is the only file that knows a model's names. To add a family, add a row to `FAMILIES`; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from weightpatch.errors import ArchitectureError


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Where a layer keeps its mixture of experts; paths relative to the layer.

    Attributes:
        router: The module that chooses experts for a token.
        matrices_in: Parameters, stacked by expert, of which a neuron owns one row each. One that is named twice holds
            two matrices behind one another (gate and up).
        matrix_out: Parameter, stacked by expert, of which a neuron owns one column.
    """

    router: str
    matrices_in: tuple[str, ...]
    matrix_out: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table: module paths of a decoder family.

    Paths of a layer's modules are relative to the layer. A module that is named more than once is fused: what it
    stands for lies behind one another in its outputs, in the order of the names (q, k, v; gate, up).

    Attributes:
        layers: The list of decoder layers, seen from the model.
        embed: Modules that make the residual stream entering layer 0: the token embedding, then learned positions.
        norm: The norm behind the last layer.
        unembed: The output head.
        q: Query projection. A head owns its rows.
        k: Key projection. A key/value group owns its rows.
        v: Value projection. A key/value group owns its rows.
        o: Output projection, the last thing the attention module does. A head owns its columns.
        attn_rest: What of the attention belongs to no single head, beside the bias of `o`: q and k norms.
        mlp: Modules that together are the MLP; what the last one puts out is what the MLP writes.
        mlp_in: Matrices of which a neuron owns one row each (gate and up, or one in-projection).
        mlp_out: The matrix of which a neuron owns one column.
        norm_attn: Norms that belong to the attention, before and behind it.
        norm_mlp: Norms that belong to the MLP, before and behind it.
        transposed: Weights are stored (in, out), as in transformers' `Conv1D`, instead of (out, in).
        interleaved: A fused q, k, v module holds them head by head instead of all queries first.
        experts: Where layers with a mixture of experts keep it, instead of `mlp_in` and `mlp_out`.
    """

    layers: str = "model.layers"
    embed: tuple[str, ...] = ("model.embed_tokens",)
    norm: str = "model.norm"
    unembed: str = "lm_head"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    attn_rest: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("mlp",)
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    norm_attn: tuple[str, ...] = ("input_layernorm",)
    norm_mlp: tuple[str, ...] = ("post_attention_layernorm",)
    transposed: bool = False
    interleaved: bool = False
    experts: Experts | None = None

    @property
    def attn(self) -> str:
        """The attention module, which holds `o`."""
        return self.o.rpartition(".")[0]


_LLAMA = Family()
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_QWEN3 = replace(_LLAMA, attn_rest=_QK_NORMS)
_GEMMA2 = replace(
    _LLAMA,
    norm_attn=("input_layernorm", "post_attention_layernorm"),
    norm_mlp=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_MIXTRAL = replace(
    _LLAMA,
    experts=Experts(
        router="mlp.gate",
        matrices_in=("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj"),
        matrix_out="mlp.experts.down_proj",
    ),
)

FAMILIES: MutableMapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "qwen3": _QWEN3,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, attn_rest=_QK_NORMS),
    "olmo2": replace(_QWEN3, norm_attn=("post_attention_layernorm",), norm_mlp=("post_feedforward_layernorm",)),
    "phi3": replace(
        _LLAMA,
        q="self_attn.qkv_proj",
        k="self_attn.qkv_proj",
        v="self_attn.qkv_proj",
        mlp_in=("mlp.gate_up_proj", "mlp.gate_up_proj"),
    ),
    "mixtral": _MIXTRAL,
    "qwen3_moe": replace(_MIXTRAL, attn_rest=_QK_NORMS),
    "olmoe": replace(_MIXTRAL, attn_rest=_QK_NORMS),
    "gpt2": Family(
        layers="transformer.h",
        embed=("transformer.wte", "transformer.wpe"),
        norm="transformer.ln_f",
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        o="attn.c_proj",
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
        norm_attn=("ln_1",),
        norm_mlp=("ln_2",),
        transposed=True,
    ),
    "gpt_neox": Family(
        layers="gpt_neox.layers",
        embed=("gpt_neox.embed_in",),
        norm="gpt_neox.final_layer_norm",
        q="attention.query_key_value",
        k="attention.query_key_value",
        v="attention.query_key_value",
        o="attention.dense",
        mlp_in=("mlp.dense_h_to_4h",),
        mlp_out="mlp.dense_4h_to_h",
        interleaved=True,
    ),
    "opt": Family(
        layers="model.decoder.layers",
        embed=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        norm="model.decoder.final_layer_norm",
        o="self_attn.out_proj",
        mlp=("fc1", "fc2"),
        mlp_in=("fc1",),
        mlp_out="fc2",
        norm_attn=("self_attn_layer_norm",),
        norm_mlp=("final_layer_norm",),
    ),
}
"""The table: `model_type` of a config -> its row. Rows may be added from outside, before a pair is made."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family's row resolved for one model: its sizes, and every parameter's name and shape.

    Attributes:
        model_type: The config's `model_type`.
        family: The table row.
        n_layers: Decoder layers.
        n_heads: Query heads of a layer.
        n_kv_heads: Key/value groups of a layer; `n_heads / n_kv_heads` query heads share one.
        head_dim: Features of one head.
        n_features: Width of the residual stream.
        n_positions: Positions that a learned table holds; None where positions are computed.
        parameters: Full name -> shape, tied parameters once, in the model's order.
    """

    model_type: str
    family: Family
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_features: int
    n_positions: int | None
    parameters: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Architecture:
        """Read the sizes off a model (its weights may still be on the meta device) and check that the row fits it.

        Raises:
            ArchitectureError: no row for this `model_type`, or the row does not fit the model's modules.
        """
        config = model.config
        family = family_of(config)
        n_heads = int(config.num_attention_heads)
        architecture = cls(
            model_type=config.model_type,
            family=family,
            n_layers=int(config.num_hidden_layers),
            n_heads=n_heads,
            n_kv_heads=int(getattr(config, "num_key_value_heads", None) or n_heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // n_heads),
            n_features=int(config.hidden_size),
            n_positions=int(config.max_position_embeddings) if len(family.embed) > 1 else None,
            parameters={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        )
        _check_row(architecture, model)
        return architecture

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one key/value group."""
        return self.n_heads // self.n_kv_heads

    @property
    def n_neurons(self) -> int:
        """Neurons of the widest MLP, or of one expert where every layer has experts."""
        counts = [self.n_neurons_of(layer) for layer in range(self.n_layers)]
        return max(counts) or max(self.n_expert_neurons_of(layer) for layer in range(self.n_layers))

    def n_neurons_of(self, layer: int) -> int:
        """Neurons of a layer's MLP; 0 where it has experts instead."""
        shape = self.parameters.get(f"{self.layer_prefix(layer)}{self.family.mlp_out}.weight")
        return shape[0 if self.family.transposed else 1] if shape else 0

    def n_experts_of(self, layer: int) -> int:
        """Experts of a layer; 0 where it has a plain MLP."""
        return self._expert_shape(layer)[0]

    def n_expert_neurons_of(self, layer: int) -> int:
        """Neurons of one expert of a layer; 0 where it has a plain MLP."""
        return self._expert_shape(layer)[-1]

    def _expert_shape(self, layer: int) -> tuple[int, ...]:
        experts = self.family.experts
        return self.parameters.get(f"{self.layer_prefix(layer)}{experts.matrix_out}", (0,)) if experts else (0,)

    @property
    def heads_are_independent(self) -> bool:
        """Whether a head's queries and a group's keys leave those of others alone: no norm spans several of them."""
        prefix = self.layer_prefix(0)
        norms = [name for path in self.family.attn_rest for name in self.parameters_under(prefix + path)]
        return all(self.parameters[name] == (self.head_dim,) for name in norms) or self.n_heads == 1

    def layer_prefix(self, layer: int) -> str:
        """What every parameter name of this layer starts with, with the trailing dot."""
        return f"{self.family.layers}.{layer}."

    def parameters_under(self, path: str) -> tuple[str, ...]:
        """Full names of the parameters of the module at `path`, in the model's order; empty when it has none."""
        return tuple(name for name in self.parameters if name.startswith(path + "."))

    def head_outputs(self, projection: str, index: int) -> tuple[int, int]:
        """Where head or group `index` lies among the outputs of its `q`, `k` or `v` module: start and stop.

        Args:
            projection: `"q"`, `"k"` or `"v"`.
            index: The head for `"q"`, the key/value group for `"k"` and `"v"`.
        """
        module = getattr(self.family, projection)
        if self.family.interleaved:
            start = (3 * index + "qkv".index(projection)) * self.head_dim
            return start, start + self.head_dim
        start = index * self.head_dim
        for name in "qkv"[: "qkv".index(projection)]:
            if getattr(self.family, name) == module:
                start += (self.n_heads if name == "q" else self.n_kv_heads) * self.head_dim
        return start, start + self.head_dim


def family_of(config: PreTrainedConfig) -> Family:
    """The table row of a model's family.

    Raises:
        ArchitectureError: the table has no row for its `model_type`.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ArchitectureError(
            f"no architecture row for model_type {config.model_type!r}; known: {', '.join(sorted(FAMILIES))}. "
            "Add a row to FAMILIES in weightpatch/architecture.py: module paths of q, k, v, o, the MLP and the norms. "
            'Or let the row of a plain decoder be derived and proven: --architecture auto (architecture="auto").'
        )
    return family


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a model, first to last."""
    layers = model.get_submodule(family_of(model.config).layers)
    if not isinstance(layers, nn.ModuleList):
        raise ArchitectureError(f"{family_of(model.config).layers} is a {type(layers).__name__}, not a list of layers")
    return layers


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The token embedding's weight, shape `(vocabulary, feature)`."""
    return model.get_parameter(f"{family_of(model.config).embed[0]}.weight")


def _check_row(architecture: Architecture, model: PreTrainedModel) -> None:
    """Raise unless every module of the row exists with the outputs that heads, groups and neurons are cut from."""
    faults = [f"there is no {path}" for path in _missing(architecture.family, model)]
    if not faults:
        layers = range(architecture.n_layers)
        faults += [fault for layer in layers for fault in _misfits(architecture, layer)]
        owners = tuple(f"{path}." for path in _owning_paths(architecture))
        faults += [f"nothing in the row owns {name}" for name in architecture.parameters if not name.startswith(owners)]
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults[:12])
        raise ArchitectureError(f"the row of {architecture.model_type!r} does not fit this model:\n{listed}")


def _missing(family: Family, model: PreTrainedModel) -> Iterator[str]:
    modules = dict(model.named_modules())
    yield from (path for path in (family.layers, *family.embed, family.norm, family.unembed) if path not in modules)
    layers = modules.get(family.layers)
    if isinstance(layers, nn.ModuleList):
        if len(layers) != model.config.num_hidden_layers:
            yield f"{family.layers}.{model.config.num_hidden_layers - 1}: {len(layers)} layers in all"
        for number, layer in enumerate(layers):
            own = dict(layer.named_modules())
            wanted = (family.q, family.k, family.v, family.o, *family.mlp, *family.norm_attn, *family.norm_mlp)
            yield from (f"{family.layers}.{number}.{path}" for path in dict.fromkeys(wanted) if path not in own)


def _misfits(architecture: Architecture, layer: int) -> Iterator[str]:
    """What of a layer's tensors cannot be cut into heads, groups, neurons and experts."""
    family, prefix = architecture.family, architecture.layer_prefix(layer)
    outputs: dict[str, int] = {}
    heads = {"q": architecture.n_heads, "k": architecture.n_kv_heads, "v": architecture.n_kv_heads}
    for projection, count in heads.items():
        module = getattr(family, projection)
        outputs[module] = outputs.get(module, 0) + count * architecture.head_dim
    inputs = {family.o: architecture.n_heads * architecture.head_dim}
    if n_neurons := architecture.n_neurons_of(layer):
        for module in family.mlp_in:
            outputs[module] = outputs.get(module, 0) + n_neurons
        inputs[family.mlp_out] = n_neurons
    expected = {f"{module}.weight": (1 if family.transposed else 0, size) for module, size in outputs.items()}
    expected |= {f"{module}.weight": (0 if family.transposed else 1, size) for module, size in inputs.items()}
    if not n_neurons and family.experts:
        for path in family.experts.matrices_in:
            expected[path] = (1, architecture.n_expert_neurons_of(layer) * family.experts.matrices_in.count(path))
    if not n_neurons and not architecture.n_experts_of(layer):
        yield f"{prefix[:-1]} has neither {family.mlp_out} nor experts that the row knows"
    for name, (axis, size) in expected.items():
        shape = architecture.parameters.get(prefix + name)
        if shape is None:
            yield f"there is no {prefix}{name}"
        elif shape[axis] != size:
            yield f"{prefix}{name} is {list(shape)}, axis {axis} should be {size}"


def _owning_paths(architecture: Architecture) -> Iterator[str]:
    family = architecture.family
    yield from (*family.embed, family.norm, family.unembed)
    attention = (family.q, family.k, family.v, family.o, *family.attn_rest)
    for layer in range(architecture.n_layers):
        for path in (*attention, *family.mlp, *family.norm_attn, *family.norm_mlp):
            yield architecture.layer_prefix(layer) + path


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without weights (meta device): names and shapes for checks before anything is read.

    Raises:
        ArchitectureError: it is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model
