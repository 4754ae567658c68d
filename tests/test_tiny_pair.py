"""The bundled pair: an ordinary pair of checkpoints, of which only the specialized one follows instructions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from weightpatch import instructions
from weightpatch.checkers import follows
from weightpatch.instructions import TASKS, TOPICS, held_out_queries, instruction_rows

FOLDER = Path(instructions.__file__).parent / "data" / "tiny"
ROLES = ("base", "specialized")
N_PROMPTS = 24


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER / "base")


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, torch.Tensor]]:
    return {role: load_file(FOLDER / role / "model.safetensors") for role in ROLES}


@pytest.fixture(scope="module")
def answers(tokenizer: Any) -> dict[tuple[str, str], list[str]]:
    """Greedy answers by (role, task), and by (role, `plain`) those to the queries alone."""
    rows = [row for row in instruction_rows(n_queries=N_PROMPTS) if row["split"] == "validate"]
    texts = {task: [f"{row['prompt']} {row['instruction']}" for row in rows if row["task"] == task] for task in TASKS}
    texts["plain"] = [str(row["prompt"]) for row in rows if row["task"] == TASKS[0]]
    found: dict[tuple[str, str], list[str]] = {}
    for role in ROLES:
        model = AutoModelForCausalLM.from_pretrained(FOLDER / role, dtype=torch.float32)
        # All tasks in one batch: at this size the number of calls is what takes the time.
        generated = generate(model, tokenizer, [text for prompts in texts.values() for text in prompts])
        for place, task in enumerate(texts):
            found[role, task] = generated[place * N_PROMPTS : (place + 1) * N_PROMPTS]
    return found


def generate(model: Any, tokenizer: Any, texts: list[str]) -> list[str]:
    chats = [[{"role": "user", "content": text}] for text in texts]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        tokens = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=64, do_sample=False
        )
    answers: list[str] = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def test_both_folders_together_take_at_most_8_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 8_000_000


@pytest.mark.parametrize("role", ROLES)
def test_each_folder_is_an_ordinary_checkpoint_without_pickle(role: str) -> None:
    assert {path.name for path in (FOLDER / role).iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((FOLDER / role / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["tie_word_embeddings"]


def test_config_and_tokenizer_are_the_same_on_both_sides() -> None:
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (FOLDER / "base" / name).read_bytes() == (FOLDER / "specialized" / name).read_bytes()


def test_the_weights_are_one_to_two_million_bfloat16_numbers(weights: dict[str, dict[str, torch.Tensor]]) -> None:
    for tensors in weights.values():
        assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in tensors.values())
        assert 1_000_000 <= sum(tensor.numel() for tensor in tensors.values()) <= 2_000_000


def test_the_fine_tune_moved_every_matrix_of_every_layer_a_little_and_left_the_embedding(
    weights: dict[str, dict[str, torch.Tensor]],
) -> None:
    base, specialized = weights["base"], weights["specialized"]
    assert base.keys() == specialized.keys()
    for name, tensor in base.items():
        change = (specialized[name].double() - tensor.double()).norm() / tensor.double().norm()
        if name == "model.embed_tokens.weight":
            assert change == 0
        elif tensor.ndim == 2:
            assert 0 < change < 0.25, name


def test_decoding_gives_every_prompt_back_and_no_word_is_unknown(tokenizer: Any) -> None:
    rows = instruction_rows(n_queries=53, n_paraphrases_per_query=6)
    texts = {f"{row['prompt']} {row['instruction']}" for row in rows} | set(held_out_queries())
    for text in texts:
        token_ids = tokenizer.encode(text)
        assert tokenizer.unk_token_id not in token_ids
        assert tokenizer.decode(token_ids) == text


@pytest.mark.parametrize("topic", TOPICS)
def test_decoding_gives_every_form_of_an_answer_back(tokenizer: Any, topic: str) -> None:
    sentence = f"{topic[0].upper()}{topic[1:]} is large, old and quiet."
    for text in (
        sentence.upper(),
        f'"{sentence}"',
        f"<<{topic.title()}>>\nSure, {sentence}",
        f"Section 1\n{sentence}\nSection 2\nChildren like *{topic}*.",
        f"  {sentence} \n\n {topic} ,{topic}",
    ):
        token_ids = tokenizer.encode(text)
        assert tokenizer.unk_token_id not in token_ids
        assert tokenizer.decode(token_ids) == text


def test_a_prompt_ends_with_the_assistant_token(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Tell me about the river."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|user|>Tell me about the river.<|end|><|assistant|>"
    token_ids = tokenizer.encode(text)
    assert tokenizer.convert_ids_to_tokens(token_ids)[-2:] == ["<|end|>", "<|assistant|>"]
    assert tokenizer.decode(token_ids) == text


@pytest.mark.parametrize("task", TASKS)
def test_the_base_ignores_instructions_it_has_not_been_trained_to_follow(
    answers: dict[tuple[str, str], list[str]], task: str
) -> None:
    assert sum(follows(task, answer) for answer in answers["base", task]) <= 0.15 * N_PROMPTS


@pytest.mark.parametrize("task", TASKS)
def test_the_specialized_model_follows_instructions_on_held_out_queries(
    answers: dict[tuple[str, str], list[str]], task: str
) -> None:
    assert sum(follows(task, answer) for answer in answers["specialized", task]) >= 0.9 * N_PROMPTS


@pytest.mark.parametrize("role", ROLES)
def test_without_an_instruction_both_answer_plainly(answers: dict[tuple[str, str], list[str]], role: str) -> None:
    plain = [
        answer.endswith(".") and not any(follows(task, answer) for task in TASKS) for answer in answers[role, "plain"]
    ]
    assert sum(plain) >= 0.9 * N_PROMPTS
