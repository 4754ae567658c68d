"""Batched greedy generation with an untouched transformers model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from weightpatch.prompts import TokenIds
from weightpatch.residuals import evaluating
from weightpatch.streaming import materialized

BATCH_SIZE = 32
MAX_NEW_TOKENS = 192
N_TOKENS_AT_ONCE = 16
"""Between two looks at which answers have ended."""


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
        on_batch: Called before each batch with the prompts in it, by their place, row by row, and again whenever
            answers that have ended leave it; for hooks that treat rows differently.
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
            padding = [[0] * (width - len(prompts[place])) for place in places]
            tokens = torch.tensor([[*pad, *prompts[place]] for pad, place in zip(padding, places, strict=True)])
            mask = torch.tensor([[0] * len(pad) + [1] * (width - len(pad)) for pad in padding])

            def left(rows: Sequence[int], places: Sequence[int] = places) -> None:
                if on_batch:
                    on_batch([places[row] for row in rows])

            answers = _continue(model, tokens, mask, ends=sorted(ends), max_new_tokens=max_new_tokens, on_rows=left)
            for place, row in zip(places, answers, strict=True):
                length = next((at for at, token in enumerate(row) if token in ends), None)
                ids = tuple(row[:length])
                text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
                found[place] = Generation(text=text, ids=ids, finished=length is not None)
            if on_done:
                on_done(len(found))
    return [found[place] for place in range(len(prompts))]


def _continue(
    model: PreTrainedModel,
    tokens: Tensor,
    mask: Tensor,
    *,
    ends: list[int],
    max_new_tokens: int,
    on_rows: Callable[[Sequence[int]], None],
) -> list[list[int]]:
    """New tokens of every row, padded on the left; rows that have ended leave the batch where the cache lets them."""
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    answers: list[list[int]] = [[] for _ in tokens]
    rows = list(range(len(tokens)))
    cache = None
    on_rows(rows)
    own_cache = model.generation_config and model.generation_config.cache_implementation
    at_once = max_new_tokens if own_cache else N_TOKENS_AT_ONCE
    for begin in range(0, max_new_tokens, at_once):
        output = model.generate(  # type: ignore[operator]
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=min(at_once, max_new_tokens - begin),
            use_cache=True,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=ends[0],
            return_dict_in_generate=True,
        )
        new = output.sequences[:, tokens.shape[1] :].tolist()
        for row, own in zip(rows, new, strict=True):
            answers[row] += own
        places = [place for place, own in enumerate(new) if not set(own) & set(ends)]
        if not places:
            break
        tokens, cache = output.sequences, output.past_key_values
        mask = torch.cat([mask, mask.new_ones(len(mask), tokens.shape[1] - mask.shape[1])], dim=1)
        if len(places) < len(rows) and _lets_rows_go(cache):
            kept = torch.tensor(places, device=model.device)
            cache.batch_select_indices(kept)
            tokens, mask, rows = tokens[kept], mask[kept], [rows[place] for place in places]
            on_rows(rows)
    return answers


def _lets_rows_go(cache: Cache | None) -> bool:
    """Whether rows can be taken out: states of linear attention cannot."""
    return cache is not None and all(hasattr(layer, "batch_select_indices") for layer in cache.layers)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ends = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    return {int(token) for token in ends if token is not None}
