"""Files of effects, one line to a component: append-only, so that nothing is lost when a run is stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from weightpatch.effects import ComponentEffect
from weightpatch.errors import RunError


def read_effects(file: Path, *, repair: bool = False) -> dict[str, list[float]]:
    """Per-prompt effects by component address, in the order of the lines; empty when there is no file.

    Args:
        file: An `effects.jsonl`.
        repair: Cut off a last line that was only half written, so that the file can be continued.

    Raises:
        RunError: a whole line that is no record.
    """
    found: dict[str, list[float]] = {}
    for number, line in enumerate(whole_lines(file, repair=repair), 1):
        try:
            record = json.loads(line)
            found[record["component"]] = record["effects"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"line {number} of {file} is no record ({error}). Delete the file to measure it again."
            ) from error
    return found


def whole_lines(file: Path, *, repair: bool = False) -> list[bytes]:
    """The lines of a file that were written to their end, none without a file. Arguments as in `read_effects`."""
    if not file.is_file():
        return []
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if repair and len(whole) < len(data):
        os.truncate(file, len(whole))
    return whole.splitlines()


def append_effects(file: Path, found: Iterable[ComponentEffect], known: set[str]) -> Iterator[ComponentEffect]:
    """Write effects to a file of lines as they come; those that are known already are passed over.

    Args:
        file: Such as `effects.jsonl`.
        found: From `sweep`.
        known: Addresses in it; takes up the new ones.

    Raises:
        RunError: an effect that is no number; those before it are kept.
    """
    with file.open("a", encoding="utf-8") as out:
        for effect in found:
            address = str(effect.component)
            if address in known:
                continue
            if not bool(effect.per_prompt.isfinite().all()):
                raise RunError(f"the effect of {address} is NaN or infinite. Run in float32 or bfloat16 (--dtype).")
            record: dict[str, object] = {"component": address, "effects": effect.per_prompt.tolist()}
            if effect.per_target is not None:
                record["delivered"] = [round(value, 9) for value in effect.per_target.mean(dim=1).tolist()]
            out.write(json.dumps(record) + "\n")
            out.flush()
            known.add(address)
            yield effect


def read_delivered(file: Path) -> dict[str, list[float]]:
    """What targets write more, mean over prompts, by address of what was patched; only lines that have it."""
    records = (json.loads(line) for line in whole_lines(file))
    return {record["component"]: record["delivered"] for record in records if "delivered" in record}
