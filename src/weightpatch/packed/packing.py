"""Prompts packed into one row of tokens behind the starts they share: a prefix tree laid out flat.

Whatever prompts have in common from their first token on (system prompt, chat template, a query asked with several
instructions) is there once, and nothing is padded. A mask lets each token see its own prompt only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

MOST_TOKENS = 4096
"""Most tokens of a packed row, however much memory there is: its mask is quadratic in them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """Where each token of some prompts lies in their packed row.

    Attributes:
        prompts: Places of the prompts in the whole list.
        paths: For each prompt, where each of its tokens lies in the row.
        owner: For each token of the row, one prompt (place in `prompts`) that it belongs to, shape `(token,)`.
        position: Its position in that prompt, shape `(token,)`.
    """

    prompts: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    owner: Tensor
    position: Tensor

    @property
    def n_tokens(self) -> int:
        """Tokens of the row."""
        return len(self.owner)

    def paths_at(self, positions: Sequence[Sequence[int]]) -> list[list[int]]:
        """Where some positions of each prompt lie in the row, as many to a prompt as given."""
        return [[path[position] for position in row] for path, row in zip(self.paths, positions, strict=True)]

    def mask(self, places: Tensor) -> Tensor:
        """Which tokens of the row are among some places: `(1, token, 1)`, boolean."""
        mask = torch.zeros(1, self.n_tokens, 1, dtype=torch.bool)
        mask[:, places.cpu()] = True
        return mask

    @cached_property
    def sees(self) -> Tensor:
        """Which token has which others before it in its prompt, itself among them: `(token, token)`, boolean."""
        sees = torch.zeros(self.n_tokens, self.n_tokens, dtype=torch.bool)
        for token, (owner, position) in enumerate(zip(self.owner.tolist(), self.position.tolist(), strict=True)):
            sees[token, list(self.paths[owner][: position + 1])] = True
        return sees

    def fold(self, value: Any) -> Any:
        """What belongs to tokens of the right-padded prompts, laid out for the packed row.

        Args:
            value: A tensor of shape `(prompt or 1, token, ...)`, a mask `(prompt or 1, head or 1, token, token)`, or a
                tuple of such; anything else is left as it is.

        Returns:
            Shape `(1, packed token, ...)` or `(1, head or 1, packed token, packed token)`. Masks also hide tokens of
            other prompts.
        """
        if isinstance(value, tuple):
            return tuple(self.fold(item) for item in value)
        length = max(len(path) for path in self.paths)
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[0] not in (1, len(self.prompts)):
            return value
        position = self.position.to(value.device)
        owner = self.owner.to(value.device) if value.shape[0] > 1 else torch.zeros_like(position)
        if value.ndim == 4 and value.shape[2:] == (length, length):
            folded = value[owner[:, None], :, position[:, None], position].permute(2, 0, 1)
            hidden = False if value.dtype == torch.bool else torch.finfo(value.dtype).min
            return folded.masked_fill(~self.sees.to(value.device), hidden).unsqueeze(0)
        return value[owner, position].unsqueeze(0) if value.shape[1] == length else value


def pack(token_ids: Sequence[Sequence[int]], *, most_tokens: int) -> tuple[Packing, ...]:
    """Pack prompts into as few rows as there may be.

    Args:
        token_ids: Unpadded prompts.
        most_tokens: Most tokens of a row; a longer prompt gets a row of its own.

    Returns:
        The rows. Prompts that start alike lie in one row where the limit allows it.
    """
    order = sorted(range(len(token_ids)), key=lambda place: (tuple(token_ids[place]), place))
    rows: list[list[int]] = []
    size = 0
    for place in order:
        shared = _shared(token_ids[rows[-1][-1]], token_ids[place]) if rows else 0
        size += len(token_ids[place]) - shared
        if not rows or size > most_tokens:
            rows.append([])
            size = len(token_ids[place])
        rows[-1].append(place)
    return tuple(_packed(token_ids, tuple(sorted(row))) for row in rows)


def side_by_side(token_ids: Sequence[Sequence[int]], *, most_tokens: int) -> tuple[Packing, ...]:
    """Lay prompts out one behind another, sharing nothing: each token of a row belongs to one prompt alone.

    Args:
        token_ids: Unpadded prompts.
        most_tokens: Most tokens of a row; a longer prompt gets a row of its own.
    """
    rows: list[list[int]] = []
    size = 0
    for place, ids in enumerate(token_ids):
        size += len(ids)
        if not rows or size > most_tokens:
            rows.append([])
            size = len(ids)
        rows[-1].append(place)
    return tuple(_laid_out([len(token_ids[place]) for place in row], tuple(row)) for row in rows)


def _laid_out(lengths: Sequence[int], prompts: tuple[int, ...]) -> Packing:
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    return Packing(
        prompts=prompts,
        paths=tuple(tuple(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)),
        owner=torch.tensor([place for place, length in enumerate(lengths) for _ in range(length)]),
        position=torch.tensor([position for length in lengths for position in range(length)]),
    )


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two prompts have in common at their start."""
    limit = min(len(one), len(other))
    return next((place for place in range(limit) if one[place] != other[place]), limit)


def _packed(token_ids: Sequence[Sequence[int]], prompts: tuple[int, ...]) -> Packing:
    """Lay prompts out in the order of their tokens, so that those that belong together lie side by side."""
    places: dict[tuple[int, int], int] = {}
    paths: dict[int, tuple[int, ...]] = {}
    owner: list[int] = []
    position: list[int] = []
    for prompt in sorted(range(len(prompts)), key=lambda prompt: tuple(token_ids[prompts[prompt]])):
        parent = -1
        path = []
        for depth, token in enumerate(token_ids[prompts[prompt]]):
            if (parent, token) not in places:
                places[parent, token] = len(owner)
                owner.append(prompt)
                position.append(depth)
            parent = places[parent, token]
            path.append(parent)
        paths[prompt] = tuple(path)
    return Packing(
        prompts=prompts,
        paths=tuple(paths[prompt] for prompt in range(len(prompts))),
        owner=torch.tensor(owner),
        position=torch.tensor(position),
    )
