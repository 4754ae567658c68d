"""What coefficients are learned from: every expert's anchors, or the streams that they are read in.

A few dozen prompts of each expert, no labels, no generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weightpatch.anchor import Anchor
from weightpatch.architecture import embedding_weight, layers_of
from weightpatch.errors import MergeError
from weightpatch.merging.learning import Loss, Weights
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompts
from weightpatch.reading import inputs, reference
from weightpatch.residuals import BATCH_TOKENS, batches, evaluating, pad, readout_index, walk

_LEAST = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Aim:
    """What the merged model shall read on one task of one expert.

    Attributes:
        expert: Its name.
        task: Of its run.
        anchor: What is read.
        token_ids: Unpadded prompts; for a contrast, those with the instruction first, then those without.
        base: Readouts of the base, shape `(prompt,)`.
        specialized: Readouts of the expert.
    """

    expert: str
    task: str
    anchor: Anchor
    token_ids: tuple[tuple[int, ...], ...]
    base: Tensor
    specialized: Tensor

    @property
    def gap(self) -> float:
        """Mean readout of the expert minus that of the base."""
        return float((self.specialized - self.base).mean())

    def recovery(self, model: PreTrainedModel, weights: Weights, *, batch_tokens: int = BATCH_TOKENS) -> float:
        """How much of the gap a merged model's mean readout has closed; 1: all of it."""
        with evaluating(model):
            read = [
                readouts(model, self.anchor, [self.token_ids[place] for place in chosen], weights)
                for chosen in self.batches(batch_tokens)
            ]
        order = [place for chosen in self.batches(batch_tokens) for place in chosen]
        found = torch.cat(read)[torch.tensor(order).argsort()]
        if self.anchor.is_difference:
            found = torch.sub(*found.chunk(2))
        return float((found.mean() - self.base.mean()) / self.gap)

    def batches(self, batch_tokens: int) -> list[list[int]]:
        """Places of sequences that are run together; both sequences of a contrast."""
        if not self.anchor.is_difference:
            return batches(self.token_ids, batch_tokens)
        n = len(self.token_ids) // 2
        chosen = batches(self.token_ids[:n], max(1, batch_tokens // 2))
        return [[*part, *(place + n for place in part)] for part in chosen]


def aim(pair: ModelPair, prompts: ContrastPrompts, anchor: Anchor, *, expert: str, task: str) -> Aim:
    """Read both models of an expert's pair on its prompts.

    Args:
        pair: Base and expert.
        prompts: Of one task.
        anchor: Of this task.
        expert: Name.
        task: Name.

    Raises:
        MergeError: the expert reads no higher than the base.
    """
    base, specialized = reference(pair, prompts, anchor)
    found = Aim(
        expert=expert,
        task=task,
        anchor=anchor,
        token_ids=inputs(pair, prompts, anchor),
        base=base,
        specialized=specialized,
    )
    if found.gap <= 0:
        raise MergeError(
            f"{expert} reads no higher than the base on {task} ({found.gap:.3g}): its anchor cannot be restored. "
            "Leave the task out, or fit its anchor again."
        )
    return found


def restoring(model: PreTrainedModel, aims: Sequence[Aim], *, batch_tokens: int = BATCH_TOKENS) -> list[Loss]:
    """Losses that are 0 together where every readout is the expert's: squared distances, in gaps.

    Prompts of a task, tasks of an expert, and experts count alike.

    Args:
        model: Of the architecture; its own weights are not used.
        aims: What to restore.
        batch_tokens: Most tokens of one forward pass.
    """
    experts = [one.expert for one in aims]
    n_experts = len(set(experts))
    return [
        _loss(model, one, chosen, weight=1 / (n_experts * experts.count(one.expert) * len(one.base)))
        for one in aims
        for chosen in one.batches(batch_tokens)
    ]


def _loss(model: PreTrainedModel, one: Aim, chosen: Sequence[int], *, weight: float) -> Loss:
    token_ids = [one.token_ids[place] for place in chosen]
    prompts = [place for place in chosen if place < len(one.specialized)]
    wanted = one.specialized[prompts]

    def loss(weights: Weights) -> Tensor:
        found = readouts(model, one.anchor, token_ids, weights)
        if one.anchor.is_difference:
            found = torch.sub(*found.chunk(2))
        return weight * ((found - wanted) / one.gap).square().sum()

    return loss


def readouts(model: PreTrainedModel, anchor: Anchor, token_ids: Sequence[Sequence[int]], weights: Weights) -> Tensor:
    """The anchor's readout of each sequence with other weights in place, shape `(sequence,)`, with its gradient."""
    return anchor.project(streams(model, anchor, token_ids, weights, last=anchor.layer)[0])


def restoring_streams(
    model: PreTrainedModel, aims: Sequence[Aim], experts: Mapping[str, Weights], *, batch_tokens: int = BATCH_TOKENS
) -> list[Loss]:
    """Losses that are 0 together where whole residual streams are the expert's, at the anchors' positions.

    All layers from the anchor's to the last are read. Squared distances, over the mean squared distance between base
    and expert in the same layer; prompts, tasks, experts count as in `restoring`. The anchors' directions play no part.

    Args:
        model: The base.
        aims: Where to read.
        experts: Name -> its weights.
        batch_tokens: Most tokens of one forward pass.
    """
    names = [one.expert for one in aims]
    found: list[Loss] = []
    for one in aims:
        weight = 1 / (len(set(names)) * names.count(one.expert) * len(one.token_ids))
        for chosen in batches(one.token_ids, batch_tokens):
            token_ids = [one.token_ids[place] for place in chosen]
            with evaluating(model):
                base = streams(model, one.anchor, token_ids, {})
                wanted = streams(model, one.anchor, token_ids, experts[one.expert])
            found.append(_stream_loss(model, one.anchor, token_ids, wanted, base, weight=weight))
    return found


def _stream_loss(
    model: PreTrainedModel,
    anchor: Anchor,
    token_ids: Sequence[Sequence[int]],
    wanted: Tensor,
    base: Tensor,
    *,
    weight: float,
) -> Loss:
    scale = (wanted - base).square().sum(dim=-1).mean(dim=(1, 2)).clamp_min(_LEAST)

    def loss(weights: Weights) -> Tensor:
        distance = (streams(model, anchor, token_ids, weights) - wanted).square().sum(dim=-1).mean(dim=2).sum(dim=1)
        return weight * (distance / scale).mean()

    return loss


def streams(
    model: PreTrainedModel,
    anchor: Anchor,
    token_ids: Sequence[Sequence[int]],
    weights: Weights,
    *,
    last: int | None = None,
) -> Tensor:
    """Residual streams at an anchor's positions with other weights in place, from its layer to the last, or to `last`.

    Returns:
        Shape `(layer, sequence, position, feature)`, float32, with its gradient.
    """
    device = embedding_weight(model).device
    index = readout_index(token_ids, anchor.positions).to(device)
    rows = torch.arange(len(token_ids), device=device).unsqueeze(1)
    read: list[Tensor] = []

    def see(layer: int, residual: Tensor, _args: object, _kwargs: object) -> None:
        if layer >= anchor.layer:
            read.append(residual[rows, index].float())

    walk(model, pad(token_ids, device), len(layers_of(model)) if last is None else last, see, weights=weights)
    return torch.stack(read)
