"""How much of each expert's difference goes in, tensor by tensor, down to rows and columns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weightpatch.architecture import Architecture
from weightpatch.component import Component, Slice, slices
from weightpatch.errors import MergeError

FORMAT = "weightpatch.coefficients/1"


@dataclass(frozen=True, kw_only=True, eq=False)
class Coefficients:
    """Coefficients of a merge.

    Attributes:
        experts: Their names.
        tensors: Parameter -> coefficient of each expert: a single number (shape `()`), or numbers along one axis, of
            the shape that broadcasts (`(rows, 1)`, `(1, columns)`; one more axis in front where a parameter stacks the
            matrices of a mixture's experts).
    """

    experts: tuple[str, ...]
    tensors: Mapping[str, tuple[Tensor, ...]]

    @classmethod
    def uniform(cls, architecture: Architecture, weights: Mapping[str, float]) -> Coefficients:
        """The same coefficient everywhere: task arithmetic.

        Args:
            architecture: Of the models.
            weights: Expert -> coefficient.
        """
        numbers = tuple(torch.tensor(float(weight)) for weight in weights.values())
        return cls(experts=tuple(weights), tensors=dict.fromkeys(architecture.parameters, numbers))

    @classmethod
    def by_component(
        cls,
        architecture: Architecture,
        weights: Mapping[str, Mapping[Component, float]],
        *,
        rest: Mapping[str, float],
    ) -> Coefficients:
        """Each component its own coefficient, of each expert.

        Args:
            architecture: Of the models.
            weights: Expert -> component -> coefficient. Components of one expert must not overlap.
            rest: Expert -> coefficient of everything that none of its components owns.

        Raises:
            MergeError: two components of an expert that own the same weights, or one tensor cut both ways.
        """
        if weights.keys() != rest.keys():
            raise MergeError(
                f"components are weighted for {', '.join(weights)}, what is left for {', '.join(rest)}: name the same "
                "experts in both."
            )
        columns = [_of_expert(architecture, own, rest[expert]) for expert, own in weights.items()]
        return cls(
            experts=tuple(weights),
            tensors={name: tuple(column[name] for column in columns) for name in architecture.parameters},
        )

    def of(self, experts: Sequence[str]) -> Coefficients:
        """The same, with the experts in another order.

        Raises:
            MergeError: they are others.
        """
        if sorted(experts) != sorted(self.experts):
            raise MergeError(
                f"the coefficients are of {', '.join(self.experts)}; the experts are {', '.join(experts)}. Give the "
                "experts that they were made for (the last part of each path is its name)."
            )
        order = [self.experts.index(one) for one in experts]
        return Coefficients(
            experts=tuple(experts),
            tensors={name: tuple(every[place] for place in order) for name, every in self.tensors.items()},
        )

    def save(self, file: str | Path) -> None:
        """Write to a safetensors file, whole or not at all: `expert/parameter` -> coefficient."""
        tensors = {
            f"{expert}/{name}": own.clone(memory_format=torch.contiguous_format)
            for name, every in self.tensors.items()
            for expert, own in zip(self.experts, every, strict=True)
        }
        file = Path(file)
        partial = file.with_name(f"{file.name}.partial")
        save_file(tensors, partial, metadata={FORMAT: json.dumps(self.experts)})  # one entry: several have no order
        partial.replace(file)

    @classmethod
    def load(cls, file: str | Path) -> Coefficients:
        """Read what `save` wrote, edited or not.

        Raises:
            MergeError: it holds no coefficients, not all of them, or some that are no numbers.
        """
        try:
            with safe_open(file, framework="pt") as stored:
                metadata = stored.metadata() or {}
                if FORMAT not in metadata:
                    raise MergeError(f"{file} holds no coefficients of a merge: no {FORMAT} in its metadata.")
                experts = tuple(json.loads(metadata[FORMAT]))
                found = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise MergeError(f"cannot read coefficients from {file} ({error}). Make them again.") from error
        names = list(dict.fromkeys(name.partition("/")[2] for name in found))
        if missing := [f"{one}/{name}" for name in names for one in experts if f"{one}/{name}" not in found]:
            raise MergeError(f"{file} lacks {len(missing)} coefficients, the first {missing[0]}.")
        if odd := [name for name, own in found.items() if not own.isfinite().all()]:
            raise MergeError(f"{file} holds coefficients that are no numbers, the first in {odd[0]}.")
        return cls(experts=experts, tensors={name: tuple(found[f"{one}/{name}"] for one in experts) for name in names})


def _of_expert(architecture: Architecture, weights: Mapping[Component, float], rest: float) -> dict[str, Tensor]:
    """Parameter -> coefficient of one expert."""
    owned: dict[str, list[tuple[Slice, Component]]] = {}
    for component in weights:
        for piece in slices(architecture, component):
            owned.setdefault(piece.parameter, []).append((piece, component))
    found: dict[str, Tensor] = {}
    for name, shape in architecture.parameters.items():
        pieces = owned.get(name, [])
        if any(piece.expert is not None for piece, _ in pieces):
            pieces = [(part, component) for piece, component in pieces for part in _by_matrix(piece, shape)]
        cuts: dict[int | None, _Cut] = {}
        for piece, component in pieces:
            matrix = shape if piece.expert is None else shape[1:]
            cut = cuts.setdefault(piece.expert, _Cut.empty(piece.axis, matrix))
            cut.mark(range(piece.start, piece.stop), piece.axis, weights[component], component)
        if not cuts:
            found[name] = torch.tensor(float(rest))
        elif None in cuts:
            found[name] = cuts[None].coefficient(rest)
        else:
            found[name] = _stacked([cuts.get(number) for number in range(shape[0])], rest)
    return found


def _by_matrix(piece: Slice, shape: Sequence[int]) -> Iterator[Slice]:
    """A part of a parameter that stacks the matrices of a mixture's experts, matrix by matrix."""
    if piece.expert is not None:
        yield piece
    elif piece.axis == 0:
        for number in range(piece.start, piece.stop):
            yield replace(piece, stop=shape[1], start=0, expert=number)
    else:
        for number in range(shape[0]):
            yield replace(piece, axis=piece.axis - 1, expert=number)


def _stacked(cuts: Sequence[_Cut | None], rest: float) -> Tensor:
    """Of a parameter that stacks the matrices of all experts of a mixture."""
    every = [torch.tensor(float(rest)) if cut is None else cut.coefficient(rest) for cut in cuts]
    matrices = [one.reshape(1, 1) if one.ndim == 0 else one for one in every]
    n_rows, n_columns = (max(one.shape[axis] for one in matrices) for axis in (0, 1))
    return torch.stack([one.expand(n_rows, n_columns) for one in matrices])


@dataclass(kw_only=True)
class _Cut:
    """Who owns what along the one axis by which a matrix is cut."""

    axis: int
    shape: tuple[int, ...]
    values: list[float]
    owners: list[Component | None]

    @classmethod
    def empty(cls, axis: int, shape: tuple[int, ...]) -> _Cut:
        return cls(axis=axis, shape=shape, values=[math.nan] * shape[axis], owners=[None] * shape[axis])

    def mark(self, places: range, axis: int, weight: float, owner: Component) -> None:
        if axis != self.axis:
            if len(places) != self.shape[axis]:  # a part of it
                others = ", ".join(str(one) for one in dict.fromkeys(self.owners) if one)
                raise MergeError(f"{owner} cuts a tensor one way and {others} the other way: give coefficients to one.")
            axis, places = self.axis, range(self.shape[self.axis])
        for place in places:
            if (other := self.owners[place]) is not None:
                raise MergeError(f"{other} and {owner} own the same weights: give a coefficient to one of them.")
            self.values[place], self.owners[place] = weight, owner

    def coefficient(self, rest: float) -> Tensor:
        values = [rest if owner is None else value for value, owner in zip(self.values, self.owners, strict=True)]
        if len(set(values)) == 1:
            return torch.tensor(float(values[0]))
        return torch.tensor(values).reshape([-1 if axis == self.axis else 1 for axis in range(len(self.shape))])


def varying(coefficients: Coefficients) -> Iterator[str]:
    """Names of the parameters within which a coefficient varies: what a merge by whole tensors would average away."""
    return (name for name, every in coefficients.tensors.items() if any(one.numel() > 1 for one in every))
