"""Runs every Python and shell snippet of the README and the docs, each file in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

HERE = Path(__file__).parent

if "PYTEST_XDIST_WORKER" in os.environ:  # programs that tests start would otherwise fight for the workers' cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Documents with shell blocks are slow, as whole stages run there, and whole, as their blocks need each other."""
    documents = {item.path for item in items if item.path.suffix == ".md"}
    long = {path for path in documents if "\n```bash\n" in path.read_text(encoding="utf-8")}
    for item in items:
        if item.path in long:
            item.add_marker(pytest.mark.slow)


def run_shell(example: Example) -> None:
    """Run a block with the programs of this environment first on the path; a failing line fails the block."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", str(example.parsed)],
        env={**os.environ, "PATH": programs, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"{example.parsed}\nexited with {done.returncode}:\n{done.stdout}\n{done.stderr}")


def enter_folder(namespace: dict[str, Any]) -> None:
    """Start a document in an empty folder."""
    namespace["_folder"], namespace["_before"] = tempfile.TemporaryDirectory(), Path.cwd()
    os.chdir(namespace["_folder"].name)


def leave_folder(namespace: dict[str, Any]) -> None:
    """Go back and remove what the document wrote."""
    os.chdir(namespace["_before"])
    namespace["_folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser(language="bash", evaluator=run_shell)],
    patterns=["README.md", "docs/*.md"],
    path=str(HERE),
    setup=enter_folder,
    teardown=leave_folder,
).pytest()
