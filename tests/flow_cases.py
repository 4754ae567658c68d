"""What the tests against `flow_oracle` share: pairs in which nothing goes through float32, and the gap of a case."""

from __future__ import annotations

from functools import cache

import torch

import flow_oracle
from conftest import build_model
from weightpatch import ModelPair


@cache
def pair_of(shape: str, dtype: torch.dtype = torch.float64) -> ModelPair:
    """Two random models, the same in every test; in float64 nothing in them goes through float32."""
    models = [build_model(shape, seed=seed, dtype=dtype) for seed in (1, 2)]
    if dtype == torch.float64:
        models = [flow_oracle.with_exact_norms(model) for model in models]
    return ModelPair(base=models[0], specialized=models[1])


def mean_gap(case: flow_oracle.Case) -> float:
    return float((flow_oracle.readouts(case.exchanged()) - flow_oracle.readouts(case)).abs().mean())
