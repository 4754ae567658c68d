"""A merge told before it is written: every tensor's coefficients, what is kept of each expert, where they meet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weightpatch.component import Component
from weightpatch.merging.combining import thin
from weightpatch.merging.policies import overlap
from weightpatch.merging.writing import Merge


@dataclass(frozen=True, kw_only=True)
class Share:
    """What of one expert's difference goes into one parameter.

    Attributes:
        low: The least of its coefficients there.
        mean: Over entries.
        high: The greatest.
        kept: Share of its entries that are kept, by coefficient and sparsifier.
        norm: Of what is added, in the weights' own unit.
        whole_norm: Of its whole difference.
    """

    low: float
    mean: float
    high: float
    kept: float
    norm: float
    whole_norm: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a merge will do.

    Attributes:
        experts: Names.
        tensors: Parameter -> each expert's share of it.
        total: Expert -> the same over all parameters; its coefficients by number of entries.
        cosines: Two experts -> cosine of what they add; NaN where one adds nothing.
        opposed: Two experts -> share of the entries that both change which they push in opposite directions.
        overlaps: Two experts -> share of the components that either brings which both bring; empty without components.
    """

    experts: tuple[str, ...]
    tensors: Mapping[str, tuple[Share, ...]]
    total: Mapping[str, Share]
    cosines: Mapping[tuple[str, str], float]
    opposed: Mapping[tuple[str, str], float]
    overlaps: Mapping[tuple[str, str], float]


def explain(merge: Merge, weights: Mapping[str, Mapping[Component, float]] | None = None) -> Plan:
    """Read everything once and tell what would be added; sign election and averages come after that.

    Args:
        merge: What is to be merged.
        weights: Expert -> component -> coefficient, where components have some.
    """
    experts = merge.coefficients.experts
    n = len(experts)
    tensors: dict[str, tuple[Share, ...]] = {}
    sizes: dict[str, int] = {}
    products, both, against = (torch.zeros(n, n, dtype=torch.float64) for _ in range(3))
    thresholds = merge.thresholds()
    for name in merge.inputs.ours.shapes:
        shares: list[list[Share]] = []
        counts: list[int] = []
        chance = merge.chance(name, thresholds)
        for base, every, coefficients in merge.matrices(name):
            changes = [*every]
            left = thin(changes, coefficients, merge.method, **chance)
            parts = [merge.method.scale * c * one for c, one in zip(coefficients, left, strict=True)]
            added = torch.stack([part.reshape(-1) for part in parts])
            shares.append([_share(*own) for own in zip(changes, coefficients, added, strict=True)])
            counts.append(base.numel())
            products += (added @ added.T).double()
            signs = added.sign()
            both += (signs.abs() @ signs.abs().T).double()
            against += ((signs.abs() @ signs.abs().T - signs @ signs.T) / 2).double()
        tensors[name] = tuple(_together(own, counts) for own in zip(*shares, strict=True))
        sizes[name] = sum(counts)
    norms = products.diagonal().sqrt()
    pairs = [(one, other) for one in range(n) for other in range(n)]
    return Plan(
        experts=experts,
        tensors=tensors,
        total={
            expert: _together([own[place] for own in tensors.values()], list(sizes.values()))
            for place, expert in enumerate(experts)
        },
        cosines={(experts[i], experts[j]): _ratio(products[i, j], norms[i] * norms[j]) for i, j in pairs},
        opposed={(experts[i], experts[j]): _ratio(against[i, j], both[i, j]) for i, j in pairs},
        overlaps=overlap(weights) if weights else {},
    )


def _share(change: Tensor, coefficient: Tensor, added: Tensor) -> Share:
    return Share(
        low=float(coefficient.min()),
        mean=float(coefficient.mean()),
        high=float(coefficient.max()),
        kept=float((added != 0).sum()) / max(added.numel(), 1),
        norm=float(added.norm()),
        whole_norm=float(change.norm()),
    )


def _together(shares: tuple[Share, ...] | list[Share], counts: list[int]) -> Share:
    """Shares of several tensors as one of all of them."""
    n = max(sum(counts), 1)
    return Share(
        low=min(one.low for one in shares),
        mean=sum(one.mean * count for one, count in zip(shares, counts, strict=True)) / n,
        high=max(one.high for one in shares),
        kept=sum(one.kept * count for one, count in zip(shares, counts, strict=True)) / n,
        norm=math.sqrt(sum(one.norm**2 for one in shares)),
        whole_norm=math.sqrt(sum(one.whole_norm**2 for one in shares)),
    )


def _ratio(one: Tensor, other: Tensor) -> float:
    return float(one / other) if float(other) else math.nan
