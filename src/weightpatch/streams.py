"""Residual streams of both models with and without the instruction, and the directions that can be found in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightpatch.anchor import Anchor, Levels
from weightpatch.errors import AnchorError
from weightpatch.pair import ModelPair
from weightpatch.prompts import TokenizedPrompts
from weightpatch.residuals import read_residuals
from weightpatch.statistics import Floats

Indices = NDArray[np.intp]
Estimator = Literal["mean-difference", "difference-in-differences", "principal-component"]
Side = Literal["b_with", "b_without", "s_with", "s_without"]


@dataclass(frozen=True, kw_only=True)
class Streams:
    """Residuals at the readout positions.

    Attributes:
        layers: The layers that they enter.
        sides: Base or specialized, with or without the instruction -> `(layer, prompt, position, feature)`.
    """

    layers: tuple[int, ...]
    sides: Mapping[Side, Tensor]

    @classmethod
    def read(
        cls,
        pair: ModelPair,
        prompts: TokenizedPrompts,
        *,
        layers: Sequence[int],
        positions: Sequence[int],
        batch_tokens: int,
    ) -> Streams:
        """Run both models on both forms of every prompt."""

        def side(model: Literal["base", "specialized"], texts: Sequence[Sequence[int]]) -> Tensor:
            return read_residuals(
                getattr(pair, model), texts, layers=layers, positions=positions, batch_tokens=batch_tokens
            )

        return cls(
            layers=tuple(layers),
            sides={
                "b_with": side("base", prompts.with_instruction),
                "b_without": side("base", prompts.without_instruction),
                "s_with": side("specialized", prompts.with_instruction),
                "s_without": side("specialized", prompts.without_instruction),
            },
        )

    def direction(self, layer: int, chosen: Indices, estimator: Estimator) -> Tensor | None:
        """The direction that the chosen prompts show, `(feature,)`, norm 1; None where nothing differs.

        Raises:
            AnchorError: an unknown estimator.
        """
        differences = self._difference("s", layer, chosen)
        mean = differences.mean(dim=0)
        if float(mean.norm()) == 0:
            return None
        if estimator == "mean-difference":
            direction = mean
        elif estimator == "difference-in-differences":
            direction = mean - self._difference("b", layer, chosen).mean(dim=0)
            if float(direction.norm()) == 0:
                return None
        elif estimator == "principal-component":
            direction = torch.linalg.svd(differences, full_matrices=False).Vh[0]
            direction = direction if float(direction @ mean) >= 0 else -direction
        else:
            raise AnchorError(f"unknown estimator {estimator!r}. Choose one of {', '.join(get_args(Estimator))}.")
        unit: Tensor = direction / direction.norm()
        return unit

    def project(self, direction: Tensor, layer: int, side: Side) -> Floats:
        """Mean projection of one side over the readout positions, shape `(prompt,)`."""
        found: Floats = (self._at(layer, side).to(torch.float64) @ direction).mean(dim=1).numpy()
        return found

    def read_side(self, anchor: Anchor, side: Side) -> Floats:
        """An anchor's readout of one side by itself, shape `(prompt,)`."""
        return anchor.read(self._at(anchor.layer, side)).numpy()

    def gap(self, anchor: Anchor) -> Floats:
        """Specialized minus base readout on prompts with their instruction, shape `(prompt,)`."""
        gap = self.read_side(anchor, "s_with") - self.read_side(anchor, "b_with")
        if anchor.readout == "contrast":
            gap = gap - (self.read_side(anchor, "s_without") - self.read_side(anchor, "b_without"))
        return gap

    def levels(self, anchor: Anchor) -> Levels:
        """Mean readouts of all four sides."""
        means = {side: float(self.read_side(anchor, side).mean()) for side in self.sides}
        return Levels(
            base_with=means["b_with"],
            base_without=means["b_without"],
            specialized_with=means["s_with"],
            specialized_without=means["s_without"],
        )

    def _at(self, layer: int, side: Side) -> Tensor:
        return self.sides[side][self.layers.index(layer)]

    def _difference(self, model: Literal["b", "s"], layer: int, chosen: Indices) -> Tensor:
        """With minus without the instruction, mean over positions: `(prompt, feature)`, float64."""
        with_: Side = "s_with" if model == "s" else "b_with"
        without: Side = "s_without" if model == "s" else "b_without"
        difference = self._at(layer, with_)[chosen] - self._at(layer, without)[chosen]
        return difference.to(torch.float64).mean(dim=1)
