"""Batched greedy generation with an untouched transformers model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weightpatch.prompts import TokenIds
from weightpatch.residuals import evaluating
from weightpatch.streaming import materialized

BATCH_SIZE = 32
MAX_NEW_TOKENS = 192


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One greedy continuation.

    Attributes:
        text: The answer, decoded without special tokens.
        ids: Its tokens, without the one that ended it.
        finished: Whether it ended by itself and not by `max_new_tokens`.
    """

    text: str
    ids: TokenIds
    finished: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenIds],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    on_batch: Callable[[Sequence[int]], None] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Continue every prompt greedily until the model ends its answer.

    Args:
        model: Any causal language model; hooks on it and weights patched into it take part.
        tokenizer: Decodes, and names the token that ends an answer.
        prompts: Unpadded token ids.
        max_new_tokens: Most tokens of an answer.
        batch_size: Prompts that are continued side by side.
        on_batch: Called before each batch with the prompts in it, by their place, row by row; for hooks that treat
            rows differently.
        on_done: Called with the number of answers finished so far, for progress.

    Returns:
        One generation for each prompt, in their order.
    """
    ends = _end_tokens(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    found: dict[int, Generation] = {}
    with materialized(model), evaluating(model):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            width = max(len(prompts[place]) for place in places)
            if on_batch:
                on_batch(places)
            padding = [[0] * (width - len(prompts[place])) for place in places]
            tokens = torch.tensor([[*pad, *prompts[place]] for pad, place in zip(padding, places, strict=True)])
            mask = torch.tensor([[0] * len(pad) + [1] * (width - len(pad)) for pad in padding])
            output = model.generate(  # type: ignore[operator]
                input_ids=tokens.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                use_cache=True,
                do_sample=False,
                eos_token_id=sorted(ends),
                pad_token_id=min(ends),
            )
            for place, row in zip(places, output[:, width:].tolist(), strict=True):
                length = next((at for at, token in enumerate(row) if token in ends), None)
                ids = tuple(row[:length])
                text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
                found[place] = Generation(text=text, ids=ids, finished=length is not None)
            if on_done:
                on_done(len(found))
    return [found[place] for place in range(len(prompts))]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ends = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    return {int(token) for token in ends if token is not None}
