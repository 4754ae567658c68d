"""Whole forward passes of unmodified transformers models for `flow_oracle`: what hooks put in, and all that is kept.

Nothing of `weightpatch` is imported. One prompt at a time, without padding; layouts come from `hook_oracle`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hook_oracle import FAMILIES, Sizes

Run = dict[tuple[int, str], Tensor]
"""By layer and name (see `_places`), what was there: (token, feature); `experts` and `gate` are tuples of such."""
Edit = tuple[str, str, Callable[[Tensor, Tensor], Tensor]]
"""A module's path, `input` or `output`, and a function of (value there, what the module takes) giving the new one."""

_SANDWICHED = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
NORMS_BEHIND = {"gemma2": _SANDWICHED, "gemma3_text": _SANDWICHED, "olmo2": _SANDWICHED}


def run(model: PreTrainedModel, ids: list[int], edits: Sequence[Edit] = (), *, only: int | None = None) -> Run:
    """One whole forward pass on one prompt; what it keeps, of all layers or only one, is as the edits left it."""
    kept: Run = {}
    handles = []

    def keep(key: tuple[int, str], rows: list[int] | None) -> Callable[[object], None]:
        def hook(value: object) -> None:
            values = value if isinstance(value, tuple) else (value,)
            flat = tuple(_flat(one).clone() if rows is None else _flat(one)[:, rows] for one in values)
            kept[key] = flat if len(flat) > 1 else flat[0]  # type: ignore[assignment]

        return hook

    for path, side, change in edits:
        handles.append(_attach(model.base_model.get_submodule(path), side, change))
    for key, (path, side, rows) in _places(model).items():
        if only not in {None, key[0]}:
            continue
        module, see = model.base_model.get_submodule(path), keep(key, rows)
        if side == "input":
            handles.append(module.register_forward_pre_hook(_seeing_input(see), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(lambda _m, _a, output, see=see: see(output)))
    try:
        with torch.no_grad():
            model.base_model(input_ids=torch.tensor([ids]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    multiplier = getattr(model.config, "residual_multiplier", 1.0)  # Granite's
    for key in kept:
        if key[1].endswith("_added"):
            kept[key] = kept[key] * multiplier
    last = max(layer for layer, _ in kept)
    kept[last + 1, "entering"] = kept[last, "leaving"]
    return kept


def _attach(
    module: nn.Module, side: str, change: Callable[[Tensor, Tensor], Tensor]
) -> torch.utils.hooks.RemovableHandle:
    def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        old = _taken(args, kwargs)
        new = change(_flat(old), _flat(old)).reshape(old.shape)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def after(_module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        if isinstance(output, tuple):
            return change(output, args)  # type: ignore[arg-type]
        taken = args if len(args) > 1 and isinstance(args[1], Tensor) and "Experts" in type(_module).__name__ else None
        return change(_flat(output), taken or _flat(_taken(args, kwargs))).reshape(output.shape)  # type: ignore

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after, with_kwargs=True)


def _seeing_input(see: Callable[[object], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        see(args if "Experts" in type(module).__name__ else _taken(args, kwargs))

    return hook


def _taken(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _flat(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])


def _put(old: Tensor, new: Tensor, *, rows: list[int] | None = None, tokens: list[int] | None = None) -> Tensor:
    """`old` with `new` at some tokens (None: all) and, where rows are named, only there; new has these rows only."""
    result = old.clone()
    where = list(range(len(old))) if tokens is None else tokens
    if rows is None:
        result[where] = new[where].to(old.dtype)
    else:
        result[torch.tensor(where)[:, None], torch.tensor(rows)] = new[where].to(old.dtype)
    return result


def _put_each(old: Iterable[Tensor], new: Iterable[Tensor], tokens: list[int] | None) -> tuple[Tensor, ...]:
    return tuple(_put(ours, theirs, tokens=tokens) for ours, theirs in zip(old, new, strict=True))


@lru_cache(maxsize=8)
def _places(model: PreTrainedModel) -> dict[tuple[int, str], tuple[str, str, list[int] | None]]:
    """Module, side and columns of what a run keeps of each layer.

    The stream `entering` and `leaving`; `q`, `k`, `v` as projected; `z`, the heads' values; what `attn` and `mlp` put
    out and what is `_added` for it; `a`, the neurons' activations, or what the `experts` take; what the `gate` gives.
    """
    family = FAMILIES[model.config.model_type]
    places: dict[tuple[int, str], tuple[str, str, list[int] | None]] = {}
    for layer, module in enumerate(model.base_model.get_submodule(family.layers)):
        prefix = f"{family.layers}.{layer}"
        out, mlp = f"{prefix}.{family.attention}.{family.out}", f"{prefix}.{family.mlp[-1]}"
        behind = {name: f"{prefix}.{norm}" for name, norm in NORMS_BEHIND.get(model.config.model_type, {}).items()}
        places[layer, "entering"] = prefix, "input", None
        places[layer, "leaving"] = prefix, "output", None
        for name in "qkv":
            path, rows = _projection(model, layer, name)
            places[layer, name] = path, "output", rows
        places[layer, "z"] = out, "input", None
        places[layer, "attn"] = out, "output", None
        places[layer, "attn_added"] = behind.get("attn", out), "output", None
        places[layer, "mlp"] = mlp, "output", None
        places[layer, "mlp_added"] = behind.get("mlp", mlp), "output", None
        if hasattr(getattr(module, "mlp", None), "experts"):
            places[layer, "experts"] = f"{mlp}.experts", "input", None
            places[layer, "gate"] = f"{mlp}.gate", "output", None
        else:
            places[layer, "a"] = f"{prefix}.{family.mlp_out}", "input", None
    return places


def _sizes(model: PreTrainedModel) -> Sizes:
    heads = model.config.num_attention_heads
    groups = getattr(model.config, "num_key_value_heads", None) or heads
    return heads, groups, getattr(model.config, "head_dim", None) or model.config.hidden_size // heads


def _projection(model: PreTrainedModel, layer: int, name: str, index: int | None = None) -> tuple[str, list[int]]:
    """The module that puts out q, k or v, and the rows of one head or group (None: of all, in order)."""
    family, sizes = FAMILIES[model.config.model_type], _sizes(model)
    counted = range(sizes[0] if name == "q" else sizes[1]) if index is None else [index]
    starts = [family.first_row(name, place, sizes) for place in counted]
    rows = [row for start in starts for row in range(start, start + sizes[2])]
    return f"{family.layers}.{layer}.{family.attention}.{family.qkv.format(name)}", rows


def _front(model: PreTrainedModel, layer: int, sublayer: str) -> str:
    """The module that takes the stream on behalf of a sublayer: its norm in front, or itself where it has none."""
    family = FAMILIES[model.config.model_type]
    if model.config.model_type == "olmo2":
        name = {"attn": family.attention, "mlp": "mlp"}[sublayer]
    else:
        name = {"attn": family.attention_norms[0], "mlp": family.mlp_norms[0]}[sublayer]
    return f"{family.layers}.{layer}.{name}"
