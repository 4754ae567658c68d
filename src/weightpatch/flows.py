"""What components of one layer write, as a readout: their suppliers are then localized as an anchor's sources are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weightpatch.anchor import Anchor
from weightpatch.architecture import embedding_weight
from weightpatch.component import Component
from weightpatch.engine.deliveries import Deliveries, contribution
from weightpatch.engine.hybrids import layer_weights
from weightpatch.errors import AnchorError
from weightpatch.packed.calls import LayerCall, record
from weightpatch.packed.packing import side_by_side
from weightpatch.pair import ModelPair
from weightpatch.prompts import TokenIds, TokenizedPrompts
from weightpatch.reader import Reader
from weightpatch.residuals import BATCH_TOKENS, batches, evaluating, pad, walk


@dataclass(frozen=True, kw_only=True, eq=False)
class Flow:
    """The writes of some components of one layer, each token's along a direction of its own, added up.

    Attributes:
        pair: The two models.
        targets: Heads, attentions, MLPs or neurons of one layer.
        toward: For each prompt, along what each token's write is read, shape `(token, feature)`; 0: not at all.
        calls: The targets' layer as it is called on each prompt alone, from `layer_calls`.

    Raises:
        AnchorError: targets of several layers, or none.
    """

    pair: ModelPair
    targets: tuple[Component, ...]
    toward: tuple[Tensor, ...]
    calls: tuple[LayerCall, ...]

    def __post_init__(self) -> None:
        if len({target.layer for target in self.targets}) != 1 or self.targets[0].layer is None:
            raise AnchorError("a flow reads targets of one layer: make one for each layer and add up.")

    @property
    def layer(self) -> int:
        """The targets' layer: what enters it is what suppliers change."""
        return self.targets[0].layer or 0

    @property
    def is_difference(self) -> bool:
        """One run is read."""
        return False

    def sequences(self, prompts: TokenizedPrompts) -> tuple[TokenIds, ...]:
        """What the models run on: the prompts with their instruction."""
        if [len(ids) for ids in prompts.with_instruction] != [len(toward) for toward in self.toward]:
            raise AnchorError("this flow was made for other prompts: make it for those that are measured.")
        return prompts.with_instruction

    def reader(self, token_ids: Sequence[Sequence[int]]) -> Reader:
        """See `Readable`."""
        return Reader(
            layer=self.layer,
            places=tuple(tuple(range(len(ids))) for ids in token_ids),
            score=lambda sequence, residual: self._score(sequence, residual, {}),
        )

    def read(self, token_ids: Sequence[TokenIds], *, specialized: bool) -> Tensor:
        """The readout of one model on every prompt, with its own weights in the targets: `(prompt,)`, float64."""
        model = self.pair.specialized if specialized else self.pair.base
        weights = layer_weights(self.pair, self.calls[0], self.layer) if specialized else {}
        with evaluating(model, self.pair.base):
            residuals = entering(model, token_ids, self.layer)
            found = [self._score(sequence, residual, weights)[0] for sequence, residual in enumerate(residuals)]
        return torch.stack(found)

    def _score(self, sequence: int, residual: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Residuals of one prompt `(row, token, feature)` -> `(row,)`, float64, on the CPU."""
        deliveries = Deliveries(pair=self.pair, targets=self.targets, direction=self.toward[sequence])
        call = self.calls[sequence]
        parts = call.parts(residual.to(embedding_weight(self.pair.base).device), weights)
        return deliveries.of(self.layer, call, parts, weights).sum(dim=(1, 2)).cpu().to(torch.float64)


def along_anchor(anchor: Anchor, token_ids: Sequence[TokenIds]) -> tuple[Tensor, ...]:
    """For each prompt, the directions that read what is written along an anchor where it is read: `(token, feature)`.

    Args:
        anchor: A projection.
        token_ids: The prompts.
    """
    toward = []
    for places, ids in zip(anchor.reader(token_ids).places, token_ids, strict=True):
        rows = torch.zeros(len(ids), len(anchor.direction), dtype=torch.float64)
        for place in places:
            rows[place] += anchor.direction / len(places)
        toward.append(rows)
    return tuple(toward)


def toward_specialized(
    pair: ModelPair, token_ids: Sequence[TokenIds], target: Component, calls: Sequence[LayerCall]
) -> tuple[Tensor, ...]:
    """For each prompt, the directions that read how far a target's write has come to that in the specialized model.

    Each token's direction is the difference of the two writes there, over the sum of all their squares. So the flow's
    gap is 1 on every prompt; where the two do not differ on some prompt it is 0.

    Args:
        pair: The two models.
        token_ids: The prompts.
        target: Any target.
        calls: Its layer on each prompt, from `layer_calls`.
    """
    layer = target.layer or 0
    written = []
    with evaluating(pair.base, pair.specialized):
        for model, weights in ((pair.base, {}), (pair.specialized, layer_weights(pair, calls[0], layer))):
            residuals = entering(model, token_ids, layer)
            written.append(
                [
                    contribution(pair, target, call, call.parts(residual, weights), weights)[0].cpu().double()
                    for call, residual in zip(calls, residuals, strict=True)
                ]
            )
    toward = []
    for ours, theirs in zip(*written, strict=True):
        change = theirs - ours
        size = change.square().sum()
        toward.append(change / size if size > 0 else change)
    return tuple(toward)


def layer_calls(pair: ModelPair, token_ids: Sequence[Sequence[int]], layer: int) -> tuple[LayerCall, ...]:
    """A layer of the base as it is called on each prompt alone, read at all of its tokens.

    What a layer is handed depends on positions only, so prompts of one length share a call.
    """
    found: dict[int, LayerCall] = {}
    with evaluating(pair.base):
        for ids in token_ids:
            if len(ids) not in found:
                (packing,) = side_by_side([ids], most_tokens=len(ids))
                tokens = pad([ids], embedding_weight(pair.base).device)
                calls, _ = record(pair.base, tokens, packing, layer + 1, torch.arange(len(ids)))
                found[len(ids)] = calls[layer]
    return tuple(found[len(ids)] for ids in token_ids)


def entering(model: PreTrainedModel, token_ids: Sequence[Sequence[int]], layer: int) -> list[Tensor]:
    """Residual stream entering a layer on each prompt, `(1, token, feature)`."""
    found: dict[int, Tensor] = {}
    for batch in batches(token_ids, BATCH_TOKENS):

        def see(number: int, residual: Tensor, _args: object, _kwargs: object, batch: list[int] = batch) -> None:
            if number == layer:
                rows = zip(batch, residual, strict=True)
                found.update((prompt, row[None, : len(token_ids[prompt])]) for prompt, row in rows)

        walk(model, pad([token_ids[prompt] for prompt in batch], embedding_weight(model).device), layer, see)
    return [found[prompt] for prompt in range(len(token_ids))]
