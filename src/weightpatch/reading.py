"""Readouts of whole models on prompts: what every effect is a change of."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weightpatch.anchor import Anchor
from weightpatch.architecture import embedding_weight
from weightpatch.flows import Flow
from weightpatch.outputs import Divergence, Margin
from weightpatch.pair import ModelPair, check_prompts
from weightpatch.prompts import ContrastPrompts, TokenIds
from weightpatch.residuals import BATCH_TOKENS, batches, evaluating, pad, read_residuals

Target = Anchor | Margin | Divergence | Flow
"""What can be localized towards: an anchor, a readout of the output, or what some components write."""


def inputs(pair: ModelPair, prompts: ContrastPrompts, target: Target) -> tuple[TokenIds, ...]:
    """What the models run on: a sequence for each prompt, and behind these a second one where two are subtracted."""
    if isinstance(target, Margin | Divergence):
        prompts = prompts.without_responses()
    return target.sequences(prompts.tokenize(pair.tokenizer))


def check_target(pair: ModelPair, prompts: ContrastPrompts, target: Target) -> None:
    """Raise unless a target fits the pair and both models can read every prompt where it looks.

    Raises:
        AnchorError: its layer or width is not the model's.
        PromptError: prompts that the models cannot read, or other ones than an output's readout was fitted on.
    """
    if isinstance(target, Anchor):
        target.check(pair)
        check_prompts(pair, prompts, positions=target.positions, both_sides=target.is_difference)
    else:
        check_prompts(pair, prompts)
        target.reader(inputs(pair, prompts, target))


def contrasted(readouts: Tensor, target: Target) -> Tensor:
    """One value to a prompt from values of `inputs`: `(..., sequence)` -> `(..., prompt)`."""
    if not target.is_difference:
        return readouts
    positive, negative = readouts.chunk(2, dim=-1)
    return positive - negative


def reference(
    pair: ModelPair, prompts: ContrastPrompts, target: Target, *, batch_tokens: int = BATCH_TOKENS
) -> tuple[Tensor, Tensor]:
    """Readouts of the base and of the specialized model, each of shape `(prompt,)`, float64."""
    base, specialized = (
        readouts(model, pair, prompts, target, batch_tokens=batch_tokens) for model in (pair.base, pair.specialized)
    )
    return base, specialized


def readouts(
    model: PreTrainedModel,
    pair: ModelPair,
    prompts: ContrastPrompts,
    target: Target,
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Tensor:
    """A readout of one model of a pair, with whatever is patched into it, shape `(prompt,)`, float64."""
    token_ids = inputs(pair, prompts, target)
    if isinstance(target, Flow):
        return target.read(token_ids, specialized=model is pair.specialized)
    if not isinstance(target, Anchor):
        return contrasted(_through_head(model, token_ids, target, batch_tokens=batch_tokens), target)
    residuals = read_residuals(
        model, token_ids, layers=[target.layer], positions=target.positions, batch_tokens=batch_tokens
    )
    return contrasted(target.read(residuals[0]), target)


def _through_head(
    model: PreTrainedModel, token_ids: tuple[TokenIds, ...], target: Margin | Divergence, *, batch_tokens: int
) -> Tensor:
    """Readouts of sequences from the model's own logits, shape `(sequence,)`."""
    reader = target.reader(token_ids)
    found = torch.zeros(len(token_ids), dtype=torch.float64)
    with evaluating(model):
        for batch in batches(token_ids, batch_tokens):
            tokens = pad([token_ids[place] for place in batch], embedding_weight(model).device)
            start = min(min(reader.places[place]) for place in batch)
            logits = model(input_ids=tokens, use_cache=False, logits_to_keep=tokens.shape[1] - start).logits
            for row, place in enumerate(batch):
                own = [position - start for position in reader.places[place]]
                found[place] = reader.score(place, logits[row, own])
    return found
