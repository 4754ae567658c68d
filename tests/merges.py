"""Two small experts of the bundled base with their runs, and merges of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightpatch import ContrastPrompts, ModelPair
from weightpatch.merging.experts import Expert
from weightpatch.merging.merge import Prepared, prepare
from weightpatch.planted.suite import SHIPPED
from weightpatch.run import RunConfig
from weightpatch.stages import fit_anchors, measure_effects, start

PLANTS = {"below-groups-1": "sections", "below-mlps-0": "quotation"}
BASE = "tiny:base"


def make_experts(folder: Path) -> dict[str, Expert]:
    """Planted adapters with runs of their own tasks: anchors at layer 6, effects of modules."""
    found = {}
    for name, task in PLANTS.items():
        specialized = str(SHIPPED["tiny"] / name)
        config = RunConfig(
            base=BASE,
            specialized=specialized,
            prompts=f"instructions:{task}",
            units="attns,mlps",
            layer=6,
            gates="readout",
            n_queries=8,
        )
        pair = ModelPair.from_pretrained(BASE, specialized, any_adapter_base=True)
        run = start(config, pair, ContrastPrompts.load(config.prompts, n_queries=8), folder / name)
        for stage in (fit_anchors, measure_effects):
            for _ in stage(run, pair):
                pass
        found[name] = Expert(specialized=specialized, run=folder / name)
    return found


def decide(experts: Mapping[str, Expert], **settings: object) -> Prepared:
    """What a merge of them would be."""
    return prepare(BASE, list(experts.values()), any_adapter_base=True, **settings)  # type: ignore[arg-type]
