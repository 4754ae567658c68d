"""The loop that a user writes with nothing but torch and transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from weightpatch.architecture import layers_of
from weightpatch.speed.contestants import Read
from weightpatch.speed.work import Batch


@contextmanager
def plain_loop(model: PreTrainedModel, batch: Batch, layer: int) -> Iterator[Read]:
    """Call the model, catch what enters the anchor layer with a forward hook.

    Advice followed: transformers' guide to padding (one batch, `attention_mask`), `use_cache=False` and gradients off
    for a single pass, torch's `register_forward_pre_hook` instead of `output_hidden_states=True`, which would keep the
    residual of every layer. The whole model runs, its head on every token included: `model(...)` is what one calls, and
    neither library stops a model half-way.
    """
    caught: list[Tensor] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    layers = layers_of(model)
    if layer < len(layers):
        handle = layers[layer].register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = layers[-1].register_forward_hook(after)

    def read() -> Tensor:
        model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
        return batch.at_last(caught.pop())

    try:
        yield read
    finally:
        handle.remove()
