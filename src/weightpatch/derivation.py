"""The row of a plain decoder that the architecture table does not know, read off its modules.

Names and shapes suggest rows; `prove_row` decides on a model of the same config with one small layer stack. What passes
joins the table for as long as the process lives.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from weightpatch.architecture import FAMILIES, Family, skeleton
from weightpatch.errors import ArchitectureError
from weightpatch.proof import FOREIGN, prove_row

Rows = Literal["table", "auto"]
"""Where the row of a model's family comes from: the table only, or derived where the table has none."""

_ROLES = {
    "qkv": r"(w|W)?_?qkv(_proj)?|query_key_value|c_attn|W_pack",
    "q": r"q_proj|query|wq|q",
    "k": r"k_proj|key|wk|k",
    "v": r"v_proj|value|wv|v",
    "o": r"o_proj|out_proj|dense|c_proj|wo|o",
}


def adopt_row(config: PreTrainedConfig) -> None:
    """Make sure that the table has a row for a config's `model_type`: the known one, or a derived and proven one.

    Raises:
        ArchitectureError: no row could be derived, or none that was derived holds.
    """
    if config.model_type in FAMILIES:
        return
    faults = []
    try:
        small = _small(config)
        candidates = list(_candidates(skeleton(config)))
    except FOREIGN as error:
        faults.append(f"a small model of its config cannot be built ({error})")
        candidates = []
    for family in candidates:
        FAMILIES[config.model_type] = family
        proven = False
        try:
            prove_row(small)
            proven = True
        except ArchitectureError as error:
            faults.append(str(error))
        finally:
            if not proven:
                del FAMILIES[config.model_type]
        if proven:
            return
    found = faults[-1] if faults else "its layers have no attention and MLP that look like a plain decoder's"
    raise ArchitectureError(
        f"no row could be derived for model_type {config.model_type!r}: {found}. Add one to FAMILIES in "
        "weightpatch/architecture.py."
    )


def _small(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model of the config with one layer and few tokens: enough to see how a layer is put together."""
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = 1
    cut.vocab_size = 64
    cut.pad_token_id = cut.bos_token_id = cut.eos_token_id = None
    if getattr(cut, "layer_types", None):
        cut.layer_types = cut.layer_types[:1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(cut, attn_implementation="eager")  # type: ignore[no-untyped-call]
    model.to(torch.float32)  # type: ignore[arg-type]
    model.train(False)
    return model


def _candidates(model: PreTrainedModel) -> Iterator[Family]:
    """Rows that the names and shapes of a model's modules suggest."""
    n_layers = model.config.num_hidden_layers
    paths = {module: path for path, module in model.named_modules()}
    lists = [path for module, path in paths.items() if isinstance(module, nn.ModuleList) and len(module) == n_layers]
    if not lists:
        return
    layers = lists[0]
    root = layers.rpartition(".")[0]
    outside = {p: m for m, p in paths.items() if p.startswith(root) and not p.startswith(f"{layers}.") and p != layers}
    embeddings = [path for path, module in outside.items() if isinstance(module, nn.Embedding)]
    norms = [path for path, module in outside.items() if _is_norm(module)]
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not embeddings or not norms or head is None:
        return
    family = _of_layer(model.get_submodule(f"{layers}.0"), model.config.hidden_size)
    if family is None:
        return
    family = replace(family, layers=layers, embed=tuple(embeddings), norm=norms[-1], unembed=paths[head])
    own = (*family.norm_attn, *family.norm_mlp)  # by order of declaration: before and behind each, or both before first
    orders = [own] if len(own) < 4 else [own, (own[0], own[2], own[1], own[3])]
    half = len(family.norm_attn)
    for order in orders:
        dealt = replace(family, norm_attn=order[:half], norm_mlp=order[half:])
        yield dealt
        if family.q == family.k:
            yield replace(dealt, interleaved=True)


def _of_layer(layer: nn.Module, n_features: int) -> Family | None:
    """The part of a row that concerns one layer."""
    matrices = {path: module for path, module in layer.named_modules() if _is_matrix(module)}
    roles: dict[str, str] = {}
    for role, form in _ROLES.items():
        named = [path for path in matrices if re.fullmatch(form, path.rpartition(".")[2])]
        attention = roles.get("q", roles.get("qkv", "")).rpartition(".")[0]
        if named := [path for path in named if role != "o" or path.rpartition(".")[0] == attention]:
            roles[role] = named[0]
    if "qkv" in roles:
        roles |= dict.fromkeys("qkv", roles["qkv"])
    if not roles.keys() >= set("qkvo"):
        return None
    attn = roles["o"].rpartition(".")[0]
    rest = {path: module for path, module in matrices.items() if not path.startswith(f"{attn}.")}
    sizes = {path: _sizes(module) for path, module in rest.items()}
    out = [path for path, (n_in, n_out) in sizes.items() if n_out == n_features and n_in != n_features]
    into = [path for path, (n_in, n_out) in sizes.items() if n_in == n_features and path not in out]
    if len(out) != 1 or not into:
        return None
    n_neurons = sizes[out[0]][0]
    mlp_in = tuple(path for path in into for _ in range(max(1, sizes[path][1] // n_neurons)))
    parents = dict.fromkeys(path.partition(".")[0] for path in (*into, out[0]))
    norms = [path for path, module in layer.named_children() if _is_norm(module)]
    half = (len(norms) + 1) // 2
    return Family(
        q=roles["q"],
        k=roles["k"],
        v=roles["v"],
        o=roles["o"],
        attn_rest=tuple(
            path for path, module in layer.named_modules() if path.startswith(f"{attn}.") and _is_norm(module)
        ),
        mlp=tuple(parents),
        mlp_in=mlp_in,
        mlp_out=out[0],
        norm_attn=tuple(norms[:half]),
        norm_mlp=tuple(norms[half:]),
        transposed=isinstance(matrices[out[0]], Conv1D),
    )


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a matrix."""
    shape = module.get_parameter("weight").shape
    return (shape[0], shape[1]) if isinstance(module, Conv1D) else (shape[1], shape[0])
