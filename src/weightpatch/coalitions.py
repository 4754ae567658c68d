"""What a component is worth in company: Shapley values and greedy set search, for any game given by a function.

Nothing here knows of models. Players are numbered; a game says what a set of them restores, prompt by prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from weightpatch.errors import ComponentError

Measure = Callable[[Sequence[frozenset[int]]], Tensor]
"""Sets of players -> what each restores, shape `(set, prompt)`; the empty set, which restores 0, is never asked for."""

BUDGET_PER_PLAYER = 10
"""Sets that are measured for every player, where no budget is given."""
WIDTH = 8
"""Players that a step of a greedy search measures: those that promise most by what is known of them."""


def shapley(measure: Measure, n: int, *, budget: int, seed: int = 0) -> Tensor:
    """Shapley values, estimated: a player's mean gain where players join in random orders, each also backwards.

    Args:
        measure: The game.
        n: Players.
        budget: Most sets to measure; one order takes n - 1 of them and the set of all is shared.
        seed: Of the orders.

    Returns:
        Values, shape `(player, prompt)`. They add up to what the set of all restores, whatever the budget.

    Raises:
        ComponentError: the budget does not suffice for one order and its reverse.

    Source:
        Shapley 1953; sampling of permutations: Castro, Gomez and Tejada 2009 (doi:10.1016/j.cor.2008.04.004); each with
        its reverse: Mitchell et al. 2022 (JMLR 23:43).
    """
    least = 2 * (n - 1) + 1
    if budget < least:
        raise ComponentError(
            f"a budget of {budget} sets is too small for the Shapley values of {n} components: one order and its "
            f"reverse take {least}. Give at least so many, or fewer components."
        )
    everyone = frozenset(range(n))
    whole = measure([everyone])[0]
    total = torch.zeros(n, *whole.shape, dtype=whole.dtype)
    n_pairs = (budget - 1) // (2 * (n - 1)) if n > 1 else 1
    draw = random.Random(seed)  # noqa: S311  not for secrets
    for _ in range(n_pairs):
        order = draw.sample(range(n), n)
        for way in (order, order[::-1]):
            growing = [frozenset(way[:length]) for length in range(1, n)]
            inner = measure(growing) if growing else whole.new_zeros(0, *whole.shape)
            steps = torch.cat([torch.zeros_like(whole)[None], inner, whole[None]])
            total[way] += steps.diff(dim=0)
    return total / (2 * n_pairs)


def addition(measure: Measure, n: int, *, budget: int, sign: int = 1, width: int = WIDTH) -> Tensor:
    """Greedy addition: in every step the player joins that then restores most.

    Args:
        measure: The game.
        n: Players.
        budget: Most sets to measure.
        sign: 1, or -1 where restoring means going down.
        width: Players measured in one step, those whose last known gain is largest.

    Returns:
        Gains, shape `(player, prompt)`: of those that joined, on top of those before them; of the rest, on top of all
        that joined.

    Raises:
        ComponentError: the budget does not suffice for measuring every player alone and again at the end.
    """
    _check(n, budget, "addition")
    taken: frozenset[int] = frozenset()
    gains = measure([frozenset([one]) for one in range(n)])
    current = torch.zeros_like(gains[0])
    spent = n
    while len(taken) < n and spent + width + n <= budget:
        promising = _ordered(gains, set(range(n)) - taken, -sign)[:width]
        reached = measure([taken | {one} for one in promising])
        spent += len(promising)
        gains[promising] = reached - current
        best = _ordered(gains, promising, -sign)[0]
        if sign * float(gains[best].mean()) <= 0:
            break
        taken, current = taken | {best}, reached[promising.index(best)]
    if left := sorted(set(range(n)) - taken):
        gains[left] = measure([taken | {one} for one in left]) - current
    return gains


def removal(measure: Measure, n: int, *, budget: int, sign: int = 1, width: int = WIDTH) -> Tensor:
    """Greedy removal: from the set of all, in every step the player leaves whose loss is least.

    Arguments and errors as in `addition`.

    Returns:
        Losses, shape `(player, prompt)`: of those that left, from the set at that time; of the rest, from what is left.
    """
    _check(n, budget, "removal")
    kept = frozenset(range(n))
    current = measure([kept])[0]
    losses = current - _values(measure, [kept - {one} for one in range(n)], current)
    spent = n + 1
    while len(kept) > 1 and spent + width + n <= budget:
        idle = _ordered(losses, kept, sign)[:width]
        left_over = _values(measure, [kept - {one} for one in idle], current)
        spent += len(idle)
        losses[idle] = current - left_over
        least = _ordered(losses, idle, sign)[0]
        kept, current = kept - {least}, left_over[idle.index(least)]
    staying = sorted(kept)
    losses[staying] = current - _values(measure, [kept - {one} for one in staying], current)
    return losses


def _values(measure: Measure, sets: Sequence[frozenset[int]], like: Tensor) -> Tensor:
    """What sets restore, among which the empty one may be."""
    found = torch.zeros(len(sets), *like.shape, dtype=like.dtype)
    if filled := [place for place, own in enumerate(sets) if own]:
        found[filled] = measure([sets[place] for place in filled])
    return found


def _ordered(values: Tensor, among: Iterable[int], sign: int) -> list[int]:
    """Players by their mean value, times the sign, the least first."""
    means = (sign * values.mean(dim=1)).tolist()
    return sorted(among, key=lambda one: (means[one], one))


def _check(n: int, budget: int, name: str) -> None:
    least = 2 * n + 1
    if budget < least:
        raise ComponentError(
            f"a budget of {budget} sets is too small for greedy {name} with {n} components: it takes {least} to begin "
            "and to end. Give more, or fewer components."
        )
