"""What tests of plants share: designs on the bundled base, and whether a plant on disk does what its page says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weightpatch.architecture import Architecture
from weightpatch.checkpoint import find, load, read_tokenizer
from weightpatch.component import components, slices
from weightpatch.planted.designs import Design, Unit, Variant, draw_design
from weightpatch.planted.planting import FAILS, N_PROMPTS, PASSES, PLAIN, TINY_COURSE, Course, pass_rate_with
from weightpatch.planted.suite import Planted, Suite

ANCHOR_LAYER = 7


def weights_of(base: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in base.named_parameters()}


def design_of(architecture: Architecture, variant: Variant, unit: Unit, seed: int = 0) -> Design:
    return draw_design(architecture, name="one", variant=variant, unit=unit, seed=seed, anchor_layer=ANCHOR_LAYER)


def check_parts(suite: Suite, planted: Planted, *, n_carriers: int, n_distractors: int) -> None:
    """Carriers, distractors and all the rest are as many as designed, and no component is two of them."""
    carriers, candidates = planted.all_carriers, set(planted.candidates)
    assert len(planted.carriers) == (2 if planted.variant in ("redundant", "joint") else 1), suite.folder
    assert len(carriers) == sum(map(len, planted.carriers)) == n_carriers
    assert len(planted.distractors) == n_distractors
    assert carriers | set(planted.distractors) < candidates
    assert carriers.isdisjoint(planted.distractors)
    assert candidates.isdisjoint(planted.others)


def check_page(planted: Planted) -> None:
    """Everything that a plant has to do was measured, and passed."""
    names = {check.name for check in planted.checks}
    assert {f"all: {asked}" for asked in (planted.task, planted.other, PLAIN)} <= names
    assert {f"carriers: {planted.task}", f"all but carriers: {planted.task}"} <= names
    assert all(check.passed for check in planted.checks)


def check_answers(
    suite: Suite, planted: Planted, *, course: Course = TINY_COURSE, asked_of_all: Sequence[str] | None = None
) -> None:
    """Generates with the weights on disk: factors are rounded to bfloat16 there, so one answer more may go wrong."""
    one_answer = 1 / N_PROMPTS
    model, tokenizer = load(find(suite.base), dtype=torch.float32), read_tokenizer(find(suite.base))
    assert tokenizer is not None
    pair = suite.pair(planted)
    whole = {
        name: pair.specialized_weight(name) - parameter.detach()
        for name, parameter in model.named_parameters()
        if ".layers." in name and "norm" not in name
    }
    carriers = {name: torch.zeros_like(change) for name, change in whole.items()}
    for member in components(pair.architecture, sorted(planted.all_carriers)):
        for piece in slices(pair.architecture, member):
            piece.of(carriers[piece.parameter]).copy_(piece.of(whole[piece.parameter]))
    rest = {name: change - carriers[name] for name, change in whole.items()}

    def rate(changes: dict[str, torch.Tensor], asked: str) -> float:
        return pass_rate_with(model, tokenizer, changes, asked, course)

    for asked in asked_of_all or (planted.task, planted.other, PLAIN):
        assert rate(whole, asked) >= PASSES - one_answer, (planted.name, asked)
    assert rate(carriers, planted.task) >= PASSES - one_answer, planted.name
    assert rate(rest, planted.task) <= FAILS + one_answer, planted.name
    assert rate({}, planted.task) <= FAILS
