"""One contestant's turn: some components patched and read, with a clock and an eye on memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weightpatch.component import Component
from weightpatch.localization import sweep
from weightpatch.speed.contestants import Read
from weightpatch.speed.machine import synchronize
from weightpatch.speed.memory import with_peak_memory
from weightpatch.speed.work import Swap, Work


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """What a turn took and found.

    Attributes:
        seconds: Wall time of all its components together.
        effects: Component -> patched readout minus the base's, shape `(prompt,)`, in the readout's unit.
        peak_memory: MiB of anonymous memory above what was there before; None where the system does not tell.
    """

    seconds: float
    effects: Mapping[Component, Tensor]
    peak_memory: float | None


def loop_turn(read: Read, work: Work, members: Sequence[Component], base: Tensor) -> Turn:
    """Write the weights, run, read, restore; what is written lies ready before the clock starts.

    Args:
        read: How the contestant runs the base and reads the residual.
        work: What it is part of.
        members: The components of this turn.
        base: The contestant's own readout of the unpatched base, shape `(prompt,)`.
    """
    swaps = [Swap.of(work.pair, component) for component in members]

    def body() -> tuple[float, dict[Component, Tensor]]:
        found: dict[Component, Tensor] = {}
        start = time.perf_counter()
        for swap in swaps:
            try:
                swap.write()
                found[swap.component] = readout(read, work) - base
            finally:
                swap.restore()
        synchronize(work.batch.tokens.device)
        return time.perf_counter() - start, found

    with torch.no_grad():
        (seconds, found), peak = with_peak_memory(body)
    return Turn(seconds=seconds, effects=found, peak_memory=peak)


def readout(read: Read, work: Work) -> Tensor:
    """The anchor's readout of the base with whatever is written into it, shape `(prompt,)`, float64."""
    return work.anchor.read(read().unsqueeze(1).cpu())


def engine_turn(engine: Literal["suffix", "swap"], work: Work, members: Sequence[Component]) -> Turn:
    """Let one of our engines measure some components.

    `swap` begins with a readout of the base; like that of the other loops it is not timed. `suffix` is timed as a
    whole, its base pass included.
    """
    ordered = tuple(sorted(members, key=work.components.index))
    below = (ordered[0], *ordered) if engine == "swap" else ordered

    def body() -> tuple[float, dict[Component, Tensor]]:
        start = time.perf_counter()
        effects = sweep(work.pair, work.prompts, work.anchor, below, engine=engine)
        if engine == "swap":  # the base, and a first component that does not count
            next(effects)
            start = time.perf_counter()
        found = {effect.component: effect.per_prompt for effect in effects}
        return time.perf_counter() - start, found

    (seconds, found), peak = with_peak_memory(body)
    return Turn(seconds=seconds, effects=found, peak_memory=peak)
