"""One checkpoint as a user names it: a folder, a hub id, a PEFT adapter folder or a GGUF file.

Everything that can be known without reading a weight (config, shapes, tokenizer, files) is read here first; `load`
comes last. Only safetensors and GGUF are read unless pickled weights are allowed explicitly.
"""

from __future__ import annotations

import copy
import filecmp
import json
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from weightpatch.errors import CheckpointError

Kind = Literal["model", "adapter", "gguf"]
DeviceMap = str | dict[str, str | int]

BUNDLED = ("tiny:base", "tiny:specialized")
"""References of the pair that is shipped in the package."""

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
_TEXT_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint found on disk, nothing of it read yet.

    Attributes:
        reference: As the user wrote it.
        kind: A full model, a PEFT adapter, or a GGUF file.
        path: Its folder, or the GGUF file itself.
        from_hub: Whether `path` is a hub snapshot whose weights may not be there yet.
    """

    reference: str
    kind: Kind
    path: Path
    from_hub: bool = False


def find(reference: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint by its folder, GGUF file or hub id (downloads its small text files only), or in the package.

    Raises:
        CheckpointError: there is none by this name.
    """
    if str(reference) in BUNDLED:
        folder = Path(__file__).parent / "data" / str(reference).replace(":", "/")
        return _in_folder(str(reference), folder)
    if str(reference).startswith("tiny:"):
        raise CheckpointError(f"{reference!r} is no bundled model. Those are {' and '.join(BUNDLED)}.")
    path = Path(reference).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{reference} is a file but not a .gguf one. Name the folder that holds the model.")
        return Checkpoint(reference=str(reference), kind="gguf", path=path)
    if path.is_dir():
        return _in_folder(str(reference), path)
    try:
        snapshot = snapshot_download(
            str(reference), revision=revision, allow_patterns=_TEXT_FILES, ignore_patterns=["*/*"]
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"{reference!r} is neither a folder, a .gguf file nor a model on the hub that can be reached "
            f"({type(error).__name__}). Check the name, or download it first; HF_HUB_OFFLINE=1 forbids downloads."
        ) from error
    return replace(_in_folder(str(reference), Path(snapshot)), from_hub=True)


def _in_folder(reference: str, folder: Path) -> Checkpoint:
    if (folder / "adapter_config.json").is_file():
        return Checkpoint(reference=reference, kind="adapter", path=folder)
    if (folder / "config.json").is_file():
        return Checkpoint(reference=reference, kind="model", path=folder)
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    hint = f" Name one of its files: {', '.join(ggufs)}." if ggufs else " Name the folder that `save_pretrained` wrote."
    raise CheckpointError(f"{reference} holds neither config.json nor adapter_config.json.{hint}")


def weight_files(checkpoint: Checkpoint, *, allow_pickle: bool = False) -> tuple[Path, ...]:
    """The files that hold the weights, each one present and (safetensors) complete by its own header.

    Raises:
        CheckpointError: no weights, a shard that is missing, a truncated file, or pickled weights not allowed.
    """
    if checkpoint.kind == "gguf":
        return (checkpoint.path,)
    if checkpoint.from_hub:
        patterns = ["*.safetensors", *(["*.bin"] if allow_pickle else [])]
        commit = checkpoint.path.name  # the folder of a snapshot is named by its commit
        snapshot_download(checkpoint.reference, revision=commit, allow_patterns=patterns, ignore_patterns=["*/*"])
    stem = "adapter_model" if checkpoint.kind == "adapter" else "model"
    index = checkpoint.path / f"{stem}.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{index.name} in {checkpoint.path.name} is truncated or damaged ({error}). Download or copy it again."
            ) from error
        files = tuple(checkpoint.path / shard for shard in shards)
    else:
        files = (checkpoint.path / f"{stem}.safetensors",)
    missing = [file.name for file in files if not file.is_file()]
    if not missing:
        for file in files:
            _header(file)
        return files
    pickles = [checkpoint.path / name for name in _PICKLES if (checkpoint.path / name).is_file()]
    if pickles and not index.is_file():
        if allow_pickle:
            return tuple(pickles)
        raise CheckpointError(
            f"{checkpoint.reference} holds pickled weights only ({pickles[0].name}), and unpickling can run code. "
            "Convert them to safetensors, or pass --allow-pickle (allow_pickle=True) if you trust their author."
        )
    raise CheckpointError(f"{checkpoint.reference} lacks {', '.join(missing)}. Download or copy the missing files.")


def shapes(checkpoint: Checkpoint, *, allow_pickle: bool = False) -> Mapping[str, tuple[int, ...]]:
    """Tensor names and shapes out of the safetensors headers; empty for other formats. Reads no weight."""
    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(checkpoint, allow_pickle=allow_pickle):
        if file.suffix == ".safetensors":
            found |= _header(file)
    return found


def _header(file: Path) -> Mapping[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        size = file.stat().st_size
        raise CheckpointError(
            f"{file.name} in {file.parent.name} is truncated or damaged: its {size} bytes do not hold what its header "
            f"announces ({error}). Download or copy it again."
        ) from error


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The model config of a full checkpoint or GGUF file (not of an adapter: that has its base's).

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        config: PreTrainedConfig = _read(AutoConfig, checkpoint)
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        if checkpoint.kind == "gguf":
            size = checkpoint.path.stat().st_size
            raise CheckpointError(
                f"{checkpoint.path.name} is truncated, damaged or of an unknown kind: its {size} bytes do not read as "
                f"a GGUF model ({error}). Download or copy it again."
            ) from error
        raise CheckpointError(f"cannot read the config of {checkpoint.reference}: {error}") from error
    return config


def _read(kind: Any, checkpoint: Checkpoint) -> Any:
    """Configuration or tokenizer, by the class that reads it; a caller may change what it gets."""
    if checkpoint.kind == "gguf":
        return copy.deepcopy(_read_gguf(kind, checkpoint.path, checkpoint.path.stat().st_mtime_ns))
    return kind.from_pretrained(str(checkpoint.path), trust_remote_code=False)


@lru_cache(maxsize=4)
def _read_gguf(kind: Any, file: Path, _modified: int) -> Any:
    """What transformers parses the file's whole header for, seconds each time."""
    return kind.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)


def read_adapter_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """`adapter_config.json` as it is."""
    try:
        config = json.loads((checkpoint.path / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read adapter_config.json of {checkpoint.reference}: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"adapter_config.json of {checkpoint.reference} is no JSON object.")
    return config


def read_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer; None when it brings none."""
    names = ("tokenizer.json", "tokenizer_config.json")
    if checkpoint.kind != "gguf" and not any((checkpoint.path / name).is_file() for name in names):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = _read(AutoTokenizer, checkpoint)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read the tokenizer of {checkpoint.reference}: {error}") from error
    return tokenizer


def same_tokenizer_files(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two folders bring the same tokenizer, byte for byte: then there is nothing to compare."""
    every = [
        {file.name: file for pattern in _TOKENIZER_FILES for file in checkpoint.path.glob(pattern)}
        if checkpoint.path.is_dir()
        else {}
        for checkpoint in (one, other)
    ]
    left, right = every
    return (
        "tokenizer.json" in left
        and left.keys() == right.keys()
        and all(filecmp.cmp(left[name], right[name], shallow=False) for name in left)
    )


_TOKENIZER_FILES = ("*token*.json", "vocab.*", "merges.txt", "*.model", "*chat_template*")


def load(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device_map: DeviceMap | None = None,
    allow_pickle: bool = False,
    base: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """Read the weights into a model in evaluation mode.

    Args:
        checkpoint: What to load.
        dtype: The one dtype of all weights; GGUF is dequantized to it.
        device_map: As in transformers.
        allow_pickle: Read pickled weights too.
        base: What an adapter is applied to; stays as it is.

    Raises:
        CheckpointError: damaged, incomplete, or with parameters that the model does not have.
    """
    if checkpoint.kind == "adapter":
        if base is None:
            raise CheckpointError(f"{checkpoint.reference} is an adapter. Only the specialized side can be one.")
        return merge_adapter(checkpoint, copy.deepcopy(base), allow_pickle=allow_pickle)
    folder, gguf = _source(checkpoint)
    weight_files(checkpoint, allow_pickle=allow_pickle)
    if gguf:
        gguf |= {"config": read_config(checkpoint)}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            **gguf,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=None if allow_pickle or gguf else True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError, SafetensorError, EOFError) as error:
        raise CheckpointError(f"cannot read the weights of {checkpoint.reference}: {error}") from error
    model: PreTrainedModel
    model, info = loaded
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        listed = ", ".join(absent[:6]) + (f" and {len(absent) - 6} more" if len(absent) > 6 else "")
        raise CheckpointError(
            f"{checkpoint.reference} lacks {len(absent)} of the model's parameters, or holds them in other shapes: "
            f"{listed}. They would be random; get a complete checkpoint."
        )
    if unexpected := sorted(info["unexpected_keys"]):
        listed = ", ".join(unexpected[:6]) + (f" and {len(unexpected) - 6} more" if len(unexpected) > 6 else "")
        raise CheckpointError(
            f"{checkpoint.reference} holds {len(unexpected)} parameters that its config has no place for: {listed}. "
            "They would be dropped; mend the config, or get the matching one."
        )
    model.train(False)
    return model


def load_alone(
    reference: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device_map: DeviceMap | None = None,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """One model with its tokenizer, where no pair is needed.

    Args:
        reference: Hub id, folder, GGUF file, or a PEFT adapter folder.
        base: What an adapter is applied to.
        revision: Of the model on the hub.
        dtype: As in `load`.
        device_map: As in `load`.
        allow_pickle: As in `load`.

    Raises:
        CheckpointError: it cannot be read, is an adapter without its base, or nobody brings a tokenizer.
    """
    checkpoint = find(reference, revision=revision)
    tokenizer = read_tokenizer(checkpoint)
    below = None
    if checkpoint.kind == "adapter":
        if base is None:
            raise CheckpointError(f"{reference} is an adapter. Name the model it belongs to as well: --base BASE.")
        found = find(base)
        below = load(found, dtype=dtype, device_map=device_map, allow_pickle=allow_pickle)
        tokenizer = tokenizer or read_tokenizer(found)
    if tokenizer is None:
        raise CheckpointError(f"{reference} has no tokenizer. Copy the tokenizer's files into its folder.")
    return load(checkpoint, dtype=dtype, device_map=device_map, allow_pickle=allow_pickle, base=below), tokenizer


def read_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating-point dtype by its name.

    Raises:
        CheckpointError: it is none.
    """
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise CheckpointError(
            f"unknown dtype {dtype!r}. Name float32, bfloat16, float16 or float64; 'auto' could differ."
        )
    return named


def merge_adapter(checkpoint: Checkpoint, base: PreTrainedModel, *, allow_pickle: bool) -> PreTrainedModel:
    """Merge an adapter into a model, which is changed and should not be used any more.

    Raises:
        CheckpointError: it cannot be applied, has nothing that could be merged, or is incomplete.
    """
    adapted = apply_adapter(checkpoint, base, allow_pickle=allow_pickle)
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=False)
    merged.train(False)
    return merged


def apply_adapter(checkpoint: Checkpoint, base: PreTrainedModel, *, allow_pickle: bool) -> Any:
    """Put an adapter's layers into a model, nothing merged yet: PEFT's model around it.

    Raises:
        CheckpointError: as in `merge_adapter`.
    """
    from peft import PeftModel, get_peft_model_state_dict

    stored = shapes(checkpoint, allow_pickle=allow_pickle)
    try:
        with warnings.catch_warnings():  # what peft warns of is an error below
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(base, str(checkpoint.path), is_trainable=False)
            wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            _ = adapted.merge_and_unload
    except AttributeError as error:
        raise CheckpointError(
            f"the adapter {checkpoint.reference} has no weights that could be merged into its base ({error}). Only "
            "adapters of weights (LoRA and its kin) can be patched."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot apply the adapter {checkpoint.reference} to its base: {error}") from error
    odd = wanted.keys() - stored.keys() | {name for name in stored.keys() - wanted.keys() if "lora_" in name}
    if stored and odd:
        listed = ", ".join(sorted(odd)[:6]) + (f" and {len(odd) - 6} more" if len(odd) > 6 else "")
        raise CheckpointError(
            f"the adapter {checkpoint.reference} is incomplete or does not fit its config; missing or left over: "
            f"{listed}. Get the whole adapter."
        )
    return adapted


def _source(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """Folder and the extra arguments by which transformers reads a checkpoint."""
    if checkpoint.kind == "gguf":
        return str(checkpoint.path.parent), {"gguf_file": checkpoint.path.name}
    return str(checkpoint.path), {}
