"""A specialized model whose weights are not in memory: each layer's are there only while it runs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weightpatch.architecture import layers_of
from weightpatch.errors import CheckpointError
from weightpatch.sources import Source, slots

PIECE = 1 << 18
"""Most numbers that `pieces` gives at once."""

_KEPT_AS = "weightpatch_stream"


def streamed(base: PreTrainedModel, source: Source) -> PreTrainedModel:
    """A model like the base with the weights of a source, which are read when they are needed.

    It can be called like any other. Its parameters rest on the meta device (that of the token embedding is real but NaN
    in all places, so that `model.device` holds). While a decoder layer runs, that layer's parameters are real; so are
    those of a module outside the layers (norm, head) while it runs, and of the token embedding those rows that
    are looked up. Beyond that the last layer asked for stays readable in memory, for `weight`. Buffers, hooks, mode
    and attention implementation are the base's. For generation, or to write into it, see `materialized`.

    Args:
        base: A model in memory, of the same architecture; its parameters say which dtype and device the others get.
        source: Has all of the base's parameters, in the same shapes.
    """
    embedding = base.get_input_embeddings().weight
    memo: dict[int, Any] = {id(one): _resting(one, stays=one is embedding) for one in base.parameters()}
    if source.config is not None:
        config = copy.deepcopy(source.config)
        config._attn_implementation = base.config._attn_implementation
        config.dtype = base.config.dtype
        memo[id(base.config)] = config
    model = copy.deepcopy(base, memo)
    model.train(False)
    if source.generation_config is not None:
        model.generation_config = source.generation_config
    vars(model)[_KEPT_AS] = _Stream(model, base, source)
    vars(model)["__deepcopy__"] = _refuse_copy
    return model


def _resting(parameter: nn.Parameter, *, stays: bool) -> nn.Parameter:
    """What stands for a parameter that is not in memory."""
    if stays:
        nothing = torch.full((), float("nan"), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
    else:
        nothing = torch.empty_like(parameter, device="meta")
    return nn.Parameter(nothing, requires_grad=False)


def is_streamed(model: nn.Module) -> bool:
    """Whether the weights of a model are read when needed. A model in memory is not, nor is one kept by `keep`."""
    stream = _stream(model)
    return stream is not None and not stream.is_kept


def weight(model: PreTrainedModel, name: str) -> Tensor:
    """One parameter by its full name, in the model's dtype and on its device; not to be written.

    Of a streamed model, the parameters of the decoder layer asked for last are kept until another is asked for or run.

    Raises:
        AttributeError: there is none of this name.
    """
    stream = _stream(model)
    if stream is None or stream.is_materialized:
        return model.get_parameter(name).detach()
    return stream.weight(name)


def pieces(model: PreTrainedModel, name: str) -> Iterator[Tensor]:
    """One parameter, in flat pieces of at most `PIECE` numbers, so that even an embedding never is in memory whole."""
    stream = _stream(model)
    if stream is None or stream.is_materialized:
        yield from _split(model.get_parameter(name).detach())
    else:
        yield from stream.pieces(name)


@contextmanager
def materialized(model: nn.Module) -> Iterator[None]:
    """Hold all weights of a streamed model in memory as long as the block lasts, as generation needs it.

    They can be written: changes last until the outermost block ends. Does nothing to other models.
    """
    stream = _stream(model)
    if stream is None:
        yield
        return
    with stream.materialized():
        yield


def keep(model: nn.Module) -> None:
    """Load all weights of a streamed model for good. Does nothing to other models."""
    stream = _stream(model)
    if stream is not None and not stream.is_kept:
        stream.keep()
        del vars(model)["__deepcopy__"]


def _refuse_copy(_memo: dict[int, Any]) -> nn.Module:
    """A copy's modules would go on calling the original's."""
    raise CheckpointError(
        "this model's weights are streamed, so it cannot be copied. Load the checkpoint with transformers instead."
    )


def _split(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.reshape(-1), PIECE)


def _stream(model: nn.Module) -> _Stream | None:
    found: _Stream | None = vars(model).get(_KEPT_AS)
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Slot:
    """A place for a parameter, which may be tied to others: then they have the same name."""

    module: nn.Module
    key: str
    name: str
    resting: nn.Parameter

    @property
    def is_empty(self) -> bool:
        """Whether nothing was put in, neither by us nor by somebody else (`functional_call`)."""
        return self.module._parameters[self.key] is self.resting

    def put(self, parameter: nn.Parameter) -> None:
        self.module._parameters[self.key] = parameter


@contextmanager
def _filled(members: Iterable[_Slot], read: Callable[[str], Tensor]) -> Iterator[None]:
    """Put parameters in for a while, tied ones only once; what is not empty stays as it is."""
    put: list[tuple[_Slot, nn.Parameter]] = []
    found: dict[str, nn.Parameter] = {}
    try:
        for slot in members:
            if slot.is_empty:
                if slot.name not in found:
                    found[slot.name] = nn.Parameter(read(slot.name), requires_grad=False)
                slot.put(found[slot.name])
                put.append((slot, found[slot.name]))
        yield
    finally:
        for slot, parameter in put:
            if slot.module._parameters[slot.key] is parameter:
                slot.put(slot.resting)


class _Stream:
    """What a streamed model reads from, and what it has in memory.

    A module's `forward` is wrapped rather than hooked: a hook that ends a forward pass at a layer (`residuals.walk`)
    then does so before that layer's weights are read, and an exception inside a layer takes them out like its end.
    """

    def __init__(self, model: PreTrainedModel, base: PreTrainedModel, source: Source) -> None:
        self._source = source
        self._like = {name: (one.device, one.dtype) for name, one in base.named_parameters()}
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        self._slots = [
            _Slot(module=module, key=key, name=first[id(parameter)], resting=parameter)
            for module, key, parameter, _ in slots(model)
        ]
        self._names = {full: first[id(parameter)] for _, _, parameter, full in slots(model)}
        self._layer_of: dict[str, nn.Module] = {}
        self._held_layer: nn.Module | None = None
        self._held: dict[str, Tensor] = {}
        self._depth = 0
        self._wrapped: list[tuple[nn.Module, Any]] = []
        self.is_kept = False
        self._wrap_all(model)

    @property
    def is_materialized(self) -> bool:
        return self._depth > 0

    def weight(self, name: str) -> Tensor:
        if name not in self._names:
            raise AttributeError(f"the model has no parameter {name!r}")
        return self._read_held(self._names[name])

    def pieces(self, name: str) -> Iterator[Tensor]:
        self._let_go()
        device, dtype = self._like[self._names[name]]
        for piece in _split(self._source.tensor(self._names[name])):
            yield piece.to(device, dtype)

    @contextmanager
    def materialized(self) -> Iterator[None]:
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        self._let_go()
        with _filled(self._slots, functools.partial(self._read, fresh=True)):
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def keep(self) -> None:
        context = self.materialized()
        context.__enter__()
        self._kept = context  # left open
        self.is_kept = True
        for module, forward in self._wrapped:
            vars(module).pop("forward")
            if forward is not None:
                vars(module)["forward"] = forward

    def _read(self, name: str, *, fresh: bool = False) -> Tensor:
        device, dtype = self._like[name]
        found = self._source.tensor(name).to(device, dtype, copy=fresh)
        # A matrix product's last bits can depend on where a matrix begins: let it begin as in a model in memory.
        return found if found.data_ptr() % 64 == 0 else found.clone()

    def _read_held(self, name: str) -> Tensor:
        """A parameter; if it is of a layer, it stays in memory until one of another layer is read."""
        layer = self._layer_of.get(name)
        if layer is None:
            return self._read(name)
        if layer is not self._held_layer:
            self._let_go()
            self._held_layer = layer
        if name not in self._held:
            self._held[name] = self._read(name)
        return self._held[name]

    def _let_go(self) -> None:
        self._held_layer = None
        self._held.clear()

    def _wrap_all(self, model: PreTrainedModel) -> None:
        by_module: dict[int, list[_Slot]] = {}
        for slot in self._slots:
            by_module.setdefault(id(slot.module), []).append(slot)
        done: set[int] = set()

        def members(module: nn.Module) -> list[_Slot]:
            """Those below a module that are not a wrapped module's yet."""
            own = [part for part in module.modules() if id(part) not in done]
            done.update(id(part) for part in own)
            return [slot for part in own for slot in by_module.get(id(part), ())]

        for layer in layers_of(model):
            found = members(layer)
            self._layer_of |= {slot.name: layer for slot in found}
            self._wrap(layer, found)
        embedding = model.get_input_embeddings()
        self._wrap_embedding(embedding, *members(embedding))
        for module in model.modules():
            if id(module) in by_module and id(module) not in done:
                self._wrap(module, members(module))

    def _wrap(self, module: nn.Module, members: list[_Slot]) -> None:
        forward = module.forward

        @functools.wraps(forward)
        def with_weights(*args: Any, **kwargs: Any) -> Any:
            with _filled(members, self._read_held):
                return forward(*args, **kwargs)

        self._replace_forward(module, with_weights)

    def _wrap_embedding(self, module: nn.Module, slot: _Slot) -> None:
        """Read the rows of the looked-up tokens only: the whole table may be larger than many layers."""
        forward = module.forward
        vars(module)["padding_idx"] = None  # of use to training only, and not a row of the smaller table

        @functools.wraps(forward)
        def with_rows(ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not slot.is_empty:
                return forward(ids, *args, **kwargs)
            known, places = torch.unique(ids, return_inverse=True)
            table = self._source.tensor(slot.name)
            device, dtype = self._like[slot.name]
            rows = table.index_select(0, known.to(table.device)).to(device, dtype)
            with _filled([slot], lambda _: rows):
                return forward(places, *args, **kwargs)

        self._replace_forward(module, with_rows)

    def _replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._wrapped.append((module, vars(module).get("forward")))
        vars(module)["forward"] = forward
