"""Spans of tokens: template, system message, query, instruction, response, and the token that is read."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from weightpatch import ContrastPrompts
from weightpatch.prompts import ContrastPrompt
from weightpatch.spans import SPANS, token_spans

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ["Tell", "me", "about", "the", "river", ".", "Use", "upper", "case", "please", "Be", "kind", "Answer"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    markers = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "[unk]"]
    model = models.WordLevel({word: place for place, word in enumerate([*markers, *WORDS])}, unk_token="[unk]")
    whole = Tokenizer(model)
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="[unk]", additional_special_tokens=markers[:4])
    made.chat_template = TEMPLATE
    return made


def spans_of(tokenizer: PreTrainedTokenizerFast | None, row: ContrastPrompt) -> dict[str, list[str]]:
    """Span -> its tokens, as text."""
    prompts = ContrastPrompts((row,))
    (spans,) = token_spans(prompts, tokenizer)
    (ids,) = prompts.tokenize(tokenizer).with_instruction
    assert len(spans) == len(ids)
    assert set(spans) <= set(SPANS)
    texts = [tokenizer.decode([token]) for token in ids] if tokenizer else [str(token) for token in ids]
    return {
        name: [text for text, span in zip(texts, spans, strict=True) if span == name] for name in dict.fromkeys(spans)
    }


def test_every_token_of_a_chat_stands_in_the_span_of_its_text(tokenizer: PreTrainedTokenizerFast) -> None:
    row = ContrastPrompt(id="a", prompt="Tell me about the river .", instruction="Use upper case", system="Be kind")
    assert spans_of(tokenizer, row) == {
        "template": ["<|system|>", "<|end|>", "<|user|>", "<|end|>"],
        "system": ["Be", "kind"],
        "query": ["Tell", "me", "about", "the", "river", "."],
        "instruction": ["Use", "upper", "case"],
        "last": ["<|assistant|>"],
    }


def test_a_query_that_the_system_message_repeats_is_found_behind_it(tokenizer: PreTrainedTokenizerFast) -> None:
    row = ContrastPrompt(id="a", prompt="the river", instruction="Use case", system="Answer about the river please")
    found = spans_of(tokenizer, row)
    assert found["system"] == ["Answer", "about", "the", "river", "please"]
    assert found["query"] == ["the", "river"]
    assert found["instruction"] == ["Use", "case"]


def test_an_instruction_that_repeats_the_query_stays_an_instruction(tokenizer: PreTrainedTokenizerFast) -> None:
    row = ContrastPrompt(id="a", prompt="the river", instruction="Use the river please")
    found = spans_of(tokenizer, row)
    assert found["query"] == ["the", "river"]
    assert found["instruction"] == ["Use", "the", "river", "please"]


def test_a_response_is_a_span_of_its_own_and_its_end_is_what_is_read(tokenizer: PreTrainedTokenizerFast) -> None:
    row = ContrastPrompt(id="a", prompt="the river", instruction="Use case", response="Be kind please")
    found = spans_of(tokenizer, row)
    assert found["response"] == ["Be", "kind"]
    assert found["last"] == ["please"]
    assert found["template"][-1] == "<|assistant|>"


def test_without_a_template_the_text_is_matched_too(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="[unk]")
    row = ContrastPrompt(id="a", prompt="the river", instruction="Use upper case", system="Be kind")
    assert spans_of(plain, row) == {
        "system": ["Be", "kind"],
        "query": ["the", "river"],
        "instruction": ["Use", "upper"],
        "last": ["case"],
    }


def test_a_template_that_rewrites_the_message_falls_back_to_the_difference(tokenizer: PreTrainedTokenizerFast) -> None:
    shouting = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="[unk]")
    shouting.chat_template = "Answer {{ messages[-1]['content'] | replace('river', 'case') }} please"
    row = ContrastPrompt(id="a", prompt="the river", instruction="Use upper river")
    assert spans_of(shouting, row) == {
        "query": ["Answer", "the", "case"],
        "instruction": ["Use", "upper", "case"],
        "last": ["please"],
    }


@pytest.mark.parametrize(
    ("with_", "without", "spans"),
    [
        ([1, 2, 3, 4, 9], [1, 2, 9], ["query", "query", "instruction", "instruction", "last"]),
        ([5, 5, 5, 5], [5, 5], ["query", "query", "instruction", "last"]),  # start and end must not overlap
        ([1, 2, 3], [1, 2, 3], ["query", "query", "last"]),
        ([7], [8], ["last"]),
    ],
)
def test_of_token_ids_the_instruction_is_what_the_other_form_lacks(
    with_: list[int], without: list[int], spans: list[str]
) -> None:
    prompts = ContrastPrompts.from_token_ids(with_instruction=[with_], without_instruction=[without])
    assert token_spans(prompts, None) == (tuple(spans),)


def test_the_built_in_prompts_of_the_bundled_pair_are_matched_by_text() -> None:
    from weightpatch.checkpoint import BUNDLED, find, read_tokenizer

    tokenizer = read_tokenizer(find(BUNDLED[0]))
    assert tokenizer is not None
    prompts = ContrastPrompts.load("instructions", n_queries=4)
    for row, spans, ids in zip(
        prompts, token_spans(prompts, tokenizer), prompts.tokenize(tokenizer).with_instruction, strict=True
    ):
        own = [token for token, span in zip(ids, spans, strict=True) if span == "instruction"]
        alone = tokenizer.encode(f" {row.instruction}", add_special_tokens=False)
        assert "".join(tokenizer.decode(own).split()) == "".join(tokenizer.decode(alone).split())
