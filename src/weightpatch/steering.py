"""Holding an anchor's readout at a level while a model runs: steering the base, ablating the specialized model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weightpatch.anchor import Anchor, Span
from weightpatch.errors import AnchorError
from weightpatch.residuals import Edit, editing


@dataclass(frozen=True, kw_only=True, eq=False)
class Hold:
    """What happens to one prompt's residual stream: h + (level - <h, direction>) along.

    Attributes:
        layer: Where: the stream that enters it; `n_layers`: what leaves the last one.
        direction: Unit vector whose projection is held, `(feature,)`.
        level: At which value.
        along: Unit vector along which the difference is added; None: the direction itself. Another one makes a control
            that is pushed as far, but elsewhere.
        positions: Positions of the prompt, from its end, so negative.
        span: Whether tokens of the answer are held too.
        n_tokens: How many of them, from the first on; None: all.
    """

    layer: int
    direction: Tensor
    level: float
    along: Tensor | None = None
    positions: tuple[int, ...] = (-1,)
    span: Span = "answer"
    n_tokens: int | None = None

    def reaches(self, token: int) -> bool:
        """Whether it holds the answer's token of this number, from 1 on."""
        return self.span == "answer" and (self.n_tokens is None or token <= self.n_tokens)


@contextmanager
def steered(
    model: PreTrainedModel, anchor: Anchor, level: float, *, span: Span = "answer"
) -> Iterator[PreTrainedModel]:
    """The model with an anchor's projection held at a level, for as long as the block lasts.

    A forward pass over several tokens is taken for a prompt (padded on the left, if at all) and held at the anchor's
    positions; one over a single token for a token of the answer, as in `generate` with its cache.

    Args:
        model: Either model of a pair. Its weights stay as they are.
        anchor: Layer, direction and positions.
        level: The projection to hold; `anchor.report.behaviour` has the levels that its gates were measured at.
        span: `prompt`: the readout positions only. `answer`: every token of the answer too.

    Yields:
        The model itself, for logits and generation.

    Raises:
        AnchorError: positions counted from a prompt's start.
    """
    hold = Hold(
        layer=anchor.layer,
        direction=anchor.direction,
        level=level,
        positions=from_the_end(anchor.positions),
        span=span,
    )
    with holding(model, [hold], is_shared=True):
        yield model


def from_the_end(positions: Sequence[int]) -> tuple[int, ...]:
    """The positions, if all count from a prompt's end: only these lie alike in a batch padded on the left.

    Raises:
        AnchorError: some do not.
    """
    if any(position >= 0 for position in positions):
        raise AnchorError(
            f"readout positions {list(positions)} are counted from a prompt's start; steering needs them from its end. "
            "Give negative ones, as -1 for the last token."
        )
    return tuple(positions)


@contextmanager
def holding(
    model: PreTrainedModel, holds: Sequence[Hold | None], *, is_shared: bool = False
) -> Iterator[Callable[[Sequence[int]], None]]:
    """Hold every prompt of a batch in its own way, at layers of its own.

    Args:
        model: The model that will run.
        holds: One for each prompt; None leaves it alone.
        is_shared: The only hold is for all rows of every batch.

    Yields:
        A function to be told, before each batch, which prompts its rows are (`generate`'s `on_batch`).
    """
    layers = {hold.layer for hold in holds if hold}
    rows: list[int] = []

    def select(places: Sequence[int]) -> None:
        rows[:] = places

    def edit_at(layer: int) -> Edit:
        n_answered = 0

        def edit(residual: Tensor) -> Tensor:
            nonlocal n_answered
            places = [0] * residual.shape[0] if is_shared else rows
            chosen = [(row, hold) for row, place in enumerate(places) if (hold := holds[place]) and hold.layer == layer]
            is_answer = residual.shape[1] == 1
            n_answered = n_answered + 1 if is_answer else 0
            if is_answer:
                chosen = [(row, hold) for row, hold in chosen if hold.reaches(n_answered)]
            return _hold(residual, chosen, is_answer=is_answer) if chosen else residual

        return edit

    with editing(model, {layer: edit_at(layer) for layer in layers}):
        yield select


def _hold(residual: Tensor, chosen: Sequence[tuple[int, Hold]], *, is_answer: bool) -> Tensor:
    """Residual `(row, token, feature)` with the chosen rows held; a copy."""
    at = [(row, position, hold) for row, hold in chosen for position in ((-1,) if is_answer else hold.positions)]
    rows, positions = [row for row, _, _ in at], [position for _, position, _ in at]
    directions = torch.stack([hold.direction for _, _, hold in at]).to(residual.dtype).to(residual.device)
    along = torch.stack([hold.direction if hold.along is None else hold.along for _, _, hold in at])
    along = along.to(residual.dtype).to(residual.device)  # (held, feature)
    levels = torch.tensor([hold.level for _, _, hold in at], dtype=residual.dtype, device=residual.device)
    held = residual.clone()
    found = held[rows, positions]
    held[rows, positions] = found + (levels - (found * directions).sum(dim=-1))[:, None] * along
    return held


def random_direction(n_features: int, generator: torch.Generator) -> Tensor:
    """A unit vector in no particular direction, `(feature,)`, float64: where a control is pushed."""
    vector = torch.randn(n_features, generator=generator).to(torch.float64)
    unit: Tensor = vector / vector.norm()
    return unit
