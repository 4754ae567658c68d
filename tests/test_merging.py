"""Merged tensors are what the formulas say, what mergekit gives for the same settings, and what chance decided once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from weightpatch.errors import MergeError
from weightpatch.merging.combining import METHODS, Method, combine, seeded_draw
from weightpatch.merging.experts import Expert
from weightpatch.merging.learning import Training
from weightpatch.merging.resolving import Rule
from weightpatch.merging.sparsifying import Draw, Sparsifier, sparsify

ROWS, COLUMNS, N_EXPERTS = 24, 40, 3
WEIGHTS = (0.9, 0.4, -0.3)


@pytest.fixture
def base() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def changes() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [0.1 * torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(N_EXPERTS)]


def draws(seed: int = 0) -> list[Draw]:
    return [seeded_draw(seed, f"expert {number}", "one") for number in range(N_EXPERTS)]


def scalars(weights: Sequence[float] = WEIGHTS) -> list[Tensor]:
    return [torch.tensor(weight) for weight in weights]


def no_chance(probabilities: Tensor) -> Tensor:
    raise AssertionError(f"nothing here is left to chance, but {probabilities.shape} was drawn")


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Every (probabilities, mask) that mergekit draws from here on."""
    from mergekit import sparsify as module

    seen: list[tuple[Tensor, Tensor]] = []
    drawn = torch.bernoulli

    def record(probabilities: Tensor) -> Tensor:
        mask = drawn(probabilities, generator=torch.Generator().manual_seed(len(seen)))
        seen.append((probabilities, mask))
        return mask

    monkeypatch.setattr(module.torch, "bernoulli", record)
    return seen


def by_mergekit(base: Tensor, changes: Sequence[Tensor], method: str, **parameters: object) -> Tensor:
    from mergekit.merge_methods.api import merge_tensors

    found: Tensor = merge_tensors(
        [base, *(base + change for change in changes)],
        method,
        base_index=0,
        parameters={"weight": list(WEIGHTS), **parameters},
        dtype=torch.float32,
    )
    return found


def of_experts(base: Tensor, changes: Sequence[Tensor]) -> list[Tensor]:
    """Differences as they are read from checkpoints: rounded once."""
    return [(base + change) - base for change in changes]


def test_equal_coefficients_and_nothing_else_are_task_arithmetic(base: Tensor, changes: list[Tensor]) -> None:
    found = combine(base, changes, scalars([0.7] * 3), METHODS["task-arithmetic"], draws=[no_chance] * 3)
    torch.testing.assert_close(found, base + 0.7 * torch.stack(changes).sum(dim=0), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        combine(base, of_experts(base, changes), scalars(), METHODS["task-arithmetic"], draws=[no_chance] * 3),
        by_mergekit(base, changes, "task_arithmetic"),
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_ties_equals_mergekit(base: Tensor, changes: list[Tensor], density: float, scale: float) -> None:
    ours = METHODS["ties"]
    ours = replace(ours, sparsifier=replace(ours.sparsifier, density=density), scale=scale)
    found = combine(base, of_experts(base, changes), scalars(), ours, draws=[no_chance] * 3)
    wanted = by_mergekit(base, changes, "ties", density=density, **{"lambda": scale})
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("gamma", [0.01, 0.1, 0.0])
@pytest.mark.parametrize("density", [0.3, 0.9, 0.995])
def test_breadcrumbs_equal_mergekit(base: Tensor, changes: list[Tensor], density: float, gamma: float) -> None:
    ours = Method(sparsifier=Sparsifier(kind="breadcrumbs", density=density, gamma=gamma))
    found = combine(base, of_experts(base, changes), scalars(), ours, draws=[no_chance] * 3)
    wanted = by_mergekit(base, changes, "breadcrumbs", density=density, gamma=gamma)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


BY_CHANCE: dict[str, tuple[str, dict[str, object], Method]] = {
    "dare_linear": ("dare_linear", {}, Method(sparsifier=Sparsifier(kind="drop", density=0.3, rescale="l1"))),
    "dare_linear, not rescaled": (
        "dare_linear",
        {"rescale": False},
        Method(sparsifier=Sparsifier(kind="drop", density=0.3)),
    ),
    "dare_ties": (
        "dare_ties",
        {},
        Method(sparsifier=Sparsifier(kind="drop", density=0.3, rescale="l1"), election="weighted"),
    ),
    "della": (
        "della",
        {"epsilon": 0.1},
        Method(
            sparsifier=Sparsifier(kind="magprune", density=0.3, epsilon=0.1, rescale="l1"),
            election="weighted",
            average="kept",
        ),
    ),
    "della_linear, normalized": (
        "della_linear",
        {"epsilon": 0.2, "normalize": True},
        Method(sparsifier=Sparsifier(kind="magprune", density=0.3, epsilon=0.2, rescale="l1"), average="all"),
    ),
}


@pytest.mark.parametrize("case", BY_CHANCE)
def test_with_its_masks_what_is_left_to_chance_equals_mergekit(
    base: Tensor, changes: list[Tensor], masks: list[tuple[Tensor, Tensor]], case: str
) -> None:
    name, parameters, ours = BY_CHANCE[case]
    wanted = by_mergekit(base, changes, name, density=0.3, **parameters)
    assert len(masks) == N_EXPERTS

    def given(number: int) -> Draw:
        def draw(probabilities: Tensor) -> Tensor:
            torch.testing.assert_close(probabilities, masks[number][0].reshape(probabilities.shape))
            return masks[number][1].reshape(probabilities.shape) > 0

        return draw

    found = combine(base, of_experts(base, changes), scalars(), ours, draws=[given(n) for n in range(N_EXPERTS)])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_coefficients_along_an_axis_give_the_sum_written_out_by_hand(base: Tensor, changes: list[Tensor]) -> None:
    rows = torch.linspace(-0.2, 1, ROWS)
    columns = torch.linspace(0, 2, COLUMNS)
    coefficients = [rows[:, None], columns[None, :], torch.tensor(0.5)]
    found = combine(base, changes, coefficients, Method(scale=0.8), draws=[no_chance] * 3)
    for row in range(0, ROWS, 5):
        for column in range(0, COLUMNS, 7):
            entries = [float(change[row, column]) for change in changes]
            wanted = float(base[row, column]) + 0.8 * (
                float(rows[row]) * entries[0] + float(columns[column]) * entries[1] + 0.5 * entries[2]
            )
            assert float(found[row, column]) == pytest.approx(wanted, abs=1e-6)


def test_sparsifiers_rank_only_what_is_selected(base: Tensor, changes: list[Tensor]) -> None:
    rows = torch.zeros(ROWS)
    rows[4:10] = 1.0
    method = Method(sparsifier=Sparsifier(kind="trim", density=0.25))
    zero = torch.tensor(0.0)
    found = combine(base, changes, [rows[:, None], zero, zero], method, draws=[no_chance] * 3) - base
    part = changes[0][4:10]
    edge = part.abs().flatten().sort(descending=True).values[int(0.25 * part.numel()) - 1]
    torch.testing.assert_close(found[4:10], part * (part.abs() >= edge), atol=1e-6, rtol=0)
    assert not found[:4].any()
    assert not found[10:].any()


def test_an_expert_has_no_vote_where_its_coefficient_is_zero(base: Tensor) -> None:
    loud, quiet = torch.full_like(base, -5.0), torch.full_like(base, 1.0)
    columns = torch.ones(1, COLUMNS)
    columns[:, ::2] = 0
    for election in ("weighted", "unweighted"):
        method = Method(election=election, average="kept")  # type: ignore[arg-type]
        found = combine(base, [loud, quiet], [columns, torch.tensor(1.0)], method, draws=[no_chance] * 2) - base
        torch.testing.assert_close(found[:, ::2], quiet[:, ::2], atol=1e-5, rtol=0)
        torch.testing.assert_close(found[:, 1::2], loud[:, 1::2], atol=1e-5, rtol=0)


def test_weights_enter_the_election_only_where_they_are_asked_to() -> None:
    base = torch.zeros(1, 1)
    changes, coefficients = [torch.tensor([[1.0]]), torch.tensor([[-2.0]])], scalars([3.0, 1.0])
    found = {
        election: float(combine(base, changes, coefficients, Method(election=election), draws=[no_chance] * 2))  # type: ignore[arg-type]
        for election in ("weighted", "unweighted", "none")
    }
    assert found == {"weighted": 3.0, "unweighted": -2.0, "none": 1.0}


def test_what_chance_keeps_is_worth_as_much_on_average() -> None:
    change = torch.rand(400, 500, generator=torch.Generator().manual_seed(2)) + 0.5
    for how in (
        Sparsifier(kind="drop", density=0.2, rescale="inverse"),
        Sparsifier(kind="magprune", density=0.4, epsilon=0.3, rescale="inverse"),
    ):
        left = sparsify(change, how, draw=seeded_draw(0, "one", how.kind))
        assert float((left != 0).float().mean()) == pytest.approx(how.density, abs=0.005)
        assert float(left.mean() / change.mean()) == pytest.approx(1, abs=0.02)


def test_rescaling_by_size_keeps_the_sum_of_sizes(changes: list[Tensor]) -> None:
    for kind in ("trim", "drop", "magprune", "breadcrumbs"):
        how = Sparsifier(kind=kind, density=0.5, rescale="l1")  # type: ignore[arg-type]
        left = sparsify(changes[0], how, draw=seeded_draw(0, "one", kind))
        assert float(left.abs().sum()) == pytest.approx(float(changes[0].abs().sum()), rel=1e-5)


def test_of_entries_that_tie_as_many_stay_as_are_wanted() -> None:
    change = torch.tensor([[2.0, -1.0, 1.0], [1.0, -1.0, 0.5]])
    left = sparsify(change, Sparsifier(kind="trim", density=0.5), draw=no_chance)
    assert left.tolist() == [[2.0, -1.0, 1.0], [0.0, 0.0, 0.0]]
    assert sparsify(change, Sparsifier(kind="trim", density=0.5), draw=no_chance, threshold=1.0).count_nonzero() == 5


def test_chance_depends_on_seed_expert_and_tensor_alone() -> None:
    probabilities = torch.full((50, 50), 0.5)
    first = seeded_draw(0, "math", "layer")(probabilities)
    seeded_draw(0, "code", "layer")(probabilities)
    assert torch.equal(first, seeded_draw(0, "math", "layer")(probabilities))
    for other in (seeded_draw(1, "math", "layer"), seeded_draw(0, "code", "layer"), seeded_draw(0, "math", "other")):
        assert not torch.equal(first, other(probabilities))


def settings() -> Iterator[tuple[str, Method]]:
    """Every method, and each of its numbers and switches changed."""
    for name, method in METHODS.items():
        how = method.sparsifier
        yield f"{name} scale", replace(method, scale=0.5)
        yield f"{name} average", replace(method, average="all" if method.average != "all" else "none")
        yield f"{name} election", replace(method, election="none" if method.election == "weighted" else "weighted")
        if how.kind != "none":
            yield f"{name} density", replace(method, sparsifier=replace(how, density=how.density - 0.04))
            rescale = "l1" if how.rescale != "l1" else "none"
            yield f"{name} rescale", replace(method, sparsifier=replace(how, rescale=rescale))
        if how.kind == "magprune":
            yield f"{name} epsilon", replace(method, sparsifier=replace(how, epsilon=0.3))
        if how.kind == "breadcrumbs":
            yield f"{name} gamma", replace(method, sparsifier=replace(how, gamma=0.05))


@pytest.mark.parametrize(("name", "changed"), list(settings()), ids=[name for name, _ in settings()])
def test_every_setting_of_every_method_changes_what_comes_out(
    base: Tensor, changes: list[Tensor], name: str, changed: Method
) -> None:
    def run(method: Method) -> Tensor:
        return combine(base, changes, scalars(), method, draws=draws())

    whole = METHODS[name.partition(" ")[0]]
    assert not torch.equal(run(whole), run(changed))
    for number in range(N_EXPERTS):
        weights = [weight * (1.5 if place == number else 1) for place, weight in enumerate(WEIGHTS)]
        assert not torch.equal(run(whole), combine(base, changes, scalars(weights), whole, draws=draws()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sparsifier(kind="prune"), "unknown kind 'prune'"),  # type: ignore[arg-type]
        (lambda: Sparsifier(kind="drop", rescale="l2"), "unknown rescale 'l2'"),  # type: ignore[arg-type]
        (lambda: Sparsifier(kind="trim", over="layer"), "unknown over 'layer'"),  # type: ignore[arg-type]
        (lambda: Sparsifier(kind="drop", over="model"), "only trim can rank a whole model"),
        (lambda: Sparsifier(kind="trim", density=0), "density 0 is no share"),
        (lambda: Sparsifier(kind="magprune", density=0.9), "runs from 0.75 to 1.05"),
        (lambda: Sparsifier(kind="trim", rescale="inverse"), "keeps nothing at random"),
        (lambda: Sparsifier(kind="breadcrumbs", gamma=1), "no share of outliers"),
        (lambda: Method(election="loudest"), "unknown election 'loudest'"),  # type: ignore[arg-type]
        (lambda: Method(scale=math.nan), "scale nan is no number"),
        (lambda: Training(n_steps=-1), "n_steps -1 of learning"),
        (lambda: Training(n_steps=5, stop_at=6), "stop_at 6 of learning is none of its 5 steps"),
        (lambda: Training(learning_rate=0), "learning_rate 0 of learning.*above 0"),
        (lambda: Training(penalty=math.nan), "penalty nan of learning"),
        (lambda: Training(answer_tokens=-1), "answer_tokens -1 of learning"),
        (lambda: Expert(specialized="a", weight=math.inf), "weight inf of a is no number"),
        (lambda: Rule(temperature=math.nan), "temperature nan"),
        (lambda: Rule(share=1.5), "share 1.5"),
        (lambda: Method(average="median"), "unknown average 'median'"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_mean_nothing_are_refused_in_words(make: Callable[[], object], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        make()


def test_coefficients_of_another_shape_are_refused(base: Tensor, changes: list[Tensor]) -> None:
    for wrong in (torch.ones(ROWS), torch.ones(ROWS, COLUMNS), torch.ones(COLUMNS, 1)):
        with pytest.raises(MergeError, match="do not fit a tensor of shape"):
            combine(base, changes[:1], [wrong], Method(), draws=[no_chance])
