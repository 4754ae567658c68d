"""Where the specialized weights are read from, one tensor at a time, so that no second model need be in memory."""

from __future__ import annotations

import gc
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from weightpatch.architecture import layers_of, skeleton
from weightpatch.checkpoint import (
    Checkpoint,
    DeviceMap,
    apply_adapter,
    load,
    merge_adapter,
    read_adapter_config,
    read_config,
    weight_files,
)
from weightpatch.errors import CheckpointError

_MAPPED_BYTES = 2**25
"""How much is read of a file that is not kept open before it is opened anew: opening takes a millisecond or two."""
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Ways of beginning a LoRA adapter that leave the base's weights alone, as PiSSA, OLoRA and others do not."""


class Source(Protocol):
    """Gives a checkpoint's parameters by the names that they have in the model, tied ones by the first of them.

    Attributes:
        shapes: Name -> shape of everything it has.
        config: The checkpoint's own config; None for an adapter, which has its base's.
        generation_config: How the checkpoint wants to generate; None: as the base.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...  # noqa: D102

    @property
    def config(self) -> PreTrainedConfig | None: ...  # noqa: D102

    @property
    def generation_config(self) -> GenerationConfig | None: ...  # noqa: D102

    def tensor(self, name: str) -> Tensor:
        """One parameter in the dtype in which it is stored, on the CPU: maybe a view of the file, so never written."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class FileSource:
    """Reads mmapped safetensors: what is not converted to another dtype costs no memory but the file's cache.

    Attributes:
        places: Name of a parameter -> the open file that holds it, and its name there.
        shapes: As in `Source`.
        config: As in `Source`.
        generation_config: As in `Source`.
    """

    places: Mapping[str, tuple[Any, str]]
    shapes: Mapping[str, tuple[int, ...]]
    config: PreTrainedConfig | None
    generation_config: GenerationConfig | None

    def tensor(self, name: str) -> Tensor:
        """As in `Source`."""
        file, stored_name = self.places[name]
        found: Tensor = file.get_tensor(stored_name)
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterSource:
    """Reads the base's weights from its files and merges a PEFT adapter into one matrix at a time, by PEFT's own code.

    The base's files are read, not the base in memory, into which other weights may just be patched.

    Attributes:
        base: The files of the model that the adapter belongs to.
        dtype: In which the adapter is merged.
        changed: Names of parameters that the adapter adds to -> the PEFT layer that does, on a model without weights.
        replaced: Parameters that the adapter brings whole (PEFT's `modules_to_save`).
    """

    base: Source
    dtype: torch.dtype
    changed: Mapping[str, Any]
    replaced: Mapping[str, Tensor]
    config: None = field(default=None, init=False)
    generation_config: None = field(default=None, init=False)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As in `Source`."""
        return self.base.shapes

    def tensor(self, name: str) -> Tensor:
        """As in `Source`."""
        if name in self.replaced:
            return self.replaced[name]
        return self._merged(name) if name in self.changed else self.base.tensor(name)

    def _merged(self, name: str) -> Tensor:
        """The parameter after a merge of its layer alone; the layer is without weights again afterwards."""
        path, _, wanted = name.rpartition(".")
        adapted = self.changed[name]
        layer: nn.Module = adapted.get_base_layer()
        empty = dict(layer._parameters)
        try:
            for key, parameter in empty.items():
                if parameter is not None:
                    whole = self.base.tensor(f"{path}.{key}").to(self.dtype, copy=True)
                    layer._parameters[key] = nn.Parameter(whole, requires_grad=False)
            with torch.no_grad():
                adapted.merge(safe_merge=False)
            return layer.get_parameter(wanted).data
        finally:
            layer._parameters.update(empty)
            adapted.merged_adapters.clear()
            adapted._caches.clear()


def open_source(
    checkpoint: Checkpoint,
    *,
    base: Checkpoint,
    dtype: torch.dtype,
    device_map: DeviceMap | None = None,
    allow_pickle: bool = False,
    keep_open: bool = True,
    below: Source | None = None,
) -> Source:
    """Make a checkpoint's weights readable one at a time. To be called before the base is loaded.

    Safetensors whose tensors are the model's parameters by name and shape are read as they lie on disk, and LoRA
    adapters (rsLoRA, DoRA, `modules_to_save`) are merged matrix by matrix over such a base. Everything else is
    converted once: loaded whole by transformers, written to a temporary folder by the model's own names in `dtype`
    (room for the whole model is needed there; `TMPDIR` says where it is), let go, and read from there; the folder goes
    with the source. That is so for checkpoints whose tensors transformers fuses on loading (experts kept one by
    one), for quantized and pickled ones, for adapters of other kinds or on tied embeddings or over such a base, and
    for GGUF, whose tensors transformers can dequantize and permute by its internal functions only, all at once.

    Args:
        checkpoint: The specialized checkpoint.
        base: The base, which an adapter is merged into.
        dtype: The dtype that the weights will be wanted in.
        device_map: As in transformers, for a conversion.
        allow_pickle: Read pickled weights too.
        keep_open: Keep the files mapped; otherwise they are opened anew every 32 MiB, and what was read leaves memory.
        below: The base's own source, where it is open already: an adapter is then merged matrix by matrix over any
            base, as it is already in `dtype`.

    Raises:
        CheckpointError: damaged or incomplete, or an adapter that does not fit.
    """
    found: Source | None = None
    if checkpoint.kind == "model":
        found = _open_files(checkpoint, allow_pickle=allow_pickle, keep_open=keep_open)
    elif checkpoint.kind == "adapter":
        found = _open_adapter(checkpoint, base, below, dtype=dtype, allow_pickle=allow_pickle)
    if found is not None:
        return found
    if checkpoint.kind == "adapter":
        return _convert(
            merge_adapter(
                checkpoint,
                load(base, dtype=dtype, device_map=device_map, allow_pickle=allow_pickle),
                allow_pickle=allow_pickle,
            )
        )
    return _convert(load(checkpoint, dtype=dtype, device_map=device_map, allow_pickle=allow_pickle))


def open_beside(
    checkpoint: Checkpoint,
    *,
    base: Checkpoint,
    dtype: torch.dtype,
    device_map: DeviceMap | None = None,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, Source]:
    """Load the base, and make a checkpoint's weights readable one at a time; arguments and errors as `open_source`.

    A source may need a whole model's memory for a while, so it is opened before the base is loaded; but an adapter over
    a GGUF file after it, as reading such a file takes longer than all else, and once is enough.
    """
    how: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "allow_pickle": allow_pickle}
    if checkpoint.kind == "adapter" and base.kind == "gguf":
        model = load(base, **how)
        return model, open_source(checkpoint, base=base, below=_convert(model), **how)
    source = open_source(checkpoint, base=base, **how)
    return load(base, **how), source


def _open_files(checkpoint: Checkpoint, *, allow_pickle: bool, keep_open: bool = True) -> FileSource | None:
    """Read a checkpoint where it lies; None where its tensors are not simply the model's parameters."""
    files = weight_files(checkpoint, allow_pickle=allow_pickle)
    config = read_config(checkpoint)
    if any(file.suffix != ".safetensors" for file in files) or hasattr(config, "quantization_config"):
        return None
    bare = skeleton(config)
    stored: dict[str, tuple[Any, str]] = {}
    opened = [_open(file) for file in files]
    for file in opened:
        for stored_name, name in _names_in_model(bare, list(file.keys())):
            if name in stored:
                return None
            stored[name] = (file, stored_name)
    shapes = {name: tuple(parameter.shape) for name, parameter in bare.named_parameters()}
    for name, shape in shapes.items():
        if name not in stored or tuple(stored[name][0].get_slice(stored[name][1]).get_shape()) != shape:
            return None
    places = {name: stored[name] for name in shapes}
    ignored = bare._keys_to_ignore_on_load_unexpected or ()
    aliases = _first_names(bare)
    for extra in stored.keys() - places.keys():
        if any(re.search(pattern, extra) for pattern in ignored):
            continue
        twin, own = places.get(aliases.get(extra, "")), stored[extra]
        if twin is None or not torch.equal(twin[0].get_tensor(twin[1]), own[0].get_tensor(own[1])):
            return None  # transformers knows what to do with it, or refuses it
    if not keep_open:
        anew = {id(handle): _Reopened(file) for handle, file in zip(opened, files, strict=True)}
        places = {name: (anew[id(handle)], stored_name) for name, (handle, stored_name) in places.items()}
    return FileSource(
        places=places, shapes=shapes, config=config, generation_config=_generation_config(checkpoint.path)
    )


@dataclass
class _Reopened:
    """A safetensors file that is mapped anew whenever so much of it was read; a mapping goes with its last tensor."""

    file: Path
    _opened: Any = None
    _n_bytes: int = 0

    def get_tensor(self, name: str) -> Tensor:
        if self._opened is None:
            self._opened = _open(self.file)
        found: Tensor = self._opened.get_tensor(name)
        self._n_bytes += found.nbytes
        if self._n_bytes >= _MAPPED_BYTES:
            self._opened, self._n_bytes = None, 0
        return found


def _open(file: Path) -> Any:
    return safe_open(file, framework="pt")


def _names_in_model(model: PreTrainedModel, stored: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names in a file, each with its name in the model as far as transformers only renames it; else with itself."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # they are not promised; without them, what is renamed is converted
        yield from ((name, name) for name in stored)
        return
    known = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    for name in stored:
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        yield name, renamed if converter is None and renamed in known else name


def _first_names(model: PreTrainedModel) -> dict[str, str]:
    """Every name of a parameter -> the first of its names: tied parameters have several."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def _generation_config(folder: Path) -> GenerationConfig:
    """What transformers would take from the folder."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def _open_adapter(
    checkpoint: Checkpoint, base: Checkpoint, below: Source | None, *, dtype: torch.dtype, allow_pickle: bool
) -> AdapterSource | None:
    """Read an adapter over its base's files; None where matrices cannot be merged one by one."""
    options = read_adapter_config(checkpoint)
    if below is None and base.kind == "model":
        below = _open_files(base, allow_pickle=allow_pickle)
    if below is None or options.get("peft_type") != "LORA" or options.get("init_lora_weights") not in _PLAIN_INITS:
        return None
    bare = _hollow(read_config(base), dtype)
    empty = tuple(bare.parameters())
    first_names = _first_names(bare)
    try:
        apply_adapter(checkpoint, bare, allow_pickle=allow_pickle)
    except CheckpointError:
        return None  # weights that it would write into the base, or a fault, which a whole base then shows
    touched = _touched(bare)
    names = {*touched[0], *touched[1]} if touched else set()
    n_names = [list(first_names.values()).count(name) for name in names]
    if touched is None or any(count != 1 for count in n_names) or any(any(one.stride()) for one in empty):
        return None
    return AdapterSource(base=below, dtype=dtype, changed=touched[0], replaced=touched[1])


def _hollow(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose parameters have shape, dtype and device, but one number of memory each: writing into them fails."""
    model = skeleton(config)
    hollow = {
        id(parameter): nn.Parameter(torch.zeros((), dtype=dtype).expand(parameter.shape), requires_grad=False)
        for parameter in model.parameters()
    }
    for module, key, parameter, _ in list(slots(model)):
        module._parameters[key] = hollow[id(parameter)]
    return model


def slots(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter, str]]:
    """Every place that a parameter is kept at: the module, its name there, the parameter, its full name."""
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield module, key, parameter, f"{path}.{key}" if path else key


def _touched(adapted: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What an adapter changes and what it replaces, by name; None where a layer is not one that is known here."""
    from peft.tuners.lora.layer import Embedding, Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    changed: dict[str, Any] = {}
    replaced: dict[str, Tensor] = {}
    for path, module in adapted.named_modules():
        if type(module) in (Linear, Embedding):
            if any(not type(variant).__name__.startswith("Dora") for variant in module.lora_variant.values()):
                return None
            changed[f"{path}.weight"] = module
            if any(module.lora_bias.values()):
                changed[f"{path}.bias"] = module
        elif isinstance(module, ModulesToSaveWrapper):
            if len(module.active_adapters) != 1:
                return None
            whole = module.modules_to_save[module.active_adapters[0]]
            if any(isinstance(part, BaseTunerLayer) for part in whole.modules()):
                return None
            replaced |= {f"{path}.{name}": parameter.detach() for name, parameter in whole.named_parameters()}
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return None
    return changed, replaced


def _convert(whole: PreTrainedModel) -> FileSource:
    """Write a model to a temporary folder, one file to a layer, to be read from there. The folder goes with the source.

    Unless the caller holds another reference to the model, it is let go here.
    """
    folder = Path(tempfile.mkdtemp(prefix="weightpatch-"))
    try:
        named = dict(whole.named_parameters())
        files = []
        for number, names in enumerate(_by_layer(whole, list(named))):
            files.append(folder / f"{number:05d}.safetensors")
            tensors = {name: named[name].detach().cpu() for name in names}
            save_file({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
                      files[-1])  # fmt: skip
        source = FileSource(
            places={name: (file, name) for file in map(_open, files) for name in file.keys()},  # noqa: SIM118
            shapes={name: tuple(parameter.shape) for name, parameter in named.items()},
            config=whole.config,
            generation_config=whole.generation_config,
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(source, shutil.rmtree, folder, ignore_errors=True)
    del named, whole
    gc.collect()
    return source


def _by_layer(model: PreTrainedModel, names: Sequence[str]) -> list[list[str]]:
    """Names in runs of one layer each, and of what lies before and behind the layers."""
    layers = layers_of(model)
    prefix = next(path for path, module in model.named_modules() if module is layers)

    def layer(name: str) -> str:
        return name.removeprefix(f"{prefix}.").partition(".")[0] if name.startswith(f"{prefix}.") else ""

    return [list(run) for _, run in groupby(names, key=layer)]
