"""Effects of patches on a readout: the numbers that every method of localization gives, and their table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightpatch.component import Component
from weightpatch.errors import ComponentError
from weightpatch.reading import Target
from weightpatch.statistics import check_gap, recovery

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, eq=False)
class Effects:
    """What patching each component does to the readout, prompt by prompt, and how it was measured.

    Attributes:
        components: What was patched; `str()` of each is its address.
        per_prompt: Patched minus base readout, shape `(component, prompt)`, float64, in the readout's unit; for
            `necessity`, the specialized readout minus that with base weights. Either way 0 is no effect, and the gap
            all of it.
        base: Readout of the base, shape `(prompt,)`, same unit.
        specialized: Readout of the specialized model, same shape and unit.
        prompt_ids: Ids of the prompts.
        queries: The base query of each; prompts of one query are resampled together in intervals.
        past_anchor: Components asked for that lie at or past the anchor. Their effect on it is 0 by construction, so
            they were not measured and are not among `components`.
        anchor: What was read: an anchor, or a readout of the output.
        method: How effects were found; see `localize`.
        engine: By which code; for estimates, by which approximation.
        per_span: Span of tokens -> mean over prompts of what acts there, shape `(component,)`; estimates only, which
            are sums over tokens. Together the spans are the mean effect.
        targets: Components whose own writes were read on the way, lowest layer first.
        per_target: What each target then writes more along the anchor's direction at the readout positions, shape
            `(component, target, prompt)`, float64, in the readout's unit. Where the targets are all that writes
            (`targets="all"`), they add up to `per_prompt`.
        delivered: What targets write there in the base and in the specialized model, shape `(2, target, prompt)`.
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
    targets: tuple[Component, ...] = ()
    per_target: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.float64))
    delivered: Tensor = field(default_factory=lambda: torch.zeros(2, 0, 0, dtype=torch.float64))

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

    def matrix(self) -> pd.DataFrame:
        """The matrix of total effects, supplier by target, as shares of the gap: who delivers what each one starts.

        Returns:
            One row for each component, one column for each target, both by address.

        Raises:
            ComponentError: no targets were read.
            NoGapError: the two models do not differ measurably in the readout.
        """
        import pandas as pd

        if not self.targets:
            raise ComponentError('no targets were read. Use localize(..., targets="all"), or name some.')
        gap = check_gap(self.gap.numpy(), groups=self.queries).estimate
        return pd.DataFrame(
            self.per_target.mean(dim=2).numpy() / gap,
            index=[str(component) for component in self.components],
            columns=[str(target) for target in self.targets],
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
        per_prompt: As in `Effects`, shape `(prompt,)`, float64.
        per_target: As in `Effects`, shape `(target, prompt)`; None without targets.
    """

    component: Component
    per_prompt: Tensor
    per_target: Tensor | None = None
