"""The program that `sandbox.run_tests` starts: limits first, then the tested code, then its tests, then the verdict.

It imports nothing of this package, and nothing of it is meant to be imported. Everything it needs after the tested code
has run is bound to local names before, because that code may replace any attribute of any module.
"""

from __future__ import annotations

import builtins
import json
import math
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

# Prefixes of audit events, and what they are called in the refusal.
FORBIDDEN = {
    "socket.": "the network",
    "subprocess.": "another process",
    "os.fork": "another process",
    "os.exec": "another process",
    "os.posix_spawn": "another process",
    "os.spawn": "another process",
    "os.startfile": "another process",
    "os.system": "another process",
    "pty.spawn": "another process",
    "os.kill": "a signal to another process",
    "ctypes.": "ctypes",
}
# Events that change files: which of their arguments are paths, and which are open folders that paths start from.
CHANGES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "os.chflags": ((0,), ()),
    "os.chmod": ((0,), (2,)),
    "os.chown": ((0,), (3,)),
    "os.link": ((0, 1), (2, 3)),
    "os.mkdir": ((0,), (2,)),
    "os.remove": ((0,), (1,)),
    "os.removexattr": ((0,), ()),
    "os.rename": ((0, 1), (2, 3)),
    "os.rmdir": ((0,), (1,)),
    "os.setxattr": ((0,), ()),
    "os.symlink": ((0, 1), (2,)),
    "os.truncate": ((0,), ()),
    "os.utime": ((0,), (3,)),
    "sqlite3.connect": ((0,), ()),
}
# Ways to a frame, whose variables hold the word that makes a verdict. Libraries that look at frames out of curiosity
# (namedtuple, enum, typing) expect a ValueError.
FRAMES = frozenset(
    (
        *("gc.get_objects", "gc.get_referents", "gc.get_referrers", "sys._current_exceptions", "sys._current_frames"),
        *("sys._getframe", "sys.setprofile", "sys.settrace"),
    )
)
FRAME_ATTRIBUTES = frozenset(("ag_frame", "cr_frame", "gi_frame", "tb_frame"))
# Modules of C functions without audit events: loaded and blunted before, never loaded again.
BLUNTED = {"_posixsubprocess": ("fork_exec",), "_signal": ("pthread_kill", "raise_signal", "signal")}
# The same, never loaded at all: files, shared memory, and interpreters without our hook.
CLOSED = frozenset(
    (
        *("_dbm", "_gdbm", "_interpreters", "_multiprocessing", "_posixshmem", "_testcapi", "_testinternalcapi"),
        *("_xxsubinterpreters", "readline"),
    )
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def set_limits(seconds: float, megabytes: int) -> list[str]:
    """Limit this process; returns the names of the limits that the platform does not have or refused."""
    n_bytes, n_seconds = megabytes << 20, math.ceil(seconds)
    wanted = {
        "processor time": ("RLIMIT_CPU", n_seconds, n_seconds + 1),
        "address space": ("RLIMIT_AS", n_bytes, n_bytes),
        "file size": ("RLIMIT_FSIZE", 1 << 20, 1 << 20),
        "open files": ("RLIMIT_NOFILE", 64, 64),
        "processes": ("RLIMIT_NPROC", 0, 0),
        "core file": ("RLIMIT_CORE", 0, 0),
    }
    refused = []
    for name, (constant, soft, hard) in wanted.items():
        try:
            resource.setrlimit(getattr(resource, constant), (soft, hard))
        except (AttributeError, OSError, ValueError):
            refused.append(name)
    if sys.platform == "darwin" and "address space" not in refused:
        refused.append("address space")  # accepted there, and not enforced
    return refused


def blunt_modules() -> None:
    """Take away the few functions that no audit event announces."""

    def refuse(*_args: object) -> NoReturn:
        raise PermissionError("the sandbox forbids signals and other processes")

    for name, functions in BLUNTED.items():
        module = __import__(name)
        for function in functions:
            if hasattr(module, function):
                setattr(module, function, refuse)


def make_hook(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """The audit hook; all that it reads is its own, so that replacing names elsewhere does not change it."""
    forbidden, changes, frames = tuple(FORBIDDEN.items()), dict(CHANGES), FRAMES
    frame_attributes, closed, writing = FRAME_ATTRIBUTES, CLOSED | frozenset(BLUNTED), WRITING
    real, is_folder, decode, is_a, text, number = os.path.realpath, os.path.isdir, os.fsdecode, isinstance, str, int
    inside = (folder, folder + os.sep)

    def check_path(path: Any) -> None:
        place = f"open file {path}" if is_a(path, number) else real(decode(path))
        if place != inside[0] and not place.startswith(inside[1]) and place != "/dev/null":
            raise PermissionError(f"the sandbox forbids changes outside its folder: {place}")

    def check_open(path: Any, mode: Any, flags: Any) -> None:
        writes = mode.strip("rbtU") != "" if is_a(mode, text) else flags is not None and flags & writing
        # An open file's number was checked when it was opened; an open folder would lead to any path.
        if path is not None and not is_a(path, number) and (writes or (mode is None and is_folder(path))):
            check_path(path)

    def check_change(paths: tuple[Any, ...], folders: tuple[Any, ...]) -> None:
        for path in paths:
            if path != ":memory:":
                check_path(path)
        for descriptor in folders:
            if descriptor != -1:
                raise PermissionError(f"the sandbox forbids changes outside its folder: open folder {descriptor}")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            check_open(*args)
        elif event in changes:
            paths, folders = changes[event]
            check_change(tuple([args[i] for i in paths]), tuple([args[i] for i in folders]))
        elif event in frames or (event == "object.__getattr__" and args[1] in frame_attributes):
            raise ValueError("the sandbox forbids looking at frames and at all objects")
        elif event == "import":
            if args[0] in closed:
                raise PermissionError(f"the sandbox forbids loading {args[0]}")
        else:
            for prefix, name in forbidden:
                if event.startswith(prefix):
                    raise PermissionError(f"the sandbox forbids {name} ({event})")

    return hook


def describe(error: BaseException, test_lines: list[str] | None) -> str:
    """One line on what went wrong; for the tests (given their lines) also where."""
    try:
        text = f"{type(error).__name__}: {error}".rstrip(": ")
    except BaseException:  # the error's own text is code under test
        text = "an error that cannot be printed"
    step = error.__traceback__.tb_next if error.__traceback__ else None  # the first is our own call of exec
    if test_lines is not None and step is not None and 1 <= step.tb_lineno <= len(test_lines):
        text = f"{text} at `{test_lines[step.tb_lineno - 1].strip()}`"
    return " ".join(text.split())[:500] or "failed"


def main() -> None:
    """Read the request from stdin, run it, answer on the verdict's pipe, leave."""
    request = json.loads(sys.stdin.buffer.read())
    verdict = request["verdict"]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    refused = set_limits(request["seconds"], request["megabytes"])
    passed = f"{request['token']} passed\n{','.join(refused)}\n".encode()
    failed = f"{request['token']} failed\n{','.join(refused)}\n".encode()
    test_lines = request["tests"].split("\n")
    tests = compile(request["tests"], "<tests>", "exec")
    source = request["code"]
    del request
    pristine = dict(vars(builtins))
    run, build, write, leave = exec, compile, os.write, os._exit
    module = sys.modules["solution"] = types.ModuleType("solution")  # dataclasses look their module up
    namespace = vars(module)
    blunt_modules()
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.addaudithook(make_hook(os.path.realpath(os.getcwd())))  # noqa: PTH109

    verdict_text = passed
    lines: list[str] | None = None
    try:
        run(build(source, "<code>", "exec"), namespace)
        lines = test_lines
        run(tests, {**namespace, "__builtins__": pristine})
    except BaseException as error:  # SystemExit and KeyboardInterrupt are failures like any other
        verdict_text = failed + describe(error, lines).encode("utf-8", "replace")
    try:
        write(verdict, verdict_text)
    finally:
        leave(0)


if __name__ == "__main__":
    main()
