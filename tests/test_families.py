"""Every family three ways: the fast engine, the oracle that writes weights, and one that only uses forward hooks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import hook_oracle
from conftest import CORE, SHAPES, build_model, build_pair, slow_unless, some_of_every_unit
from weightpatch import Anchor, ModelPair
from weightpatch.component import Component
from weightpatch.engine import Measured, suffix, swap


def is_normal(shape: str, attention: str, dtype: torch.dtype) -> bool:
    """Every shape in float64, and what differs most in other dtypes, in half precision by one kind of attention."""
    return (shape in CORE or dtype == torch.float64) and (attention == "sdpa" or dtype != torch.bfloat16)


CASES = [
    pytest.param(
        shape,
        attention,
        dtype,
        id=f"{shape}-{attention}-{str(dtype).removeprefix('torch.')}",
        marks=slow_unless(is_normal(shape, attention, dtype)),
    )
    for shape in SHAPES
    for attention in ("sdpa", "eager")
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    if (shape, attention) != ("gemma2-softcap", "sdpa")  # transformers: sdpa does not support softcap
]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
ANCHOR = Anchor(layer=2, direction=torch.randn(24, generator=torch.Generator().manual_seed(9)), positions=(-1, 1))
PROMPTS = [[7, 3, 55, 20, 41, 8, 19], [7, 3, 55, 2, 2, 30, 11, 60, 5], [7, 3, 55, 20], [7, 3, 55, 20]]
"""Ragged, with a start that all share, one that is the start of another, and twice the same; beyond the windows."""


def effects(measured: Iterator[Measured]) -> Tensor:
    return torch.stack([one.readout - one.base for one in measured])


def sweep(engine: object, pair: ModelPair, chosen: list[Component]) -> Tensor:
    return effects(engine.sweep(pair, PROMPTS, ANCHOR, chosen, batch_tokens=10, skip=frozenset()))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("shape", "attention", "dtype"), [case for case in CASES if case.values[2] in TOLERANCE])
def test_suffix_swap_and_hooks_agree_on_every_unit(shape: str, attention: str, dtype: torch.dtype) -> None:
    pair = build_pair(shape, dtype=dtype, attention=attention)
    chosen = some_of_every_unit(pair, below=ANCHOR.layer)
    fast, written = sweep(suffix, pair, chosen), sweep(swap, pair, chosen)
    where = {"layer": ANCHOR.layer, "positions": ANCHOR.positions, "direction": ANCHOR.direction}
    base, specialized = (hook_oracle.readouts(model, PROMPTS, **where) for model in (pair.base, pair.specialized))
    hooked = torch.stack(
        [
            hook_oracle.patched_readouts(pair.base, pair.specialized, PROMPTS, str(component), **where) - base
            for component in chosen
        ]
    )
    gap = float((specialized - base).abs().mean())
    assert float(hooked.abs().max()) > 0.05 * gap
    torch.testing.assert_close(fast, written, rtol=0, atol=TOLERANCE[dtype] * gap)
    torch.testing.assert_close(fast, hooked, rtol=0, atol=TOLERANCE[dtype] * gap)


@pytest.mark.parametrize(("shape", "attention", "dtype"), [case for case in CASES if case.values[2] not in TOLERANCE])
def test_in_half_precision_suffix_is_as_near_to_a_float32_run_as_writing_the_weights_is(
    shape: str, attention: str, dtype: torch.dtype
) -> None:
    models = [build_model(shape, seed=seed, dtype=dtype, attention=attention) for seed in (1, 2)]
    pair = ModelPair(base=models[0], specialized=models[1])
    chosen = some_of_every_unit(pair, below=ANCHOR.layer)
    fast, written = sweep(suffix, pair, chosen), sweep(swap, pair, chosen)
    for model in models:
        model.float()
    exact = sweep(swap, pair, chosen)
    ours, theirs = ((found - exact).abs().mean() for found in (fast, written))
    assert float(theirs) > 0
    assert float(ours) <= 1.5 * float(theirs)
