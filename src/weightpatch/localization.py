"""One entry for every method of localization: which parameters move the readout, and by how much."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from weightpatch.anchor import Anchor
from weightpatch.component import Component, components
from weightpatch.engine import Sweep, suffix, swap
from weightpatch.errors import AnchorError, ComponentError
from weightpatch.estimation import Estimation, estimate_effects
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompts
from weightpatch.reading import Target, check_target, contrasted, inputs, reference
from weightpatch.residuals import BATCH_TOKENS, tokens_per_call
from weightpatch.statistics import check_gap, recovery

if TYPE_CHECKING:
    import pandas as pd

Method = Literal["exact", "first-order"]
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
        anchor: What was read: an anchor, or a readout of the output.
        method: How effects were found: `exact` or `first-order`.
        engine: By which code; for estimates, by which approximation.
        per_span: Span of tokens -> mean over prompts of what acts there, shape `(component,)`; estimates only, which
            are sums over tokens. Together the spans are the mean effect.
    """

    components: tuple[Component, ...]
    per_prompt: Tensor
    base: Tensor
    specialized: Tensor
    prompt_ids: tuple[str, ...]
    queries: tuple[str, ...]
    past_anchor: tuple[Component, ...]
    anchor: Target
    method: str
    engine: str
    per_span: Mapping[str, Tensor] = field(default_factory=dict)

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

    def by_span(self) -> pd.DataFrame:
        """Where in the prompts each component acts: one row for each, its recovery split by span.

        Returns:
            Columns component, unit, layer, one for each span that prompts have (`weightpatch.spans.SPANS`), and
            recovery, their sum.

        Raises:
            ComponentError: effects that are no sums over tokens: exact ones, those of a contrast or with `grad_drop`.
            NoGapError: the two models do not differ measurably in the readout.
        """
        import pandas as pd

        if not self.per_span:
            raise ComponentError(
                f"these effects ({self.method}, {self.engine}) are no sums over the tokens of these prompts. "
                'Use localize(..., method="first-order"), no contrast readout, no grad_drop.'
            )
        gap = check_gap(self.gap.numpy(), groups=self.queries).estimate
        shares = {span: values.numpy() / gap for span, values in self.per_span.items()}
        about = {
            "component": [str(component) for component in self.components],
            "unit": [component.unit for component in self.components],
            "layer": pd.array([component.layer for component in self.components], dtype="Int64"),
        }
        return pd.DataFrame({**about, **shares, "recovery": self.per_prompt.mean(dim=1).numpy() / gap})

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
    anchor: Target,
    *,
    units: str | Sequence[str | Component] = "heads,mlps",
    method: Method = "exact",
    engine: Engine = "suffix",
    estimation: Estimation | None = None,
    batch_tokens: int | None = None,
    on_effect: Callable[[ComponentEffect], None] | None = None,
) -> Effects:
    """Patch each component's specialized weights into the base and measure the anchor's readout, or estimate it.

    Args:
        pair: The two models.
        prompts: All of them are used, with their instruction.
        anchor: What to read: an anchor, or what the output says (`weightpatch.outputs`: `Margin`, `Divergence`).
        units: Units (`heads`, `kvs`, `mlps`, ...) and addresses (`L5.N812`), in one string with commas or a sequence.
        method: `exact`: the weights are really in place. `first-order`: all components at once, from one forward and
            one backward pass; see `weightpatch.screening` for how good that is on a pair.
        engine: `suffix` (fast) or `swap` (writes weights and runs the whole model; the oracle), for exact effects.
        estimation: How to estimate, for `first-order`; None: by outputs.
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
    if isinstance(anchor, Anchor) and anchor.report is not None and not anchor.report.stable:
        failed = ", ".join(gate.name for gate in anchor.report.gates if not gate.passed)
        warnings.warn(f"the anchor is unstable: it failed {failed}; recoveries on it may mean little", stacklevel=2)
    below, past = plan(pair, anchor, units)
    _check_method(method, engine)
    how = estimation or Estimation()
    per_span: Mapping[str, Tensor] = {}
    if method == "first-order":
        _check_head(pair, below, anchor)
        estimates = estimate_effects(pair, prompts, anchor, below, how, batch_tokens=batch_tokens)
        per_prompt, per_span = estimates.per_prompt, estimates.per_span
    else:
        found: list[Tensor] = []
        for effect in sweep(pair, prompts, anchor, below, method=method, engine=engine, batch_tokens=batch_tokens):
            found.append(effect.per_prompt)
            if on_effect:
                on_effect(effect)
        per_prompt = torch.stack(found)
    base, specialized = reference(pair, prompts, anchor, batch_tokens=batch_tokens or BATCH_TOKENS)
    return Effects(
        components=below,
        per_prompt=per_prompt,
        base=base,
        specialized=specialized,
        prompt_ids=tuple(row.id for row in prompts),
        queries=tuple(row.query for row in prompts),
        past_anchor=past,
        anchor=anchor,
        method=method,
        engine=how.name if method == "first-order" else engine,
        per_span=per_span,
    )


def plan(
    pair: ModelPair, anchor: Target, units: str | Sequence[str | Component]
) -> tuple[tuple[Component, ...], tuple[Component, ...]]:
    """What a sweep would patch: components that can reach the anchor, and those at or past it, which cannot.

    Raises:
        ComponentError: an unknown unit or address.
        AnchorError: the anchor does not fit the pair, or nothing lies below it.
    """
    if isinstance(anchor, Anchor):
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


def reaches(component: Component, anchor: Target) -> bool:
    """Whether what a component writes, or one member of a set, can reach what is read."""
    if component.members:
        return any(reaches(member, anchor) for member in component.members)
    if not isinstance(anchor, Anchor):
        return True
    return component.address == "embed" if component.layer is None else component.layer < anchor.layer


def sweep(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Target,
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
    _check_method(method, engine)
    if method == "first-order" or engine == "suffix":
        _check_head(pair, below, anchor)
    if method == "first-order":
        estimates = estimate_effects(pair, prompts, anchor, below, Estimation(), batch_tokens=batch_tokens)
        for component, effects in zip(below, estimates.per_prompt, strict=True):
            yield ComponentEffect(component=component, per_prompt=effects)
        return
    check_target(pair, prompts, anchor)
    token_ids = inputs(pair, prompts, anchor)
    width = batch_tokens or (tokens_per_call(pair.base) if engine == "suffix" else BATCH_TOKENS)
    for measured in ENGINES[engine](pair, token_ids, anchor, below, batch_tokens=width, skip=skip):
        change = measured.readout - measured.base
        yield ComponentEffect(component=measured.component, per_prompt=contrasted(change, anchor))


def _check_method(method: str, engine: str) -> None:
    if method not in get_args(Method):
        raise ComponentError(f"unknown method {method!r}. Choose one of {', '.join(get_args(Method))}.")
    if engine not in ENGINES:
        raise ComponentError(f"unknown engine {engine!r}. Choose one of {', '.join(ENGINES)}.")


def _check_head(pair: ModelPair, below: Sequence[Component], anchor: Target) -> None:
    """Raise for components behind the last layer, where what is read is read through them."""
    if isinstance(anchor, Anchor):
        return
    tied = not pair.architecture.parameters_under(pair.architecture.family.unembed)
    head = {"norm", "unembed", *(("embed",) if tied else ())}
    if named := [str(one) for one in below if head & {part.address for part in one.members or (one,)}]:
        raise ComponentError(
            f"{', '.join(named[:4])}: the output is read through the base's norm and head, which only "
            f'engine="swap" patches. Leave {"it" if len(named) == 1 else "them"} out, or use that.'
        )
