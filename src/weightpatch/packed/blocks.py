"""Attention in blocks of a sparse mask: each block of queries meets only the keys that one of them may see.

A packed row's mask is mostly empty (a token sees its own prompt only). The attention function of the model's own
implementation is called once for each block, with the same arguments, so that scaling, soft-capping and grouped heads
stay the model's business.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from weightpatch.errors import ArchitectureError

NAME = "weightpatch_blocks"
"""Name of our function in transformers' registry of attention implementations."""

ROWS = 64
"""Queries of a block. More of them share fewer calls but meet more keys in vain."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Some queries with all the keys that one of them may see.

    Attributes:
        rows: The queries, shape `(query,)`.
        columns: The keys, shape `(key,)`.
        mask: What each query may see of them, shape `(1, head or 1, query, key)`, boolean or additive.
    """

    rows: Tensor
    columns: Tensor
    mask: Tensor


Blocks = tuple[Block, ...]


def blocks_of(mask: Tensor, rows: Tensor | None = None) -> Blocks:
    """Cut a mask into blocks.

    Args:
        mask: Shape `(1, head or 1, token, token)`, boolean (True: may see) or additive.
        rows: The queries that are wanted, shape `(query,)`; None for all tokens.
    """
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    seen = allowed.any(dim=1)[0]
    wanted = torch.arange(mask.shape[-2], device=mask.device) if rows is None else rows.to(mask.device)
    blocks = []
    for start in range(0, len(wanted), ROWS):
        part = wanted[start : start + ROWS]
        columns = seen[part].any(dim=0).nonzero().flatten()
        blocks.append(Block(rows=part, columns=columns, mask=mask[:, :, part][..., columns].contiguous()))
    return tuple(blocks)


_current: ContextVar[tuple[str, Blocks]] = ContextVar("weightpatch_blocks")


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it; queries of no block get zeros.

    Returns:
        Shape `(row, token, head, feature)`, and no attention weights.
    """
    del attention_mask  # the blocks hold it
    implementation, blocks = _current.get()
    attend = _function(implementation, module)
    out: Tensor | None = None
    for block in blocks:
        rows, columns = block.rows.to(query.device), block.columns.to(query.device)  # layers may lie on several devices
        part = attend(
            module,
            query.index_select(2, rows),
            key.index_select(2, columns),
            value.index_select(2, columns),
            block.mask.to(query.device),
            **options,
        )[0]
        if out is None:
            out = part.new_zeros((part.shape[0], query.shape[2], *part.shape[2:]))
        out[:, rows] = part
    if out is None:
        raise ArchitectureError("attention was called without a single query")
    return out, None


AttentionInterface.register(NAME, _attend)


def _function(implementation: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that a module would have called by itself."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise ArchitectureError(f'{type(module).__module__} has no eager_attention_forward. Use engine="swap".')
    found: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, own)
    return found


@contextmanager
def attending(config: PreTrainedConfig, implementation: str, blocks: Blocks) -> Iterator[None]:
    """Let the attention modules of a config work block by block, for as long as the `with` block lasts.

    Args:
        config: The config that the attention modules look at.
        implementation: The implementation that is called on each block.
        blocks: The blocks.
    """
    token = _current.set((implementation, blocks))
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = implementation
        _current.reset(token)
