"""Patching many sets of components one after another: from one set to the next, only what changes is done again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from weightpatch.component import Component, slices
from weightpatch.engine import suffix
from weightpatch.errors import ComponentError
from weightpatch.pair import ModelPair
from weightpatch.reader import Readable
from weightpatch.residuals import evaluating

_NOBODY = -1
Read = Callable[[frozenset[int]], Tensor]
"""Readouts with the specialized weights of some components, by their places, in the base: shape `(sequence,)`."""


@contextmanager
def walking(
    pair: ModelPair,
    token_ids: Sequence[Sequence[int]],
    anchor: Readable,
    components: Sequence[Component],
    *,
    batch_tokens: int,
) -> Iterator[Read]:
    """The base, read with one set of components after another patched; restored bit for bit on leaving.

    Weights are written into the base itself. Layers below the lowest change since the last set are not run again.

    Args:
        pair: The two models. Both sides of all that the components own are in memory as long as the block lasts.
        token_ids: Unpadded prompts.
        anchor: What to read, and where.
        components: What sets consist of.
        batch_tokens: Most tokens of one forward call.

    Raises:
        ComponentError: two components that share weights.
    """
    owned = _owned(pair, components)
    with evaluating(pair.base, pair.specialized):
        runs = suffix.start(pair, token_ids, anchor, batch_tokens=batch_tokens)
    ways = [_Way(run=run) for run in runs]
    now: set[int] = set()

    def write(wanted: frozenset[int]) -> None:
        with torch.no_grad():
            for place in now - wanted:
                for target, ours, _ in owned[place]:
                    target.copy_(ours)
            for place in wanted - now:
                for target, _, theirs in owned[place]:
                    target.copy_(theirs)
        now.clear()
        now.update(wanted)

    def read(wanted: frozenset[int]) -> Tensor:
        changed = [member for place in wanted ^ now for member in _members(components[place])]
        write(wanted)
        outside = [one for place in sorted(wanted) for one in _members(components[place]) if one.layer is None]
        lowest = min((-1 if one.layer is None else one.layer for one in changed), default=len(runs[0].calls))
        with evaluating(pair.base):
            return suffix.gather([way.read(lowest, outside) for way in ways], runs)

    try:
        yield read
    finally:
        write(frozenset())


@dataclass(kw_only=True)
class _Way:
    """One packed row on its way up the base as it is patched now.

    Attributes:
        run: The row.
        entering: Layer -> residual stream that enters it, of the layers that have been run.
        found: The last readouts, shape `(prompt,)`.
    """

    run: suffix.Run
    entering: list[Tensor] = field(default_factory=list)
    found: Tensor | None = None

    def read(self, lowest: int, outside: Sequence[Component]) -> Tensor:
        """Readouts, shape `(prompt,)`.

        Args:
            lowest: The lowest layer that has changed; below 0: what enters layer 0 has.
            outside: Patched components that lie in no layer.
        """
        run, calls = self.run, self.run.calls
        if self.found is not None and lowest >= len(calls):
            return self.found
        if lowest < 0 or not self.entering:
            self.entering = [run.embedded(outside) if outside else run.residual]
        start = min(max(lowest, 0), len(self.entering) - 1)
        del self.entering[start + 1 :]
        rows = self.entering[start]
        for call in calls[start:-1]:
            rows = call(rows)
            self.entering.append(rows)
        rows = calls[-1].last(rows) if calls else rows[:, run.reads.to(rows.device)]
        self.found = run.read(rows)[0]
        return self.found


def _owned(pair: ModelPair, components: Sequence[Component]) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """What each component owns: places in the base, with what stands there and what the specialized model has."""
    owned: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in components]
    pieces = [(place, piece) for place, one in enumerate(components) for piece in slices(pair.architecture, one)]
    pieces.sort(key=lambda found: found[1].parameter)  # so that a streamed layer is read once
    for name, group in groupby(pieces, key=lambda found: found[1].parameter):
        ours, theirs = pair.base.get_parameter(name).data, pair.specialized_weight(name).detach()
        owner = torch.full(ours.shape, _NOBODY, dtype=torch.int32)
        for place, piece in group:
            taken = piece.of(owner)
            others = taken[(taken != _NOBODY) & (taken != place)]
            if len(others):
                raise ComponentError(
                    f"{components[int(others[0])]} and {components[place]} share weights ({name}). In company every "
                    "weight belongs to one component: name units that do not overlap, for example heads,kvs,mlps."
                )
            taken.fill_(place)
            target = piece.of(ours)
            owned[place].append((target, target.clone(), piece.of(theirs).clone()))
    return owned


def _members(component: Component) -> tuple[Component, ...]:
    return component.members or (component,)
