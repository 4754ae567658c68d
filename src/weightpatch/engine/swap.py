"""The oracle: write the weights into the base, run the whole model, restore bit for bit.

As plain as can be. Beyond the table of slices and the readout it shares no code with the fast engines: agreement means
something.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weightpatch.component import Component
from weightpatch.engine import Measured
from weightpatch.pair import ModelPair
from weightpatch.patch import patched
from weightpatch.reader import Readable


def sweep(
    pair: ModelPair,
    token_ids: Sequence[Sequence[int]],
    anchor: Readable,
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
    model: PreTrainedModel, token_ids: Sequence[Sequence[int]], anchor: Readable, *, batch_tokens: int
) -> Tensor:
    """Readout of a whole model on every prompt, shape `(prompt,)`, float64.

    Only prompts of one length share a batch, so there is no padding and no mask that could go wrong.
    """
    found = torch.zeros(len(token_ids), dtype=torch.float64)
    reader = anchor.reader(token_ids)
    was_training = [module for module in model.modules() if module.training]
    model.train(False)
    try:
        for length in {len(ids) for ids in token_ids}:
            alike = [place for place, ids in enumerate(token_ids) if len(ids) == length]
            n_rows = max(1, batch_tokens // length)
            for start in range(0, len(alike), n_rows):
                places = alike[start : start + n_rows]
                tokens = torch.tensor([list(token_ids[place]) for place in places])
                stream, logits = _run(model, tokens, reader.layer)
                for row, place in enumerate(places):
                    seen = (logits if reader.through_head else stream)[row, list(reader.places[place])]
                    found[place] = reader.score(place, seen.detach())
    finally:
        for module in was_training:
            module.training = True
    return found


def _run(model: PreTrainedModel, tokens: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Residual stream that enters `layer`, `(prompt, token, feature)`, and logits, from one run of the whole model."""
    caught: list[Tensor] = []

    def entering(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])

    def leaving(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    blocks = next(module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
    if layer < len(blocks):
        handle = blocks[layer].register_forward_pre_hook(entering, with_kwargs=True)
    else:
        handle = blocks[-1].register_forward_hook(leaving)
    try:
        with torch.no_grad():
            tokens = tokens.to(next(model.get_input_embeddings().parameters()).device)
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()
    return caught[0], logits
