"""A third opinion on what patching one component does: forward hooks on unmodified transformers models.

Nothing of `weightpatch` is imported and no weight is ever written. An address becomes a list of parts, each part one
hook on one module of the base, which returns what the module would have returned with the specialized weights. Every
layout below was read off the source of transformers 5.23. In float64 a mixture of experts runs only with
`experts_implementation="eager"` (or "batched_mm"), in both models.
"""
# ruff: noqa: ARG001, ARG005 - hooks and actions share one signature

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Part = tuple[str, str, list[int]]
"""What to do, the module's path inside its layer, and the rows, columns or (expert, neuron) it is about."""


def readouts(
    model: PreTrainedModel, token_ids: Sequence[list[int]], *, layer: int, positions: Sequence[int], direction: Tensor
) -> Tensor:
    """Mean over `positions` of <h, direction>, shape (prompt,), float64; h is the residual stream entering `layer`."""
    family = FAMILIES[model.config.model_type]
    layers = model.base_model.get_submodule(family.layers)
    streams: list[Tensor] = []  # one of shape (1, token, feature) per prompt
    if layer < len(layers):
        watch = layers[layer].register_forward_pre_hook(
            lambda _, args, kwargs: streams.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    else:
        watch = layers[-1].register_forward_hook(lambda _, args, output: streams.append(output))
    try:
        with torch.no_grad():
            for ids in token_ids:
                model.base_model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    finally:
        watch.remove()
    unit = direction.detach().cpu().double()
    return torch.stack([(stream[0, list(positions)].cpu().double() @ unit).mean() for stream in streams])


def patched_readouts(
    base: PreTrainedModel,
    specialized: PreTrainedModel,
    token_ids: Sequence[list[int]],
    address: str,
    *,
    layer: int,
    positions: Sequence[int],
    direction: Tensor,
) -> Tensor:
    """`readouts` of the base, had it the specialized weights of the component at `address`; shape (prompt,)."""
    if base.config._attn_implementation != specialized.config._attn_implementation:
        raise ValueError("the two models use different attentions: a mask made for one is wrong for the other")
    if base.training or specialized.training:
        raise ValueError("call .eval() on both models: dropout would make the readout random")
    roots, parts = _locate(base, specialized, address)
    if not parts:
        raise ValueError(f"{address} owns nothing in this {base.config.model_type}")
    handles = []
    try:
        for action, path, which in parts:
            old, new = (root.get_submodule(path) for root in roots)
            handles.append(old.register_forward_hook(_hook(action, new, which), with_kwargs=True))
        return readouts(base, token_ids, layer=layer, positions=positions, direction=direction)
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------------------------------------------------------------
# Actions: what a module returns instead of its output.


def _hook(action: str, new: nn.Module, which: list[int]) -> Callable[..., object]:
    if action == "module":
        return lambda old, args, kwargs, output: new(*args, **kwargs)
    return lambda old, args, kwargs, output: ACTIONS[action](old, new, which, args, output)


def _weight(linear: nn.Module) -> Tensor:
    """The matrix as (out, in); GPT-2 keeps it as (in, out)."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def _replace_rows(old: nn.Module, new: nn.Module, rows: list[int], args: tuple, output: Tensor) -> Tensor:
    output = output.clone()
    output[..., rows] = functional.linear(args[0], _weight(new)[rows], None if new.bias is None else new.bias[rows])
    return output


def _replace_columns(old: nn.Module, new: nn.Module, columns: list[int], args: tuple, output: Tensor) -> Tensor:
    change = _weight(new)[:, columns].double() - _weight(old)[:, columns].double()  # (out, column)
    return (output.double() + args[0][..., columns].double() @ change.T).to(output.dtype)


def _replace_bias(old: nn.Module, new: nn.Module, which: list[int], args: tuple, output: Tensor) -> Tensor:
    return (output.double() + (new.bias.double() - old.bias.double())).to(output.dtype)


def _replace_in_expert(old: nn.Module, new: nn.Module, which: list[int], args: tuple, output: Tensor) -> Tensor:
    """`which` is [expert] or [expert, neuron]; the sum over all experts is computed anew."""
    x, chosen, weights = args  # (token, feature), (token, slot), (token, slot)
    total = torch.zeros_like(x)
    for expert in range(old.gate_up_proj.shape[0]):
        token, slot = torch.where(chosen == expert)
        contribution = _run_expert(new if which == [expert] else old, expert, x[token])
        if expert == which[0]:
            for neuron in which[1:]:
                contribution += _run_neuron(new, expert, neuron, x[token]) - _run_neuron(old, expert, neuron, x[token])
        total.index_add_(0, token, (contribution * weights[token, slot, None]).to(total.dtype))
    return total


def _run_expert(experts: nn.Module, expert: int, x: Tensor) -> Tensor:
    gate, up = functional.linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)  # gate rows first, then up rows
    return functional.linear(experts.act_fn(gate) * up, experts.down_proj[expert])


def _run_neuron(experts: nn.Module, expert: int, neuron: int, x: Tensor) -> Tensor:
    """What one neuron adds to its expert's output: a product of two scalars per token, times a column."""
    gate, up = experts.gate_up_proj[expert].chunk(2, dim=0)
    return (experts.act_fn(x @ gate[neuron]) * (x @ up[neuron]))[:, None] * experts.down_proj[expert][:, neuron]


ACTIONS: dict[str, Callable[[nn.Module, nn.Module, list[int], tuple, Tensor], Tensor]] = {
    "rows": _replace_rows,
    "columns": _replace_columns,
    "bias": _replace_bias,
    "expert": _replace_in_expert,
}


# ---------------------------------------------------------------------------------------------------------------------
# Layouts: the first row of head (or group) `index` of q, k or v, in the module that holds it.

Sizes = tuple[int, int, int]
"""Counts of query heads and of key/value groups, and the width of one head."""


def _separate(name: str, index: int, sizes: Sizes) -> int:
    return index * sizes[2]


def _concatenated(name: str, index: int, sizes: Sizes) -> int:
    """GPT-2, Phi-3: all of q, then all of k, then all of v."""
    heads, groups, width = sizes
    return ({"q": 0, "k": heads, "v": heads + groups}[name] + index) * width


def _interleaved(name: str, index: int, sizes: Sizes) -> int:
    """GPT-NeoX: q, k and v of head 0, then q, k and v of head 1 ..."""
    return (3 * index + "qkv".index(name)) * sizes[2]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a model family keeps what; paths of a layer's parts are relative to the layer."""

    layers: str = "layers"
    embeddings: tuple[str, ...] = ("embed_tokens",)
    attention: str = "self_attn"
    qkv: str = "{}_proj"  # the braces stand for q, k or v
    first_row: Callable[[str, int, Sizes], int] = _separate
    out: str = "o_proj"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp: tuple[str, ...] = ("mlp",)  # the modules that make up the whole MLP
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    blocks_in: int = 1  # how many matrices are stacked in each of mlp_in, as blocks of rows
    mlp_out: str = "mlp.down_proj"
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)


LLAMA = Family()
GEMMA = Family(
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"), LLAMA),
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe"), LLAMA),  # the experts are found by looking at the layer
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA),
    "olmo2": Family(attention_norms=("post_attention_layernorm",), mlp_norms=("post_feedforward_layernorm",)),
    "phi3": Family(qkv="qkv_proj", first_row=_concatenated, mlp_in=("mlp.gate_up_proj",), blocks_in=2),
    "gpt2": Family(
        layers="h",
        embeddings=("wte", "wpe"),
        attention="attn",
        qkv="c_attn",
        first_row=_concatenated,
        out="c_proj",
        attention_norms=("ln_1",),
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
        mlp_norms=("ln_2",),
    ),
    "gpt_neox": Family(
        embeddings=("embed_in",),
        attention="attention",
        qkv="query_key_value",
        first_row=_interleaved,
        out="dense",
        mlp_in=("mlp.dense_h_to_4h",),
        mlp_out="mlp.dense_4h_to_h",
    ),
    "opt": Family(
        layers="decoder.layers",
        embeddings=("decoder.embed_tokens", "decoder.embed_positions"),
        out="out_proj",
        attention_norms=("self_attn_layer_norm",),
        mlp=("fc1", "fc2"),
        mlp_in=("fc1",),
        mlp_out="fc2",
        mlp_norms=("final_layer_norm",),
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Addresses.


def _locate(base: PreTrainedModel, specialized: PreTrainedModel, address: str) -> tuple[list[nn.Module], list[Part]]:
    """The module of each model that the paths start from, and the parts of the component."""
    family = FAMILIES[base.config.model_type]
    if address == "embed":
        return [base.base_model, specialized.base_model], [("module", path, []) for path in family.embeddings]
    match = re.fullmatch(r"L(\d+)(?:\.(.+))?", address)
    if match is None:
        raise ValueError(f"{address!r} is no address")
    roots = [model.base_model.get_submodule(f"{family.layers}.{match[1]}") for model in (base, specialized)]
    if match[2] is None:
        return roots, [("module", "", [])]
    heads = base.config.num_attention_heads
    groups = getattr(base.config, "num_key_value_heads", None) or heads
    width = getattr(base.config, "head_dim", None) or base.config.hidden_size // heads
    return roots, _parts_of(roots[0], match[2], family, (heads, groups, width))


def _parts_of(layer: nn.Module, component: str, family: Family, sizes: Sizes) -> list[Part]:
    """What `component` (an address without its layer) owns."""
    out = f"{family.attention}.{family.out}"
    has_experts = hasattr(getattr(layer, "mlp", None), "experts")
    whole = {
        "attn": (family.attention,),
        "mlp": family.mlp,
        "norm.attn": family.attention_norms,
        "norm.mlp": family.mlp_norms,
        "router": ("mlp.gate",) if has_experts else (),
    }
    if component in whole:
        return [("module", path, []) for path in whole[component]]
    if component == "attn.rest":
        norms = [name for name in ("q_norm", "k_norm") if hasattr(layer.get_submodule(family.attention), name)]
        return [*(("module", f"{family.attention}.{name}", []) for name in norms), *_bias_of(layer, out)]
    if component == "mlp.rest":
        return [] if has_experts else _bias_of(layer, family.mlp_out)
    match = re.fullmatch(r"(H|KV|N|E)(\d+)(?:\.(q|o|N(\d+)))?", component)
    kind, index, suffix = (match[1], int(match[2]), match[3]) if match else ("", 0, None)
    parts: list[Part] = []
    if kind == "H" and suffix in {None, "q", "o"}:
        columns = _span(index, sizes[0], sizes[2])
        parts = [_rows_of("q", index, family, sizes), ("columns", out, columns)]
        parts = {None: parts, "q": parts[:1], "o": parts[1:]}[suffix]
    elif kind == "KV" and suffix is None and index < sizes[1]:
        parts = [_rows_of(name, index, family, sizes) for name in "kv"]
    elif kind == "N" and suffix is None and not has_experts:
        n_neurons = _weight(layer.get_submodule(family.mlp_out)).shape[1]
        rows = [block * n_neurons + index for block in range(family.blocks_in)]
        columns = _span(index, n_neurons, 1)
        parts = [*(("rows", path, rows) for path in family.mlp_in), ("columns", family.mlp_out, columns)]
    elif kind == "E" and suffix not in {"q", "o"} and has_experts:
        n_experts, _, n_neurons = layer.get_submodule("mlp.experts").down_proj.shape
        neuron = _span(int(match[4]), n_neurons, 1) if match and suffix else []
        parts = [("expert", "mlp.experts", [*_span(index, n_experts, 1), *neuron])]
    return parts


def _rows_of(name: str, index: int, family: Family, sizes: Sizes) -> Part:
    start = family.first_row(name, index, sizes)
    return "rows", f"{family.attention}.{family.qkv.format(name)}", list(range(start, start + sizes[2]))


def _bias_of(layer: nn.Module, path: str) -> list[Part]:
    return [] if layer.get_submodule(path).bias is None else [("bias", path, [])]


def _span(index: int, count: int, width: int) -> list[int]:
    """The places of item `index` of `count` items that lie one after another, each `width` wide."""
    if index >= count:
        raise ValueError(f"there are {count} of these, counted from 0: {index} is too high")
    return list(range(index * width, (index + 1) * width))
