"""The model card of a merged checkpoint: what it is made of, how, and how far that can be trusted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from weightpatch.files import write_whole
from weightpatch.merging.coefficients import varying
from weightpatch.merging.experts import Expert
from weightpatch.merging.resolving import Resolved, Rule
from weightpatch.merging.writing import Merge

CARD = "README.md"


def write_card(
    folder: Path, merge: Merge, rule: Rule | None, resolved: Resolved, experts: Mapping[str, Expert]
) -> None:
    """Write a merged folder's README.md with its full provenance."""
    write_whole(folder / CARD, "\n".join(_lines(merge, rule, resolved, experts)) + "\n")


def _lines(merge: Merge, rule: Rule | None, resolved: Resolved, experts: Mapping[str, Expert]) -> Iterator[str]:
    base = merge.inputs.base.reference
    head: dict[str, Any] = {
        "base_model": [base, *(one.reference for one in merge.inputs.experts.values())],
        "library_name": "transformers",
        "tags": ["merge", "weightpatch"],
    }
    yield "---"
    for key, value in head.items():
        yield f"{key}: {json.dumps(value, ensure_ascii=False)}"
    yield from ("---", "", f"# A merge of {', '.join(experts)}", "")
    yield (
        f"Base: `{base}`. Merged by weightpatch {version('weightpatch')}: base + the sum of each expert's difference "
        "times its coefficients. Whether the licences of these models allow that is for whoever passes it on to check."
    )
    yield from ("", "| expert | checkpoint | weight | run | tasks | digest |", "| --- | --- | ---: | --- | --- | --- |")
    for name, expert in experts.items():
        weight = f"{expert.weight:g}" if rule else "given"
        yield f"| {name} | `{expert.specialized}` | {weight} | {_about(expert)} |"
    yield from ("", "## How", "")
    yield f"- coefficients: {_settings(asdict(rule)) if rule else 'given, in merge.coefficients'}"
    yield f"- method: {_settings(asdict(merge.method))}"
    yield f"- seed: {merge.seed}; files: {str(merge.dtype or 'dtypes of the base').removeprefix('torch.')}"
    fine = sum(1 for _ in varying(resolved.coefficients))
    yield f"- tensors with coefficients by row or column: {fine} of {len(resolved.coefficients.tensors)}"
    if merge.chat_template()[1]:
        yield "- chat template: the base's; those of the experts differ, so prompts may not be what each was trained on"
    for name, own in resolved.doubts.items():
        for task, why in own.items():
            yield f"- {name}, {task}: {why}"
    if resolved.restored:
        yield from ("", "## Anchors", "")
        yield "Share of each expert's gap that the merge restores, on prompts that coefficients were not learned from:"
        yield from ("", "| expert | task | before | learned |", "| --- | --- | ---: | ---: |")
        for one in resolved.restored:
            yield f"| {one.expert} | {one.task} | {one.before:.3f} | {one.after:.3f} |"
        yield from ("", "An anchor that is restored is no promise of behaviour: measure it with `weightpatch eval`.")


def _about(expert: Expert) -> str:
    if expert.run is None:
        return "none | | "
    from weightpatch.run import Run

    run = Run.open(expert.run)
    digest = str(run.manifest.get("digests", {}).get("specialized", ""))[:12]
    return f"`{expert.run}` | {', '.join(run.tasks)} | {digest}"


def _settings(found: Mapping[str, Any]) -> str:
    flat = {
        key: value
        for name, own in found.items()
        for key, value in (own.items() if isinstance(own, dict) else [(name, own)])
    }
    return ", ".join(f"{key} {value}" for key, value in flat.items() if value is not None)
