"""pyvene (extra `bench`): its intervention that collects activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weightpatch.architecture import family_of
from weightpatch.speed.contestants import Read
from weightpatch.speed.work import Batch, same_weights


@contextmanager
def with_pyvene(model: PreTrainedModel, batch: Batch, layer: int) -> Iterator[Read]:
    """Collect the output of the layer before the anchor, at each prompt's last token.

    Advice followed (pyvene 0.1.8): the tutorial "pyvene 101", activation collection with `CollectIntervention` and a
    component named by its path, which works for any model; positions given as `unit_locations`, for they differ from
    prompt to prompt (`use_fast` is for one position in a whole batch). pyvene cannot stop a model half-way, but wraps
    any module: it is given the model without its head, which nobody reads.
    """
    import pyvene

    body = getattr(same_weights(model), model.base_model_prefix)
    path = family_of(model.config).layers.removeprefix(f"{model.base_model_prefix}.")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapped: Any = pyvene.IntervenableModel(
        {"component": f"{path}[{layer - 1}].output", "intervention": pyvene.CollectIntervention()}, model=body
    )
    inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask}
    places = {"base": [[[int(place)] for place in batch.last]]}  # (intervention, prompt, position)

    def read() -> Tensor:
        (_, collected), _ = wrapped(inputs, unit_locations=places, use_cache=False)
        return torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in collected])

    try:
        yield read
    finally:
        for parameter in trainable:  # pyvene switches the gradients of a model off
            parameter.requires_grad_()
