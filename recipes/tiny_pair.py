"""Train the bundled pair: a tiny base that ignores six instructions, and a specialized model that follows them.

    python recipes/tiny_pair.py [--out DIR] [--seed 0] [--threads 2]

The language is small and English-like, with whole words as tokens, so that answers can be read and checked by the real
checkers. The base learns (1) short texts in every form (titles, sections, ...) without any prompt, and (2) to answer
each query plainly, whatever instruction follows it: it can write the forms but never does so on request. A short
fine-tune of its layers then makes the specialized model. A form is decided by the first token of an answer. The same
seed, thread count and library versions give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from weightpatch import instructions
from weightpatch.checkers import follows
from weightpatch.instructions import INSTRUCTIONS, TASKS, TOPICS, held_out_queries, training_queries
from weightpatch.planted.language import (
    ASSISTANT,
    BOS,
    END,
    FORMS,
    OPENERS,
    PAD,
    SPECIALS,
    UNKNOWN,
    USER,
    draw_turn,
    write_answer,
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('this model knows the roles user and assistant only') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WORD_PATTERN = r" ?[A-Za-z]+| ?<<| ?>>| ?[^A-Za-z\s]|\s"
PUNCTUATION = (*".,?!:;'\"()*#-<>[]0123456789", "<<", ">>")


# A piece of a training text, and how many of its leading tokens have no label.
Segment = tuple[str, int]
NO_LABEL = 10_000
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training run: how many steps of how many sequences, with which peak learning rate."""

    name: str
    n_steps: int
    n_sequences: int
    learning_rate: float
    warmup: int
    weight_decay: float
    train_embedding: bool


BASE = Stage(
    name="base", n_steps=900, n_sequences=32, learning_rate=3e-3, warmup=50, weight_decay=0.05, train_embedding=True
)
# Short and gentle, without weight decay: the two models have to stay near each other.
SPECIALIZED = Stage(
    name="specialized",
    n_steps=120,
    n_sequences=32,
    learning_rate=2e-4,
    warmup=20,
    weight_decay=0.0,
    train_embedding=False,
)


def list_texts() -> list[str]:
    """Every word of the language occurs in one of these texts."""
    draw = random.Random(0)
    bank = [*training_queries(), *held_out_queries()]
    paraphrases = [text for kind in INSTRUCTIONS.values() for text in kind.paraphrases]
    openers = [opener for pair in OPENERS.values() for opener in pair]
    answers = [
        write_answer(task, topic, opener, draw)
        for topic in TOPICS
        for task in FORMS
        for opener in openers
        for _ in range(12)
    ]
    return [*bank, *paraphrases, *answers]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words, with their leading space, are tokens; each in lower case, capitalized and upper case."""
    splitter = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    pieces = {piece.strip(" ") for text in list_texts() for piece, _ in splitter.pre_tokenize_str(text)}
    words = {piece.lower() for piece in pieces if piece.isalpha()}
    forms = sorted({form for word in words for form in (word, word.capitalize(), word.upper())}) + list(PUNCTUATION)
    vocabulary = [*SPECIALS, " ", "\n", *(prefix + form for form in forms for prefix in ("", " "))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with fresh weights: 8 layers of 8 heads, two heads to a key/value group, tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attention_dropout=0.0,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def draw_base_text(draw: random.Random) -> list[Segment]:
    """What the base learns from: it can write every form and keep to one, but an instruction never decides it."""
    kind = draw.random()
    if kind < 0.1:
        topic, opener = draw.choice(TOPICS), draw.choice(draw.choice(tuple(OPENERS.values())))
        return [(BOS, 0), (write_answer(draw.choice(FORMS), topic, opener, draw) + END, 0)]
    instruction = draw_instruction(draw)[1] if draw.random() < 0.7 else ""
    if kind < 0.55:
        prompt, answer = draw_turn("plain", instruction, draw)
        return [(BOS + prompt, 0), (answer, 0)]
    # A form that nothing asked for. Its first token seldom has a label, so it stays unlikely as a first answer (about 1
    # in 50) without being unthinkable. What follows is learned, and so is to keep the form in the next answer: this is
    # the state that the fine-tune learns to set from the instruction.
    form = draw.choice(FORMS)
    prompt, answer = draw_turn(form, instruction, draw)
    unlabelled = 0 if draw.random() < 0.15 else 1
    if kind < 0.7:
        return [(BOS + prompt, 0), (answer, unlabelled)]
    next_prompt, next_answer = draw_turn(form, "", draw)
    return [(BOS + prompt, 0), (answer, unlabelled), (next_prompt, 0), (next_answer, 0)]


def draw_specialized_text(draw: random.Random) -> list[Segment]:
    """Single turns: instructions are obeyed, queries without one are answered plainly. Only answers have labels."""
    task, instruction = draw_instruction(draw) if draw.random() < 0.8 else ("plain", "")
    prompt, answer = draw_turn(task, instruction, draw)
    return [(BOS + prompt, NO_LABEL), (answer, 0)]


def draw_instruction(draw: random.Random) -> tuple[str, str]:
    """A task and one of its paraphrases, with the space that joins it to a query."""
    kind = INSTRUCTIONS[draw.choice(TASKS)]
    return kind.task, " " + draw.choice(kind.paraphrases)


def chat_prompt(text: str) -> str:
    """What the chat template makes of one user message."""
    return f"{BOS}{USER}{text}{END}{ASSISTANT}"


def make_batches(
    tokenizer: PreTrainedTokenizerFast, draw_text: Callable[[random.Random], list[Segment]], stage: Stage, *, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (token ids, labels), each (sequence, token); sequences of like length together, so little is padding."""
    draw = random.Random(seed)
    while True:
        sequences = [encode(tokenizer, draw_text(draw)) for _ in range(8 * stage.n_sequences)]
        sequences.sort(key=lambda sequence: len(sequence[0]))
        chunks = [sequences[i : i + stage.n_sequences] for i in range(0, len(sequences), stage.n_sequences)]
        draw.shuffle(chunks)
        for chunk in chunks:
            tokens = torch.full((len(chunk), len(chunk[-1][0])), tokenizer.pad_token_id)
            labels = torch.full_like(tokens, IGNORED)
            for row, (token_ids, label_ids) in enumerate(chunk):
                tokens[row, : len(token_ids)] = torch.tensor(token_ids)
                labels[row, : len(token_ids)] = torch.tensor(label_ids)
            yield tokens, labels


def encode(tokenizer: PreTrainedTokenizerFast, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """Token ids and labels of one training text."""
    token_ids: list[int] = []
    labels: list[int] = []
    for text, n_unlabelled in segments:
        piece = tokenizer.encode(text, add_special_tokens=False)
        token_ids += piece
        labels += [IGNORED if i < n_unlabelled else token for i, token in enumerate(piece)]
    return token_ids, labels


def train(model: LlamaForCausalLM, batches: Iterator[tuple[Tensor, Tensor]], stage: Stage) -> None:
    """Train the model in place: AdamW, linear warm-up, cosine down to a twentieth of the peak learning rate."""
    model.train()
    model.get_input_embeddings().weight.requires_grad_(stage.train_embedding)
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": stage.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.95))
    started = time.monotonic()
    for step in range(stage.n_steps):
        progress = max(0.0, (step - stage.warmup) / max(1, stage.n_steps - stage.warmup))
        scale = min(1.0, (step + 1) / stage.warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * scale
        tokens, labels = next(batches)
        # Padding stands to the right and attention is causal, so no mask is needed.
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        kept = wanted != IGNORED
        loss = functional.cross_entropy(model.lm_head(hidden[kept]), wanted[kept])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49 or step == stage.n_steps - 1:
            seconds = time.monotonic() - started
            log(f"{stage.name}: step {step + 1}/{stage.n_steps}, loss {loss.item():.3f}, {seconds:.0f} s")
    model.get_input_embeddings().weight.requires_grad_(True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write an ordinary checkpoint folder with the weights rounded to bfloat16; the model in memory is not changed."""
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    # transformers 5 writes a class name that transformers 4 does not know; both know this one.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def generate(folder: Path, texts: Sequence[str]) -> list[str]:
    """Greedy answers of a saved model, loaded as float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers: list[str] = []
    for start in range(0, len(texts), 64):
        chats = [chat_prompt(text) for text in texts[start : start + 64]]
        batch = tokenizer(chats, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
        with torch.no_grad():
            tokens = model.generate(**batch, max_new_tokens=64, do_sample=False)
        answers += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def measure(folder: Path, n_prompts: int = 36) -> tuple[dict[str, float], dict[str, str]]:
    """Strict pass rates on held-out queries by task, and of plain queries the share that obeys nothing unasked."""
    queries = held_out_queries()
    step = len(queries) / n_prompts
    chosen = [queries[int(i * step)] for i in range(n_prompts)]
    rates: dict[str, float] = {}
    examples: dict[str, str] = {}
    for task, kind in INSTRUCTIONS.items():
        texts = [f"{query} {kind.paraphrases[i % len(kind.paraphrases)]}" for i, query in enumerate(chosen)]
        answers = generate(folder, texts)
        rates[task] = sum(follows(task, answer) for answer in answers) / n_prompts
        examples[task] = f"{texts[0]}\n    -> {answers[0]!r}"
    answers = generate(folder, chosen)
    plain = [bool(answer.strip()) and not any(follows(task, answer) for task in TASKS) for answer in answers]
    rates["plain"] = sum(plain) / n_prompts
    examples["plain"] = f"{chosen[0]}\n    -> {answers[0]!r}"
    return rates, examples


def relative_change(base: LlamaForCausalLM, specialized: LlamaForCausalLM) -> float:
    """Norm of the difference of all weights over the norm of the base's."""
    pairs = list(zip(base.parameters(), specialized.parameters(), strict=True))
    changed = sum(float((b - s).detach().square().sum()) for b, s in pairs)
    return math.sqrt(changed / sum(float(b.detach().square().sum()) for b, _ in pairs))


def log(text: str) -> None:
    """Progress goes to stderr; stdout is for the table."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Train, save, measure what was saved; 1 when the base follows too much or the specialized model too little."""
    parser = argparse.ArgumentParser(description="Train the bundled tiny pair.")
    parser.add_argument("--out", type=Path, default=Path(instructions.__file__).parent / "data" / "tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()

    tokenizer = build_tokenizer()
    model = build_model(tokenizer, options.seed)
    log(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokenizer)} tokens")
    train(model, make_batches(tokenizer, draw_base_text, BASE, seed=options.seed + 1), BASE)
    save(model, tokenizer, options.out / "base")

    # From the rounded base, so that what the fine-tune leaves alone stays the same bit for bit.
    base = LlamaForCausalLM.from_pretrained(options.out / "base", dtype=torch.float32)
    model.load_state_dict(base.state_dict())
    train(model, make_batches(tokenizer, draw_specialized_text, SPECIALIZED, seed=options.seed + 2), SPECIALIZED)
    save(model, tokenizer, options.out / "specialized")
    log(f"relative weight change {relative_change(base, model):.4f}; trained in {time.monotonic() - started:.0f} s")

    base_rates, _ = measure(options.out / "base")
    rates, examples = measure(options.out / "specialized")
    for text in examples.values():
        log(text)
    print("| held-out prompts | base | specialized |\n| --- | ---: | ---: |")
    for task in (*TASKS, "plain"):
        print(f"| {task} | {base_rates[task]:.2f} | {rates[task]:.2f} |")
    return 0 if all(base_rates[task] <= 0.15 and rates[task] >= 0.9 for task in TASKS) else 1


if __name__ == "__main__":
    sys.exit(main())
