"""Readouts of behaviour: what a model's output says along given responses, instead of an anchor on the way to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weightpatch.architecture import embedding_weight
from weightpatch.errors import PromptError
from weightpatch.generation import BATCH_SIZE, generate
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompts, TokenIds, TokenizedPrompts
from weightpatch.reader import Reader
from weightpatch.residuals import BATCH_TOKENS, batches, evaluating, pad

N_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Margin:
    """Mean log-probability of a compliant response minus that of a plain one, in nats to a token.

    Attributes:
        layer: The number of the models' layers: the output is read.
        compliant: For each prompt, tokens of a response that follows its instruction.
        plain: For each prompt, tokens of one that does not.
        prompts: Tokens of the prompts that it is for, if it is to be refused for others.
    """

    layer: int
    compliant: tuple[TokenIds, ...]
    plain: tuple[TokenIds, ...]
    prompts: tuple[TokenIds, ...] = ()

    @property
    def is_difference(self) -> bool:
        """Two runs are subtracted."""
        return True

    def sequences(self, prompts: TokenizedPrompts) -> tuple[TokenIds, ...]:
        """What the models run on: prompts with their compliant response, then with the plain one."""
        _check_prompts(self.prompts, prompts)
        return (*forced(prompts.with_instruction, self.compliant), *forced(prompts.with_instruction, self.plain))

    def reader(self, token_ids: Sequence[Sequence[int]]) -> Reader:
        """See `Readable`."""
        responses = (*self.compliant, *self.plain)
        return Reader(
            layer=self.layer,
            places=_places(token_ids, responses),
            score=partial(_mean_log_prob, responses),
            through_head=True,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Divergence:
    """Minus KL(specialized || model) along the specialized model's responses, in nats to a token: 0 at best.

    Patch exactly where it matters: near its best value a divergence is all curvature, which no first-order estimate
    sees, however small the difference of the weights.

    Attributes:
        layer: The number of the models' layers: the output is read.
        responses: For each prompt, tokens of the specialized model's response.
        log_probs: Its next-token log-probabilities there, `(token, vocabulary)` for each prompt.
        prompts: Tokens of the prompts that it is for, if it is to be refused for others.
    """

    layer: int
    responses: tuple[TokenIds, ...]
    log_probs: tuple[Tensor, ...] = field(repr=False)
    prompts: tuple[TokenIds, ...] = ()

    @property
    def is_difference(self) -> bool:
        """One run is read."""
        return False

    def sequences(self, prompts: TokenizedPrompts) -> tuple[TokenIds, ...]:
        """What the models run on: prompts with the response."""
        _check_prompts(self.prompts, prompts)
        return tuple(forced(prompts.with_instruction, self.responses))

    def reader(self, token_ids: Sequence[Sequence[int]]) -> Reader:
        """See `Readable`."""
        return Reader(
            layer=self.layer,
            places=_places(token_ids, self.responses),
            score=partial(_minus_divergence, self.log_probs),
            through_head=True,
        )


def fit_margin(
    pair: ModelPair, prompts: ContrastPrompts, *, n_tokens: int = N_TOKENS, batch_size: int = BATCH_SIZE
) -> Margin:
    """A margin between what the models say themselves.

    Compliant: the specialized model's greedy answer with the instruction. Plain: the base's to the query alone.

    Args:
        pair: The two models, with a tokenizer.
        prompts: Those that will be measured, in their order.
        n_tokens: Most tokens of a response.
        batch_size: Answers generated side by side.

    Raises:
        PromptError: no tokenizer.
    """
    if pair.tokenizer is None:
        raise PromptError("responses are generated: give the pair a tokenizer, or make Margin(...) of token ids.")
    tokens = prompts.without_responses().tokenize(pair.tokenizer)
    answer = partial(generate, max_new_tokens=n_tokens, batch_size=batch_size)
    with pair.materialized() as specialized:
        compliant = answer(specialized, pair.tokenizer, tokens.with_instruction)
    plain = answer(pair.base, pair.tokenizer, tokens.without_instruction)
    return Margin(
        layer=pair.architecture.n_layers,
        compliant=tuple(one.ids for one in compliant),
        plain=tuple(one.ids for one in plain),
        prompts=tokens.with_instruction,
    )


def fit_divergence(
    pair: ModelPair, prompts: ContrastPrompts, *, n_tokens: int = N_TOKENS, batch_size: int = BATCH_SIZE
) -> Divergence:
    """The divergence along the specialized model's own greedy answers.

    Args:
        pair: The two models.
        prompts: Those that will be measured, in their order.
        n_tokens: Most tokens of a response; 0: only the token after the prompt is compared, and nothing generated.
        batch_size: Answers generated side by side.

    Raises:
        PromptError: no tokenizer, where something is generated.
    """
    if pair.tokenizer is None and n_tokens:
        raise PromptError("responses are generated: give the pair a tokenizer, or make Divergence(...) yourself.")
    tokens = prompts.without_responses().tokenize(pair.tokenizer).with_instruction
    responses: tuple[TokenIds, ...] = ((),) * len(tokens)
    if pair.tokenizer is not None and n_tokens:
        with pair.materialized() as specialized:
            answers = generate(specialized, pair.tokenizer, tokens, max_new_tokens=n_tokens, batch_size=batch_size)
        responses = tuple(answer.ids for answer in answers)
    return Divergence(
        layer=pair.architecture.n_layers,
        responses=responses,
        log_probs=tuple(forced_log_probs(pair.specialized, tokens, responses)),
        prompts=tokens,
    )


def forced_log_probs(
    model: PreTrainedModel,
    token_ids: Sequence[TokenIds],
    responses: Sequence[TokenIds],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Tensor]:
    """Next-token log-probabilities along given responses (teacher forcing).

    Args:
        model: Any causal language model.
        token_ids: Prompts, unpadded.
        responses: What is forced behind each; an empty one counts as one token to predict.
        batch_tokens: Most tokens of one forward pass.

    Returns:
        For each prompt, in order, `(token, vocabulary)`, float32, on the CPU: one row for every token of the response.
    """
    # The response's last token predicts nothing that is compared, so it need not be run.
    whole = forced(token_ids, responses)
    found: dict[int, Tensor] = {}
    with evaluating(model):
        for batch in batches(whole, batch_tokens):
            tokens = pad([whole[place] for place in batch], embedding_weight(model).device)
            start = min(len(token_ids[place]) for place in batch) - 1
            logits = model(input_ids=tokens, use_cache=False, logits_to_keep=tokens.shape[1] - start).logits
            for row, place in enumerate(batch):
                first = len(token_ids[place]) - 1 - start
                own = logits[row, first : first + max(1, len(responses[place]))]
                found[place] = torch.log_softmax(own.float(), dim=-1).cpu()
    return [found[place] for place in range(len(whole))]


def _check_prompts(fitted: tuple[TokenIds, ...], prompts: TokenizedPrompts) -> None:
    if fitted and fitted != prompts.with_instruction:
        raise PromptError(
            "this readout was fitted on other prompts: fit it on those that are measured, in their order."
        )


def forced(token_ids: Sequence[TokenIds], responses: Sequence[TokenIds]) -> list[TokenIds]:
    """Prompts with all of their responses but the last token, which predicts nothing that is compared."""
    if len(token_ids) != len(responses):
        raise PromptError(
            f"{len(responses)} responses for {len(token_ids)} prompts: fit the readout on those that are measured."
        )
    return [(*prompt, *response[:-1]) for prompt, response in zip(token_ids, responses, strict=True)]


def _places(sequences: Sequence[Sequence[int]], responses: Sequence[TokenIds]) -> tuple[tuple[int, ...], ...]:
    """Where the tokens of each response are predicted, in sequences that `forced` made."""
    counts = [max(1, len(response)) for response in responses]
    return tuple(tuple(range(len(ids) - count, len(ids))) for ids, count in zip(sequences, counts, strict=True))


def _mean_log_prob(responses: Sequence[TokenIds], sequence: int, logits: Tensor) -> Tensor:
    """Of a response's tokens, `(..., position, vocabulary)` -> `(...)`; 0 for an empty response."""
    response = responses[sequence]
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    chosen = log_probs[..., range(max(1, len(response))), list(response or (0,))].cpu().double()
    return chosen.mean(dim=-1) * bool(response)


def _minus_divergence(reference: Sequence[Tensor], sequence: int, logits: Tensor) -> Tensor:
    """Mean over positions, `(..., position, vocabulary)` -> `(...)`."""
    own = torch.log_softmax(logits.float(), dim=-1).cpu().double()
    other = reference[sequence].double()
    return -(other.exp() * (other - own)).sum(dim=-1).mean(dim=-1)
