"""The anchor: a direction in the residual stream that shows whether the control state of a behaviour has formed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weightpatch.errors import AnchorError
from weightpatch.pair import ModelPair, check_prompts
from weightpatch.prompts import ContrastPrompts, TokenizedPrompts
from weightpatch.residuals import BATCH_TOKENS, read_residuals
from weightpatch.statistics import Floats, area_under_curve, mean_interval

Indices = NDArray[np.intp]

Readout = Literal["projection", "cosine", "contrast"]
Estimator = Literal["mean-difference", "principal-component"]

SPLIT_HALF_COSINE = 0.8
AUC = 0.9
SEARCH = (0.2, 0.9)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A test that an anchor has to pass.

    Attributes:
        name: `split-half-cosine`, `auc` or `gap`.
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
class AnchorReport:
    """How a fitted anchor was made and how good it is.

    Attributes:
        estimator: `mean-difference` or `principal-component`.
        gates: Every test with its outcome; one that failed makes the anchor unstable.
        levels: Reference levels of the readout.
        gap: Mean specialized minus base readout on prompts with their instruction, held-out half.
        gap_low: Lower end of its 95 % interval.
        gap_high: Upper end.
        search: Layer -> mean(gap) / std(gap) within the first half, what the layer was chosen by.
        n_prompts: Prompts used.
        n_held_out: Those among them that the gates were measured on.
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
        residual = residual.detach().cpu().to(torch.float64)
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
        save_file({"direction": self.direction.contiguous()}, str(path), metadata=metadata)

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
    fields["search"] = {int(layer): value for layer, value in fields["search"].items()}
    return AnchorReport(**fields)


def fit_anchor(
    pair: ModelPair,
    prompts: ContrastPrompts,
    *,
    layer: int | None = None,
    positions: Sequence[int] = (-1,),
    estimator: Estimator = "mean-difference",
    readout: Readout = "projection",
    search: tuple[float, float] = SEARCH,
    batch_tokens: int = BATCH_TOKENS,
) -> Anchor:
    """Fit the direction in which the specialized model moves when the instruction is added, at the best layer.

    The queries are dealt to two halves. Within the first, directions fitted on one quarter and tried on the other
    choose the layer by mean(gap) / std(gap). The gates are measured on the second half with the direction fitted on
    the first, so on prompts that neither chose the layer nor made the direction. The direction returned is fitted on
    all prompts.

    Args:
        pair: The two models.
        prompts: All of them are used; at least four queries.
        layer: Fix the layer instead of searching it.
        positions: Readout positions; negative ones count from the end of each prompt. Their residuals are averaged.
        estimator: Mean of the differences, or their first principal component, not centred (pointing the same way).
        readout: What the anchor's readout will be.
        search: Part of the depth that is searched.
        batch_tokens: Most tokens of one forward pass.

    Returns:
        The anchor with its report. Whether it is stable is for the caller to look at: `anchor.report.stable`.

    Raises:
        AnchorError: too few queries, more than one task, or no difference to fit.
        PromptError: prompts that the models cannot read.

    Source:
        Method section 1. Difference in means at the last prompt token is the consensus; thresholds are our choice.
    """
    if len(prompts.tasks) > 1:
        raise AnchorError(
            f"these prompts hold {len(prompts.tasks)} tasks ({', '.join(prompts.tasks)}). An anchor belongs to one: "
            "fit it on prompts.of_task(...)."
        )
    check_prompts(pair, prompts, positions=positions)
    tokenized = prompts.tokenize(pair.tokenizer)
    n_layers = pair.architecture.n_layers
    layers = _candidates(n_layers, search) if layer is None else [layer]
    if min(layers) < 0 or max(layers) > n_layers:
        raise AnchorError(f"layer {layer} is outside this model's residual streams 0 to {n_layers}.")
    first, second = halves(prompts)
    streams = _Streams.read(pair, tokenized, layers=layers, positions=positions, batch_tokens=batch_tokens)
    everything = np.arange(len(prompts))

    def trial(place: int, chosen: Indices) -> Anchor | None:
        direction = streams.direction(place, chosen, estimator)
        if direction is None:
            return None
        return Anchor(layer=layers[place], direction=direction, positions=positions, readout=readout)

    # Within the first half, each quarter's direction is tried on the other: the second half stays out of the choice.
    quarters = _deal(prompts, first)
    strength: dict[int, float] = {}
    for place, at in enumerate(layers):
        fits = [trial(place, quarter) for quarter in quarters]
        if fits[0] is not None and fits[1] is not None and trial(place, first) and trial(place, second):
            pairs = zip(fits, reversed(quarters), strict=True)
            strength[at] = _strength(np.concatenate([streams.gap(fit, place)[other] for fit, other in pairs if fit]))
    if not strength:
        raise AnchorError(
            f"the instruction changes nothing at the readout positions {list(positions)} of layers {layers[0]} to "
            f"{layers[-1]}: prompts with and without it end alike there. Try a later layer or other positions."
        )
    best = layers.index(max(strength, key=lambda at: strength[at]))
    fitted, other, final = trial(best, first), trial(best, second), trial(best, everything)
    if fitted is None or other is None or final is None:
        raise AnchorError("the differences of the two halves of the prompts cancel out. Give more prompts.")
    gap = mean_interval(streams.gap(fitted, best)[second], groups=[prompts.rows[place].query for place in second])
    reads = {side: streams.read_side(fitted, best, side)[second] for side in ("s_with", "s_without")}
    report = AnchorReport(
        estimator=estimator,
        gates=_gates(
            float(fitted.direction @ other.direction), area_under_curve(reads["s_with"], reads["s_without"]), gap.low
        ),
        levels=streams.levels(final, best),
        gap=gap.estimate,
        gap_low=gap.low,
        gap_high=gap.high,
        search={at: round(value, 6) for at, value in strength.items()},
        n_prompts=len(prompts),
        n_held_out=len(second),
    )
    return replace(final, report=report)


def _strength(gap: Floats) -> float:
    """Mean over spread; 0 where there is no spread, which only readouts without any gap have."""
    spread = float(gap.std(ddof=1)) if len(gap) > 1 else 0.0
    return float(gap.mean()) / spread if spread > 0 else 0.0


def _gates(cosine: float, auc: float, gap_low: float) -> tuple[Gate, ...]:
    return (
        Gate(
            name="split-half-cosine",
            value=cosine,
            threshold=SPLIT_HALF_COSINE,
            passed=cosine >= SPLIT_HALF_COSINE,
            meaning="directions fitted on two disjoint halves of the queries agree",
        ),
        Gate(
            name="auc",
            value=auc,
            threshold=AUC,
            passed=auc >= AUC,
            meaning="the specialized model's readout tells held-out prompts with the instruction from those without",
        ),
        Gate(
            name="gap",
            value=gap_low,
            threshold=0.0,
            passed=gap_low > 0,
            meaning="the specialized model reads higher than the base on held-out prompts (lower end of 95 %)",
        ),
    )


def _candidates(n_layers: int, search: tuple[float, float]) -> list[int]:
    low, high = (round(share * n_layers) for share in search)
    if not 0 <= low <= high <= n_layers:
        raise AnchorError(
            f"cannot search from {search[0]:g} to {search[1]:g} of the depth; give 0 <= low <= high <= 1."
        )
    return list(range(low, high + 1))


def halves(prompts: ContrastPrompts) -> tuple[Indices, Indices]:
    """Indices of the prompts of every other query, and of the rest: one half to fit an anchor, one to test it.

    Raises:
        AnchorError: fewer than four queries.
    """
    queries = {row.query for row in prompts}
    if len(queries) < 4:
        raise AnchorError(
            f"{len(queries)} different queries of {', '.join(prompts.tasks)} are too few to fit an anchor and test it "
            "on others: 4 are needed, so 10 where they are dealt to the three splits. In Python an anchor can also be "
            "made by hand: Anchor(layer=, direction=, positions=)."
        )
    return _deal(prompts, np.arange(len(prompts)))


def _deal(prompts: ContrastPrompts, chosen: Indices) -> tuple[Indices, Indices]:
    """Some prompts in two parts, every other query of theirs in each."""
    queries = {query: place for place, query in enumerate(dict.fromkeys(prompts.rows[at].query for at in chosen))}
    parity = np.array([queries[prompts.rows[at].query] % 2 for at in chosen])
    return chosen[parity == 0], chosen[parity == 1]


@dataclass(frozen=True, kw_only=True)
class _Streams:
    """Residuals at the readout positions: side -> `(layer, prompt, position, feature)`."""

    sides: Mapping[str, Tensor]

    @classmethod
    def read(
        cls,
        pair: ModelPair,
        prompts: TokenizedPrompts,
        *,
        layers: Sequence[int],
        positions: Sequence[int],
        batch_tokens: int,
    ) -> _Streams:
        models = {"b": pair.base, "s": pair.specialized}
        texts = {"with": prompts.with_instruction, "without": prompts.without_instruction}
        sides = {
            f"{model}_{text}": read_residuals(
                models[model], texts[text], layers=layers, positions=positions, batch_tokens=batch_tokens
            )
            for model in models
            for text in texts
        }
        return cls(sides=sides)

    def direction(self, place: int, chosen: Indices, estimator: str) -> Tensor | None:
        """Direction of the layer at `place` from the chosen prompts, `(feature,)`, norm 1; None without differences."""
        with_, without = self.sides["s_with"][place, chosen], self.sides["s_without"][place, chosen]
        differences = (with_ - without).to(torch.float64).mean(dim=1)
        mean = differences.mean(dim=0)
        if float(mean.norm()) == 0:
            return None
        if estimator == "mean-difference":
            direction = mean
        elif estimator == "principal-component":
            direction = torch.linalg.svd(differences, full_matrices=False).Vh[0]
            direction = direction if float(direction @ mean) >= 0 else -direction
        else:
            raise AnchorError(f"unknown estimator {estimator!r}. Choose one of {', '.join(get_args(Estimator))}.")
        unit: Tensor = direction / direction.norm()
        return unit

    def read_side(self, anchor: Anchor, place: int, side: str) -> Floats:
        """Plain readout of one side, shape `(prompt,)`."""
        return anchor.read(self.sides[side][place]).numpy()

    def gap(self, anchor: Anchor, place: int) -> Floats:
        """Specialized minus base readout on prompts with their instruction, shape `(prompt,)`."""
        gap = self.read_side(anchor, place, "s_with") - self.read_side(anchor, place, "b_with")
        if anchor.readout == "contrast":
            gap = gap - (self.read_side(anchor, place, "s_without") - self.read_side(anchor, place, "b_without"))
        return gap

    def levels(self, anchor: Anchor, place: int) -> Levels:
        means = {side: float(self.read_side(anchor, place, side).mean()) for side in self.sides}
        return Levels(
            base_with=means["b_with"],
            base_without=means["b_without"],
            specialized_with=means["s_with"],
            specialized_without=means["s_without"],
        )
