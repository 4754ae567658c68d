"""Where the weights of a pair differ: by how much each component moved between the two checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weightpatch.component import Component, components, slices
from weightpatch.pair import ModelPair


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one component's weights moved.

    Attributes:
        component: Which one.
        relative_norm: Norm of specialized minus base over the norm of the base; dimensionless.
        norm: Norm of the difference.
        n_parameters: Numbers that the component owns.
    """

    component: Component
    relative_norm: float
    norm: float
    n_parameters: int


def weight_differences(
    pair: ModelPair, units: str | Sequence[str | Component] = "ends,norms,attns,mlps"
) -> list[Difference]:
    """Frobenius norm of each component's weight difference, absolute and relative to the base.

    Args:
        pair: The two models.
        units: Units and addresses, as in `localize`.

    Raises:
        ComponentError: an unknown unit or address.
    """
    differences = []
    for component in components(pair.architecture, units):
        moved = held = 0.0
        count = 0
        for piece in slices(pair.architecture, component):
            ours = piece.of(pair.base.get_parameter(piece.parameter).detach())
            ours = ours.float() if ours.dtype.itemsize < 4 else ours
            theirs = piece.of(pair.specialized_weight(piece.parameter)).to(ours)
            moved += float((theirs - ours).square().sum())
            held += float(ours.square().sum())
            count += ours.numel()
        relative = (moved / held) ** 0.5 if held else float("inf") if moved else 0.0
        differences.append(Difference(component=component, relative_norm=relative, norm=moved**0.5, n_parameters=count))
    return differences
