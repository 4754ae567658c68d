"""Where in a prompt each token stands: chat template, system message, query, instruction, response, last token."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from weightpatch.prompts import ContrastPrompt, ContrastPrompts, TokenIds, render

SPANS: tuple[str, ...] = ("template", "system", "query", "instruction", "response", "last")
"""Spans in the order in which prompts have them. `last` is the token at which behaviour is read, whatever it is."""

_SYSTEM, _USER = "\ue000", "\ue001"
"""Private characters that stand for the two messages when the template is rendered alone."""


def token_spans(prompts: ContrastPrompts, tokenizer: PreTrainedTokenizerBase | None) -> tuple[tuple[str, ...], ...]:
    """The span of every token of each prompt, with its instruction.

    A token belongs to the span of its first character that is no space; the space between query and instruction, where
    it is a token, to the instruction.

    Where text and tokens cannot be matched (token ids, slow tokenizers, a chat template that rewrites the message), the
    instruction is what lies between the common start and the common end of the prompt with and without it, and all else
    up to the response is the query.

    Args:
        prompts: The prompts.
        tokenizer: As for `ContrastPrompts.tokenize`.

    Returns:
        For each prompt as many names out of `SPANS` as it has tokens.

    Raises:
        PromptError: as for `ContrastPrompts.tokenize`.
    """
    tokenized = prompts.tokenize(tokenizer)
    found = []
    for row, with_, without in zip(prompts, tokenized.with_instruction, tokenized.without_instruction, strict=True):
        if tokenizer is None or row.with_instruction:
            spans = _by_difference(with_, without)
        else:
            n_begun = len(tokenizer.encode(row.response, add_special_tokens=False)) if row.response else 0
            read, plain = with_[: len(with_) - n_begun], without[: len(without) - n_begun]
            spans = _by_text(row, read, tokenizer) or _by_difference(read, plain)
            spans += ["response"] * n_begun
        found.append((*spans[:-1], "last"))
    return tuple(found)


def _by_text(row: ContrastPrompt, ids: TokenIds, tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """Spans by where tokens stand in the rendered text; None where that cannot be told."""
    if not tokenizer.is_fast:
        return None
    text, adds_special = render(tokenizer, row.text, system=row.system)
    encoded = tokenizer(text, add_special_tokens=adds_special, return_offsets_mapping=True)
    places = _places(row, text, tokenizer)
    if places is None or tuple(encoded["input_ids"]) != ids:
        return None
    spans = []
    for low, high in encoded["offset_mapping"]:
        inside = text[low:high]
        first = low + len(inside) - len(inside.lstrip()) if inside.strip() else low
        # What the tokenizer adds by itself stands at (0, 0); a space of which offsets are trimmed, at its end
        names = (name for name, place in places.items() if high > 0 and first in place)
        spans.append(next(names, "template"))
    return spans


def _places(row: ContrastPrompt, text: str, tokenizer: PreTrainedTokenizerBase) -> Mapping[str, range] | None:
    """Which characters of the rendered text each message takes up; None where the template does more than trim them.

    Searching for a message would also find it in the other, or in a role's name; so the template is rendered around two
    placeholders, and what stands in their place is the message.
    """
    frame, _ = render(tokenizer, _USER, system=_SYSTEM if row.system else "")
    if frame.count(_USER) != 1 or frame.count(_SYSTEM) > 1:
        return None
    for system, user in itertools.product((row.system, row.system.strip()), (row.text, row.text.strip())):
        if frame.replace(_SYSTEM, system, 1).replace(_USER, user, 1) != text:
            continue
        start = len(frame[: frame.index(_USER)].replace(_SYSTEM, system))
        query_end = start + len(row.prompt) - row.text.index(user)
        places = {"query": range(start, query_end), "instruction": range(max(start, query_end), start + len(user))}
        if _SYSTEM in frame:
            before = len(frame[: frame.index(_SYSTEM)].replace(_USER, user))
            places["system"] = range(before, before + len(system))
        return places
    return None


def _by_difference(with_: TokenIds, without: TokenIds) -> list[str]:
    """Spans of tokens that only their counterpart without the instruction explains."""
    start = _n_common(with_, without)
    end = min(_n_common(with_[::-1], without[::-1]), len(with_) - start, len(without) - start)
    return ["query"] * start + ["instruction"] * (len(with_) - start - end) + ["query"] * end


def _n_common(one: TokenIds, other: TokenIds) -> int:
    """How many tokens two sequences share from their start."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
