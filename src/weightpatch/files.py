"""Files that are there completely or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

_DECISIVE = ("*.safetensors", "*.bin", "*.gguf", "adapter_config.json")
_BLOCK_BYTES = 4096
_N_BLOCKS = 64


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is there completely or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def file_digest(file: Path) -> str:
    """SHA-256 of a file that is small enough to be read whole."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def fingerprint(checkpoint: Path) -> str:
    """Tells whether a checkpoint's weights are still those of before, without reading all of them.

    SHA-256 of names, sizes and 64 evenly spaced blocks of 4 KiB of each file of weights, so a change that stays between
    all of these blocks goes unnoticed; training changes every one.

    Args:
        checkpoint: A folder or a single file.
    """
    digest = hashlib.sha256()
    files = (
        {file for pattern in _DECISIVE for file in checkpoint.glob(pattern)} if checkpoint.is_dir() else {checkpoint}
    )
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for start in dict.fromkeys(
                max(0, size - _BLOCK_BYTES) * place // (_N_BLOCKS - 1) for place in range(_N_BLOCKS)
            ):
                stream.seek(start)
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()
