"""Where q, k, v, o, the MLP's matrices and the norms live, one table row to a model family.

This is the only file that knows a model's names. To add a family, add a row to `FAMILIES`; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from weightpatch.errors import ArchitectureError


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table: module paths of a decoder family.

    Paths of a layer's modules are relative to the layer. `q`, `k` and `v` that name the same module are fused: their
    outputs lie behind one another in this order.

    Attributes:
        layers: The list of decoder layers, seen from the model.
        embed: Modules that make the residual stream entering layer 0: the token embedding, then learned positions.
        norm: The norm behind the last layer.
        unembed: The output head.
        q: Query projection. A head owns its rows.
        k: Key projection. A key/value group owns its rows.
        v: Value projection. A key/value group owns its rows.
        o: Output projection. A head owns its columns.
        attn_rest: What of the attention belongs to no single head, beside the bias of `o` (say, q and k norms).
        mlp: The MLP as a whole.
        mlp_in: Matrices of which a neuron owns one row each (gate and up, or one in-projection).
        mlp_out: The matrix of which a neuron owns one column.
        norm_attn: Norms that belong to the attention.
        norm_mlp: Norms that belong to the MLP; the first one is applied to its input.
        transposed: Weights are stored (in, out), as in transformers' `Conv1D`, instead of (out, in).
    """

    layers: str
    embed: tuple[str, ...]
    norm: str
    unembed: str
    q: str
    k: str
    v: str
    o: str
    attn_rest: tuple[str, ...] = ()
    mlp: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    norm_attn: tuple[str, ...]
    norm_mlp: tuple[str, ...]
    transposed: bool = False

    def after_attention(self, layer: nn.Module, residual: Tensor, write: Tensor) -> Tensor:
        """The rest of a layer once its attention has written: add, norm, MLP, add.

        Args:
            layer: A decoder layer of this family.
            residual: The residual stream that entered the layer, shape `(row, token, feature)`.
            write: What the attention adds to it, the output of `o` with its bias, same shape.

        Returns:
            The residual stream that leaves the layer, same shape.
        """
        middle = residual + write
        written: Tensor = layer.get_submodule(self.mlp)(layer.get_submodule(self.norm_mlp[0])(middle))
        return middle + written


_LLAMA = Family(
    layers="model.layers",
    embed=("model.embed_tokens",),
    norm="model.norm",
    unembed="lm_head",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    mlp="mlp",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
    norm_attn=("input_layernorm",),
    norm_mlp=("post_attention_layernorm",),
)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "gpt2": Family(
        layers="transformer.h",
        embed=("transformer.wte", "transformer.wpe"),
        norm="transformer.ln_f",
        unembed="lm_head",
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        o="attn.c_proj",
        mlp="mlp",
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
        norm_attn=("ln_1",),
        norm_mlp=("ln_2",),
        transposed=True,
    ),
}
"""The table: `model_type` of a config -> its row."""


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
        n_neurons: Neurons of one MLP.
        n_features: Width of the residual stream.
        parameters: Full name -> shape, tied parameters once, in the model's order.
    """

    model_type: str
    family: Family
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_neurons: int
    n_features: int
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
            n_neurons=_n_neurons(model, family),
            n_features=int(config.hidden_size),
            parameters={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        )
        _check_row(architecture, model)
        return architecture

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one key/value group."""
        return self.n_heads // self.n_kv_heads

    @property
    def n_positions(self) -> int | None:
        """Positions that a learned table holds; None where positions are computed."""
        tables = [self.parameters[f"{path}.weight"] for path in self.family.embed[1:]]
        return min(shape[0] for shape in tables) if tables else None

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
            "Add a row to FAMILIES in weightpatch/architecture.py: module paths of q, k, v, o, the MLP and the norms."
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


def _n_neurons(model: PreTrainedModel, family: Family) -> int:
    try:
        weight = model.get_submodule(f"{family.layers}.0.{family.mlp_out}").get_parameter("weight")
    except AttributeError as error:
        raise ArchitectureError(f"the row of {model.config.model_type!r} does not fit this model: {error}") from error
    return int(weight.shape[0 if family.transposed else 1])


def _check_row(architecture: Architecture, model: PreTrainedModel) -> None:
    """Raise unless every module of the row exists with the outputs that heads, groups and neurons are cut from."""
    family, faults = architecture.family, []
    width = {"q": architecture.n_heads, "k": architecture.n_kv_heads, "v": architecture.n_kv_heads}
    outputs: dict[str, int] = {}
    for projection, heads in width.items():
        module = getattr(family, projection)
        outputs[module] = outputs.get(module, 0) + heads * architecture.head_dim
    outputs |= dict.fromkeys(family.mlp_in, architecture.n_neurons)
    inputs = {family.o: architecture.n_heads * architecture.head_dim, family.mlp_out: architecture.n_neurons}
    for layer in range(architecture.n_layers):
        prefix = architecture.layer_prefix(layer)
        for modules, axis in ((outputs, 1 if family.transposed else 0), (inputs, 0 if family.transposed else 1)):
            for module, expected in modules.items():
                shape = architecture.parameters.get(f"{prefix}{module}.weight")
                if shape is None:
                    faults.append(f"there is no {prefix}{module}.weight")
                elif shape[axis] != expected:
                    faults.append(f"{prefix}{module}.weight is {list(shape)}, axis {axis} should be {expected}")
    named = (*family.embed, family.norm)
    faults += [f"{path} has no parameters" for path in named if not architecture.parameters_under(path)]
    inside = {
        family.q,
        family.k,
        family.v,
        family.o,
        *family.attn_rest,
        family.mlp,
        *family.norm_attn,
        *family.norm_mlp,
    }
    owners = [f"{architecture.layer_prefix(layer)}{path}." for layer in range(architecture.n_layers) for path in inside]
    owners += [f"{path}." for path in (*named, family.unembed)]
    faults += [
        f"nothing in the row owns {name}" for name in architecture.parameters if not name.startswith(tuple(owners))
    ]
    if len(layers_of(model)) != architecture.n_layers:
        faults.append(f"{len(layers_of(model))} layers, the config says {architecture.n_layers}")
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults[:12])
        raise ArchitectureError(f"the row of {architecture.model_type!r} does not fit this model:\n{listed}")


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without weights (meta device): names and shapes for checks before anything is read."""
    from transformers import AutoModelForCausalLM

    family_of(config)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model
