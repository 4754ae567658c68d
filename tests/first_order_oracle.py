"""First-order estimates of patching one component, taken from plain transformers models with nothing but autograd.

Nothing of `weightpatch` is imported and no weight is ever written: a model is run with other weights than its own by
`torch.func.functional_call`. Which entries of which parameters a component owns is read off `hook_oracle`. The two
models must be in float64, a mixture of experts with `experts_implementation="eager"`; even so the norms, and the
softmax of eager attention and of routers, work in float32 inside transformers. One prompt at a time, without padding.

Throughout, F is the mean over some positions of <h, direction>, where h is the residual stream that enters `layer`.
"""
# ruff: noqa: ARG001, ARG005 - hooks share one signature

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hook_oracle import FAMILIES, _locate

Weights = Mapping[str, Tensor]
"""A value for every parameter of `model.base_model`, by its name there: the head plays no part in F."""
Owned = Mapping[str, Tensor]
"""For each parameter that a component owns something of, a mask of the parameter's shape: True where it does."""
Place = tuple[str, Literal["input", "output"]]
"""A module's path in `model.base_model`, and which side of it."""


def outputs(
    base: PreTrainedModel,
    specialized: PreTrainedModel,
    token_ids: Sequence[list[int]],
    address: str,
    *,
    layer: int,
    positions: Sequence[int],
    direction: Tensor,
) -> Tensor:
    """How F would move, to first order, with the change of what the component's module writes; shape (prompt,).

    The sum over tokens of <dF/do, o' - o>, with o what is written at `written_at(base, address)` by the base and o'
    the same with the component's specialized weights. Everything before that place is the base's in both.
    """
    readout = _check(base, specialized, layer=layer, positions=positions, direction=direction)
    return torch.stack([_output_estimate(base, specialized, ids, address, readout) for ids in token_ids])


def dropped(
    base: PreTrainedModel,
    specialized: PreTrainedModel,
    token_ids: Sequence[list[int]],
    address: str,
    *,
    layer: int,
    positions: Sequence[int],
    direction: Tensor,
) -> Tensor:
    """GradDrop: the mean of |outputs| over backward passes that each leave out one layer; shape (prompt,).

    The layers below `layer` take turns, save the component's own. A layer that is left out of a backward pass hands
    the gradient of what leaves it unchanged to what enters it. Where no layer is left to leave out: |outputs|.

    Source:
        AtP* (Kramar et al. 2024, arXiv:2403.00745), GradDrop.
    """
    readout = _check(base, specialized, layer=layer, positions=positions, direction=direction)
    own = _layer_of(address)
    n_terms = layer if own is None else layer - 1
    turns = [turn for turn in range(layer) if turn != own] if n_terms > 0 else [None]
    sums = []
    for ids in token_ids:
        estimates = [_output_estimate(base, specialized, ids, address, readout, left_out=turn) for turn in turns]
        sums.append(torch.stack(estimates).abs().sum())
    return torch.stack(sums) / max(n_terms, 1)


def weights(
    base: PreTrainedModel,
    specialized: PreTrainedModel,
    token_ids: Sequence[list[int]],
    address: str,
    *,
    layer: int,
    positions: Sequence[int],
    direction: Tensor,
) -> Tensor:
    """<dF/dw at the base, specialized - base weights> over the entries the component owns; shape (prompt,)."""
    readout = _check(base, specialized, layer=layer, positions=positions, direction=direction)
    return torch.stack([_slope(base, specialized, ids, address, readout, share=0.0) for ids in token_ids])


def integrated(
    base: PreTrainedModel,
    specialized: PreTrainedModel,
    token_ids: Sequence[list[int]],
    address: str,
    *,
    n_steps: int,
    layer: int,
    positions: Sequence[int],
    direction: Tensor,
) -> Tensor:
    """Integrated gradients along the straight line on which all weights move at once; shape (prompt,).

    The mean of `weights`' product, its gradient taken at the middles of `n_steps` equal pieces of the line.
    """
    readout = _check(base, specialized, layer=layer, positions=positions, direction=direction)
    shares = [(step - 0.5) / n_steps for step in range(1, n_steps + 1)]
    estimates = []
    for ids in token_ids:
        slopes = [_slope(base, specialized, ids, address, readout, share=share) for share in shares]
        estimates.append(torch.stack(slopes).mean())
    return torch.stack(estimates)


# ---------------------------------------------------------------------------------------------------------------------
# One prompt.


@dataclass(frozen=True, kw_only=True)
class Readout:
    """What F is: see the top of this file."""

    layer: int
    positions: list[int]
    direction: Tensor

    def of(self, stream: Tensor) -> Tensor:
        """F, a scalar in the graph of the stream entering `layer`, whose shape is (1, token, feature)."""
        return (stream[0, self.positions] @ self.direction.to(stream)).mean()


def _output_estimate(
    base: PreTrainedModel,
    specialized: PreTrainedModel,
    ids: list[int],
    address: str,
    readout: Readout,
    *,
    left_out: int | None = None,
) -> Tensor:
    """<dF/do, o' - o>; the gradient's backward pass leaves out a layer."""
    owned, before, after = owned_entries(base, address), _weights_of(base), _weights_of(specialized)
    patched = before | {name: torch.where(mask, after[name], before[name]) for name, mask in owned.items()}
    places = [entering(base, readout.layer), written_at(base, address)]
    with torch.no_grad():  # what comes before the place is the base's: the component is not part of it
        _, new = run(base, patched, ids, places)
    leaves = {name: weight.requires_grad_() for name, weight in before.items()}
    stream, old = run(base, leaves, ids, places, left_out=left_out)
    (gradient,) = _gradients(readout.of(stream), [old])
    return (gradient * (new - old.detach())).sum()


def _slope(
    base: PreTrainedModel,
    specialized: PreTrainedModel,
    ids: list[int],
    address: str,
    readout: Readout,
    *,
    share: float,
) -> Tensor:
    """dF/dw with all weights `share` of the way from base to specialized, times the way of what the component owns."""
    owned, start, end = owned_entries(base, address), _weights_of(base), _weights_of(specialized)
    leaves = {name: (start[name] + share * (end[name] - start[name])).requires_grad_() for name in start}
    (stream,) = run(base, leaves, ids, [entering(base, readout.layer)])
    gradients = _gradients(readout.of(stream), [leaves[name] for name in owned])
    products = [
        (gradient * (end[name] - start[name]))[mask].sum()
        for gradient, (name, mask) in zip(gradients, owned.items(), strict=True)
    ]
    return torch.stack(products).sum()


def _gradients(value: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Zeros for inputs that `value` does not depend on: those at or above the layer that is read."""
    return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)


# ---------------------------------------------------------------------------------------------------------------------
# Running a model with any weights, and looking inside.


def run(
    model: PreTrainedModel,
    with_weights: Weights,
    ids: list[int],
    places: Sequence[Place],
    *,
    left_out: int | None = None,
) -> list[Tensor]:
    """What is found at some places of the model when it has these weights, kept in autograd's graph.

    Layer `left_out` gives its usual output, but a gradient passes it as if it were the identity.
    """
    body = model.base_model
    found: dict[Place, Tensor] = {}
    with ExitStack() as hooks:
        if left_out is not None:
            decoder_layer = body.get_submodule(f"{_layers_path(model)}.{left_out}")
            hooks.enter_context(decoder_layer.register_forward_hook(_pass_gradient_by, with_kwargs=True))
        for place in places:
            hooks.enter_context(_watch(body, place, found))
        input_ids = torch.tensor([ids], device=model.device)
        functional_call(body, dict(with_weights), kwargs={"input_ids": input_ids, "use_cache": False})
    return [found[place] for place in places]


def _watch(body: nn.Module, place: Place, found: dict[Place, Tensor]) -> RemovableHandle:
    path, side = place
    module = body.get_submodule(path)
    if side == "input":
        note: Callable[..., None] = lambda _, args, kwargs: found.update({place: _only_input(args, kwargs)})  # noqa: E731
        return module.register_forward_pre_hook(note, with_kwargs=True)
    return module.register_forward_hook(lambda _, args, output: found.update({place: _first(output)}))


def _pass_gradient_by(layer: nn.Module, args: tuple, kwargs: dict[str, object], output: Tensor) -> Tensor:
    entering_stream = _only_input(args, kwargs)
    return entering_stream + (output - entering_stream).detach()


def _only_input(args: tuple, kwargs: Mapping[str, object]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _first(output: Tensor | tuple) -> Tensor:
    """An attention also returns its pattern, which comes second."""
    return output[0] if isinstance(output, tuple) else output


def _weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.base_model.named_parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# Where a component writes, and what it owns.


def entering(model: PreTrainedModel, layer: int) -> Place:
    """Where the residual stream enters `layer`; after the last layer, where it leaves that one (before the norm)."""
    if layer < model.config.num_hidden_layers:
        return f"{_layers_path(model)}.{layer}", "input"
    return f"{_layers_path(model)}.{model.config.num_hidden_layers - 1}", "output"


def written_at(model: PreTrainedModel, address: str) -> Place:
    """The place whose change stands for the component's change.

    Heads, groups, attentions and their rests: what the attention writes, before any norm that follows. Neurons,
    experts, routers, MLPs and their rests: what the MLP writes, likewise. Blocks and norms: the stream that leaves the
    layer. `embed`: the stream that enters layer 0.
    """
    if address == "embed":
        return entering(model, 0)
    family = FAMILIES[model.config.model_type]
    path = f"{_layers_path(model)}.{_layer_of(address)}"
    part = address.partition(".")[2]
    if part == "" or part.startswith("norm."):
        return path, "output"
    if part.startswith(("attn", "H", "KV")):
        return f"{path}.{family.attention}", "output"
    if part.startswith(("mlp", "N", "E", "router")):
        return f"{path}.{family.mlp[-1]}", "output"
    raise ValueError(f"{address!r} is no address")


def owned_entries(model: PreTrainedModel, address: str) -> Owned:
    """The entries of `model.base_model`'s parameters that the component owns.

    Raises:
        ValueError: it owns none in this model.
    """
    names = {id(parameter): name for name, parameter in model.base_model.named_parameters()}
    (root, _), parts = _locate(model, model, address)
    masks: dict[str, Tensor] = {}
    for action, path, which in parts:
        module = root.get_submodule(path)
        for own_name, parameter in module.named_parameters():
            mask = masks.setdefault(names[id(parameter)], torch.zeros_like(parameter, dtype=torch.bool))
            matrix = mask.T if isinstance(module, Conv1D) and own_name == "weight" else mask  # (out, in), as elsewhere
            _mark(matrix, action, own_name, which)
    owned = {name: mask for name, mask in masks.items() if mask.any()}
    if not owned:
        raise ValueError(f"{address} owns nothing in this {model.config.model_type}")
    return owned


def _mark(mask: Tensor, action: str, name: str, which: list[int]) -> None:
    """Set to True what a part (see `hook_oracle`) owns of the parameter called `name` in its module."""
    if action == "module":
        mask[...] = True
    elif action == "rows":  # with their biases
        mask[which] = True
    elif action == "columns" and name == "weight":
        mask[:, which] = True
    elif action == "bias" and name == "bias":
        mask[...] = True
    elif action == "expert":
        expert, *neurons = which
        if not neurons:
            mask[expert] = True
        elif name == "down_proj":  # (expert, out, neuron)
            mask[expert][:, neurons] = True
        elif name == "gate_up_proj":  # (expert, gate rows and then up rows, in)
            n_neurons = mask.shape[1] // 2
            mask[expert, [row for neuron in neurons for row in (neuron, n_neurons + neuron)]] = True


def _layers_path(model: PreTrainedModel) -> str:
    return FAMILIES[model.config.model_type].layers


def _layer_of(address: str) -> int | None:
    match = re.match(r"L(\d+)(\.|$)", address)
    return int(match[1]) if match else None


def _check(
    base: PreTrainedModel, specialized: PreTrainedModel, *, layer: int, positions: Sequence[int], direction: Tensor
) -> Readout:
    shapes = [{name: weight.shape for name, weight in _weights_of(model).items()} for model in (base, specialized)]
    if shapes[0] != shapes[1]:
        raise ValueError("the two models have different parameters")
    if base.training:
        raise ValueError("call .eval() on the base: dropout would make the readout random")
    if {weight.dtype for model in (base, specialized) for weight in model.parameters()} != {torch.float64}:
        raise ValueError("both models must be in float64: an oracle is no use if its own rounding is in question")
    if not 0 <= layer <= base.config.num_hidden_layers:
        raise ValueError(f"there is no stream that enters layer {layer}")
    return Readout(layer=layer, positions=list(positions), direction=direction.detach())
