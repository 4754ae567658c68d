"""What coefficients are learned from: every expert's anchors, the streams that they are read in, or what comes out.

A few dozen prompts of each expert and no labels; at most each expert's own answers to these prompts are generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import DynamicCache, PreTrainedModel

from weightpatch.anchor import Anchor
from weightpatch.architecture import embedding_weight, layers_of
from weightpatch.errors import MergeError
from weightpatch.generation import generate
from weightpatch.merging.learning import Loss, Weights
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompts
from weightpatch.reader import logits_of
from weightpatch.reading import inputs, reference
from weightpatch.residuals import BATCH_TOKENS, LEAST_SHARED, batches, evaluating, pad, readout_index, walk

_LEAST = 1e-12
_MOST_PADDING = 1 / 8
"""Of the tokens of a forward pass: more costs more than another pass does."""


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
        answers: What the expert answers to each sequence; where there are any, whole states are read along them.
    """

    expert: str
    task: str
    anchor: Anchor
    token_ids: tuple[tuple[int, ...], ...]
    base: Tensor
    specialized: Tensor
    answers: tuple[tuple[int, ...], ...] = ()

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


def aim(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Anchor,
    *,
    expert: str,
    task: str,
    answer_tokens: int = 0,
) -> Aim:
    """Read both models of an expert's pair on its prompts.

    Args:
        pair: Base and expert.
        prompts: Of one task.
        anchor: Of this task.
        expert: Name.
        task: Name.
        answer_tokens: Most tokens of the expert's own greedy answers to take along; 0: none.

    Raises:
        MergeError: answers without a tokenizer.
    """
    base, specialized = reference(pair, prompts, anchor)
    token_ids = inputs(pair, prompts, anchor)
    answers: tuple[tuple[int, ...], ...] = ()
    if answer_tokens:
        if pair.tokenizer is None:
            raise MergeError(f"{expert} and the base bring no tokenizer, which generating answers needs.")
        found = generate(pair.specialized, pair.tokenizer, token_ids, max_new_tokens=answer_tokens)
        answers = tuple(one.ids for one in found)
    return Aim(
        expert=expert,
        task=task,
        anchor=anchor,
        token_ids=token_ids,
        base=base,
        specialized=specialized,
        answers=answers,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Spot:
    """Where residual streams are read in some sequences.

    Attributes:
        token_ids: The sequences, unpadded.
        positions: Of each sequence; negative ones count from its end.
        first: The first layer whose entering stream is read.
        last: The last one; `n_layers`: what leaves the model's last layer.
    """

    token_ids: tuple[tuple[int, ...], ...]
    positions: Sequence[int]
    first: int
    last: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.token_ids))


Part = tuple[Spot, Callable[[Tensor, Weights], Tensor]]
"""Where to read, and a loss on what is read there, shape `(layer, sequence, position, feature)`, with some weights."""


def restoring(model: PreTrainedModel, aims: Sequence[Aim], *, batch_tokens: int = BATCH_TOKENS) -> list[Loss]:
    """Losses that are 0 together where every readout is the expert's: squared distances, in gaps.

    Prompts of a task, tasks of an expert, and experts count alike.

    Args:
        model: Of the architecture; its own weights are not used.
        aims: What to restore.
        batch_tokens: Most tokens of one forward pass.

    Raises:
        MergeError: an expert that reads no higher than the base.
    """
    for one in aims:
        if one.gap <= 0:
            raise MergeError(
                f"{one.expert} reads no higher than the base on {one.task} ({one.gap:.3g}): its anchor cannot be "
                "restored. Fit it again (weightpatch run with another --layer), or learn from --policy streams, which "
                "needs no direction."
            )
    experts = [one.expert for one in aims]
    n_experts = len(set(experts))
    parts = [
        _readout_part(one, chosen, weight=1 / (n_experts * experts.count(one.expert) * len(one.base)))
        for one in aims
        for chosen in one.batches(batch_tokens)
    ]
    return together(model, parts, batch_tokens=batch_tokens)


def _readout_part(one: Aim, chosen: Sequence[int], *, weight: float) -> Part:
    wanted = one.specialized[[place for place in chosen if place < len(one.specialized)]]

    def loss(read: Tensor, _weights: Weights) -> Tensor:
        found = one.anchor.project(read[0])
        if one.anchor.is_difference:
            found = torch.sub(*found.chunk(2))
        return weight * ((found - wanted) / one.gap).square().sum()

    return _anchored(one.anchor, [one.token_ids[place] for place in chosen]), loss


def readouts(model: PreTrainedModel, anchor: Anchor, token_ids: Sequence[tuple[int, ...]], weights: Weights) -> Tensor:
    """The anchor's readout of each sequence with other weights in place, shape `(sequence,)`, with its gradient."""
    (found,) = streams(model, [_anchored(anchor, token_ids)], weights)
    return anchor.project(found[0])


def _anchored(anchor: Anchor, token_ids: Sequence[tuple[int, ...]]) -> Spot:
    return Spot(token_ids=tuple(token_ids), positions=anchor.positions, first=anchor.layer, last=anchor.layer)


@dataclass(frozen=True, kw_only=True)
class Weighing:
    """What each part of a loss on whole states counts; a part that counts nothing is not computed.

    Attributes:
        streams: Squared distance of residual streams, over that of base and expert.
        outputs: KL(expert || merged) of the next token, in nats.
    """

    streams: float = 0.0
    outputs: float = 0.0


def restoring_states(
    model: PreTrainedModel,
    aims: Sequence[Aim],
    theirs: Callable[[str], Weights],
    weighing: Weighing,
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Loss]:
    """Losses that are 0 together where the merged model is in the expert's state at the anchors' positions.

    With answers the positions are those of the last token before the answer and of each of its tokens.

    Residual streams are read in all layers from the anchor's to the last: squared distances, over the mean squared
    distance between base and expert in the same layer, as a mean over layers. Outputs are the distribution of the next
    token. Prompts, tasks, experts count as in `restoring`; the anchors' directions play no part.

    Args:
        model: The base.
        aims: Where to read.
        theirs: From an expert's name to its weights; called for one task at a time.
        weighing: What counts how much.
        batch_tokens: Most tokens of one forward pass.
    """
    n_layers = len(layers_of(model))
    parts: list[Part] = []
    for one, share in zip(aims, shares_of(aims), strict=True):
        weights = theirs(one.expert)
        spots = _spots(one, one.anchor.layer if weighing.streams else n_layers, n_layers, batch_tokens)
        with evaluating(model):
            wanted = [streams(model, [spot], weights)[0] for spot in spots]
            losses: list[list[Callable[[Tensor, Weights], Tensor]]] = [[] for _ in spots]
            if weighing.streams:
                gaps = [read - streams(model, [spot], {})[0] for spot, read in zip(spots, wanted, strict=True)]
                sizes = torch.cat([gap.square().sum(dim=-1).mean(dim=2) for gap in gaps], dim=1)
                scale = sizes.mean(dim=1).clamp_min(_LEAST)
                for own, read in zip(losses, wanted, strict=True):
                    own.append(_distance(read, weighing.streams * share / scale))
            if weighing.outputs:
                for own, read in zip(losses, wanted, strict=True):
                    own.append(_divergence(model, _log_probs(model, read, weights), weighing.outputs * share))
        parts += [(spot, _sum(own)) for spot, own in zip(spots, losses, strict=True)]
    return together(model, parts, batch_tokens=batch_tokens)


def _sum(losses: Sequence[Callable[[Tensor, Weights], Tensor]]) -> Callable[[Tensor, Weights], Tensor]:
    return lambda read, weights: torch.stack([one(read, weights) for one in losses]).sum()


def shares_of(aims: Sequence[Aim]) -> list[float]:
    """What each sequence counts: experts alike, their tasks alike, a task's sequences alike."""
    names = [one.expert for one in aims]
    return [1 / (len(set(names)) * names.count(one.expert) * len(one.token_ids)) for one in aims]


def _spots(one: Aim, first: int, last: int, batch_tokens: int) -> list[Spot]:
    """Where an aim's sequences are read, as many to a spot as fit into a forward pass and have positions alike."""
    if one.answers:
        return [
            Spot(token_ids=((*ids, *answer),), positions=range(-len(answer) - 1, 0), first=first, last=last)
            for ids, answer in zip(one.token_ids, one.answers, strict=True)
        ]
    return [
        Spot(
            token_ids=tuple(one.token_ids[place] for place in chosen),
            positions=one.anchor.positions,
            first=first,
            last=last,
        )
        for chosen in batches(one.token_ids, batch_tokens)
    ]


def _distance(wanted: Tensor, shares: Tensor) -> Callable[[Tensor, Weights], Tensor]:
    """Weighted squared distances, summed over sequences; shares of shape `(layer,)`."""

    def loss(read: Tensor, _weights: Weights) -> Tensor:
        distance = (read - wanted).square().sum(dim=-1).mean(dim=2).sum(dim=1)
        return (shares * distance).mean()

    return loss


def _divergence(model: PreTrainedModel, wanted: Tensor, share: float) -> Callable[[Tensor, Weights], Tensor]:
    def loss(read: Tensor, weights: Weights) -> Tensor:
        found = _log_probs(model, read, weights)
        return share * kl_div(found, wanted, log_target=True, reduction="none").sum(dim=-1).mean(dim=1).sum()

    return loss


def _log_probs(model: PreTrainedModel, read: Tensor, weights: Weights) -> Tensor:
    """Of the next token, shape `(sequence, position, token)`, from what leaves the last layer."""
    residual = read[-1].to(embedding_weight(model).dtype)
    return logits_of(model, residual, weights=weights).float().log_softmax(dim=-1)


def together(model: PreTrainedModel, parts: Sequence[Part], *, batch_tokens: int) -> list[Loss]:
    """One loss, and so one forward pass, for as many parts of like length as fit into it; their sum stays as it was."""
    dealt: list[list[Part]] = []
    for part in sorted(parts, key=lambda part: part[0].longest):
        lengths = [len(ids) for spot, _ in dealt[-1] for ids in spot.token_ids] if dealt else []
        longest = part[0].longest
        padding = sum(longest - length for length in lengths)
        fits = (len(lengths) + len(part[0].token_ids)) * longest <= batch_tokens
        if dealt and fits and padding <= _MOST_PADDING * batch_tokens:
            dealt[-1].append(part)
        else:
            dealt.append([part])

    def of(group: Sequence[Part]) -> Loss:
        def loss(weights: Weights) -> Tensor:
            found = streams(model, [spot for spot, _ in group], weights)
            return torch.stack([own(read, weights) for (_, own), read in zip(group, found, strict=True)]).sum()

        return loss

    return [of(group) for group in dealt]


def streams(model: PreTrainedModel, spots: Sequence[Spot], weights: Weights) -> list[Tensor]:
    """Residual streams with other weights in place, all spots in one forward pass.

    Returns:
        For each spot, shape `(layer, sequence, position, feature)`, float32, with its gradient.
    """
    device = embedding_weight(model).device
    token_ids = [ids for spot in spots for ids in spot.token_ids]
    ends = list(accumulate(len(spot.token_ids) for spot in spots))
    rows = [
        torch.arange(end - len(spot.token_ids), end, device=device)[:, None]
        for end, spot in zip(ends, spots, strict=True)
    ]
    index = [readout_index(spot.token_ids, spot.positions) for spot in spots]
    n_shared = _n_shared(token_ids, min(int(one.min()) for one in index))
    index = [one.to(device) - n_shared for one in index]
    last = max(spot.last for spot in spots)
    read: list[list[Tensor]] = [[] for _ in spots]

    def see(layer: int, residual: Tensor, _args: object, _kwargs: object) -> None:
        for place, spot in enumerate(spots):
            if spot.first <= layer <= spot.last:
                read[place].append(residual[rows[place], index[place]].float())

    cache: DynamicCache | None = None
    if n_shared:
        cache = DynamicCache()
        start = torch.tensor([token_ids[0][:n_shared]], device=device)
        walk(model, start, last, lambda *_: None, weights=weights, cache=cache)
        cache.batch_repeat_interleave(len(token_ids))
    walk(model, pad([ids[n_shared:] for ids in token_ids], device), last, see, weights=weights, cache=cache)
    return [torch.stack(own) for own in read]


def _n_shared(token_ids: Sequence[Sequence[int]], most: int) -> int:
    """How many tokens all sequences begin with, if it is worth to run them once."""
    alike = (len(set(column)) == 1 for column in zip(*token_ids, strict=False))
    shared = min(most, sum(takewhile(bool, alike)))
    return shared if len(token_ids) > 1 and shared >= LEAST_SHARED else 0
