"""Single layers of a model, called by hand on packed rows: whole, only their attention, or all but their attention.

Layers run as transformers wrote them. Where a sublayer's write is known, a stub that gives it stands in the module's
place for one call, so that norms, multipliers, parallel branches and residual additions stay the layer's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from weightpatch.architecture import Family, family_of, layers_of
from weightpatch.errors import ArchitectureError
from weightpatch.packed.blocks import Blocks, attending, blocks_of
from weightpatch.packed.packing import Packing
from weightpatch.residuals import walk

Weights = Mapping[str, Tensor]
"""Parameters that stand in for a layer's own, by their names within the layer."""

Edits = Mapping[str, Callable[[nn.Module, Tensor, Any], Any]]
"""Path of a module (`""`: the layer) -> gives, from the module, its input and its output, what stands for this."""


class Done(Exception):
    """All that was wanted of a layer has been seen."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """What a layer did at the readout positions, and what leaves it; shapes `(row, read, feature)`.

    Attributes:
        heads_in: Input of `o`: what the heads gathered, side by side.
        attention: What the attention writes, before a norm behind it.
        neurons_in: Input of the last module of the MLP: activations of a plain one's neurons.
        mlp: What the MLP writes, likewise.
        leaving: Residual stream that leaves the layer, at all tokens unless only these positions were asked for.
    """

    heads_in: Tensor
    attention: Tensor
    neurons_in: Tensor
    mlp: Tensor
    leaving: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerCall:
    """A layer with everything it is called with beside the residual stream, for packed rows.

    Attributes:
        layer: The module.
        family: Its row of the architecture table.
        kwargs: What the model hands to it.
        implementation: Name of the model's attention implementation.
        blocks: Its attention mask, cut into blocks.
        reads: Where the row is read at the anchor, shape `(read,)`.
        read_blocks: The blocks of these queries alone.
        n_outputs: How many things the attention module returns as a tuple; 0: its write alone, as it is.
    """

    layer: nn.Module
    family: Family
    kwargs: dict[str, Any]
    implementation: str
    blocks: Blocks
    reads: Tensor
    read_blocks: Blocks
    n_outputs: int

    def __call__(self, residual: Tensor, weights: Weights | None = None) -> Tensor:
        """What leaves the layer, with some weights replaced; shapes `(row, token, feature)`."""
        return self._run(residual, weights or {})

    def alone(self, residual: Tensor, weights: Weights, *, attention: Tensor | None, mlp: Tensor | None) -> Tensor:
        """What the given writes add to the residual stream, behind norms and multipliers: `(row, token, feature)`.

        Args:
            residual: Says where they are added: any tensor of this shape and device.
            weights: Parameters that stand in for the layer's own.
            attention: What the attention writes; None: nothing.
            mlp: What the MLP writes; None: nothing.
        """
        nothing = torch.zeros_like(residual)
        return self.finish(
            nothing,
            weights,
            attention=nothing if attention is None else attention,
            mlp=nothing if mlp is None else mlp,
        )

    def last(self, residual: Tensor) -> Tensor:
        """What leaves the layer at the readout positions: `(row, token, feature)` -> `(row, read, feature)`."""
        return self.finish(self.at_reads(residual), {}, attention=self.attend_at_reads(residual)[1])

    def attend_at_reads(self, residual: Tensor, edits: Edits | None = None) -> tuple[Tensor, Tensor]:
        """What the heads gather and what the attention writes, at the readout positions: each `(row, read, feature)`.

        Args:
            residual: Residual stream entering the layer, shape `(row, token, feature)`.
            edits: Modules before `o` whose output is another one.
        """
        stubs: dict[str, nn.Module] = {self.family.o: _AtReads(self.layer.get_submodule(self.family.o), self.reads)}
        if self.family.q != self.family.k and self.family.q not in (edits or {}):
            stubs[self.family.q] = _AtReads(self.layer.get_submodule(self.family.q), self.reads, spread=True)
        with _standing_in(self.layer, stubs):
            paths = self.family.o, self.family.attn
            seen = self.watch(residual, {}, *paths, stop=True, blocks=self.read_blocks, edits=edits)
        return self.at_reads(seen[self.family.o][0]), seen[self.family.attn][1]

    def mlp_behind(self, residual: Tensor, attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input of the last module of the MLP, what it writes, and what leaves the layer, once attention has written.

        Args:
            residual: Residual stream entering the layer, shape `(row, token, feature)`, at any tokens.
            attention: What the attention writes there, same shape.
        """
        path = self.mlp_path
        with self._attention_done({}, attention, None):
            seen = self.watch(residual, {}, path)
        inputs, write = (tensor.reshape(*residual.shape[:2], -1) for tensor in seen[path])
        return inputs, write, seen[""][1]

    def parts(self, residual: Tensor, weights: Weights, *, last: bool = False, edits: Edits | None = None) -> Parts:
        """Call the layer and keep what it did at the readout positions.

        Args:
            residual: Residual stream entering the layer, shape `(row, token, feature)`.
            weights: Parameters that stand in for the layer's own.
            last: Only the readout positions of what leaves it are wanted.
            edits: Modules whose output is another one.
        """
        mlp = self.mlp_path
        if last and not weights and not edits:
            heads_in, attention = self.attend_at_reads(residual)
            inputs, write, leaving = self.mlp_behind(self.at_reads(residual), attention)
            return Parts(heads_in=heads_in, attention=attention, neurons_in=inputs, mlp=write, leaving=leaving)
        found = self.parts_of(self.watch(residual, weights, self.family.o, mlp, edits=edits))
        return replace(found, leaving=self.at_reads(found.leaving)) if last else found

    def parts_of(self, seen: Mapping[str, tuple[Tensor, Tensor]]) -> Parts:
        """What `watch` saw of `o`, of `mlp_path` and of the whole layer, at the readout positions."""
        rows = (*seen[""][0].shape[:2], -1)
        heads_in, attention = (self.at_reads(tensor) for tensor in seen[self.family.o])
        inputs, write = (self.at_reads(tensor.reshape(rows)) for tensor in seen[self.mlp_path])
        return Parts(heads_in=heads_in, attention=attention, neurons_in=inputs, mlp=write, leaving=seen[""][1])

    @cached_property
    def mlp_path(self) -> str:
        """The module whose output is the MLP's write: the one that neurons own a column of, if it is a plain MLP."""
        plain = any(path == self.family.mlp_out for path, _ in self.layer.named_modules())
        return self.family.mlp_out if plain else self.family.mlp[-1]

    def at_reads(self, rows: Tensor) -> Tensor:
        """Rows at the readout positions: `(row, token, feature)` -> `(row, read, feature)`."""
        return rows.index_select(1, self.reads.to(rows.device))

    def attend(self, residual: Tensor, weights: Weights, *, only_reads: bool = False) -> Tensor:
        """What the attention writes, shape `(row, token, feature)`, with some weights replaced.

        Args:
            residual: Residual stream entering the layer, same shape.
            weights: Parameters that stand in for the layer's own.
            only_reads: Work on the queries at the readout positions only; elsewhere the result means nothing.
        """
        path = self.family.attn
        blocks = self.read_blocks if only_reads else self.blocks
        return self.watch(residual, weights, path, stop=True, blocks=blocks)[path][1]

    def finish(self, residual: Tensor, weights: Weights, *, attention: Tensor, mlp: Tensor | None = None) -> Tensor:
        """What leaves the layer once its attention has written.

        Args:
            residual: Residual stream entering the layer, shape `(row, token, feature)`, at any tokens.
            weights: Parameters that stand in for the layer's own; those of stubbed modules have no effect.
            attention: What the attention writes, same shape.
            mlp: What the MLP writes; None: let it work.
        """
        with self._attention_done(weights, attention, mlp) as kept:
            return self._run(residual, kept)

    def finish_at(self, path: str, residual: Tensor, weights: Weights, *, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output of a module behind the attention, once that has written. Arguments as in `finish`."""
        with self._attention_done(weights, attention, None) as kept:
            return self.watch(residual, kept, path, stop=True)[path]

    @contextmanager
    def _attention_done(self, weights: Weights, attention: Tensor, mlp: Tensor | None) -> Iterator[dict[str, Tensor]]:
        """Let stubs give the known writes, for as long as the block lasts; yields the weights that still count."""
        stubs: dict[str, nn.Module] = {self.family.attn: _Given(attention, n_outputs=self.n_outputs)}
        if mlp is not None:
            stubs |= dict.fromkeys(self.family.mlp[:-1], nn.Identity())
            stubs[self.family.mlp[-1]] = _Given(mlp, n_outputs=0)
        kept = {name: tensor for name, tensor in weights.items() if not name.startswith(tuple(f"{p}." for p in stubs))}
        with _standing_in(self.layer, stubs):
            yield kept

    def watch(
        self,
        residual: Tensor,
        weights: Weights,
        *paths: str,
        stop: bool = False,
        copies: bool = False,
        blocks: Blocks | None = None,
        edits: Edits | None = None,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Call the layer and note input and output of some of its modules (`""`: the layer's own).

        Args:
            residual: Residual stream entering the layer, shape `(row, token, feature)`.
            weights: Parameters that stand in for the layer's own.
            paths: Modules of the layer.
            stop: Stop at the last of them.
            copies: Hand copies of their outputs on, so that nothing behind them changes what is noted.
            blocks: What queries the attention works on.
            edits: Modules whose output is another one; noted is what stands for it.
        """
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        with ExitStack() as hooks, _edited(self.layer, edits or {}):
            for path in paths:

                def note(_module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> Any:
                    entering = args[0] if args else kwargs.get("hidden_states")
                    found, *others = output if isinstance(output, tuple) else (output,)
                    seen[path] = (entering, found)
                    if stop and len(seen) == len(paths):
                        raise Done
                    if not copies:
                        return None
                    return (found.clone(), *others) if isinstance(output, tuple) else found.clone()

                module = self.layer.get_submodule(path)
                hooks.callback(module.register_forward_hook(note, with_kwargs=True).remove)
            with suppress(Done):
                seen[""] = (residual, self._run(residual, weights, blocks))
        return seen

    def _run(self, residual: Tensor, weights: Weights, blocks: Blocks | None = None) -> Tensor:
        attention = self.layer.get_submodule(self.family.attn)
        with ExitStack() as stack:
            if not isinstance(attention, _Given):
                stack.enter_context(attending(_config(attention), self.implementation, blocks or self.blocks))
            if weights:
                output = functional_call(self.layer, dict(weights), (residual,), self.kwargs)
            else:
                output = self.layer(residual, **self.kwargs)
        leaving: Tensor = output[0] if isinstance(output, tuple) else output
        return leaving


def _config(attention: nn.Module) -> Any:
    config = getattr(attention, "config", None)
    if config is None:
        raise ArchitectureError(f"{type(attention).__name__} keeps no config, so its attention cannot be chosen.")
    return config


class _Given(nn.Module):
    """A stub that gives a known write."""

    def __init__(self, write: Tensor, *, n_outputs: int) -> None:
        super().__init__()
        self.write = write
        self.n_outputs = n_outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The write in the leading shape of what the module was asked."""
        asked: Tensor = args[0] if args else kwargs["hidden_states"]
        write = self.write.reshape(*asked.shape[:-1], self.write.shape[-1])
        return (write, *[None] * (self.n_outputs - 1)) if self.n_outputs else write


class _AtReads(nn.Module):
    """A projection that works at the readout positions only; with `spread`, its outputs stay where they belong."""

    def __init__(self, projection: nn.Module, reads: Tensor, *, spread: bool = False) -> None:
        super().__init__()
        self.projection = projection
        self.reads = reads
        self.spread = spread

    def forward(self, rows: Tensor) -> Tensor:
        """Shapes `(row, token, feature)` -> `(row, read, output)`; with `spread`, `(row, token, output)`, else 0."""
        reads = self.reads.to(rows.device)
        found: Tensor = self.projection(rows.index_select(1, reads))
        if not self.spread:
            return found
        whole = found.new_zeros((*rows.shape[:-1], found.shape[-1]))
        return whole.index_copy_(1, reads, found)


@contextmanager
def _edited(layer: nn.Module, edits: Edits) -> Iterator[None]:
    """Let modules put out something else, for as long as the block lasts."""
    with ExitStack() as hooks:
        for path, edit in edits.items():
            module = layer.get_submodule(path)
            hooks.callback(module.register_forward_hook(_once(edit), with_kwargs=True).remove)
        yield


def _once(edit: Callable[[nn.Module, Tensor, Any], Any]) -> Callable[..., Any]:
    """A hook that leaves alone what the edit itself gets from its module."""
    is_busy = False

    def change(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        nonlocal is_busy
        if is_busy:
            return output
        is_busy = True
        try:
            return edit(module, args[0] if args else kwargs["hidden_states"], output)
        finally:
            is_busy = False

    return change


@contextmanager
def _standing_in(layer: nn.Module, stubs: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the place of some, for as long as the block lasts."""
    found = {path: layer.get_submodule(path) for path in stubs}
    try:
        for path, stub in stubs.items():
            _place(layer, path, stub)
        yield
    finally:
        for path, module in found.items():
            _place(layer, path, module)


def _place(layer: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    layer.get_submodule(parent)._modules[name] = module


def record(
    model: PreTrainedModel, tokens: Tensor, packing: Packing, last: int, reads: Tensor
) -> tuple[tuple[LayerCall, ...], Tensor]:
    """The calls of a model's layers below `last`, and the residual stream that enters layer 0, all for a packed row.

    What a layer is handed beside the residual stream depends on positions alone (`proof` would find a model where it
    does not), so it is recorded on the longest prompt only.

    Args:
        model: A model whose family has a row in the architecture table.
        tokens: The prompts, right-padded, shape `(prompt, token)`.
        packing: How they lie in the packed row.
        last: The anchor's layer.
        reads: Where the row is read, shape `(read,)`.

    Returns:
        One call to a layer, and the residual, shape `(1, packed token, feature)`.

    Raises:
        ArchitectureError: an attention implementation that takes no mask of our making, or positions that are encoded
            otherwise in long prompts than in short ones.
    """
    _check_positions(model, tokens.shape[1])
    family = family_of(model.config)
    implementation = model.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise ArchitectureError(
            f"the suffix engine works with eager and sdpa attention; this model was loaded with {implementation}. "
            'Load it with attn_implementation="sdpa", or use engine="swap".'
        )
    layers = layers_of(model)
    n_outputs: dict[int, int] = {}
    found: dict[int, LayerCall] = {}
    start: list[Tensor] = []
    masks: dict[int | None, tuple[Tensor, Blocks, Blocks]] = {}

    def see(number: int, residual: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if number == last:
            return
        named = _by_name(layers[number], residual, args, kwargs)
        mask = named.pop("attention_mask", None)
        key = None if mask is None else id(mask)
        if key not in masks:
            if mask is None:
                folded = packing.sees.to(residual.device)[None, None]
                if implementation == "eager":
                    hidden = torch.finfo(residual.dtype).min
                    folded = torch.zeros_like(folded, dtype=residual.dtype).masked_fill(~folded, hidden)
            else:
                folded = packing.fold(mask)
            masks[key] = (folded, blocks_of(folded), blocks_of(folded, reads))
        folded, blocks, read_blocks = masks[key]
        found[number] = LayerCall(
            layer=layers[number],
            family=family,
            kwargs={name: packing.fold(value) for name, value in named.items()} | {"attention_mask": folded},
            implementation=implementation,
            blocks=blocks,
            reads=reads,
            read_blocks=read_blocks,
            n_outputs=0,
        )

    with ExitStack() as hooks:
        for number in range(last):

            def count(_module: nn.Module, _args: Any, output: Any, number: int = number) -> None:
                n_outputs[number] = len(output) if isinstance(output, tuple) else 0

            hooks.callback(layers[number].get_submodule(family.attn).register_forward_hook(count).remove)
        longest = max(range(len(packing.paths)), key=lambda place: len(packing.paths[place]))
        walk(model, tokens[longest : longest + 1], last, see)
    walk(model, tokens, 0, lambda _number, residual, _args, _kwargs: start.append(packing.fold(residual)))
    return tuple(replace(found[number], n_outputs=n_outputs[number]) for number in range(last)), start[0]


def _check_positions(model: PreTrainedModel, longest: int) -> None:
    """Raise where the length of the longest prompt of a row decides how positions are encoded in all of them."""
    config = model.config
    scalings = getattr(config, "rope_parameters", None) or {}
    kinds = [scalings, *(kind for kind in scalings.values() if isinstance(kind, dict))]
    for kind in kinds:
        limit = (
            kind.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None) or longest
        )
        if kind.get("rope_type") in ("longrope", "dynamic") and longest > int(limit):
            raise ArchitectureError(
                f"a prompt has {longest} tokens, and beyond {limit} this model ({kind['rope_type']}) encodes positions "
                'by the length of the prompt, so that prompts cannot be packed. Shorten it, or use engine="swap".'
            )


def _by_name(layer: nn.Module, residual: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a layer is called with beside the residual stream, all by name."""
    signature = inspect.signature(layer.forward)
    bound = signature.bind(residual, *args, **kwargs).arguments
    named: dict[str, Any] = {}
    for place, (name, value) in enumerate(bound.items()):
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        elif place > 0:
            named[name] = value
    if "attention_mask" not in signature.parameters:
        raise ArchitectureError(f'{type(layer).__name__} takes no attention_mask. Use engine="swap".')
    return named
