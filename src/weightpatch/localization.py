"""One entry for every method of localization: which parameters move the readout, and by how much."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weightpatch.anchor import Anchor
from weightpatch.component import Component, components
from weightpatch.engine import Sweep, suffix, swap
from weightpatch.errors import AnchorError, ComponentError
from weightpatch.pair import ModelPair, check_prompts
from weightpatch.prompts import ContrastPrompts, TokenIds
from weightpatch.residuals import BATCH_TOKENS, read_residuals, tokens_per_call
from weightpatch.statistics import recovery

if TYPE_CHECKING:
    import pandas as pd

Method = Literal["exact"]
Engine = Literal["suffix", "swap"]

ENGINES: dict[str, Sweep] = {"suffix": suffix.sweep, "swap": swap.sweep}


@dataclass(frozen=True, kw_only=True, eq=False)
class Effects:
    """What each component's specialized weights do to the readout, prompt by prompt, and how it was measured.

    Attributes:
        components: What was patched; `str()` of each is its address.
        per_prompt: Patched minus base readout, shape `(component, prompt)`, float64, in the readout's unit.
        base: Readout of the base, shape `(prompt,)`, same unit.
        specialized: Readout of the specialized model, same shape and unit.
        prompt_ids: Ids of the prompts.
        queries: The base query of each; prompts of one query are resampled together in intervals.
        past_anchor: Components asked for that lie at or past the anchor. Their effect on it is 0 by construction, so
            they were not measured and are not among `components`.
        anchor: What was read.
        method: How effects were found.
        engine: By which code.
    """

    components: tuple[Component, ...]
    per_prompt: Tensor
    base: Tensor
    specialized: Tensor
    prompt_ids: tuple[str, ...]
    queries: tuple[str, ...]
    past_anchor: tuple[Component, ...]
    anchor: Anchor
    method: str
    engine: str

    @property
    def gap(self) -> Tensor:
        """Specialized minus base readout, shape `(prompt,)`."""
        return self.specialized - self.base

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row for each component, in the order of `components`.

        Args:
            seed: Of the bootstrap over queries.

        Returns:
            Columns component, unit, layer, effect (mean over prompts, the readout's unit), recovery (ratio of means),
            ci_low and ci_high (its bootstrap 95 % interval; NaN with a single prompt), mean_of_ratios.

        Raises:
            NoGapError: the two models do not differ measurably in the readout.
        """
        import pandas as pd

        share = recovery(self.per_prompt.numpy(), self.gap.numpy(), groups=self.queries, seed=seed)
        return pd.DataFrame(
            {
                "component": [str(component) for component in self.components],
                "unit": [component.unit for component in self.components],
                "layer": pd.array([component.layer for component in self.components], dtype="Int64"),
                "effect": self.per_prompt.mean(dim=1).numpy(),
                "recovery": share.ratio,
                "ci_low": share.low,
                "ci_high": share.high,
                "mean_of_ratios": share.mean_of_ratios,
            }
        )

    def top(self, k: int = 20, *, seed: int = 0) -> pd.DataFrame:
        """The rows of `table` with the highest recovery, best first."""
        table = self.table(seed=seed).sort_values("recovery", ascending=False, kind="stable")
        return table.head(k).reset_index(drop=True)


@dataclass(frozen=True, kw_only=True)
class ComponentEffect:
    """One component's effects as they come out of a sweep.

    Attributes:
        component: What was patched.
        per_prompt: Patched minus base readout, shape `(prompt,)`, float64.
    """

    component: Component
    per_prompt: Tensor


def localize(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Anchor,
    *,
    units: str | Sequence[str | Component] = "heads,mlps",
    method: Method = "exact",
    engine: Engine = "suffix",
    batch_tokens: int | None = None,
    on_effect: Callable[[ComponentEffect], None] | None = None,
) -> Effects:
    """Patch each component's specialized weights into the base and measure the anchor's readout.

    Args:
        pair: The two models.
        prompts: All of them are used, with their instruction.
        anchor: What to read.
        units: Units (`heads`, `kvs`, `mlps`, ...) and addresses (`L5.N812`), in one string with commas or a sequence.
        method: `exact`: the weights are really in place.
        engine: `suffix` (fast) or `swap` (writes weights and runs the whole model; the oracle).
        batch_tokens: Most tokens of one forward call; None: as many as suit the model and its device. Changes speed
            and memory, not the numbers beyond rounding.
        on_effect: Called with each component's effects as they are measured, for progress.

    Returns:
        The effects, in the order of layers and units.

    Raises:
        ComponentError: an unknown unit or address.
        AnchorError: the anchor does not fit the pair, or nothing asked for lies below it.
        PromptError: text without a tokenizer, or tokens outside the vocabulary.
    """
    if anchor.report is not None and not anchor.report.stable:
        failed = ", ".join(gate.name for gate in anchor.report.gates if not gate.passed)
        warnings.warn(f"the anchor is unstable: it failed {failed}; recoveries on it may mean little", stacklevel=2)
    below, past = plan(pair, anchor, units)
    found: list[Tensor] = []
    for effect in sweep(pair, prompts, anchor, below, method=method, engine=engine, batch_tokens=batch_tokens):
        found.append(effect.per_prompt)
        if on_effect:
            on_effect(effect)
    base, specialized = reference(pair, prompts, anchor, batch_tokens=batch_tokens or BATCH_TOKENS)
    return Effects(
        components=below,
        per_prompt=torch.stack(found),
        base=base,
        specialized=specialized,
        prompt_ids=tuple(row.id for row in prompts),
        queries=tuple(row.query for row in prompts),
        past_anchor=past,
        anchor=anchor,
        method=method,
        engine=engine,
    )


def plan(
    pair: ModelPair, anchor: Anchor, units: str | Sequence[str | Component]
) -> tuple[tuple[Component, ...], tuple[Component, ...]]:
    """What a sweep would patch: components that can reach the anchor, and those at or past it, which cannot.

    Raises:
        ComponentError: an unknown unit or address.
        AnchorError: the anchor does not fit the pair, or nothing lies below it.
    """
    anchor.check(pair)
    wanted = components(pair.architecture, units)
    below = tuple(component for component in wanted if reaches(component, anchor))
    past = tuple(component for component in wanted if not reaches(component, anchor))
    if not below:
        raise AnchorError(
            f"nothing to measure: all {len(wanted)} components of {units} lie at or past the anchor (layer "
            f"{anchor.layer}), where their effect on it is 0 by construction. Name components below it."
        )
    return below, past


def reaches(component: Component, anchor: Anchor) -> bool:
    """Whether what a component writes can reach the residual stream that the anchor reads."""
    return component.address == "embed" if component.layer is None else component.layer < anchor.layer


def sweep(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Anchor,
    below: Sequence[Component],
    *,
    method: Method = "exact",
    engine: Engine = "suffix",
    batch_tokens: int | None = None,
    skip: Set[Component] = frozenset(),
) -> Iterator[ComponentEffect]:
    """The effects of components below the anchor one after another; what `localize` collects and a run records.

    Args:
        pair: The two models.
        prompts: All of them are used, with their instruction.
        anchor: What to read.
        below: What to patch, ordered by layer, as `plan` returns it.
        method: As in `localize`.
        engine: As in `localize`.
        batch_tokens: As in `localize`.
        skip: Components already known. They may come again where they share a forward call with others.
    """
    if method not in get_args(Method):
        raise ComponentError(f"unknown method {method!r}. Choose one of {', '.join(get_args(Method))}.")
    if engine not in ENGINES:
        raise ComponentError(f"unknown engine {engine!r}. Choose one of {', '.join(ENGINES)}.")
    check_prompts(pair, prompts, positions=anchor.positions, both_sides=anchor.readout == "contrast")
    token_ids = _inputs(pair, prompts, anchor)
    width = batch_tokens or (tokens_per_call(pair.base) if engine == "suffix" else BATCH_TOKENS)
    for measured in ENGINES[engine](pair, token_ids, anchor, below, batch_tokens=width, skip=skip):
        change = measured.readout - measured.base
        yield ComponentEffect(component=measured.component, per_prompt=_contrasted(change, anchor))


def _inputs(pair: ModelPair, prompts: ContrastPrompts, anchor: Anchor) -> tuple[TokenIds, ...]:
    """What the models run on: prompts with their instruction, and behind them those without for a contrast readout."""
    tokenized = prompts.tokenize(pair.tokenizer)
    extra = tokenized.without_instruction if anchor.readout == "contrast" else ()
    return tokenized.with_instruction + extra


def _contrasted(readouts: Tensor, anchor: Anchor) -> Tensor:
    """One value to a prompt from the readouts of `_inputs`, shape `(prompt,)`."""
    if anchor.readout != "contrast":
        return readouts
    positive, negative = readouts.chunk(2)
    return positive - negative


def reference(
    pair: ModelPair, prompts: ContrastPrompts, anchor: Anchor, *, batch_tokens: int = BATCH_TOKENS
) -> tuple[Tensor, Tensor]:
    """Readouts of the base and of the specialized model, each of shape `(prompt,)`, float64."""
    base, specialized = (
        readouts(model, pair, prompts, anchor, batch_tokens=batch_tokens) for model in (pair.base, pair.specialized)
    )
    return base, specialized


def readouts(
    model: PreTrainedModel,
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Anchor,
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Tensor:
    """An anchor's readout of one model of a pair, with whatever is patched into it, shape `(prompt,)`, float64."""
    token_ids = _inputs(pair, prompts, anchor)
    residuals = read_residuals(
        model, token_ids, layers=[anchor.layer], positions=anchor.positions, batch_tokens=batch_tokens
    )
    return _contrasted(anchor.read(residuals[0]), anchor)
