"""Beginnings of answers for prompts to be read along: where open-ended behaviour is decided token by token."""

from __future__ import annotations

from dataclasses import replace

from weightpatch.errors import PromptError
from weightpatch.generation import BATCH_SIZE, generate
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompts, tokenize


def with_responses(
    pair: ModelPair, prompts: ContrastPrompts, *, n_tokens: int, batch_size: int = BATCH_SIZE
) -> ContrastPrompts:
    """Give every prompt the beginning of the base's own plain answer to its query.

    The same tokens then stand behind the prompt with and without its instruction, in both models, so that only the
    instruction and the weights differ: an anchor with `positions=range(-n_tokens, 0)` reads whether the model, at a
    token of a plain answer, is set to write another form. Where an answer is shorter, these positions reach back into
    the prompt.

    Args:
        pair: The two models, with a tokenizer.
        prompts: Text; those that have a response keep it.
        n_tokens: Tokens of the answer to take.
        batch_size: Answers generated side by side.

    Raises:
        PromptError: no tokenizer, or prompts given as token ids.
    """
    if pair.tokenizer is None or any(row.with_instruction for row in prompts):
        raise PromptError("responses are generated from text: give the pair a tokenizer, and prompts as text.")
    asked = list(dict.fromkeys((row.prompt, row.system) for row in prompts if not row.response))
    answers = generate(
        pair.base,
        pair.tokenizer,
        [tokenize(pair.tokenizer, query, system=system) for query, system in asked],
        max_new_tokens=n_tokens,
        batch_size=batch_size,
    )
    begun = {key: answer.text for key, answer in zip(asked, answers, strict=True)}
    rows = (replace(row, response=row.response or begun[row.prompt, row.system]) for row in prompts)
    return ContrastPrompts(tuple(rows))
