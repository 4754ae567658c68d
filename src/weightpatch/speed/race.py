"""One anchor layer: every contestant checked against `swap`, then all of them in turns on the same components."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor

from weightpatch.component import Component
from weightpatch.reading import reference
from weightpatch.residuals import evaluating
from weightpatch.speed.contestants import LOOPS, Read, open_loop
from weightpatch.speed.sampling import deal, one_of_each_unit
from weightpatch.speed.turns import Turn, engine_turn, loop_turn, readout
from weightpatch.speed.work import Work

TOLERANCE = 1e-4
"""By how much of the gap a contestant's readouts may differ from those of `swap`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """A contestant's turns towards one anchor layer.

    Attributes:
        engine: Its name.
        turns: For each repeat, its turns; empty when it failed.
        max_difference: Largest difference of its readouts to those of `swap`, over the mean gap; None when it could not
            be run at all.
        failure: Why it was not timed; empty when it was.
    """

    engine: str
    turns: Sequence[Sequence[Turn]]
    max_difference: float | None
    failure: str = ""


@dataclass(kw_only=True, eq=False)
class _Entry:
    """A contestant while the race goes on."""

    name: str
    read: Read | None = None  # for one that writes weights by itself
    base: Tensor | None = None
    base_difference: float = 0.0
    effects: dict[Component, Tensor] = field(default_factory=dict)
    turns: list[list[Turn]] = field(default_factory=list)
    failure: str = ""

    def take_turn(self, work: Work, members: Sequence[Component]) -> Turn:
        if self.read is None or self.base is None:
            turn = engine_turn(cast("Literal['suffix', 'swap']", self.name), work, members)
        else:
            turn = loop_turn(self.read, work, members, self.base)
        self.effects |= turn.effects
        return turn

    def difference(self, truth: Mapping[Component, Tensor], gap: float) -> float:
        pairs = [(self.effects[component], truth[component]) for component in self.effects if component in truth]
        largest = [self.base_difference, *(float((own - other).abs().max()) for own, other in pairs)]
        return float(torch.tensor(largest, dtype=torch.float64).max()) / gap  # NaN if any of them is


def race(
    work: Work,
    names: Sequence[str],
    sampled: Sequence[Component],
    *,
    repeats: int,
    n_rounds: int,
    seed: int,
    on_turn: Callable[[], None],
) -> tuple[Outcome, ...]:
    """Check the contestants and time them.

    In every repeat the sampled components are dealt out to rounds. In every round each loop has its turn with the
    round's components, and another one begins; `suffix`, which is timed on a whole sweep, has its turn in one round.

    Args:
        work: The sweep.
        names: Contestants, all of which can be run here.
        sampled: What the loops are timed on.
        repeats: How often everything is done.
        n_rounds: Rounds of a repeat, at most one for each sampled component.
        seed: Of the dealing.
        on_turn: Called after each turn.
    """
    base, specialized = reference(work.pair, work.prompts, work.anchor)
    gap = float((specialized - base).abs().mean())
    checked = one_of_each_unit(work.components, seed=seed)
    truth = dict(engine_turn("swap", work, checked).effects)
    with ExitStack() as opened:
        opened.enter_context(evaluating(work.pair.base))
        entries = [_enter(name, work, checked, base, opened) for name in names]
        for entry in entries:
            off = entry.difference(truth, gap)
            if not entry.failure and not off <= TOLERANCE:
                entry.failure = f"its readouts differ from swap's by {off:.1e} of the gap, more than {TOLERANCE:.0e}"
        for repeat in range(repeats):
            _repeat(work, entries, deal(sampled, n_rounds, seed=seed + repeat), repeat, on_turn)
    truth |= next((entry.effects for entry in entries if entry.name == "swap"), {})
    return tuple(_outcome(entry, truth, gap) for entry in entries)


def _enter(name: str, work: Work, checked: Sequence[Component], base: Tensor, opened: ExitStack) -> _Entry:
    """Make a contestant ready and let it patch the checked components, which also warms it up."""
    entry = _Entry(name=name)
    if name not in LOOPS:
        if name != "swap":  # it has just been run, to check the others by
            entry.take_turn(work, checked)
        return entry
    try:
        with redirect_stdout(sys.stderr):  # some tools print where results belong
            entry.read = opened.enter_context(open_loop(name)(work.pair.base, work.batch, work.anchor.layer))
            with torch.no_grad():
                entry.base = readout(entry.read, work)
            entry.base_difference = float((entry.base - base).abs().max())
            entry.take_turn(work, checked)
    except Exception as error:
        if name == "loop":
            raise
        entry.failure = _told(error)
    return entry


def _repeat(
    work: Work,
    entries: Sequence[_Entry],
    rounds: Sequence[Sequence[Component]],
    repeat: int,
    on_turn: Callable[[], None],
) -> None:
    """All rounds once."""
    for entry in entries:
        entry.turns.append([])
    for number, members in enumerate(rounds):
        first = (repeat + number) % len(entries)
        for entry in (*entries[first:], *entries[:first]):
            whole = entry.name == "suffix"
            if whole and number != len(rounds) // 2:
                continue
            if not entry.failure:
                _timed(work, entry, work.components if whole else members)
            on_turn()


def _timed(work: Work, entry: _Entry, members: Sequence[Component]) -> None:
    """One turn. A tool that fails in the middle is out of the race; ours are not excused."""
    try:
        entry.turns[-1].append(entry.take_turn(work, members))
    except Exception as error:
        if entry.name not in LOOPS or entry.name == "loop":
            raise
        entry.failure = _told(error)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _outcome(entry: _Entry, truth: Mapping[Component, Tensor], gap: float) -> Outcome:
    off = entry.difference(truth, gap) if entry.effects else None
    failure = entry.failure
    if off is not None and not off <= TOLERANCE and not failure:
        failure = f"its readouts differ from swap's by {off:.1e} of the gap, more than {TOLERANCE:.0e}"
    return Outcome(engine=entry.name, turns=() if failure else entry.turns, max_difference=off, failure=failure)
