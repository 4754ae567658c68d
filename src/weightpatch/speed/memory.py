"""Peak anonymous memory of a piece of work, as the operating system sees it."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

_STATUS = Path("/proc/self/status")
_PERIOD = 0.005  # seconds between two samples


def with_peak_memory(body: Callable[[], Result]) -> tuple[Result, float | None]:
    """Do something and watch this process's anonymous memory.

    Freed memory that the allocator still holds is given back first, so that what an earlier piece of work left behind
    is not reused unseen.

    Returns:
        What `body` returns, and by how many MiB memory at most exceeded what it was before; None where the system does
        not tell (it is read from `/proc/self/status`).
    """
    trim()
    before = _anonymous()
    if before is None:
        return body(), None
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_PERIOD):
            peak = max(peak, _anonymous() or 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = body()
    finally:
        done.set()
        watcher.join()
    return result, (max(peak, _anonymous() or 0) - before) / 1024


def trim() -> None:
    """Give freed memory back to the system, where the C library can do that."""
    gc.collect(1)  # what was made lately; the whole heap takes longer than many a turn
    if sys.platform == "linux":
        release = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if release is not None:
            release(0)


def _anonymous() -> int | None:
    """Resident anonymous memory in KiB."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)
