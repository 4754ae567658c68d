"""One component's recovery with its interval, as figures and tables show it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightpatch.component import Component

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of a table of effects.

    Attributes:
        component: Which one.
        recovery: Share of the gap.
        low: Lower end of the 95 % interval; NaN with a single prompt.
        high: Upper end.
    """

    component: Component
    recovery: float
    low: float
    high: float

    @property
    def address(self) -> str:
        """The component's address."""
        return self.component.address

    @property
    def interval(self) -> str:
        """The 95 % interval in words; says so where a single prompt gives none."""
        if math.isnan(self.low) or math.isnan(self.high):
            return "no interval (a single prompt)"
        return f"95 % interval {self.low:.3f} to {self.high:.3f}"

    @property
    def text(self) -> str:
        """The recovery with two decimals."""
        text = f"{self.recovery:.2f}"
        return "0.00" if text == "-0.00" else text


def read_scores(table: pd.DataFrame) -> list[Score]:
    """The rows of a table as scores, in its order.

    Args:
        table: What `Effects.table` returns.
    """
    columns = (table[name].tolist() for name in ("component", "recovery", "ci_low", "ci_high"))
    return [
        Score(component=Component.parse(str(address)), recovery=float(value), low=float(low), high=float(high))
        for address, value, low, high in zip(*columns, strict=True)
    ]
