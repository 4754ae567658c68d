"""Differences of weights as products of small matrices, each component's norm held where it is wanted."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weightpatch.architecture import Architecture
from weightpatch.component import Component, slices
from weightpatch.errors import ComponentError

_LEAST_NORM = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class Factors:
    """The difference of some rows or columns of one matrix: `scale * (outer @ inner)`, by rows.

    Attributes:
        axis: 0: `places` are rows of the matrix; 1: columns, and the product is transposed.
        places: Which, shape `(place,)`.
        owner: Which component each belongs to, by its place among those of this matrix, shape `(place,)`.
        norms: Norm of each component's part, shape `(component,)`.
        members: The components.
        outer: Trained, shape `(place, rank)`.
        inner: Trained, shape `(rank, other axis)`.
    """

    axis: int
    places: Tensor
    owner: Tensor
    norms: Tensor
    members: tuple[Component, ...]
    outer: Tensor
    inner: Tensor

    def scaled(self, left_out: Collection[Component] = ()) -> Tensor:
        """`outer` such that every component's part has its norm, shape `(place, rank)`; differentiable.

        Args:
            left_out: The parts of these are 0.
        """
        squares = ((self.outer @ (self.inner @ self.inner.T)) * self.outer).sum(dim=1)
        sums = torch.zeros_like(self.norms).index_add(0, self.owner, squares)
        wanted = self.norms * torch.tensor([float(one not in left_out) for one in self.members])
        return self.outer * (wanted / sums.sqrt().clamp_min(_LEAST_NORM))[self.owner][:, None]

    def dense(self, shape: torch.Size, left_out: Collection[Component] = ()) -> Tensor:
        """The difference of the whole matrix; differentiable."""
        rows = shape if self.axis == 0 else torch.Size((shape[1], shape[0]))
        product = self.scaled(left_out) @ self.inner
        whole = torch.zeros(rows, dtype=product.dtype, device=product.device).index_copy(0, self.places, product)
        return whole if self.axis == 0 else whole.T

    def adapter(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """The same as a pair of a LoRA adapter, A `(rank, in)` and B `(out, rank)`, whose product B A it is."""
        rows = shape[self.axis]
        outer = torch.zeros(rows, self.outer.shape[1]).index_copy(0, self.places, self.scaled().detach())
        inner = self.inner.detach()
        return (inner, outer) if self.axis == 0 else (outer.T.contiguous(), inner.T.contiguous())


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """A trainable difference of some components' weights.

    Attributes:
        factors: Parameter -> its difference.
    """

    factors: Mapping[str, Factors]

    @classmethod
    def start(
        cls,
        architecture: Architecture,
        weights: Mapping[str, Tensor],
        norms: Mapping[Component, float],
        *,
        rank: int,
        seed: int,
    ) -> LowRank:
        """Begin with a random difference.

        Args:
            architecture: Says what each component owns.
            weights: The base's parameters.
            norms: Component -> norm of its difference as a share of the norm of what it owns, in every matrix.
            rank: Of the products.
            seed: Of the first numbers.

        Raises:
            ComponentError: a component that owns biases, or cuts one matrix both ways.
        """
        generator = torch.Generator().manual_seed(seed)
        parts: dict[tuple[str, int], list[tuple[Component, Tensor, float]]] = {}
        for component, share in norms.items():
            owned: dict[tuple[str, int], list[int]] = {}
            for piece in slices(architecture, component):
                if weights[piece.parameter].ndim != 2 or piece.expert is not None:
                    raise ComponentError(f"{component} owns more than matrices ({piece.parameter}), which is not done.")
                # A whole output projection is cut by its inputs, as neurons and heads cut it.
                axis = 1 if _is_output(architecture, piece.parameter) else piece.axis
                length = weights[piece.parameter].shape[axis]
                span = range(piece.start, piece.stop) if axis == piece.axis else range(length)
                owned.setdefault((piece.parameter, axis), []).extend(span)
            for key, indices in owned.items():
                parts.setdefault(key, []).append((component, torch.tensor(indices), share))
        found: dict[str, Factors] = {}
        for (name, axis), members in parts.items():
            if name in found:
                raise ComponentError(f"{name} is cut by rows and by columns, which is not done.")
            matrix = weights[name] if axis == 0 else weights[name].T
            places = torch.cat([own for _, own, _ in members])
            inner = torch.randn(rank, matrix.shape[1], generator=generator) / math.sqrt(matrix.shape[1])
            outer = torch.randn(len(places), rank, generator=generator) / math.sqrt(rank)
            found[name] = Factors(
                axis=axis,
                places=places,
                owner=torch.cat([torch.full((len(own),), place) for place, (_, own, _) in enumerate(members)]),
                norms=torch.tensor([share * float(matrix[own].norm()) for _, own, share in members]),
                members=tuple(component for component, _, _ in members),
                outer=outer.requires_grad_(),
                inner=inner.requires_grad_(),
            )
        return cls(factors=found)

    def trained(self) -> list[Tensor]:
        """What an optimizer moves."""
        return [tensor for one in self.factors.values() for tensor in (one.outer, one.inner)]

    @property
    def members(self) -> tuple[Component, ...]:
        """The components whose weights it changes."""
        return tuple(dict.fromkeys(one for factors in self.factors.values() for one in factors.members))

    def dense(self, weights: Mapping[str, Tensor], left_out: Collection[Component] = ()) -> dict[str, Tensor]:
        """Parameter -> difference, of those that it changes; differentiable.

        Args:
            weights: The base's parameters.
            left_out: Components whose weights are to stay as they are.
        """
        return {name: one.dense(weights[name].shape, left_out) for name, one in self.factors.items()}


def _is_output(architecture: Architecture, parameter: str) -> bool:
    family = architecture.family
    return parameter.removesuffix(".weight").endswith((family.o, family.mlp_out))


def summed(*differences: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Differences added up, parameter by parameter."""
    found: dict[str, Tensor] = {}
    for difference in differences:
        for name, change in difference.items():
            found[name] = found[name] + change if name in found else change
    return found
