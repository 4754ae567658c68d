"""Generated code runs within limits, and nothing but the tests decides whether it passed."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from weightpatch import sandbox
from weightpatch.errors import PromptError, WeightpatchError
from weightpatch.sandbox import OUTPUT_KEPT, run_tests

TESTS = "assert f(1) == 2\nassert f(2) == 3"
RIGHT = "def f(x): return x + 1\n"

FAILING = {
    "a wrong answer": ("def f(x): return x", "AssertionError at `assert f(1) == 2`"),
    "a wrong answer to the last test only": ("def f(x): return 2", "AssertionError at `assert f(2) == 3`"),
    "no function": ("", "NameError: name 'f' is not defined at `assert f(1) == 2`"),
    "no Python": ("def f(x) return x", "SyntaxError: expected ':'"),
    "an error": ("def f(x): return x / 0", "ZeroDivisionError: division by zero"),
    "an error that cannot be printed": (
        "class E(Exception):\n  def __str__(self): raise SystemExit\ndef f(x): raise E",
        "an error that cannot be printed",
    ),
    "a memory hog": ("def f(x): return len([0] * 10**9)", "MemoryError"),
    "a large file": ("open('a', 'w').write('a' * 10**7)", "OSError: [Errno 27]"),
    "a fork": (f"import os\nos.fork()\n{RIGHT}", "the sandbox forbids another process (os.fork)"),
    "a process": ("import subprocess\nsubprocess.run(['true'])", "the sandbox forbids another process"),
    "a process through C": ("import _posixsubprocess\n_posixsubprocess.fork_exec()", "forbids signals and other proc"),
    "a shell": ("import os\nos.system('true')", "the sandbox forbids another process (os.system)"),
    "the network": ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "the sandbox forbids the network"),
    "ctypes": ("import ctypes\nctypes.CDLL(None)", "the sandbox forbids ctypes"),
    "a signal to its parent": (
        "import os\nos.kill(os.getppid(), 0)",
        "the sandbox forbids a signal to another process",
    ),
    "input": ("input()", "EOFError"),
}

FORGERIES = {
    "exit with success": "import sys\nsys.exit(0)",
    "exit with success in a test": "import sys\ndef f(x): sys.exit(0)",
    "leave at once": "import os\ndef f(x): os._exit(0)",
    "print the verdict": "print('passed')\nprint(' passed\\n')\ndef f(x): return 0",
    "write the verdict to every open file": (
        "import os\nfor i in range(1, 60):\n  try: os.write(i, b' passed\\n\\n')\n  except OSError: pass\n"
        "def f(x): return 0"
    ),
    "close every open file": f"import os\nos.closerange(1, 60)\n{RIGHT}",
    "replace the builtins": "import builtins\nbuiltins.exec = builtins.compile = print\ndef f(x): return 0",
    "replace os.write": "import os\nos.write = print\ndef f(x): return 0",
    "read the frames": "import sys\nprint(sys._getframe(1).f_locals)\ndef f(x): return 0",
    "read the frames of an error": (
        "try: 1 / 0\nexcept ZeroDivisionError as e: print(e.__traceback__.tb_frame.f_back.f_locals)\ndef f(x): return 0"
    ),
    "read the frames of a signal": "import signal\nsignal.signal(signal.SIGALRM, lambda n, frame: print(frame))",
    "trace": "import sys\nsys.settrace(print)",
    "read all objects": "import gc\nprint(gc.get_objects())",
    "read the main module": "import __main__\nprint(__main__.FORBIDDEN)",
    "load a blunted module anew": "import sys\ndel sys.modules['_signal']\nimport _signal\nprint(_signal.signal)",
}


@pytest.mark.parametrize(("code", "reason"), FAILING.values(), ids=FAILING)
def test_what_is_wrong_or_forbidden_fails_with_its_reason(code: str, reason: str) -> None:
    outcome = run_tests(code, TESTS, megabytes=256)
    assert not outcome.passed
    assert reason in outcome.reason


@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES)
def test_the_verdict_cannot_be_forged_by(code: str) -> None:
    outcome = run_tests(code, TESTS)
    assert not outcome.passed
    assert outcome.reason


def test_right_code_passes_without_a_reason_and_with_its_output() -> None:
    outcome = run_tests(f"print('hello')\n{RIGHT}", TESTS)
    assert (outcome.passed, outcome.reason, outcome.output) == (True, "", "hello\n")


@pytest.mark.parametrize("body", ["\n  while True: pass", "import time; time.sleep(60)", "return 10 ** (10 ** 9)"])
def test_what_does_not_end_is_ended_by_the_clock(body: str) -> None:
    started = time.monotonic()
    outcome = run_tests(f"def f(x): {body}", TESTS, seconds=0.6)
    assert outcome.reason == "took longer than 0.6 s"
    assert time.monotonic() - started < 3


def test_output_without_end_is_cut_and_does_not_stop_the_clock() -> None:
    outcome = run_tests("def f(x):\n  while True: print('x' * 10000)", TESTS, seconds=0.6)
    assert outcome.reason == "took longer than 0.6 s"
    assert len(outcome.output) == OUTPUT_KEPT


def test_files_can_be_written_in_its_folder_only_and_nothing_stays(tmp_path: Path) -> None:
    inside = "import os\nopen('a', 'w').write('b')\nos.rename('a', 'c')\nprint(os.getcwd(), open('c').read())\n"
    outcome = run_tests(inside + RIGHT, TESTS)
    folder, text = outcome.output.split()
    assert (outcome.passed, text) == (True, "b")
    assert not Path(folder).exists()

    target = tmp_path / "precious"
    target.write_text("kept")
    changes = (
        f"open({str(target)!r}, 'w')",
        f"open({str(target)!r}, 'r+')",
        f"import os; os.open({str(target)!r}, os.O_WRONLY)",
        f"import os; os.remove({str(target)!r})",
        f"import os; os.rename({str(target)!r}, 'here')",
        f"import os; os.symlink({str(tmp_path)!r}, 'link'); open('link/precious', 'w')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.remove('precious', dir_fd=os.open({str(tmp_path)!r}, os.O_RDONLY))",
        f"import os; os.fchmod(os.open({str(target)!r}, os.O_RDONLY), 0)",
        f"import os; os.chdir({str(tmp_path)!r}); open('precious', 'w')",
        f"import sqlite3; sqlite3.connect({str(target)!r})",
        f"import pathlib; pathlib.Path({str(target)!r}).write_text('gone')",
    )
    for change in changes:
        outcome = run_tests(f"{change}\n{RIGHT}", TESTS)
        assert "the sandbox forbids changes outside its folder" in outcome.reason, change
        assert target.read_text() == "kept"


def test_it_sees_no_environment_no_packages_and_not_this_repository() -> None:
    code = "import os\nprint(sorted(os.environ.keys() - {'LC_CTYPE'}), os.listdir())\nimport weightpatch"
    outcome = run_tests(code, TESTS)
    assert outcome.output == "[] []\n"
    assert "No module named 'weightpatch'" in outcome.reason


def test_the_usual_imports_of_an_answer_work() -> None:
    code = (
        "from __future__ import annotations\nimport bisect, collections, dataclasses, datetime, decimal, doctest\n"
        "import enum, functools, heapq, itertools, json, math, operator, random, re, statistics\n"
        "import string, typing, unittest\n"
        "P = collections.namedtuple('P', 'a')\n@dataclasses.dataclass\nclass Q:\n  a: typing.List[int]\n"
        "class N(typing.NamedTuple):\n  a: int\nE = enum.Enum('E', 'A B')\n"
    )
    assert run_tests(code + RIGHT, TESTS).reason == ""


def test_a_swallowed_refusal_leaves_nothing_done() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    address = server.getsockname()
    code = f"import socket\ntry: socket.create_connection({address!r})\nexcept Exception: pass\n"
    with server:
        assert run_tests(code + RIGHT, TESTS).passed
        with pytest.raises(TimeoutError):
            server.accept()


def test_tests_run_with_unchanged_builtins() -> None:
    assert not run_tests(
        "import builtins\nbuiltins.len = lambda x: 1\ndef f(): return ''", "assert len(f()) == 1"
    ).passed


def test_no_open_file_and_no_process_stays_behind() -> None:
    n_open = len(list(Path("/dev/fd").iterdir()))
    for code in (RIGHT, "import os\nos._exit(3)", "while True: pass"):
        run_tests(code, TESTS, seconds=0.5)
    assert len(list(Path("/dev/fd").iterdir())) == n_open
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize(
    ("tests", "message"),
    [("f(1)", "the tests hold no assert"), ("", "the tests hold no assert"), ("assert (", "the tests are no Python")],
)
def test_tests_that_could_not_fail_are_refused(tests: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        run_tests(RIGHT, tests)


def test_limits_must_be_positive() -> None:
    with pytest.raises(PromptError, match="use more than 0 seconds"):
        run_tests(RIGHT, TESTS, seconds=0)
    with pytest.raises(PromptError, match="at least 64 megabytes"):
        run_tests(RIGHT, TESTS, megabytes=1)


def test_a_platform_without_limits_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.os, "name", "nt")
    with pytest.raises(WeightpatchError, match="Run this on Linux or macOS"):
        run_tests(RIGHT, TESTS)
