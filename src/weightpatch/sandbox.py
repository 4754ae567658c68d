"""Runs generated Python code against tests, in a process of its own with limits."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from weightpatch.errors import PromptError, WeightpatchError

CHILD = Path(__file__).with_name("sandbox_child.py")
OUTPUT_KEPT = 4096
"""Bytes of what the tested code prints that are kept; the rest is read and dropped."""

_VERDICT_KEPT = 1 << 16


@dataclass(frozen=True, kw_only=True)
class TestOutcome:
    """What became of one run.

    Attributes:
        passed: The last line of the tests was reached and nothing failed.
        reason: Why it did not pass, in one line; empty when it did.
        output: What the code printed, to either stream, cut after `OUTPUT_KEPT` bytes.
        unlimited: Limits that this platform does not offer or refused (`"address space"` on macOS).
    """

    passed: bool
    reason: str
    output: str = ""
    unlimited: tuple[str, ...] = ()


def run_tests(code: str, tests: str, *, seconds: float = 5.0, megabytes: int = 512) -> TestOutcome:
    """Run `code`, then `tests` with its names, in a separate process, and say whether every test passed.

    This is a guard against accidents of generated code, not a security boundary: the code runs with the rights of the
    user, may read files, and code written to break out will. Run models that you do not trust in a container.

    What it does: a fresh `python -I -S` in an empty temporary folder with an empty environment; limits on processor
    time, address space, file size, open files and processes; a clock that kills the whole process group; an audit hook
    that refuses sockets, other processes, ctypes, signals to other processes, and every change of files outside the
    folder. The verdict is a random word that the child writes to a pipe of its own after the last test, so neither
    printing nor `sys.exit(0)` passes; the audit hook also refuses the ways to reach that word from Python (frames,
    tracing, the garbage collector). An object that claims to equal everything does pass a test with `==`.

    Where a limit is missing: macOS does not enforce the address space, so a memory hog there ends only with the clock;
    for the superuser Linux does not enforce the number of processes, so there the audit hook alone stops a fork. A
    limit that could not be set is named in the outcome.

    Args:
        code: Python source to be tested; its `__name__` is not `__main__`.
        tests: Python source with asserts, run after `code` in a copy of its namespace with unchanged builtins.
        seconds: Wall-clock time for the whole process, start included.
        megabytes: Address space (2**20 bytes each), of which Python itself takes about 30.

    Returns:
        The outcome; failing code never raises here.

    Raises:
        PromptError: the tests are no Python or assert nothing, or a limit is not positive.
        WeightpatchError: the platform has no process groups and limits (Windows).
    """
    _check_request(tests, seconds, megabytes)
    token = secrets.token_hex(16)
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="weightpatch-", ignore_cleanup_errors=True) as folder:
        verdict_end, child_end = os.pipe()
        with open(verdict_end, "rb", buffering=0) as verdict_pipe:  # noqa: PTH123
            try:
                process = subprocess.Popen(  # noqa: S603 - our own program; the tested code travels through stdin
                    [sys.executable, "-I", "-S", "-B", "-u", str(CHILD)],
                    cwd=folder,
                    env={},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=(child_end,),
                    start_new_session=True,
                    bufsize=0,
                )
            finally:
                os.close(child_end)
            request = {
                "code": code,
                "tests": tests,
                "token": token,
                "verdict": child_end,
                "seconds": seconds,
                "megabytes": megabytes,
            }
            with process:
                try:
                    _send(process.stdin, json.dumps(request).encode())
                    verdict, output = _collect(verdict_pipe, process.stdout, deadline)
                    in_time = _wait(process, deadline)
                finally:
                    _kill_group(process)
    return _read_outcome(
        verdict, token, output=output, exit_code=process.returncode, seconds=None if in_time else seconds
    )


def _check_request(tests: str, seconds: float, megabytes: int) -> None:
    if os.name != "posix":
        raise WeightpatchError(
            f"tests of generated code need process groups and resource limits, which {sys.platform} does not have. "
            "Run this on Linux or macOS, or on Windows in WSL or a container."
        )
    if not seconds > 0 or megabytes < 64:
        raise PromptError(
            f"seconds={seconds}, megabytes={megabytes}: use more than 0 seconds and at least 64 megabytes."
        )
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError) as error:
        raise PromptError(f"the tests are no Python: {error}. Mend them; the code was not run.") from error
    if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        raise PromptError("the tests hold no assert, so every code would pass: write at least one.")


def _send(stdin: IO[bytes] | None, request: bytes) -> None:
    if stdin is not None:
        with contextlib.suppress(BrokenPipeError), stdin:
            while request:
                request = request[stdin.write(request) :]


def _collect(verdict_pipe: IO[bytes], stdout: IO[bytes] | None, deadline: float) -> tuple[bytes, bytes]:
    """Read both pipes until the verdict's end is closed or the time is over; what exceeds the caps is dropped."""
    kept = {"verdict": b"", "output": b""}
    caps = {"verdict": _VERDICT_KEPT, "output": OUTPUT_KEPT}
    with selectors.DefaultSelector() as selector:
        selector.register(verdict_pipe, selectors.EVENT_READ, "verdict")
        if stdout is not None:
            selector.register(stdout, selectors.EVENT_READ, "output")
        is_open = True
        while is_open and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                chunk = os.read(key.fd, 1 << 16)
                kept[key.data] = (kept[key.data] + chunk)[: caps[key.data]]
                if not chunk:
                    selector.unregister(key.fileobj)
                    is_open = is_open and key.data != "verdict"
        # What was printed just before the end may still be in the pipe.
        for key, _ in selector.select(0):
            kept[key.data] = (kept[key.data] + os.read(key.fd, 1 << 16))[: caps[key.data]]
    return kept["verdict"], kept["output"]


def _wait(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Whether the process ended by itself in time; one that has closed the verdict's pipe is soon at its end."""
    if time.monotonic() >= deadline:
        return False
    try:
        process.wait(min(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # Whatever the process left behind is in its group; macOS answers with EPERM when only zombies are left in it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _read_outcome(
    verdict: bytes, token: str, *, output: bytes, exit_code: int | None, seconds: float | None
) -> TestOutcome:
    text = output.decode("utf-8", "replace")
    # The code may have written to the pipe too: only what follows the word counts.
    _, found, answer = verdict.decode("utf-8", "replace").rpartition(token)
    if found:
        mark, unlimited, reason = (*answer.split("\n", 2), "", "")[:3]
        names = tuple(filter(None, unlimited.split(",")))
        passed = mark == " passed"
        return TestOutcome(passed=passed, reason="" if passed else reason or "failed", output=text, unlimited=names)
    if seconds is not None or exit_code == -signal.SIGXCPU:
        limit = "its processor time" if seconds is None else f"{seconds:g} s"
        reason = f"took longer than {limit}"
    elif exit_code is not None and exit_code < 0:
        reason = f"was ended by {signal.Signals(-exit_code).name} before the last test"
    else:
        reason = f"ended itself with exit code {exit_code} before the last test"
    return TestOutcome(passed=False, reason=reason, output=text)
