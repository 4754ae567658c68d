"""What chosen components write along the anchor's direction at the readout positions: who delivers the readout.

The residual stream is a sum of writes and a projection is linear, so the readout is the sum of what the embedding and
all sublayers below the anchor write along the direction, and an effect on it is the sum of the changes of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightpatch.component import Component
from weightpatch.errors import ArchitectureError, ComponentError
from weightpatch.packed.calls import LayerCall, Parts
from weightpatch.pair import ModelPair

UNITS_OF_TARGETS = ("embed", "blocks", "attns", "mlps", "heads", "rests", "neurons")


@dataclass(frozen=True, kw_only=True, eq=False)
class Deliveries:
    """Reads what targets write, in whatever is run.

    Attributes:
        pair: The two models.
        targets: Whose writes; of any layers, in any order.
        direction: Along which they are read: one vector `(feature,)`, or one to each readout position, `(read,
            feature)`.

    Raises:
        ComponentError: a target that writes nothing of its own to the residual stream.
    """

    pair: ModelPair
    targets: tuple[Component, ...]
    direction: Tensor

    def __post_init__(self) -> None:
        wrong = [
            str(one)
            for one in self.targets
            if one.address != "embed" and (one.unit not in UNITS_OF_TARGETS or one.expert is not None)
        ]
        if wrong:
            raise ComponentError(
                f"{', '.join(wrong[:4])}: cannot be a target, for its write is not read by itself. Name heads, attns, "
                "mlps, neurons of plain MLPs, blocks, rests or embed."
            )

    def at(self, layer: int | None) -> list[int]:
        """Places of the targets of one layer; None: of `embed`."""
        return [place for place, target in enumerate(self.targets) if target.layer == layer]

    def embedded(self, residual: Tensor) -> Tensor:
        """What `embed` delivers.

        Args:
            residual: What enters layer 0 at the readout positions, shape `(row, read, feature)`.

        Returns:
            Shape `(row, target, read)`, for as many targets as are `embed`.
        """
        return _along(residual, self._direction(residual))[:, None].expand(-1, len(self.at(None)), -1)

    def of(self, layer: int, call: LayerCall, parts: Parts, weights: Mapping[str, Tensor]) -> Tensor:
        """What the targets of one layer deliver.

        Args:
            layer: Its number.
            call: It.
            parts: What it did.
            weights: Parameters that stood in for the layer's own.

        Returns:
            Shape `(row, target of the layer, read)`.
        """
        along = self._direction(parts.attention)
        rows = parts.attention
        attention = _along(call.alone(rows, weights, attention=rows, mlp=None), along)
        mlp = _along(call.alone(rows, weights, attention=None, mlp=parts.mlp), along)
        family = self.pair.architecture.family
        split: dict[str, Tensor] = {}
        found = []
        for target in (self.targets[place] for place in self.at(layer)):
            index = target.index or 0
            match target.unit:
                case "blocks":
                    found.append(attention + mlp)
                case "attns":
                    found.append(attention)
                case "mlps":
                    found.append(mlp)
                case "heads":
                    if "heads" not in split:
                        factor = self.factor(call, parts.attention, weights, is_attention=True) * along
                        products = parts.heads_in * self._by_input(layer, family.o, weights, factor)
                        size = self.pair.architecture.head_dim
                        split["heads"] = products.reshape(*products.shape[:-1], -1, size).sum(dim=-1)
                    found.append(split["heads"][..., index])
                case "neurons":
                    if "neurons" not in split:
                        factor = self.factor(call, parts.mlp, weights, is_attention=False) * along
                        split["neurons"] = parts.neurons_in * self._by_input(layer, family.mlp_out, weights, factor)
                    found.append(split["neurons"][..., index])
                case _:
                    is_attention = target.address.endswith(".attn.rest")
                    path = family.o if is_attention else family.mlp_out
                    write = parts.attention if is_attention else parts.mlp
                    factor = self.factor(call, write, weights, is_attention=is_attention)
                    found.append(_along(factor * self.parameter(layer, f"{path}.bias", weights, write), along))
        return torch.stack(found, dim=1) if found else rows.new_zeros((len(rows), 0, rows.shape[1]))

    def _direction(self, like: Tensor) -> Tensor:
        return self.direction.to(like.dtype).to(like.device)

    def factor(self, call: LayerCall, write: Tensor, weights: Mapping[str, Tensor], *, is_attention: bool) -> Tensor:
        """By what each feature of a write is multiplied before it is added to the stream, `(row, read, feature)`.

        A norm behind a sublayer divides by the root mean square of the whole write, so a vector that is the same in
        all features and has that root mean square meets the same factors.
        """
        size = (
            write.square()
            .mean(dim=-1, keepdim=True)
            .sqrt()
            .clamp(min=torch.finfo(write.dtype).tiny)
            .expand_as(write)
            .contiguous()
        )
        added = call.alone(size, weights, attention=size if is_attention else None, mlp=None if is_attention else size)
        return added / size

    def _by_input(self, layer: int, path: str, weights: Mapping[str, Tensor], factor: Tensor) -> Tensor:
        """How much along the direction each input of a projection is worth, `(row, read, input)`."""
        weight = self.parameter(layer, f"{path}.weight", weights, factor)
        return factor @ (weight.T if self.pair.architecture.family.transposed else weight)

    def parameter(self, layer: int, name: str, weights: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """A parameter of a layer, by its name within it; zeros for a bias that the model does not have."""
        full = f"{self.pair.architecture.layer_prefix(layer)}{name}"
        if name in weights:
            return weights[name].to(like.device)
        if full not in self.pair.architecture.parameters:
            return torch.zeros(like.shape[-1], dtype=like.dtype, device=like.device)
        return self.pair.base.get_parameter(full).detach()


def contribution(
    pair: ModelPair, target: Component, call: LayerCall, parts: Parts, weights: Mapping[str, Tensor]
) -> Tensor:
    """What one target adds to the residual stream, behind norms and multipliers: `(row, read, feature)`.

    Args:
        pair: The two models.
        target: A head, an attention, an MLP, a neuron or a block.
        call: Its layer.
        parts: What this did.
        weights: Parameters that stood in for the layer's own.
    """
    reading = Deliveries(pair=pair, targets=(target,), direction=parts.attention.new_zeros(()))
    rows, index = parts.attention, target.index or 0
    match target.unit:
        case "heads":
            size = pair.architecture.head_dim
            part, places, write = parts.heads_in, slice(index * size, (index + 1) * size), parts.attention
        case "neurons":
            part, places, write = parts.neurons_in, slice(index, index + 1), parts.mlp
        case _:
            return call.alone(
                rows,
                weights,
                attention=None if target.unit == "mlps" else parts.attention,
                mlp=None if target.unit == "attns" else parts.mlp,
            )
    is_attention = target.unit == "heads"
    path = call.family.o if is_attention else call.family.mlp_out
    matrix = reading.parameter(target.layer or 0, f"{path}.weight", weights, rows)
    columns = matrix[places] if call.family.transposed else matrix[:, places].T
    return (part[..., places] @ columns) * reading.factor(call, write, weights, is_attention=is_attention)


def _along(rows: Tensor, direction: Tensor) -> Tensor:
    """Projections `(row, read, feature)` -> `(row, read)`."""
    return (rows * direction).sum(dim=-1)


def check_sum(call: LayerCall, residual: Tensor, parts: Parts) -> None:
    """Raise unless a layer adds what its sublayers write to the residual stream, and does nothing else to it.

    Args:
        call: The layer.
        residual: What entered it at the readout positions, shape `(row, read, feature)`.
        parts: What it did, with what left it at these positions.

    Raises:
        ArchitectureError: it does something else, as with norms behind the addition.
    """
    added = call.alone(residual, {}, attention=parts.attention, mlp=None)
    added = added + call.alone(residual, {}, attention=None, mlp=parts.mlp)
    off = (residual + added - parts.leaving).abs().max()
    rounding = 8 * torch.finfo(parts.leaving.dtype).eps  # a bfloat16 stream is rounded at every addition
    if off > max(1e-3, rounding) * parts.leaving.abs().max():
        raise ArchitectureError(
            f"{type(call.layer).__name__}: what leaves this layer is not the sum of what entered it and what its "
            "attention and MLP wrote, so an effect cannot be split among targets. Leave targets out."
        )


def by_prompt(values: Tensor, index: Sequence[Tensor]) -> Tensor:
    """Means over each prompt's own readout positions: `(row, target, read)` -> `(row, target, prompt)`, float64."""
    wide = values.detach().cpu().to(torch.float64)
    return torch.stack([wide[..., own].mean(dim=-1) for own in index], dim=-1)
