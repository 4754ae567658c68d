"""Prompts as a prefix tree: nothing is lost, nothing is there twice, and nobody sees another prompt."""

from __future__ import annotations

import pytest
import torch

from conftest import build_pair
from weightpatch import Anchor, ContrastPrompts, localize
from weightpatch.packed.blocks import blocks_of
from weightpatch.packed.packing import pack

PROMPTS = [[5, 1, 2, 3], [5, 1, 9], [5, 1, 2, 3], [5, 1, 2], [7], [5, 1, 2, 3, 8, 8], [5, 4]]
"""Two are the same, some are the start of others, one shares nothing."""


def test_every_start_of_a_prompt_is_there_exactly_once() -> None:
    (packing,) = pack(PROMPTS, most_tokens=100)
    starts = {tuple(prompt[: end + 1]) for prompt in PROMPTS for end in range(len(prompt))}
    assert packing.n_tokens == len(starts)
    held = {}
    for prompt, path in zip((PROMPTS[place] for place in packing.prompts), packing.paths, strict=True):
        assert len(path) == len(prompt)
        for end, place in enumerate(path):
            assert held.setdefault(place, tuple(prompt[: end + 1])) == tuple(prompt[: end + 1])
    assert set(held.values()) == starts


def test_a_token_sees_its_own_start_and_nothing_else() -> None:
    (packing,) = pack(PROMPTS, most_tokens=100)
    for path in packing.paths:
        for end, place in enumerate(path):
            assert packing.sees[place].nonzero().flatten().tolist() == sorted(path[: end + 1])


@pytest.mark.parametrize("most_tokens", [1, 2, 4, 5, 7, 9, 100])
def test_rows_hold_every_prompt_once_and_no_more_tokens_than_allowed(most_tokens: int) -> None:
    rows = pack(PROMPTS, most_tokens=most_tokens)
    assert sorted(prompt for row in rows for prompt in row.prompts) == list(range(len(PROMPTS)))
    assert all(row.n_tokens <= most_tokens or len({tuple(PROMPTS[p]) for p in row.prompts}) == 1 for row in rows)


def test_folding_lays_out_what_belongs_to_tokens_and_hides_other_prompts() -> None:
    (packing,) = pack(PROMPTS, most_tokens=100)
    longest, n_prompts = max(map(len, PROMPTS)), len(PROMPTS)
    own = torch.tensor([[10 * prompt + token for token in range(longest)] for prompt in range(n_prompts)])
    folded = packing.fold(own.unsqueeze(-1).float())[0, :, 0]
    expected = [
        10 * owner + place for owner, place in zip(packing.owner.tolist(), packing.position.tolist(), strict=True)
    ]
    assert folded.tolist() == expected
    positions = packing.fold((torch.arange(longest).unsqueeze(0), "other", torch.ones(3)))
    assert positions[0][0].tolist() == packing.position.tolist()
    assert positions[1] == "other"
    window = torch.ones(longest, longest).tril().triu(-1).bool()
    mask = packing.fold(window[None, None])[0, 0]
    distance = packing.position[:, None] - packing.position
    assert torch.equal(mask, packing.sees & (distance <= 1))


def test_blocks_together_are_the_mask() -> None:
    (packing,) = pack([[prompt, *range(30)] for prompt in range(5)], most_tokens=1000)
    wanted = torch.tensor([3, 40, 154])
    for rows in (None, wanted):
        rebuilt = torch.zeros_like(packing.sees)
        for block in blocks_of(packing.sees[None, None], rows):
            rebuilt[block.rows[:, None], block.columns] = block.mask[0, 0]
        chosen = slice(None) if rows is None else rows
        assert torch.equal(rebuilt[chosen], packing.sees[chosen])
        assert int(rebuilt.sum()) == int(packing.sees[chosen].sum())


@pytest.mark.parametrize("batch_tokens", [1, 5, 1000])
def test_prompts_alike_give_alike_effects_however_they_are_packed(batch_tokens: int) -> None:
    pair = build_pair("qwen3", dtype=torch.float64)
    prompts = ContrastPrompts.from_token_ids(with_instruction=PROMPTS, without_instruction=[[5]] * len(PROMPTS))
    anchor = Anchor(layer=3, direction=torch.ones(24))
    fast, slow = (
        localize(pair, prompts, anchor, units="heads,mlps", engine=engine, batch_tokens=batch_tokens).per_prompt
        for engine in ("suffix", "swap")
    )
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast[:, 0], fast[:, 2], rtol=0, atol=1e-12)
