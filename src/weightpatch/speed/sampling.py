"""Which components the loops are timed on, and in which rounds."""

from __future__ import annotations

import random
from collections.abc import Sequence

from weightpatch.component import Component


def sample(components: Sequence[Component], size: int, *, seed: int) -> tuple[Component, ...]:
    """Components drawn at random, as evenly from every layer as the numbers allow, and at least one from each.

    Args:
        components: What there is.
        size: How many at least; fewer when there are not that many, more when there are more layers.
        seed: Of the draw.
    """
    dice = random.Random(seed)  # noqa: S311  no secret
    layers: dict[int | None, list[Component]] = {}
    for component in components:
        layers.setdefault(component.layer, []).append(component)
    piles = list(layers.values())
    for members in piles:
        dice.shuffle(members)
    dice.shuffle(piles)  # which layers give one more than others
    wanted = min(max(size, len(piles)), len(components))
    by_turns = [members[turn] for turn in range(max(map(len, piles))) for members in piles if turn < len(members)]
    return tuple(by_turns[:wanted])


def deal(components: Sequence[Component], n_rounds: int, *, seed: int) -> list[list[Component]]:
    """The components in a random order, dealt out to rounds of about equal size; no round is empty."""
    order = list(components)
    random.Random(seed).shuffle(order)  # noqa: S311  no secret
    rounds = [order[start::n_rounds] for start in range(n_rounds)]
    return [members for members in rounds if members]


def one_of_each_unit(components: Sequence[Component], *, seed: int) -> tuple[Component, ...]:
    """A random component of every unit, ordered by layer."""
    dice = random.Random(seed)  # noqa: S311  no secret
    units = dict.fromkeys(component.unit for component in components)
    chosen = [dice.choice([one for one in components if one.unit == unit]) for unit in units]
    return tuple(sorted(chosen, key=components.index))
