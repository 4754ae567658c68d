"""What every contestant is given: the same prompts, anchor and components, as each of them likes to have them."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weightpatch.anchor import Anchor
from weightpatch.component import Component, slices
from weightpatch.errors import PromptError
from weightpatch.localization import plan
from weightpatch.pair import ModelPair, check_prompts
from weightpatch.prompts import ContrastPrompts, TokenIds
from weightpatch.residuals import read_residuals


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """All prompts in one tensor, padded on the right.

    Attributes:
        tokens: Token ids, shape `(prompt, token)`.
        mask: 1 for a token, 0 for padding, same shape.
        last: Where each prompt's last token is, shape `(prompt,)`.
    """

    tokens: Tensor
    mask: Tensor
    last: Tensor

    @classmethod
    def of(cls, token_ids: Sequence[TokenIds], device: torch.device) -> Batch:
        """Pad prompts with token 0, as a tokenizer with `padding=True` would."""
        lengths = torch.tensor([len(ids) for ids in token_ids], device=device)
        tokens = torch.zeros(len(token_ids), int(lengths.max()), dtype=torch.long, device=device)
        for row, ids in zip(tokens, token_ids, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        mask = (torch.arange(tokens.shape[1], device=device) < lengths.unsqueeze(1)).long()
        return cls(tokens=tokens, mask=mask, last=lengths - 1)

    def at_last(self, residual: Tensor) -> Tensor:
        """Residual at each prompt's last token: `(prompt, token, feature)` -> `(prompt, feature)`."""
        return residual[torch.arange(len(self.last), device=residual.device), self.last]


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """One sweep to be done.

    Attributes:
        pair: The two models.
        prompts: The prompts as token ids, so that no contestant tokenizes.
        token_ids: The same with their instruction, unpadded.
        batch: The same, padded.
        anchor: What is read, at each prompt's last token.
        components: What is patched, ordered by layer; all of it lies below the anchor.
    """

    pair: ModelPair
    prompts: ContrastPrompts
    token_ids: tuple[TokenIds, ...]
    batch: Batch
    anchor: Anchor
    components: tuple[Component, ...]

    @classmethod
    def of(cls, pair: ModelPair, prompts: ContrastPrompts, *, layer: int, units: str) -> Work:
        """The sweep of some units towards an anchor layer.

        The anchor's direction is the difference of the two models' mean residuals, so that there is a gap to measure
        differences by; any direction costs the same.

        Raises:
            AnchorError: a layer that the model does not have, or with nothing below it.
            ComponentError: an unknown unit.
        """
        plan(pair, Anchor(layer=layer, direction=torch.ones(pair.architecture.n_features)), units)
        token_ids = prompts.tokenize(pair.tokenizer).with_instruction
        base, specialized = (
            read_residuals(model, token_ids, layers=[layer], positions=[-1]).double().mean(dim=(0, 1, 2))
            for model in (pair.base, pair.specialized)
        )
        anchor = Anchor(layer=layer, direction=specialized - base)
        components, _ = plan(pair, anchor, units)
        device = next(pair.base.parameters()).device
        return cls(
            pair=pair,
            prompts=prompts,
            token_ids=token_ids,
            batch=Batch.of(token_ids, device),
            anchor=anchor,
            components=components,
        )


def choose_prompts(pair: ModelPair, prompts: ContrastPrompts, *, n_prompts: int, seed: int) -> ContrastPrompts:
    """Some of the prompts, drawn at random and turned into token ids.

    Raises:
        PromptError: fewer prompts than asked for, or prompts that the pair cannot read.
    """
    if not 1 <= n_prompts <= len(prompts):
        raise PromptError(f"cannot draw {n_prompts} of {len(prompts)} prompts. Ask for 1 to {len(prompts)}.")
    drawn = random.Random(seed).sample(prompts.rows, n_prompts)  # noqa: S311  no secret
    tokenized = ContrastPrompts(tuple(drawn)).tokenize(pair.tokenizer)
    chosen = ContrastPrompts.from_token_ids(
        with_instruction=tokenized.with_instruction, without_instruction=tokenized.without_instruction
    )
    check_prompts(pair, chosen, positions=(-1,), both_sides=False)
    return chosen


@dataclass(frozen=True, kw_only=True, eq=False)
class Swap:
    """What a loop writes for one component.

    Attributes:
        component: What is patched.
        pieces: A view into the base's parameters, the specialized values that go there, and the base's own.
    """

    component: Component
    pieces: tuple[tuple[Tensor, Tensor, Tensor], ...]

    @classmethod
    def of(cls, pair: ModelPair, component: Component) -> Swap:
        """Look up and copy what is needed; done before the clock starts, as if both models were in memory."""
        pieces = []
        for piece in slices(pair.architecture, component):
            target = piece.of(pair.base.get_parameter(piece.parameter).data)
            donor = piece.of(pair.specialized_weight(piece.parameter)).to(target.device).clone()
            pieces.append((target, donor, target.clone()))
        return cls(component=component, pieces=tuple(pieces))

    def write(self) -> None:
        """Put the specialized values into the base."""
        for target, donor, _ in self.pieces:
            target.copy_(donor)

    def restore(self) -> None:
        """Put the base's own values back, bit for bit."""
        for target, _, original in reversed(self.pieces):
            target.copy_(original)


def same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model with modules of its own around the very same parameters: what a tool may wrap, hook and rewire.

    Weights written into either are in both; nothing that is done to the modules of one reaches the other.
    """
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
