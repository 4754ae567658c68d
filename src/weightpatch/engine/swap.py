"""The oracle: write the weights into the base, run the whole model, restore bit for bit.

As plain as can be: a mask, explicit positions, `output_hidden_states`-like hooks of its own. It shares no code with the
fast engines beyond the table of slices, so that agreement means something.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weightpatch.anchor import Anchor
from weightpatch.component import Component
from weightpatch.engine import Measured
from weightpatch.pair import ModelPair
from weightpatch.patch import patched


def sweep(
    pair: ModelPair,
    token_ids: Sequence[Sequence[int]],
    anchor: Anchor,
    components: Sequence[Component],
    *,
    batch_tokens: int,
    skip: Set[Component],
) -> Iterator[Measured]:
    """Measure by writing weights; see `engine.Sweep`."""
    base = readouts(pair.base, token_ids, anchor, batch_tokens=batch_tokens)
    for component in components:
        if component in skip:
            continue
        with patched(pair, [component]) as model:
            readout = readouts(model, token_ids, anchor, batch_tokens=batch_tokens)
        yield Measured(component=component, readout=readout, base=base)


def readouts(
    model: PreTrainedModel,
    token_ids: Sequence[Sequence[int]],
    anchor: Anchor,
    *,
    batch_tokens: int,
    padding_side: Literal["left", "right"] = "right",
) -> Tensor:
    """Anchor readout of a whole model on every prompt, shape `(prompt,)`, float64."""
    longest = max(map(len, token_ids))
    n_rows = max(1, batch_tokens // longest)
    parts = []
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for start in range(0, len(token_ids), n_rows):
            parts.append(_read_batch(model, token_ids[start : start + n_rows], anchor, padding_side))
    finally:
        for module in was_training:
            module.training = True
    return torch.cat(parts)


def _read_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], anchor: Anchor, padding_side: str
) -> Tensor:
    width = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    offsets = []
    for row, prompt in enumerate(prompts):
        offset = width - len(prompt) if padding_side == "left" else 0
        tokens[row, offset : offset + len(prompt)] = torch.tensor(prompt)
        mask[row, offset : offset + len(prompt)] = 1
        offsets.append(offset)
    stream = _stream(model, tokens, mask, anchor.layer)
    rows = []
    for row, prompt in enumerate(prompts):
        where = [offsets[row] + (at if at >= 0 else len(prompt) + at) for at in anchor.positions]
        rows.append(anchor.read(stream[row, where]))
    return torch.stack(rows)


def _stream(model: PreTrainedModel, tokens: Tensor, mask: Tensor, layer: int) -> Tensor:
    """Residual stream that enters `layer`, shape `(prompt, token, feature)`, from one run of the whole model."""
    caught: list[Tensor] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else kwargs.get("hidden_states", kwargs.get("input")))

    inner = model.base_model
    blocks = next(module for module in inner.children() if isinstance(module, nn.ModuleList))
    children = list(inner.children())
    behind = children[children.index(blocks) + 1]
    handle = (blocks[layer] if layer < len(blocks) else behind).register_forward_pre_hook(catch, with_kwargs=True)
    device = model.get_input_embeddings().weight.device
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    try:
        with torch.no_grad():
            model(
                input_ids=tokens.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                use_cache=False,
            )
    finally:
        handle.remove()
    return caught[0]
