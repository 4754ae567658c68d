"""An anchor's readout of whole models on prompts: what every effect is a change of."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from weightpatch.anchor import Anchor
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompts, TokenIds
from weightpatch.residuals import BATCH_TOKENS, read_residuals


def inputs(pair: ModelPair, prompts: ContrastPrompts, anchor: Anchor) -> tuple[TokenIds, ...]:
    """What the models run on: prompts with their instruction, and behind them those without for a contrast readout."""
    tokenized = prompts.tokenize(pair.tokenizer)
    extra = tokenized.without_instruction if anchor.readout == "contrast" else ()
    return tokenized.with_instruction + extra


def contrasted(readouts: Tensor, anchor: Anchor) -> Tensor:
    """One value to a prompt from the readouts of `inputs`, shape `(prompt,)`."""
    if anchor.readout != "contrast":
        return readouts
    positive, negative = readouts.chunk(2)
    return positive - negative


def reference(
    pair: ModelPair, prompts: ContrastPrompts, anchor: Anchor, *, batch_tokens: int = BATCH_TOKENS
) -> tuple[Tensor, Tensor]:
    """Readouts of the base and of the specialized model, each of shape `(prompt,)`, float64."""
    base, specialized = (
        readouts(model, pair, prompts, anchor, batch_tokens=batch_tokens) for model in (pair.base, pair.specialized)
    )
    return base, specialized


def readouts(
    model: PreTrainedModel,
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Anchor,
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Tensor:
    """An anchor's readout of one model of a pair, with whatever is patched into it, shape `(prompt,)`, float64."""
    token_ids = inputs(pair, prompts, anchor)
    residuals = read_residuals(
        model, token_ids, layers=[anchor.layer], positions=anchor.positions, batch_tokens=batch_tokens
    )
    return contrasted(anchor.read(residuals[0]), anchor)
