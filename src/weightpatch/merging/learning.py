"""Coefficients that are learned: whatever is read of a merged model is differentiable in them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from weightpatch.architecture import Architecture
from weightpatch.component import Component
from weightpatch.errors import MergeError
from weightpatch.merging.coefficients import Coefficients

Weights = dict[str, Tensor]
"""Parameter -> tensor of a merged model."""
Loss = Callable[[Weights], Tensor]
"""Runs a merged model and gives one number, the lower the better."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Blend:
    """All models base + sum of coefficient times difference, with one coefficient to each expert and component.

    Base and differences are held in memory, whole.

    Attributes:
        base: The base's parameters.
        changes: Expert -> parameter -> what it has more than the base.
        components: What is weighted; what they leave over is the last column of a table of coefficients.
        numbers: Parameter -> column of its coefficients, a single one or one to each row or column.
    """

    base: Mapping[str, Tensor]
    changes: Mapping[str, Mapping[str, Tensor]]
    components: tuple[Component, ...]
    numbers: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, model: PreTrainedModel, changes: Mapping[str, Mapping[str, Tensor]], components: Sequence[Component]
    ) -> Blend:
        """Number the components of a model.

        Raises:
            MergeError: components that own the same weights.
        """
        architecture = Architecture.of(model)
        columns = {"": {component: float(number) for number, component in enumerate(components)}}
        numbered = Coefficients.by_component(architecture, columns, rest={"": float(len(components))})
        device = model.device
        return cls(
            base={name: model.get_parameter(name).detach() for name in architecture.parameters},
            changes=changes,
            components=tuple(components),
            numbers={name: own[0].long().to(device) for name, own in numbered.tensors.items()},
        )

    def weights(self, table: Tensor) -> Weights:
        """The merged parameters.

        Args:
            table: Coefficients, shape `(expert, component + 1)`.
        """
        merged: Weights = {}
        for name, base in self.base.items():
            own = table[:, self.numbers[name]]
            parts = (own[place] * changes[name] for place, changes in enumerate(self.changes.values()))
            merged[name] = base + sum(parts, torch.zeros_like(base))
        return merged

    def table(self, weights: Mapping[str, Mapping[Component, float]], rest: Mapping[str, float]) -> Tensor:
        """Coefficients as a table, those of components that an expert has none for as what is left over."""
        rows = [
            [*(weights[expert].get(one, rest[expert]) for one in self.components), rest[expert]]
            for expert in self.changes
        ]
        return torch.tensor(rows, device=next(iter(self.base.values())).device)

    def by_component(self, table: Tensor) -> dict[str, dict[Component, float]]:
        """Expert -> component -> coefficient of a table."""
        rows = zip(self.changes, table.tolist(), strict=True)
        return {expert: dict(zip(self.components, row, strict=False)) for expert, row in rows}


@dataclass(frozen=True, kw_only=True)
class Training:
    """How coefficients are learned.

    Attributes:
        n_steps: Steps of Adam that the learning rate falls along.
        stop_at: The step to stop behind; None: the last one.
        learning_rate: Of the coefficients; falls to a tenth along a line.
        penalty: What the mean squared distance from where they start is multiplied by.
        answer_tokens: Most tokens of every expert's own answer that whole states are restored along; 0: they are
            restored at the anchors' positions.
    """

    n_steps: int = 80
    stop_at: int | None = None
    learning_rate: float = 0.05
    penalty: float = 0.1
    answer_tokens: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            MergeError: one out of range.
        """
        for name in ("n_steps", "learning_rate", "penalty", "answer_tokens"):
            value, least = getattr(self, name), "above 0" if name == "learning_rate" else "of 0 or more"
            if not (0 <= value < math.inf) or (value == 0 and name == "learning_rate"):
                raise MergeError(f"{name} {value} of learning is out of range. Give a number {least}.")
        if self.stop_at is not None and not 0 <= self.stop_at <= self.n_steps:
            raise MergeError(f"stop_at {self.stop_at} of learning is none of its {self.n_steps} steps.")

    @property
    def n_taken(self) -> int:
        """Steps that are taken."""
        return self.n_steps if self.stop_at is None else self.stop_at


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """A step of learning.

    Attributes:
        number: Of steps so far.
        loss: Sum of the losses before it.
        table: Coefficients after it, shape `(expert, component + 1)`.
        moments: Adam's running means of the gradient and of its square, each of shape `(expert, component)`.
    """

    number: int
    loss: float
    table: Tensor
    moments: tuple[Tensor, Tensor]


_NOTE = "step"
"""One entry, as safetensors writes several in any order, and the same step shall be the same bytes."""


@dataclass(frozen=True, kw_only=True)
class Bookmark:
    """A file that keeps the last step, so that learning goes on behind it.

    Attributes:
        file: Where; its folder is made.
        key: Tells one learning from another.
    """

    file: Path
    key: str

    def read(self) -> Step | None:
        """The last step that was kept, if any.

        Raises:
            MergeError: of another learning.
        """
        if not self.file.is_file():
            return None
        try:
            with safe_open(self.file, framework="pt") as kept:
                note = json.loads((kept.metadata() or {})[_NOTE])
                found = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError, KeyError):  # damaged: as if there were none
            return None
        if note["key"] != self.key:
            raise MergeError(
                f"{self.file} keeps what another merge has learned so far: other experts, runs or settings. Name "
                "another folder, or delete the file."
            )
        return Step(
            number=note["number"],
            loss=note["loss"],
            table=found["table"],
            moments=(found["first"], found["second"]),
        )

    def write(self, step: Step) -> None:
        """Keep a step, whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(f"{self.file.name}.partial")
        tensors = {"table": step.table, "first": step.moments[0], "second": step.moments[1]}
        note = {_NOTE: json.dumps({"key": self.key, "number": step.number, "loss": step.loss})}
        save_file({name: own.cpu().contiguous() for name, own in tensors.items()}, partial, metadata=note)
        partial.replace(self.file)


_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps them by."""


def learn(
    blend: Blend, losses: Sequence[Loss], start: Tensor, training: Training, *, behind: Step | None = None
) -> Iterator[Step]:
    """Coefficients that make losses small; those of what components leave over stay as they are.

    Args:
        blend: The models.
        losses: They are added up; gradients of one are let go before the next, so each should be one forward pass.
        start: Coefficients to begin with and to stay near, shape `(expert, component + 1)`.
        training: How.
        behind: The step to go on from.

    Yields:
        Every step that is left; the last one's table is what was learned.
    """
    learned = (start if behind is None else behind.table.to(start.device))[:, :-1].clone().requires_grad_()
    optimizer = torch.optim.Adam([learned], lr=training.learning_rate)
    if behind is not None:
        means = dict(zip(_MOMENTS, (own.to(start.device) for own in behind.moments), strict=True))
        optimizer.state[learned] = {"step": torch.tensor(float(behind.number)), **means}
    for step in range(behind.number if behind else 0, training.n_taken):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * (1 - 0.9 * step / training.n_steps)
        merged = blend.weights(torch.cat([learned, start[:, -1:]], dim=1))
        cut = {name: weight.detach().requires_grad_() for name, weight in merged.items()}
        total = 0.0
        for loss in losses:
            found = loss(cut)
            torch.autograd.backward(found)
            total += float(found.detach())
        moved = [name for name, weight in cut.items() if weight.grad is not None and merged[name].requires_grad]
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(training.penalty * (learned - start[:, :-1]).square().mean())
        torch.autograd.backward([merged[name] for name in moved], [cut[name].grad for name in moved])
        optimizer.step()
        first, second = (optimizer.state[learned][name].clone() for name in _MOMENTS)
        table = torch.cat([learned.detach(), start[:, -1:]], dim=1)
        yield Step(number=step + 1, loss=total, table=table, moments=(first, second))
