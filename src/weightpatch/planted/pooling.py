"""The same work on many plants, several at a time, each in a process of its own with one thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import starmap
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from transformers.utils import logging

Result = TypeVar("Result")


def in_processes(
    work: Callable[..., Result], arguments: Sequence[tuple[Any, ...]], *, jobs: int | None = None
) -> Iterator[Result]:
    """Call a function with each of some arguments, in processes, and give what it returns as it comes.

    Tiny models are slower with two threads than with one; what is computed does not depend on the number of processes.

    Args:
        work: A function of a module.
        arguments: What it is called with.
        jobs: Processes; None: as many as the machine has cores; 1: none, the work is done here, with one thread too.
    """
    if jobs == 1:
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from starmap(work, arguments)
        finally:
            torch.set_num_threads(n_threads)
        return
    pool = ProcessPoolExecutor(
        max_workers=max(1, min(jobs or os.cpu_count() or 1, len(arguments))),
        mp_context=get_context("spawn"),
        initializer=_start,
    )
    try:
        futures = [pool.submit(work, *own) for own in arguments]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
