"""Writing one model's weights into another for a while, and taking them out again bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weightpatch.component import Component, components, slices
from weightpatch.errors import ComponentError
from weightpatch.pair import ModelPair
from weightpatch.streaming import materialized

Recipient = Literal["base", "specialized"]


@contextmanager
def patched(
    pair: ModelPair, patch: str | Iterable[str | Component], *, recipient: Recipient = "base"
) -> Iterator[PreTrainedModel]:
    """The recipient with the other model's weights in some components; restored bit for bit on leaving.

    Args:
        pair: The two models.
        patch: Components, addresses or units, in one string with commas or as a sequence; of any layers.
        recipient: `"base"` receives specialized weights (sufficiency), `"specialized"` receives base ones (necessity);
            if it is streamed, all its weights are in memory as long as the block lasts.

    Yields:
        The recipient itself, usable for logits and generation while the block lasts.

    Raises:
        ComponentError: an address or unit that this architecture does not have, or an unknown recipient.
    """
    if recipient not in get_args(Recipient):
        raise ComponentError(f"unknown recipient {recipient!r}. Choose one of {', '.join(get_args(Recipient))}.")
    named = patch if isinstance(patch, str) else list(patch)
    members = components(pair.architecture, named) if named else ()
    owned = [piece for member in members for piece in slices(pair.architecture, member)]
    owned.sort(key=lambda piece: piece.parameter)  # so that a streamed layer is read once
    receiving = pair.base if recipient == "base" else pair.specialized
    giving = pair.specialized_weight if recipient == "base" else pair.base.get_parameter
    saved: list[tuple[Tensor, Tensor]] = []
    with materialized(receiving):
        parameters = dict(receiving.named_parameters())
        try:
            with torch.no_grad():
                for piece in owned:
                    target = piece.of(parameters[piece.parameter].data)
                    saved.append((target, target.clone()))
                    target.copy_(piece.of(giving(piece.parameter).detach()))
            yield receiving
        finally:
            with torch.no_grad():
                for target, original in reversed(saved):
                    target.copy_(original)
