"""Suites of plants on disk: each plant a PEFT adapter with a page about it, so that any tool can load them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weightpatch.architecture import Architecture
from weightpatch.component import Component
from weightpatch.errors import RunError
from weightpatch.files import write_whole
from weightpatch.pair import ModelPair
from weightpatch.planted.designs import TINY_SIZES, UNITS, Size, Unit, Variant, draw_design
from weightpatch.planted.planting import TINY_COURSE, Check, Course, Plant, plant
from weightpatch.planted.training import Texts

FORMAT = 1
ANCHOR_SHARE = 7 / 8
"""Depth of the anchor: plants are read where the signal has nearly arrived, and carry it below."""
MOST_ATTEMPTS = 12
"""Designs that are drawn for one place in a suite before it is given up."""
TINY_COUNTS: Mapping[Variant, Mapping[Unit, int]] = {
    "below": dict.fromkeys(UNITS, 4),
    "split": dict.fromkeys(UNITS, 2),
    "redundant": dict.fromkeys(UNITS, 2),
    "joint": dict.fromkeys(UNITS, 2),
}
"""Plants of the suite `tiny`, 40 in all."""
SUITES: Mapping[str, Mapping[Variant, Mapping[Unit, int]]] = {"tiny": TINY_COUNTS}
"""Name of a suite that can be made -> variant -> unit -> plants."""
SHIPPED: Mapping[str, Path] = {"tiny": Path(__file__).parent.parent / "data" / "planted" / "tiny"}
"""Name of a suite that is frozen and shipped -> its folder."""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """What is known about a plant on disk.

    Attributes:
        name: Unique in its suite.
        variant: How its carriers relate.
        unit: What they are.
        task: What they carry.
        other: What the distractors carry.
        carriers: Addresses of each set of carriers.
        distractors: Addresses.
        candidates: Addresses of all components of the unit.
        others: Addresses of all components of other units, which drift.
        anchor_layer: Where it is read.
        seed: Of the suite.
        attempt: How many designs failed in its place before.
        checks: Pass rates that were measured on it.
    """

    name: str
    variant: Variant
    unit: Unit
    task: str
    other: str
    carriers: tuple[tuple[str, ...], ...]
    distractors: tuple[str, ...]
    candidates: tuple[str, ...]
    others: tuple[str, ...]
    anchor_layer: int
    seed: int
    attempt: int
    checks: tuple[Check, ...]

    @property
    def all_carriers(self) -> frozenset[str]:
        """Addresses of the carriers of all sets."""
        return frozenset(one for group in self.carriers for one in group)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Plants of one base.

    Attributes:
        folder: Where they lie.
        base: What they were planted in, as `ModelPair.from_pretrained` takes it.
        seed: Of everything.
        plants: In their order.
        failures: Plant -> the checks that failed, by attempt; only plants that were drawn again.
        version: Of a suite that is shipped; empty for others.
    """

    folder: Path
    base: str
    seed: int
    plants: tuple[Planted, ...]
    failures: Mapping[str, Sequence[Sequence[str]]]
    version: str = ""

    @classmethod
    def open(cls, folder: str | Path, *, base: str | None = None) -> Suite:
        """Read a suite.

        Args:
            folder: Its folder, or the name of a shipped one, `tiny`.
            base: Where its base lies, if not where the suite says.

        Raises:
            RunError: there is none, or it is of another format.
        """
        folder = SHIPPED.get(str(folder), Path(folder))
        try:
            head: dict[str, Any] = json.loads((folder / "suite.json").read_text(encoding="utf-8"))
            plants = [_read(folder / name / "plant.json") for name in head["plants"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{folder} holds no suite of plants that can be read ({error}). Make one: "
                "weightpatch bench planted --make --seed 1 --out DIR"
            ) from error
        if head.get("format") != FORMAT:
            raise RunError(f"{folder} has format {head.get('format')}; this program reads {FORMAT}. Make it again.")
        return cls(
            folder=folder,
            base=base or head["base"],
            seed=head["seed"],
            plants=tuple(plants),
            failures=head["failures"],
            version=head.get("version", ""),
        )

    def pair(self, planted: Planted) -> ModelPair:
        """The base and one plant on it."""
        return ModelPair.from_pretrained(self.base, self.folder / planted.name, any_adapter_base=True)


@dataclass(frozen=True, kw_only=True)
class Made:
    """One attempt at a plant.

    Attributes:
        name: Of the plant.
        attempt: 0 for the first.
        took: Whether it was written.
        failed: Checks that failed.
    """

    name: str
    attempt: int
    took: bool
    failed: tuple[str, ...]


def places(counts: Mapping[Variant, Mapping[Unit, int]] = TINY_COUNTS) -> list[tuple[str, Variant, Unit]]:
    """Name, variant and unit of every plant of a suite."""
    return [
        (f"{variant}-{unit}-{number}", variant, unit)
        for variant, units in counts.items()
        for unit, count in units.items()
        for number in range(count)
    ]


def make_plant(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    base: str,
    name: str,
    variant: Variant,
    unit: Unit,
    seed: int,
    texts: Texts,
    course: Course = TINY_COURSE,
    sizes: Mapping[Unit, Size] = TINY_SIZES,
    on_step: Callable[[], None] | None = None,
    on_checked: Callable[[Sequence[Check]], None] | None = None,
) -> Iterator[Made]:
    """Draw designs for one place of a suite until one takes; the plant is then written.

    A plant that is there is left alone and nothing is yielded. Failed attempts are kept in `failed.json` beside it, and
    what a design has been taught so far in a folder of its own, so that an interrupted suite goes on as if it had not
    been.

    Args:
        model: The base.
        tokenizer: Its tokenizer.
        folder: Of the suite.
        base: What the adapter names as its base.
        name: Of the plant.
        variant: How carriers relate.
        unit: What they are.
        seed: Of the suite.
        texts: What it is trained on.
        course: How.
        sizes: How many carriers and distractors, and how much they are moved.
        on_step: Called after every optimizer step.
        on_checked: Called with the checks of the whole after every round of drift.

    Raises:
        RunError: none took.
    """
    own = folder / name
    if (own / "plant.json").is_file():
        return
    own.mkdir(parents=True, exist_ok=True)
    architecture = Architecture.of(model)
    anchor_layer = round(ANCHOR_SHARE * architecture.n_layers)
    failed = _failed(own)
    for attempt in range(len(failed), MOST_ATTEMPTS):
        design = draw_design(
            architecture,
            name=f"{name} {attempt}",
            variant=variant,
            unit=unit,
            seed=seed,
            anchor_layer=anchor_layer,
            sizes=sizes,
            tasks=course.tasks,
            target=course.target,
        )
        begun = own / f"attempt-{attempt}"
        found = plant(
            model,
            tokenizer,
            design,
            texts=texts,
            course=course,
            on_step=on_step,
            on_checked=on_checked,
            kept_in=begun,
        )
        wrong = tuple(f"{check.name} {check.rate:.2f}" for check in found.checks if not check.passed)
        if found.took:
            shutil.rmtree(begun)
            write_plant(own, model, found, base=base, name=name, attempt=attempt, anchor_layer=anchor_layer)
            yield Made(name=name, attempt=attempt, took=True, failed=())
            return
        failed.append(list(wrong))
        write_whole(own / "failed.json", json.dumps(failed, indent=1) + "\n")
        shutil.rmtree(begun)
        yield Made(name=name, attempt=attempt, took=False, failed=wrong)
    raise RunError(
        f"none of {MOST_ATTEMPTS} designs for {name} took (see failed.json there). Try another seed, or larger "
        "differences in weightpatch.planted.designs."
    )


def write_plant(
    own: Path, model: PreTrainedModel, found: Plant, *, base: str, name: str, attempt: int, anchor_layer: int
) -> None:
    """Write a plant's adapter, and then its page, which says that it is whole.

    Args:
        own: The plant's folder.
        model: The base.
        found: The plant.
        base: What the adapter names as its base.
        name: Of the plant.
        attempt: Designs that failed in its place before.
        anchor_layer: Where it is to be read.
    """
    weights = {key: parameter.detach() for key, parameter in model.named_parameters()}
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for part in found.parts:
        for key, factors in part.factors.items():
            pairs.setdefault(key.removesuffix(".weight"), []).append(factors.adapter(weights[key].shape))
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module, own_pairs in sorted(pairs.items()):
        inner = torch.cat([a for a, _ in own_pairs]).bfloat16().contiguous()
        outer = torch.cat([b for _, b in own_pairs], dim=1).bfloat16().contiguous()
        tensors[f"base_model.model.{module}.lora_A.weight"] = inner
        tensors[f"base_model.model.{module}.lora_B.weight"] = outer
        ranks[module] = len(inner)
    save_file(tensors, own / "adapter_model.safetensors", metadata={"format": "pt"})
    _write_compact(own / "adapter_config.json", _config(base, ranks))
    design = found.design
    page = Planted(
        name=name,
        variant=design.variant,
        unit=design.unit,
        task=design.task,
        other=design.other,
        carriers=tuple(_addresses(group) for group in design.carriers),
        distractors=_addresses(design.distractors),
        candidates=_addresses(design.candidates),
        others=tuple(
            address for address in _addresses(tuple(design.norms)) if address not in set(_addresses(design.candidates))
        ),
        anchor_layer=anchor_layer,
        seed=design.seed,
        attempt=attempt,
        checks=found.checks,
    )
    _write_compact(own / "plant.json", _record(page))


def finish_suite(folder: Path, *, base: str, seed: int, names: Sequence[str]) -> Suite:
    """Write the suite's own page when all its plants are there."""
    failures = {name: found for name in names if (found := _failed(folder / name))}
    head = {"format": FORMAT, "base": base, "seed": seed, "plants": list(names), "failures": failures}
    write_whole(folder / "suite.json", json.dumps(head, indent=1) + "\n")
    for name in failures:
        (folder / name / "failed.json").unlink()
    return Suite.open(folder)


def _failed(own: Path) -> list[list[str]]:
    file = own / "failed.json"
    found: list[list[str]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return found


def _config(base: str, ranks: Mapping[str, int]) -> dict[str, Any]:
    """What PEFT reads: module -> rank, the commonest of which is the default; the scale is 1 everywhere."""
    commonest = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != commonest}
    return {
        "base_model_name_or_path": base,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "init_lora_weights": True,
        "r": commonest,
        "lora_alpha": commonest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted({module.rpartition(".")[2] for module in ranks}),
    }


def _record(page: Planted) -> dict[str, Any]:
    """A plant's page as it is written: groups of neurons by layer and number, everything else by address.

    Where components are groups, `candidates` is layer -> groups -> numbers of neurons, and carriers and distractors are
    (layer, place among its groups).
    """
    record = asdict(page)
    if page.unit == "groups":
        by_layer: dict[int, list[list[int]]] = {}
        places: dict[str, tuple[int, int]] = {}
        for address in page.candidates:
            group = Component.parse(address)
            layer = group.layer or 0
            own = by_layer.setdefault(layer, [])
            places[address] = (layer, len(own))
            own.append([one.index for one in group.members if one.index is not None])
        record["candidates"] = by_layer
        record["carriers"] = [[places[one] for one in group] for group in page.carriers]
        record["distractors"] = [places[one] for one in page.distractors]
    return record


def _write_compact(file: Path, record: Mapping[str, Any]) -> None:
    """JSON without a space too many: a suite has eighty such files."""
    write_whole(file, json.dumps(record, separators=(",", ":")) + "\n")


def _addresses(members: Sequence[Component]) -> tuple[str, ...]:
    return tuple(map(str, members))


def _read(file: Path) -> Planted:
    page: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if page["unit"] == "groups":
        addresses = {
            (int(layer), place): str(Component.joint(Component.parse(f"L{layer}.N{number}") for number in group))
            for layer, groups in page["candidates"].items()
            for place, group in enumerate(groups)
        }
        page["candidates"] = addresses.values()
        page["carriers"] = [[addresses[layer, place] for layer, place in group] for group in page["carriers"]]
        page["distractors"] = [addresses[layer, place] for layer, place in page["distractors"]]
    lists = {key: tuple(page[key]) for key in ("distractors", "candidates", "others")}
    return Planted(
        **page
        | lists
        | {
            "carriers": tuple(tuple(group) for group in page["carriers"]),
            "checks": tuple(Check(**one) for one in page["checks"]),
        }
    )
