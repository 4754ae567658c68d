"""Making a whole suite, several plants at a time, each in a process of its own with one thread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weightpatch.checkpoint import BUNDLED, find, load, read_tokenizer
from weightpatch.errors import CheckpointError, RunError
from weightpatch.planted.designs import Unit, Variant
from weightpatch.planted.language import texts_of
from weightpatch.planted.pooling import in_processes
from weightpatch.planted.suite import TINY_COUNTS, Made, finish_suite, make_plant, places

_TINY_BASE = BUNDLED[0]


def make_suite(
    folder: str | Path,
    *,
    seed: int,
    counts: Mapping[Variant, Mapping[Unit, int]] = TINY_COUNTS,
    jobs: int | None = None,
) -> Iterator[Made]:
    """Make the suite on the bundled base; goes on where an interrupted call with the same seed stopped.

    Every plant depends on the seed and its own name alone, not on how many processes there are.

    Args:
        folder: Where to put it.
        seed: Of everything.
        counts: Variant -> unit -> plants.
        jobs: Processes; None: as many as the machine has cores.

    Yields:
        Every attempt as it ends, in whatever order.

    Raises:
        RunError: a folder with plants of another seed, or a place in which no design took.
    """
    folder = Path(folder)
    _claim(folder, seed)
    wanted = places(counts)
    for made in in_processes(_make, [(folder, name, variant, unit, seed) for name, variant, unit in wanted], jobs=jobs):
        yield from made
    finish_suite(folder, base=_TINY_BASE, seed=seed, names=[name for name, _, _ in wanted])


def _claim(folder: Path, seed: int) -> None:
    """Note the seed of a suite before it begins."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "seed.txt"
    if not note.exists():
        if any(folder.iterdir()):
            raise RunError(f"{folder} is not empty and holds no suite of plants: name a new folder.")
        note.write_text(f"{seed}\n", encoding="utf-8")
    elif note.read_text(encoding="utf-8").strip() != str(seed):
        raise RunError(f"{folder} holds plants of seed {note.read_text().strip()}, not {seed}: name another folder.")


@cache
def _base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read once in every process."""
    found = find(_TINY_BASE)
    tokenizer = read_tokenizer(found)
    if tokenizer is None:
        raise CheckpointError(f"{_TINY_BASE} has no tokenizer.")
    return load(found, dtype=torch.float32), tokenizer


def _make(folder: Path, name: str, variant: Variant, unit: Unit, seed: int) -> list[Made]:
    model, tokenizer = _base()
    return list(
        make_plant(
            model,
            tokenizer,
            folder,
            base=_TINY_BASE,
            name=name,
            variant=variant,
            unit=unit,
            seed=seed,
            texts=texts_of(tokenizer),
        )
    )
