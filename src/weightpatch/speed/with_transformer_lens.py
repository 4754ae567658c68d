"""TransformerLens (extra `bench`): its bridge over the model, stopped at the anchor layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from weightpatch.speed.contestants import Read
from weightpatch.speed.work import Batch, same_weights


@contextmanager
def with_transformer_lens(model: PreTrainedModel, batch: Batch, layer: int) -> Iterator[Read]:
    """Call a bridge with `stop_at_layer`, which returns the residual that enters that layer.

    Advice followed (TransformerLens 4.3 and its docs): `migrating_to_v3.md`, a `TransformerBridge` over the model and
    no `enable_compatibility_mode`, so that the weights are the checkpoint's own; `build_bridge_from_module`, which is
    `boot_transformers` for a model that is already in memory and needs no name on the hub and no tokenizer; the
    docstring of `TransformerBridge.forward`, `stop_at_layer` and a mask for padded tokens. The bridge computes
    attention itself, in the eager way, so that its hooks see scores; it has no option for another. Its
    `start_at_layer` would save nothing: that docstring says that the layers below still run.
    Behind the last layer there is nothing to stop at, so there the residual is cached by name.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    copied = same_weights(model)
    bridge: Any = build_bridge_from_module(copied, type(copied).__name__, hf_config=copied.config)
    n_layers = model.config.num_hidden_layers
    name = f"blocks.{n_layers - 1}.hook_out"

    def read() -> Tensor:
        if layer < n_layers:
            return batch.at_last(bridge(batch.tokens, attention_mask=batch.mask, stop_at_layer=layer, use_cache=False))
        _, cache = bridge.run_with_cache(batch.tokens, attention_mask=batch.mask, names_filter=name, return_type=None)
        return batch.at_last(cache[name])

    yield read
