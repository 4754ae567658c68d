"""Making a whole suite, several plants at a time, each in a process of its own with one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from weightpatch.checkpoint import BUNDLED, find, load, read_tokenizer
from weightpatch.errors import CheckpointError, RunError
from weightpatch.planted.designs import Unit, Variant
from weightpatch.planted.language import texts_of
from weightpatch.planted.suite import TINY_COUNTS, Made, finish_suite, make_plant, places

_TINY_BASE = BUNDLED[0]
_loaded: dict[str, Any] = {}
"""What a worker process keeps between plants."""


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
    pool = ProcessPoolExecutor(
        max_workers=min(jobs or os.cpu_count() or 1, len(wanted)), mp_context=get_context("spawn"), initializer=_start
    )
    try:
        futures = [pool.submit(_make, folder, name, variant, unit, seed) for name, variant, unit in wanted]
        for future in as_completed(futures):
            yield from future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
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


def _start() -> None:
    torch.set_num_threads(1)
    base = find(_TINY_BASE)
    _loaded["model"] = load(base, dtype=torch.float32)
    _loaded["tokenizer"] = read_tokenizer(base)
    if _loaded["tokenizer"] is None:
        raise CheckpointError(f"{_TINY_BASE} has no tokenizer.")
    _loaded["texts"] = texts_of(_loaded["tokenizer"])


def _make(folder: Path, name: str, variant: Variant, unit: Unit, seed: int) -> list[Made]:
    return list(
        make_plant(
            _loaded["model"],
            _loaded["tokenizer"],
            folder,
            base=_TINY_BASE,
            name=name,
            variant=variant,
            unit=unit,
            seed=seed,
            texts=_loaded["texts"],
        )
    )
