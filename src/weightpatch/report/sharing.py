"""Which components serve all tasks of a run and which only one; a description, not a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightpatch.component import UNITS, Component

if TYPE_CHECKING:
    import pandas as pd

SERVING_RECOVERY = 0.02
"""A component serves a task when its recovery is above this and its 95 % interval lies above 0."""


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How the components of one unit are shared among tasks; addresses, those of the earliest layers first.

    Attributes:
        unit: Which unit.
        n_compared: Components measured in every task; the others cannot be compared and are left out.
        in_all: Those that serve every task.
        in_several: Those that serve more than one but not all.
        in_one: Task -> those that serve it alone.
        n_in_none: How many serve none.
    """

    unit: str
    n_compared: int
    in_all: tuple[str, ...]
    in_several: tuple[str, ...]
    in_one: Mapping[str, tuple[str, ...]]
    n_in_none: int


def serves(table: pd.DataFrame) -> pd.Series[bool]:
    """Whether each component of a task's table serves that task."""
    return (table["ci_low"] > 0) & (table["recovery"] > SERVING_RECOVERY)


def share(tables: Mapping[str, pd.DataFrame]) -> list[Sharing]:
    """How the components of each unit are shared among the tasks.

    Args:
        tables: Task -> what `Effects.table` returns.
    """
    measured = [set(table["component"]) for table in tables.values()]
    common = set.intersection(*measured) if measured else set()
    serving = {task: set(table["component"][serves(table)]) & common for task, table in tables.items()}
    members = sorted((Component.parse(address) for address in common), key=_place)
    found = []
    for unit in UNITS:
        own = [member.address for member in members if member.unit == unit]
        count = {address: sum(address in those for those in serving.values()) for address in own}
        if own:
            found.append(
                Sharing(
                    unit=unit,
                    n_compared=len(own),
                    in_all=tuple(at for at in own if count[at] == len(tables)),
                    in_several=tuple(at for at in own if 1 < count[at] < len(tables)),
                    in_one={
                        task: alone
                        for task, those in serving.items()
                        if (alone := tuple(at for at in own if count[at] == 1 and at in those))
                    },
                    n_in_none=sum(count[at] == 0 for at in own),
                )
            )
    return found


def _place(component: Component) -> tuple[int, int, str]:
    return (component.layer or 0, component.index or 0, component.address)
