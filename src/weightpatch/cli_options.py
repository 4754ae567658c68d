"""Options that several commands of the command line share. Nothing here imports torch."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

Base = Annotated[str, typer.Argument(metavar="BASE", help="Hub id, folder or .gguf file of the base.")]
Specialized = Annotated[
    str, typer.Argument(metavar="SPECIALIZED", help="The same of the specialized model, or a PEFT adapter folder.")
]
OnlyTask = Annotated[list[str] | None, typer.Option("--task", help="Only this task; may be given several times.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
Dtype = Annotated[str, typer.Option(help="One dtype for both: float32, bfloat16, float16, float64.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the base on the hub.")]
SpecializedRevision = Annotated[str | None, typer.Option(help="The same of the specialized model.")]
DeviceMap = Annotated[str | None, typer.Option(help="As in transformers: auto, cuda, mps, cpu.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights too; they can run code.")]
AnyAdapterBase = Annotated[
    bool, typer.Option("--any-adapter-base", help="Apply an adapter although it names another base.")
]
Units = Annotated[
    str,
    typer.Option(
        help="Units (blocks, attns, mlps, heads, heads.q, heads.o, kvs, neurons, experts, routers, "
        "norms, rests, ends) and addresses "
        "(L5.N812, L5.H3.q), with commas."
    ),
]
ArchitectureRow = Annotated[
    Literal["table", "auto"],
    typer.Option("--architecture", help="table: a known family. auto: derive an unknown decoder's row, and prove it."),
]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How checkpoints are read, beyond what a run records.

    Attributes:
        device_map: As in transformers.
        allow_pickle: Read pickled weights too.
        any_adapter_base: Apply an adapter although it names another base.
    """

    device_map: str | None = None
    allow_pickle: bool = False
    any_adapter_base: bool = False


def quiet() -> None:
    """Keep transformers' bars and advice off stderr; its errors stay."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore", FutureWarning)
