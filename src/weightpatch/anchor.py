"""The anchor: a direction in the residual stream that shows whether the control state of a behaviour has formed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from weightpatch.errors import AnchorError
from weightpatch.pair import ModelPair
from weightpatch.prompts import TokenIds, TokenizedPrompts
from weightpatch.reader import Reader
from weightpatch.residuals import readout_index

Readout = Literal["projection", "cosine", "contrast"]
Span = Literal["prompt", "answer"]
"""Where steering holds an anchor: at the readout positions of the prompt, or there and at every token of the answer."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A test that an anchor has to pass.

    Attributes:
        name: `split-half-cosine`, `auc`, `gap`; with behaviour also `steering`, `ablation`, `random`, `other-task`.
        value: What was measured.
        threshold: What was needed.
        passed: Whether it was reached.
        meaning: One sentence for the report.
    """

    name: str
    value: float
    threshold: float
    passed: bool
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Mean readouts over the prompts that the anchor was fitted on, in the readout's unit.

    `with`: prompts that carry their instruction; `without`: the same queries alone.
    """

    base_with: float
    base_without: float
    specialized_with: float
    specialized_without: float


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What one way of running a model did to its answers.

    Attributes:
        name: `base`, `specialized`, `steered`, `ablated`, `random` or `other-task`.
        n: Answers.
        n_passed: Those that follow the instruction and do not repeat themselves.
        n_repetitive: Those that repeat themselves, whether they follow it or not.
    """

    name: str
    n: int
    n_passed: int
    n_repetitive: int


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """How answers change when an anchor is held at a level; measured on held-out prompts.

    Attributes:
        span: Where it was held.
        level: The readout that the base is held at: the specialized model's mean on prompts with their instruction.
        ablation_level: What the specialized model is held at: its own mean without the instruction.
        arms: Every way of running the two models.
        search: Span -> layer -> rise of the base's pass rate, within the first half; the layer was chosen by it.
        other_tasks: Whose anchors served as a control, one prompt each in turn; empty: there was none.
        max_new_tokens: Most tokens of an answer.
    """

    span: Span
    level: float
    ablation_level: float
    arms: tuple[Arm, ...]
    search: Mapping[Span, Mapping[int, float]]
    other_tasks: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class AnchorReport:
    """How a fitted anchor was made and how good it is.

    Attributes:
        estimator: How the direction was found.
        gates: Every test with its outcome; one that failed makes the anchor unstable.
        levels: Reference levels of the readout.
        gap: Mean specialized minus base readout on prompts with their instruction, held-out half.
        gap_low: Lower end of its 95 % interval.
        gap_high: Upper end.
        search: Layer -> mean(gap) / std(gap) within the first half; without behaviour the layer was chosen by it.
        n_prompts: Prompts used.
        n_held_out: Those among them that the gates were measured on.
        behaviour: What steering and ablation did to the answers; None where nothing was generated.
    """

    estimator: str
    gates: tuple[Gate, ...]
    levels: Levels
    gap: float
    gap_low: float
    gap_high: float
    search: Mapping[int, float]
    n_prompts: int
    n_held_out: int
    behaviour: Behaviour | None = None

    @property
    def stable(self) -> bool:
        """Whether every gate was passed."""
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True, kw_only=True, eq=False)
class Anchor:
    """A direction at one layer and some positions; projected on, it gives the readout.

    Attributes:
        layer: The residual stream that enters this layer is read, 0 to `n_layers`.
        direction: Shape `(feature,)`; scaled to norm 1.
        positions: Readout positions in a prompt; negative ones count from its end.
        readout: `projection` on the direction; `cosine` with it; `contrast`: projection with the instruction minus
            projection without it, which cancels drift that has nothing to do with the instruction.
        report: How it was fitted; None for an anchor made by hand.

    Raises:
        AnchorError: a direction that is not one finite, non-zero vector, a negative layer, no positions.
    """

    layer: int
    direction: Tensor = field(repr=False)
    positions: Sequence[int] = (-1,)
    readout: Readout = "projection"
    report: AnchorReport | None = None

    def __post_init__(self) -> None:
        direction = torch.as_tensor(self.direction).detach().cpu().to(torch.float64)
        if direction.ndim != 1:
            raise AnchorError(f"the direction has shape {list(direction.shape)}; give one vector, (feature,).")
        norm = float(direction.norm())
        if not math.isfinite(norm) or norm == 0:
            raise AnchorError(f"the direction has norm {norm}; give a finite vector that is not 0.")
        positions = (self.positions,) if isinstance(self.positions, int) else tuple(self.positions)
        whole = all(isinstance(number, int) for number in (self.layer, *positions))
        if not whole or self.layer < 0 or not positions:
            raise AnchorError("an anchor needs a layer from 0 on and at least one readout position, as whole numbers.")
        if self.readout not in get_args(Readout):
            raise AnchorError(f"unknown readout {self.readout!r}. Choose one of {', '.join(get_args(Readout))}.")
        # A direction of norm 1 stays as it is, so that saving and loading changes no bit.
        object.__setattr__(self, "direction", direction if abs(norm - 1) < 1e-12 else direction / norm)
        object.__setattr__(self, "positions", positions)

    def read(self, residual: Tensor) -> Tensor:
        """The readout of residuals at the readout positions, averaged over these.

        Args:
            residual: Shape `(..., position, feature)`.

        Returns:
            Shape `(...)`, float64, on the CPU.
        """
        return self.project(residual.detach())

    @property
    def is_difference(self) -> bool:
        """Whether two runs are subtracted: with the instruction minus without."""
        return self.readout == "contrast"

    def sequences(self, prompts: TokenizedPrompts) -> tuple[TokenIds, ...]:
        """What the models run on: prompts with their instruction; behind them those without, for a contrast."""
        return prompts.with_instruction + (prompts.without_instruction if self.is_difference else ())

    def reader(self, token_ids: Sequence[Sequence[int]]) -> Reader:
        """Prepare for given sequences of tokens.

        Raises:
            AnchorError: one is too short for a readout position.
        """
        places = readout_index(token_ids, self.positions).tolist()
        return Reader(
            layer=self.layer,
            places=tuple(map(tuple, places)),
            score=lambda _, found: self.project(found),
            is_alike=True,
        )

    def project(self, residual: Tensor) -> Tensor:
        """As `read`, with its gradient."""
        residual = residual.cpu().to(torch.float64)
        projection = residual @ self.direction
        if self.readout == "cosine":
            projection = projection / residual.norm(dim=-1)
        return projection.mean(dim=-1)

    def check(self, pair: ModelPair) -> None:
        """Raise unless the anchor fits the pair.

        Raises:
            AnchorError: its layer or width is not the model's.
        """
        architecture = pair.architecture
        if self.layer > architecture.n_layers:
            raise AnchorError(
                f"the anchor is at layer {self.layer}; this model has residual streams 0 to {architecture.n_layers}."
            )
        if len(self.direction) != architecture.n_features:
            raise AnchorError(
                f"the direction has {len(self.direction)} features, the residual stream {architecture.n_features}. "
                "Was it fitted on another model?"
            )

    def save(self, path: str | Path) -> None:
        """Write it as safetensors, what is known about it in the metadata."""
        about = {"layer": self.layer, "positions": self.positions, "readout": self.readout}
        report = asdict(self.report) if self.report else None
        metadata = {"weightpatch.anchor/1": json.dumps({**about, "report": report}, sort_keys=True)}  # one: no order
        # Not save_file, which makes files that only their owner can read.
        Path(path).write_bytes(save({"direction": self.direction.contiguous()}, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> Anchor:
        """Read what `save` wrote.

        Raises:
            AnchorError: no such file, or not an anchor.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads((file.metadata() or {})["weightpatch.anchor/1"])
                direction = file.get_tensor("direction")
            report = about.pop("report")
            return cls(direction=direction, report=_read_report(report) if report else None, **about)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise AnchorError(f"cannot read an anchor from {path}: {error}. Fit it again.") from error


def _read_report(record: dict[str, object]) -> AnchorReport:
    fields = json.loads(json.dumps(record))
    fields["gates"] = tuple(Gate(**gate) for gate in fields["gates"])
    fields["levels"] = Levels(**fields["levels"])
    fields["search"] = _by_layer(fields["search"])
    if behaviour := fields.get("behaviour"):
        behaviour["other_tasks"] = tuple(behaviour["other_tasks"])
        behaviour["arms"] = tuple(Arm(**arm) for arm in behaviour["arms"])
        behaviour["search"] = {span: _by_layer(found) for span, found in behaviour["search"].items()}
        fields["behaviour"] = Behaviour(**behaviour)
    return AnchorReport(**fields)


def _by_layer(found: Mapping[str, float]) -> dict[int, float]:
    return {int(layer): value for layer, value in found.items()}
