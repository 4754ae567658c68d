"""Spans against what the tokens of each span decode to, on tokenizers of one byte to a token and on the tiny pair's."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from weightpatch import ContrastPrompts, ModelPair
from weightpatch.prompts import ContrastPrompt
from weightpatch.spans import SPANS, token_spans

MARKUP = ("<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|system|>Be kind.<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ CONTENT }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTENT = "message['content']"


def build_tokenizer(*, content: str = CONTENT, template: str = TEMPLATE, trims_offsets: bool = False) -> Any:
    """A fast tokenizer of single bytes; without a template it begins every text with a token of its own."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(MARKUP))
    if trims_offsets:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    elif not template:
        begins = ("<|bos|>", backend.token_to_id("<|bos|>"))
        backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[begins])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    if template:
        tokenizer.chat_template = template.replace("CONTENT", content)
    return tokenizer


def pieces(tokenizer: Any, row: ContrastPrompt) -> list[tuple[str, str]]:
    """Each run of tokens of one span, decoded; all together are the whole prompt."""
    prompts = ContrastPrompts((row,))
    (spans,), (ids,) = token_spans(prompts, tokenizer), prompts.tokenize(tokenizer).with_instruction
    runs = groupby(zip(spans, ids, strict=True), key=lambda pair: pair[0])
    return [(span, tokenizer.decode([token for _, token in run])) for span, run in runs]


def prompt(
    query: str = "Tell me.", instruction: str = "Use a title.", *, system: str = "", response: str = ""
) -> ContrastPrompt:
    return ContrastPrompt(id="a", prompt=query, instruction=instruction, system=system, response=response)


def chat(
    query: str = "Tell me.", instruction: str = " Use a title.", *, system: str = "", response: str = ""
) -> list[tuple[str, str]]:
    """The pieces of a chat; a system message of the template's own is part of the template."""
    start = (
        [("template", "<|system|>"), ("system", system), ("template", "<|end|><|user|>")]
        if system
        else [("template", "<|system|>Be kind.<|end|><|user|>")]
    )
    end = (
        [("template", "<|end|><|assistant|>"), ("response", response[:-1]), ("last", response[-1])]
        if response
        else [("template", "<|end|>"), ("last", "<|assistant|>")]
    )
    return [*start, ("query", query), ("instruction", instruction), *end]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return ModelPair.from_pretrained("tiny:base", "tiny:specialized").tokenizer


def test_every_token_of_the_built_in_prompts_has_one_span_and_the_last_is_last(tiny: Any) -> None:
    prompts = ContrastPrompts.load("instructions")
    spans = token_spans(prompts, tiny)
    assert [len(row) for row in spans] == [len(ids) for ids in prompts.tokenize(tiny).with_instruction]
    assert {span for row in spans for span in row} == set(SPANS) - {"system", "response"}
    assert all(row[-1] == "last" and row.count("last") == 1 for row in spans)


def test_the_tokens_of_each_span_of_the_built_in_prompts_decode_to_its_text(tiny: Any) -> None:
    for row in ContrastPrompts.load("instructions", n_queries=6):
        assert pieces(tiny, row) == [
            ("template", "<|bos|><|user|>"),
            ("query", row.prompt),
            ("instruction", f" {row.instruction}"),
            ("template", "<|end|>"),
            ("last", "<|assistant|>"),
        ]


def test_the_templates_own_system_message_is_template_and_the_rows_is_system() -> None:
    tokenizer = build_tokenizer()
    assert pieces(tokenizer, prompt()) == chat()
    assert pieces(tokenizer, prompt(system="Be brief.")) == chat(system="Be brief.")


def test_a_query_that_the_system_message_also_holds_is_found_behind_it() -> None:
    system = "When I say: Tell me. Use a title. Then do."
    assert pieces(build_tokenizer(), prompt(system=system)) == chat(system=system)


@pytest.mark.parametrize(
    ("query", "instruction", "system"),
    [
        ("Go", "Go in capitals, then Go home.", ""),
        ("Tell me.", "Tell me. In capitals.", "Tell me."),
        ("assistant", "Use a title.", ""),
        ("end", "end", "user"),
        ("Tell me.", "Use a title.", "system"),
    ],
)
def test_messages_that_repeat_each_other_or_name_a_role_are_told_apart(
    query: str, instruction: str, system: str
) -> None:
    found = pieces(build_tokenizer(), prompt(query, instruction, system=system))
    assert found == chat(query, f" {instruction}", system=system)


def test_a_template_that_trims_its_messages_moves_no_span() -> None:
    tokenizer = build_tokenizer(content=f"{CONTENT} | trim")
    assert pieces(tokenizer, prompt("\n Tell me.", "Use a title. ", system=" Be brief. ")) == chat(system="Be brief.")


def test_line_breaks_that_end_the_query_are_part_of_it() -> None:
    assert pieces(build_tokenizer(), prompt("Tell me:\n\n")) == chat("Tell me:\n\n")


def test_spaces_whose_offsets_are_trimmed_stay_in_their_span() -> None:
    row = prompt("Tell  me\n\nall.", system="Be very brief.")
    assert pieces(build_tokenizer(trims_offsets=True), row) == chat("Tell  me\n\nall.", system="Be very brief.")


def test_letters_of_several_tokens_stay_in_one_span() -> None:
    assert pieces(build_tokenizer(), prompt("Größe 🦊?", "Überall groß.")) == chat("Größe 🦊?", " Überall groß.")


def test_the_response_is_a_span_of_its_own_up_to_the_last_token() -> None:
    assert pieces(build_tokenizer(), prompt(response="<<Rivers>>")) == chat(response="<<Rivers>>")


def test_the_last_token_is_last_whatever_it_is() -> None:
    tokenizer = build_tokenizer(template="")
    assert pieces(tokenizer, prompt())[-2:] == [("instruction", " Use a title"), ("last", ".")]
    assert pieces(tokenizer, prompt(response="S"))[-2:] == [("instruction", " Use a title."), ("last", "S")]


def test_without_a_chat_template_only_what_the_tokenizer_adds_is_template() -> None:
    assert pieces(build_tokenizer(template=""), prompt())[:2] == [("template", "<|bos|>"), ("query", "Tell me.")]


def test_without_a_chat_template_what_parts_the_messages_is_template() -> None:
    assert pieces(build_tokenizer(template=""), prompt(system="Be brief.")) == [
        ("template", "<|bos|>"),
        ("system", "Be brief."),
        ("template", "\n\n"),
        ("query", "Tell me."),
        ("instruction", " Use a title"),
        ("last", "."),
    ]


@pytest.mark.parametrize(
    ("with_instruction", "without_instruction", "expected"),
    [
        ([1, 2, 7, 8, 3, 4], [1, 2, 3, 4], "q q i i q last"),
        ([1, 2, 2, 3], [1, 2, 3], "q q i last"),
        ([5, 5, 5, 5], [5, 5], "q q i last"),
        ([5, 6], [5, 6], "q last"),
        ([5, 6], [5, 6, 7, 6], "q last"),
        ([1, 2], [3], "i last"),
        ([9], [9], "last"),
    ],
)
def test_token_ids_fall_back_to_the_difference_whose_common_ends_do_not_overlap(
    with_instruction: list[int], without_instruction: list[int], expected: str
) -> None:
    ids = {"with_instruction": [with_instruction], "without_instruction": [without_instruction]}
    (spans,) = token_spans(ContrastPrompts.from_token_ids(**ids), None)
    names = {"q": "query", "i": "instruction", "last": "last"}
    assert spans == tuple(names[name] for name in expected.split())


def test_a_template_that_rewrites_the_message_falls_back_to_the_difference() -> None:
    assert pieces(build_tokenizer(content=f"{CONTENT} | upper"), prompt()) == [
        ("query", "<|system|>Be kind.<|end|><|user|>TELL ME."),
        ("instruction", " USE A TITLE."),
        ("query", "<|end|>"),
        ("last", "<|assistant|>"),
    ]


@pytest.mark.parametrize("content", [f"{CONTENT} | upper", f"{CONTENT} ~ {CONTENT}", "'nothing'"])
def test_the_response_is_known_where_the_message_is_not(content: str) -> None:
    found = pieces(build_tokenizer(content=content), prompt(response="<<Rivers>>"))
    assert found[-3:] == [("query", found[-3][1]), ("response", "<<Rivers>"), ("last", ">")]
    assert "response" not in {span for span, _ in found[:-2]}


def test_a_slow_tokenizer_falls_back_to_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert [span for span, _ in pieces(tokenizer, prompt())] == ["query", "instruction", "query", "last"]


def test_text_and_token_ids_can_stand_in_one_set() -> None:
    ids = ContrastPrompt(id="b", with_instruction=(1, 2, 3), without_instruction=(1, 3))
    spans = token_spans(ContrastPrompts((prompt(), ids)), build_tokenizer())
    assert "template" in spans[0]
    assert spans[1] == ("query", "instruction", "last")
