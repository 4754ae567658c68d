"""Where in a prompt each token stands: chat template, system message, query, instruction, response, last token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from weightpatch.prompts import ContrastPrompt, ContrastPrompts, TokenIds, render

SPANS: tuple[str, ...] = ("template", "system", "query", "instruction", "response", "last")
"""Spans in the order in which prompts have them. `last` is the token at which behaviour is read, whatever it is."""


def token_spans(prompts: ContrastPrompts, tokenizer: PreTrainedTokenizerBase | None) -> tuple[tuple[str, ...], ...]:
    """The span of every token of each prompt, with its instruction.

    Where text and tokens cannot be matched (token ids, slow tokenizers, a chat template that rewrites the message), the
    instruction is what lies between the common start and the common end of the prompt with and without it, and all else
    is the query.

    Args:
        prompts: The prompts.
        tokenizer: As for `ContrastPrompts.tokenize`.

    Returns:
        For each prompt as many names out of `SPANS` as it has tokens.
    """
    tokenized = prompts.tokenize(tokenizer)
    found = []
    for row, with_, without in zip(prompts, tokenized.with_instruction, tokenized.without_instruction, strict=True):
        spans = None if tokenizer is None else _by_text(row, with_, tokenizer)
        found.append((*(spans or _by_difference(with_, without))[:-1], "last"))
    return tuple(found)


def _by_text(row: ContrastPrompt, ids: TokenIds, tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """Spans by where tokens stand in the rendered text; None where that cannot be told."""
    if row.with_instruction or not tokenizer.is_fast:
        return None
    text, adds_special = render(tokenizer, row.text, system=row.system)
    encoded = tokenizer(text, add_special_tokens=adds_special, return_offsets_mapping=True)
    known: Sequence[int] = encoded["input_ids"]
    if tuple(known) != ids[: len(known)]:
        return None
    start = text.rfind(row.text.strip())
    if start < 0:
        return None
    middle = text.find(row.instruction.strip(), start + len(row.prompt.strip()))
    system = text.find(row.system.strip()) if row.system.strip() else -1
    spans = []
    for low, high in encoded["offset_mapping"]:
        inside = text[low:high]
        place = low + len(inside) - len(inside.lstrip())
        if low == high:
            spans.append("template")
        elif start <= place < start + len(row.prompt.strip()):
            spans.append("query")
        elif middle <= place < middle + len(row.instruction.strip()):
            spans.append("instruction")
        elif 0 <= system <= place < system + len(row.system.strip()):
            spans.append("system")
        else:
            spans.append("template")
    return spans + ["response"] * (len(ids) - len(known))


def _by_difference(with_: TokenIds, without: TokenIds) -> list[str]:
    """Spans of tokens that only their counterpart without the instruction explains."""
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(with_, without, strict=False)))
    rest = min(len(with_), len(without)) - start
    backwards = zip(reversed(with_), reversed(without), strict=False)
    end = min(rest, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], backwards)))
    return ["query"] * start + ["instruction"] * (len(with_) - start - end) + ["query"] * end
