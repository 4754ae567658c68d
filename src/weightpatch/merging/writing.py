"""A merged checkpoint, written tensor by tensor: whole models are never in memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import GENERATION_CONFIG_NAME

from weightpatch.architecture import skeleton
from weightpatch.checkpoint import read_config, read_tokenizer
from weightpatch.errors import MergeError
from weightpatch.files import write_whole
from weightpatch.merging.coefficients import Coefficients
from weightpatch.merging.combining import METHODS, Method, check_fit, combine, seeded_draw
from weightpatch.merging.inputs import Inputs, versions
from weightpatch.merging.thresholds import find_threshold
from weightpatch.residuals import keep_freed_buffers

SHARD_BYTES = 4_000_000_000
_NOTE = "merge.json"
LEARNING = "merge.learning"
"""What is learned so far; it stays, so that a merge whose command is repeated is not learned again."""
_ALLOWED = {LEARNING, f"{LEARNING}.partial"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Merge:
    """What is to be merged, and how.

    Attributes:
        inputs: Base and experts.
        coefficients: Of each expert and parameter.
        method: How differences become one.
        dtype: Of what is written; None: as the base's files have it, parameter by parameter.
        seed: Of what is left to chance, which depends on it, the expert and the parameter alone.
        shard_bytes: Of one file, at most, unless a single parameter is larger.
    """

    inputs: Inputs
    coefficients: Coefficients
    method: Method = METHODS["task-arithmetic"]
    dtype: torch.dtype | None = None
    seed: int = 0
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        """Check that coefficients and inputs fit; experts in another order are put into that of the inputs.

        Raises:
            MergeError: other experts, parameters without coefficients, or coefficients of a shape that does not fit.
        """
        object.__setattr__(self, "coefficients", self.coefficients.of(tuple(self.inputs.theirs)))
        if missing := sorted(self.inputs.ours.shapes.keys() - self.coefficients.tensors.keys()):
            raise MergeError(
                f"no coefficients for {len(missing)} parameters, the first {missing[0]}: they are of another model. "
                "Make them again (--save-coefficients)."
            )
        for name, shape in self.inputs.ours.shapes.items():
            stacked = len(shape) > 2
            for one in self.coefficients.tensors[name]:
                if stacked and one.ndim and len(one) != shape[0]:
                    raise MergeError(
                        f"{name}: coefficients of {len(one)} of its {shape[0]} matrices. Give all of them."
                    )
                try:
                    check_fit(one.shape[1:] if stacked else one.shape, shape[1:] if stacked else shape)
                except MergeError as error:
                    raise MergeError(f"{name}: {error}") from error

    def write(self, out: str | Path, *, on_parameter: Callable[[int, int], None] | None = None) -> Path:
        """Write a folder that transformers loads.

        Parameters are merged in float32. Shards appear whole or not at all, and a call that was interrupted goes on
        behind its last one when it is made again.

        Args:
            out: A folder, new or of the same merge.
            on_parameter: Called with the number of parameters that are done, and of all.

        Raises:
            MergeError: a folder with something else in it, or weights that are no numbers; what is finished stays.
        """
        folder = Path(out)
        _claim(folder, self._settings())
        stored = {name: self.dtype or self.inputs.ours.tensor(name).dtype for name in self.inputs.ours.shapes}
        sizes = {
            name: torch.Size(shape).numel() * stored[name].itemsize for name, shape in self.inputs.ours.shapes.items()
        }
        shards = dict(_shards(sizes, self.shard_bytes))
        thresholds: Mapping[str, float | None] | None = None
        keep_freed_buffers()
        done = 0
        for file, names in shards.items():
            if not _is_whole(folder / file):
                thresholds = thresholds or self.thresholds()
                merged: dict[str, Tensor] = {}
                for number, name in enumerate(names, done + 1):
                    merged[name] = self.parameter(name, thresholds).to(stored[name])
                    if not _is_finite(merged[name]):
                        raise MergeError(
                            f"{name} would hold NaN or infinite numbers as {stored[name]}: look for some in the "
                            "checkpoints, or for numbers too large for this type (--dtype float32)."
                        )
                    if on_parameter:
                        on_parameter(number, len(stored))
                partial = folder / f"{file}.partial"
                save_file(merged, partial, metadata={"format": "pt"})
                partial.replace(folder / file)
            done += len(names)
        self._finish(folder, shards, sizes, stored)
        return folder

    def parameter(self, name: str, thresholds: Mapping[str, float | None]) -> Tensor:
        """One merged parameter, float32; where it stacks the matrices of a mixture's experts, matrix by matrix.

        Args:
            name: Of the parameter.
            thresholds: What `thresholds` found.
        """
        chance = self.chance(name, thresholds)
        merged = [combine(*matrix, self.method, **chance) for matrix in self.matrices(name)]
        return torch.stack(merged) if len(self.inputs.ours.shapes[name]) > 2 else merged[0].contiguous()

    def matrices(self, name: str) -> Iterator[tuple[Tensor, Iterable[Tensor], Sequence[Tensor]]]:
        """A parameter of the base, differences and coefficients; one by one where it stacks those of a mixture."""
        base = self.inputs.weights(name)
        changes = (self.inputs.change(expert, name, base=base) for expert in self.inputs.theirs)
        coefficients = self.coefficients.tensors[name]
        if base.ndim < 3:
            yield base, changes, coefficients
            return
        stacked = [*changes]
        every = [one.expand(len(base), 1, 1) if one.ndim == 0 else one for one in coefficients]
        for number, matrix in enumerate(base):
            yield matrix, [change[number] for change in stacked], [one[number] for one in every]

    def chance(self, name: str, thresholds: Mapping[str, float | None]) -> dict[str, Any]:
        """What `combine` needs beside: draws, which are used up, and thresholds."""
        experts = self.inputs.theirs
        draws = [seeded_draw(self.seed, expert, name) for expert in experts]
        return {"draws": draws, "thresholds": [thresholds[expert] for expert in experts]}

    def thresholds(self) -> dict[str, float | None]:
        """Expert -> the least size that is kept; None where that is decided within each parameter."""
        experts = self.inputs.theirs
        if self.method.sparsifier.over != "model":
            return dict.fromkeys(experts)

        def selected(place: int, expert: str) -> Iterator[Tensor]:
            for name in self.inputs.ours.shapes:
                coefficient = self.coefficients.tensors[name][place]
                if bool((coefficient != 0).any()):
                    change = self.inputs.change(expert, name)
                    yield change[(coefficient != 0).expand_as(change)]

        return {
            expert: find_threshold(lambda: selected(place, expert), self.method.sparsifier.density)  # noqa: B023  called at once
            for place, expert in enumerate(experts)
        }

    def _settings(self) -> dict[str, Any]:
        """Everything that decides the bytes of the merge."""
        digest = hashlib.sha256()
        for name, every in sorted(self.coefficients.tensors.items()):
            for one in every:
                digest.update(f"{name} {tuple(one.shape)} ".encode() + one.contiguous().numpy().tobytes())
        return {
            "base": self.inputs.base.reference,
            "experts": {name: one.reference for name, one in self.inputs.experts.items()},
            "files": self.inputs.fingerprints(),
            "method": asdict(self.method),
            "coefficients": digest.hexdigest(),
            "dtype": str(self.dtype).removeprefix("torch.") if self.dtype else "as the base",
            "seed": self.seed,
            "shard_bytes": self.shard_bytes,
            "versions": versions(),
        }

    def _finish(
        self,
        folder: Path,
        shards: Mapping[str, Sequence[str]],
        sizes: Mapping[str, int],
        stored: Mapping[str, torch.dtype],
    ) -> None:
        """Index, configs and tokenizer."""
        if len(shards) > 1:
            places = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
            write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
        config = read_config(self.inputs.base)
        dtypes = list(stored.values())
        config.dtype = max(dtypes, key=dtypes.count)
        if not config.architectures:  # a GGUF file names none, and mergekit and servers ask for it
            config.architectures = [type(skeleton(config)).__name__]
        config.save_pretrained(folder)
        if (generation := self.inputs.ours.generation_config) is not None:
            write_whole(folder / GENERATION_CONFIG_NAME, generation.to_json_string())
        if (tokenizer := read_tokenizer(self.inputs.base)) is not None:
            template, _ = self.chat_template()
            tokenizer.chat_template = template
            tokenizer.save_pretrained(folder)

    def chat_template(self) -> tuple[str | dict[str, str] | None, bool]:
        """The one that all experts' prompts are read with, or the base's where they differ; and whether they differ."""
        used = [one.chat_template for one in self.inputs.tokenizers.values() if one is not None]
        if used and all(one == used[0] for one in used):
            return used[0], False
        own = read_tokenizer(self.inputs.base)
        return own.chat_template if own is not None else None, bool(used)


def _is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; both show in the extremes, which are found thirty times as fast."""
    return not tensor.numel() or all(math.isfinite(float(one)) for one in torch.aminmax(tensor))


def check_free(folder: Path) -> None:
    """Check that a merge may be written to a folder: it is new, empty, or holds one, even only begun.

    Raises:
        MergeError: something else is in it.
    """
    if folder.exists() and not folder.is_dir():
        raise MergeError(f"{folder} is a file: name a new folder.")
    if folder.is_dir() and not (folder / _NOTE).is_file() and {one.name for one in folder.iterdir()} - _ALLOWED:
        raise MergeError(f"{folder} is not empty and holds no merge: name a new folder.")


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Begin the folder, or go on in one of the same merge."""
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / _NOTE
    if not note.is_file():
        write_whole(note, json.dumps(settings, indent=1) + "\n")
        return
    try:
        found: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MergeError(f"{note} is damaged ({error}): delete the folder, or name another one.") from error
    wanted: dict[str, Any] = json.loads(json.dumps(settings))
    if differing := [key for key in wanted if found.get(key) != wanted[key]]:
        raise MergeError(f"{folder} holds a merge of another {', '.join(differing)}: name another folder.")


def _shards(sizes: Mapping[str, int], most: int) -> Iterator[tuple[str, list[str]]]:
    """Each file with its parameters, in the model's order."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        yield "model.safetensors", groups[0]
        return
    for number, names in enumerate(groups, 1):
        yield f"model-{number:05d}-of-{len(groups):05d}.safetensors", names


def _is_whole(file: Path) -> bool:
    """Whether a shard is there: they are renamed into place, so a header that can be read is the whole file."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
