"""Residual streams of whole models: read at the readout positions, or changed on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DynamicCache, PreTrainedModel

from weightpatch.architecture import Architecture, embedding_weight, layers_of
from weightpatch.errors import AnchorError

BATCH_TOKENS = 2048
"""Tokens, with padding, that one forward pass of a whole model works on, unless told otherwise."""

LEAST_SHARED = 8
"""Tokens at the start of all prompts that are worth a call of their own."""

_CPU_BYTES = 32 * 2**20
"""What a call's activations may take on a CPU, where more gains nothing (docs/speed.md)."""

_MOST_MALLOC = 32 * 2**20
"""The largest mapping from which glibc learns (`M_MMAP_THRESHOLD` in its manual)."""

_DEVICE_SHARE = 0.125
"""The share of an accelerator's memory that they may take."""


def tokens_per_call(model: PreTrainedModel) -> int:
    """How many tokens one call of a layer should work on: as many as memory is meant for, the same on every call.

    Depends on the model's widths and dtype and on the device, never on what else the machine does, so that a sweep
    that is continued makes the very same calls.
    """
    device = model.device
    if device.type == "cuda":
        budget = torch.cuda.get_device_properties(device).total_memory * _DEVICE_SHARE
    elif device.type == "mps":
        budget = torch.mps.recommended_max_memory() * _DEVICE_SHARE
    else:
        budget = _CPU_BYTES
    return max(256, int(budget) // bytes_per_token(model))


def bytes_per_token(model: PreTrainedModel) -> int:
    """What a layer's activations take for one token, about: six vectors of the stream's width, three of the MLP's."""
    architecture = Architecture.of(model)
    return (6 * architecture.n_features + 3 * architecture.n_neurons) * model.dtype.itemsize


def batches(token_ids: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    """Deal prompts out to batches of similar length.

    Args:
        token_ids: Unpadded prompts.
        batch_tokens: Most tokens of a batch, padding included; a longer prompt gets a batch of its own.

    Returns:
        Indices of the prompts of each batch, shortest prompts first.
    """
    order = sorted(range(len(token_ids)), key=lambda index: len(token_ids[index]))
    dealt: list[list[int]] = []
    for index in order:
        if dealt and len(token_ids[index]) * (len(dealt[-1]) + 1) <= batch_tokens:
            dealt[-1].append(index)
        else:
            dealt.append([index])
    return dealt


def pad(token_ids: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Right-padded tokens, shape `(prompt, token)`.

    The padding repeats a prompt's last token. Lying behind all positions that are read, it cannot reach them in a
    causal model, so no mask is needed.
    """
    longest = max(len(ids) for ids in token_ids)
    rows = [[*ids, *[ids[-1]] * (longest - len(ids))] for ids in token_ids]
    return torch.tensor(rows, device=device)


def readout_index(token_ids: Sequence[Sequence[int]], positions: Sequence[int]) -> Tensor:
    """Where the readout positions lie in right-padded prompts, shape `(prompt, position)`.

    Args:
        token_ids: Unpadded prompts.
        positions: From the start of a prompt, or from its end when negative.

    Raises:
        AnchorError: a prompt is too short for a position.
    """
    rows = []
    for number, ids in enumerate(token_ids):
        row = [position if position >= 0 else len(ids) + position for position in positions]
        if min(row) < 0 or max(row) >= len(ids):
            raise AnchorError(
                f"prompt {number} has {len(ids)} tokens, too few for readout positions {list(positions)}. "
                "Drop it, or read at other positions."
            )
        rows.append(row)
    return torch.tensor(rows)


def at_positions(residual: Tensor, index: Tensor) -> Tensor:
    """Residual at each row's own positions, on the CPU: `(row, token, feature)` -> `(row, position, feature)`."""
    index = index.to(residual.device)
    rows = torch.arange(residual.shape[0], device=residual.device).unsqueeze(1)
    return residual[rows, index].detach().cpu()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Switch dropout off and gradients too; afterwards every module is in the mode it was found in."""
    found = [(module, module.training) for model in models for module in model.modules() if module.training]
    for module, _ in found:
        module.training = False
    keep_freed_buffers()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in found:
            module.training = training


def keep_freed_buffers() -> None:
    """Let the C library keep what activations free instead of giving it back and fetching it again at every layer.

    glibc raises its thresholds when a large mapping is freed: up to twice its size then stays with the process. One
    that is never touched costs nothing. A tenth of a sweep's time on a CPU was page faults (LOG.md); other C libraries
    do not mind.
    """
    torch.empty(_MOST_MALLOC - 2**16, dtype=torch.uint8, device="cpu")


Edit = Callable[[Tensor], Tensor]
"""Takes the residual stream that enters a layer, `(prompt, token, feature)`, and gives what shall enter it instead."""


@contextmanager
def editing(model: PreTrainedModel, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Change the residual stream that enters some layers in every forward pass, for as long as the block lasts.

    Args:
        model: A model whose family has a row in the architecture table.
        edits: Layer -> what happens to the stream that enters it; `n_layers`: to what leaves the last one.
    """
    layers = layers_of(model)
    with ExitStack() as hooks:
        for layer, edit in edits.items():

            def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], edit: Edit = edit) -> Any:
                if args:
                    return (edit(args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

            def after(_module: nn.Module, _args: tuple[Any, ...], output: Any, edit: Edit = edit) -> Any:
                return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

            if layer < len(layers):
                hooks.callback(layers[layer].register_forward_pre_hook(before, with_kwargs=True).remove)
            else:
                hooks.callback(layers[-1].register_forward_hook(after).remove)
        yield


class _Done(Exception):
    """The wanted layer was reached; the rest of the forward pass is not needed."""


See = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], None]
"""Told of each layer reached: its number, the residual entering it, and what else it is called with."""


def walk(
    model: PreTrainedModel,
    tokens: Tensor,
    last: int,
    see: See,
    *,
    weights: dict[str, Tensor] | None = None,
    cache: DynamicCache | None = None,
) -> None:
    """Run a model up to the residual stream that enters layer `last`, and no further.

    Args:
        model: A model whose family has a row in the architecture table.
        tokens: Token ids, shape `(prompt, token)`, without padding on the left.
        last: The last layer reached; `n_layers` stands for what leaves the model's last one.
        see: Called on the way with every residual, that of `last` included.
        weights: Parameters that stand in for the model's own of these names.
        cache: Of tokens that come before these in every row; these are added to it.
    """
    layers = layers_of(model)
    hooks = ExitStack()

    def reach(layer: int, residual: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(layer, residual, args, kwargs)
        if layer == last:
            raise _Done

    for number, module in enumerate(layers[: last + 1]):

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int = number) -> None:
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            reach(number, args[0] if args else kwargs["hidden_states"], args[1:], others)

        hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        reach(len(layers), output[0] if isinstance(output, tuple) else output, (), {})

    if last == len(layers):
        hooks.callback(layers[-1].register_forward_hook(after).remove)
    with hooks, suppress(_Done):
        given = {"input_ids": tokens, "past_key_values": cache, "use_cache": cache is not None}
        functional_call(model, weights or {}, (), given)


def read_residuals(
    model: PreTrainedModel,
    token_ids: Sequence[Sequence[int]],
    *,
    layers: Sequence[int],
    positions: Sequence[int],
    batch_tokens: int = BATCH_TOKENS,
) -> Tensor:
    """Residual stream that enters some layers, at the readout positions of each prompt.

    Args:
        model: A model whose family has a row in the architecture table.
        token_ids: Unpadded prompts.
        layers: Layers whose entering residual is read; `n_layers`: what leaves the last one, before the norm.
        positions: Readout positions; negative ones count from the end of each prompt.
        batch_tokens: Most tokens of one forward pass.

    Returns:
        Shape `(layer, prompt, position, feature)`, on the CPU, in the model's dtype.
    """
    device = embedding_weight(model).device
    index = readout_index(token_ids, positions)
    read: dict[tuple[int, int], Tensor] = {}
    with evaluating(model):
        for batch in batches(token_ids, batch_tokens):

            def see(layer: int, residual: Tensor, _args: object, _kwargs: object, batch: list[int] = batch) -> None:
                if layer in layers:
                    rows = at_positions(residual, index[batch])
                    read.update(((layer, prompt), row) for prompt, row in zip(batch, rows, strict=True))

            walk(model, pad([token_ids[prompt] for prompt in batch], device), max(layers), see)
    return torch.stack([torch.stack([read[layer, prompt] for prompt in range(len(token_ids))]) for layer in layers])
