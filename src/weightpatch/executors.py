"""Executors: components past the anchor that turn the formed state into output.

The base is steered to the specialized model's readout at the anchor. Then one later component at a time is held at the
output that it has without steering, and what is lost of the way to the specialized model's output is its loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightpatch.anchor import Anchor
from weightpatch.architecture import embedding_weight
from weightpatch.component import Component, components
from weightpatch.engine import suffix
from weightpatch.engine.activations import Activations
from weightpatch.errors import AnchorError, NoGapError
from weightpatch.outputs import N_TOKENS, Divergence, fit_divergence
from weightpatch.packed.calls import record
from weightpatch.packed.packing import MOST_TOKENS, side_by_side
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompts, TokenIds
from weightpatch.reading import inputs, reference
from weightpatch.residuals import evaluating, pad, tokens_per_call
from weightpatch.statistics import Floats, recovery
from weightpatch.steering import random_direction

if TYPE_CHECKING:
    import pandas as pd

LEAST_NULL = 60
"""Losses that the null has at least, over random directions and components."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Executors:
    """What each component past the anchor is worth to the steered base's output.

    Attributes:
        components: Which were held.
        lost: KL(specialized || steered base with the component held) minus KL(specialized || steered base), mean over
            next tokens, nats, shape `(component, prompt)`, float64.
        null: The same with the base pushed as far along random directions, `(direction, component, prompt)`.
        base_kl: KL(specialized || base), shape `(prompt,)`.
        steered_kl: KL(specialized || steered base), same shape.
        level: The readout that the base was held at.
        queries: The base query of each prompt.
    """

    components: tuple[Component, ...]
    lost: Tensor
    null: Tensor
    base_kl: Tensor
    steered_kl: Tensor
    level: float
    queries: tuple[str, ...]

    @property
    def restored(self) -> float:
        """How much of the way to the specialized model's output steering goes: R = 1 - KL(steered) / KL(base)."""
        return 1 - float(self.steered_kl.mean() / self.base_kl.mean())

    @property
    def null_shares(self) -> Floats:
        """Losses of the null as `table` gives them, shape `(direction x component,)`."""
        shares: Floats = (self.null.mean(dim=2) / self.base_kl.mean()).flatten().numpy()
        return shares

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row for each component.

        Returns:
            Columns component, unit, layer, loss (X, the part of R that holding it costs; ratio of means), ci_low and
            ci_high (bootstrap 95 % interval over queries).
        """
        import pandas as pd

        gaps = self.base_kl.numpy()
        share = recovery(self.lost.numpy(), gaps, groups=self.queries, seed=seed, is_positive=True)
        return pd.DataFrame(
            {
                "component": [str(one) for one in self.components],
                "unit": [one.unit for one in self.components],
                "layer": pd.array([one.layer for one in self.components], dtype="Int64"),
                "loss": share.ratio,
                "ci_low": share.low,
                "ci_high": share.high,
            }
        )


def find_executors(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Anchor,
    *,
    units: str | Sequence[str | Component] = "heads,mlps",
    level: float | None = None,
    n_tokens: int = N_TOKENS,
    divergence: Divergence | None = None,
    n_random: int | None = None,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Executors:
    """Steer the base at the anchor, hold each later component at its unsteered output, and measure what is lost.

    The output is compared along the specialized model's own greedy answers. The anchor is held where it is read; where
    its gates found that steering needs every token of the answer, at these too. Where steering does not bring the
    output nearer to the specialized model's (`restored` is not above 0), losses mean nothing.

    Args:
        pair: The two models; without a tokenizer only the token after the prompt is compared.
        prompts: All of them are used, with their instruction.
        anchor: A projection, read at positions counted from the prompt's end.
        units: Which components; those below the anchor are left out.
        level: The readout to hold; None: the mean of the specialized model's.
        n_tokens: Most tokens of an answer.
        divergence: Made for these prompts already; None: fit it.
        n_random: Random directions for the null; None: as many as give `LEAST_NULL` losses, and two at least.
        seed: Of these directions.
        batch_tokens: Most tokens of one call; None: as many as suit the model and its device.

    Raises:
        AnchorError: no component lies past the anchor, or it is no projection.
        NoGapError: the two models' outputs do not differ.
        PromptError: prompts that the models cannot read.

    Source:
        Executors as the last level of the hierarchy: Sun et al. 2026 (arXiv:2604.13694). The measure, from method.md
        section 5, and the null are ours.
    """
    if anchor.readout == "cosine":
        raise AnchorError("a cosine cannot be held at a level: steer with an anchor whose readout is a projection.")
    past = [one for one in components(pair.architecture, units) if one.layer is not None and one.layer >= anchor.layer]
    if not past:
        raise AnchorError(f"none of {units} lies at or past the anchor (layer {anchor.layer}): nothing can execute.")
    target = divergence or fit_divergence(pair, prompts, n_tokens=n_tokens if pair.tokenizer else 0)
    token_ids = inputs(pair, prompts, target)
    plain_anchor = replace(anchor, readout="projection")
    asked = inputs(pair, prompts.without_responses(), plain_anchor)
    behaviour = anchor.report.behaviour if anchor.report else None
    if level is None:
        level = behaviour.level if behaviour else float(reference(pair, prompts, plain_anchor)[1].mean())
    own: tuple[int, ...]
    if any(row.response for row in prompts):  # read along a response: held where this would begin, as the gates do
        own, n_answer = (-1,), len(anchor.positions)
    else:
        along = behaviour is not None and behaviour.span == "answer"
        own, n_answer = tuple(anchor.positions), max(map(len, token_ids)) if along else 0
    held = [_held(own, n_answer, ids, whole) for ids, whole in zip(asked, token_ids, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    size = len(anchor.direction)
    if n_random is None:
        n_random = max(2, -(-LEAST_NULL // len(past)))
    ways = [anchor.direction, *(random_direction(size, generator) for _ in range(n_random))]
    width = batch_tokens or tokens_per_call(pair.base)
    with evaluating(pair.base):
        unsteered = _unsteered(pair, token_ids, target, anchor.layer, batch_tokens=width)
    plain = -suffix.gather([run.base for run in unsteered], unsteered)
    lost, steered = [], []
    for way in ways:
        with evaluating(pair.base):
            runs = [
                replace(run, residual=_hold(run, held, unit=anchor.direction, level=level, along=way))
                for run in unsteered
            ]
        steered.append(-suffix.gather([run.base for run in runs], runs))
        found = suffix.measure_all(pair, runs, past, batch_tokens=width, skip=frozenset())
        lost.append(torch.stack([measured.base - measured.readout for measured in found]))
    if not float(plain.mean()) > 0:
        raise NoGapError("the two models give the same output on these prompts: there is nothing to execute.")
    return Executors(
        components=tuple(past),
        lost=lost[0],
        null=torch.stack(lost[1:]) if n_random else torch.zeros(0, *lost[0].shape, dtype=torch.float64),
        base_kl=plain,
        steered_kl=steered[0],
        level=level,
        queries=tuple(row.query for row in prompts),
    )


def _held(positions: Sequence[int], n_answer: int, prompt: TokenIds, whole: TokenIds) -> list[int]:
    """Places of a prompt with its answer where the anchor is held: in the prompt, and at the answer's first tokens."""
    own = [place if place >= 0 else len(prompt) + place for place in positions]
    return [*own, *range(len(prompt), min(len(whole), len(prompt) + n_answer))]


def _unsteered(
    pair: ModelPair, token_ids: Sequence[TokenIds], target: Divergence, layer: int, *, batch_tokens: int
) -> list[suffix.Run]:
    """Runs of the base that begin at the anchor's layer and take outputs from the base itself, as it is there."""
    reader = target.reader(token_ids)
    same = pair.with_models(pair.base, pair.base)
    runs = []
    for packing in side_by_side(token_ids, most_tokens=min(batch_tokens, MOST_TOKENS)):
        tokens = pad([token_ids[prompt] for prompt in packing.prompts], embedding_weight(pair.base).device)
        reads, index = suffix.reads_of(packing, reader)
        calls, residual = record(pair.base, tokens, packing, reader.layer, reads)
        for call in calls[:layer]:
            residual = call(residual)
        run = suffix.Run(
            pair=same,
            reader=reader,
            packing=packing,
            calls=calls,
            donor=Activations(same, calls, residual, start=layer),
            reads=reads,
            index=index,
            residual=residual,
            layer=layer,
        )
        runs.append(run)
    return runs


def _hold(run: suffix.Run, held: Sequence[Sequence[int]], *, unit: Tensor, level: float, along: Tensor) -> Tensor:
    """A run's residual stream with the readout held at a level at some places, by adding along a direction."""
    rows = run.residual.clone()
    unit, way = (vector.to(rows.dtype).to(rows.device) for vector in (unit, along))
    for prompt, path in zip(run.packing.prompts, run.packing.paths, strict=True):
        places = [path[place] for place in held[prompt]]
        found = rows[0, places]
        rows[0, places] = found + (level - found @ unit)[:, None] * way
    return rows
