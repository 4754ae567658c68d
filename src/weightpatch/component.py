"""Addresses, the components they name, and the slices of tensors that each component owns.

The address is the whole notation: `L5` block, `L5.attn`, `L5.H3` head, `L5.H3.q`, `L5.H3.o`, `L5.KV1` key/value group,
`L5.mlp`, `L5.N812` neuron, `L5.norm.attn`, `L5.norm.mlp`, `L5.attn.rest`, `L5.mlp.rest`, `embed`, `norm`, `unembed`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from weightpatch.architecture import Architecture
from weightpatch.errors import ComponentError

UNITS: tuple[str, ...] = (
    "blocks", "attns", "mlps", "heads", "heads.q", "heads.o", "kvs", "neurons", "norms", "rests", "ends",
)  # fmt: skip
"""Kinds of components. `rests`: what no head, group or neuron of a layer owns; `ends`: embed, norm, unembed."""

LEVELS: tuple[str, ...] = ("blocks", "modules", "heads", "neurons")
"""Partitions of all parameters, coarse to fine."""

_PART_OF: dict[str, str] = {
    "attns": "blocks", "mlps": "blocks", "norms": "blocks", "rests": "blocks", "heads": "attns", "kvs": "attns",
    "heads.q": "heads", "heads.o": "heads", "neurons": "mlps",
}  # fmt: skip

_FORMS: tuple[tuple[str, str], ...] = (
    ("blocks", r"L(0|[1-9][0-9]*)"),
    ("attns", r"L(0|[1-9][0-9]*)\.attn"),
    ("mlps", r"L(0|[1-9][0-9]*)\.mlp"),
    ("heads", r"L(0|[1-9][0-9]*)\.H(0|[1-9][0-9]*)"),
    ("heads.q", r"L(0|[1-9][0-9]*)\.H(0|[1-9][0-9]*)\.q"),
    ("heads.o", r"L(0|[1-9][0-9]*)\.H(0|[1-9][0-9]*)\.o"),
    ("kvs", r"L(0|[1-9][0-9]*)\.KV(0|[1-9][0-9]*)"),
    ("neurons", r"L(0|[1-9][0-9]*)\.N(0|[1-9][0-9]*)"),
    ("norms", r"L(0|[1-9][0-9]*)\.norm\.(?:attn|mlp)"),
    ("rests", r"L(0|[1-9][0-9]*)\.(?:attn|mlp)\.rest"),
    ("ends", r"embed|norm|unembed"),
)


@dataclass(frozen=True, kw_only=True)
class Component:
    """Something that can be patched; `str()` of it is its address.

    Attributes:
        address: Its name, for instance `L5.H3`.
        unit: Its kind, one of `UNITS`.
        layer: Its decoder layer; None for `embed`, `norm` and `unembed`.
        index: Which head, group or neuron of the layer; None for what a layer has once.
    """

    address: str
    unit: str
    layer: int | None
    index: int | None = None

    @classmethod
    def parse(cls, address: str) -> Component:
        """Read an address.

        Raises:
            ComponentError: it follows none of the forms.
        """
        for unit, form in _FORMS:
            if match := re.fullmatch(form, address):
                numbers = [int(group) for group in match.groups()] + [None, None]
                return cls(address=address, unit=unit, layer=numbers[0], index=numbers[1])
        raise ComponentError(
            f"cannot read the component address {address!r}. Write one of L5, L5.attn, L5.mlp, L5.H3, L5.H3.q, "
            "L5.H3.o, L5.KV1, L5.N812, L5.norm.attn, L5.norm.mlp, L5.attn.rest, L5.mlp.rest, embed, norm, unembed."
        )

    def __str__(self) -> str:
        return self.address


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Part of one parameter that a component owns.

    Attributes:
        parameter: Full name of the parameter in the model.
        axis: The axis that is cut; 0 with the full length for a whole parameter.
        start: First index on that axis.
        stop: One past the last index.
    """

    parameter: str
    axis: int
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """The slice of a tensor of the parameter's shape, as a view."""
        return tensor.narrow(self.axis, self.start, self.stop - self.start)


def slices(architecture: Architecture, component: Component) -> tuple[Slice, ...]:
    """The slices of tensors that a component owns in this architecture.

    Raises:
        ComponentError: the model has no such component, or nothing in it can be owned alone.
    """
    _check_exists(architecture, component)
    owned = tuple(_owned(architecture, component))
    if not owned:
        why = "its parameters are tied to embed's: patch embed" if component.address == "unembed" else "it has none"
        raise ComponentError(f"{component} owns no parameters in this model: {why}.")
    return owned


def encloses(unit: str, other: str) -> bool:
    """Whether components of one unit own what components of another unit own: blocks enclose heads."""
    whole = _PART_OF.get(other)
    return whole is not None and (whole == unit or encloses(unit, whole))


def components(architecture: Architecture, units: str | Sequence[str | Component]) -> tuple[Component, ...]:
    """The components that some units and addresses name, ordered by layer and, within a layer, as named.

    Args:
        architecture: The model's architecture.
        units: Units out of `UNITS`, addresses (`"heads,L5.N812"`) and components, as a sequence or in one string.

    Raises:
        ComponentError: nothing named, or a name that is no unit and no address in this architecture.
    """
    names = [name.strip() for name in (units.split(",") if isinstance(units, str) else map(str, units))]
    singles = {name: Component.parse(name) for name in names if name not in UNITS and _is_address(name)}
    unknown = [name for name in names if name not in UNITS and name not in singles]
    if unknown or not names:
        found = ", ".join(repr(name) for name in unknown) or "none"
        raise ComponentError(
            f"unknown units: {found}. Name some of {', '.join(UNITS)}, or addresses such as L5.H3, with commas between."
        )
    for single in singles.values():
        slices(architecture, single)
    found_components: dict[Component, None] = {}
    for layer in (None, *range(architecture.n_layers)):
        for name in names:
            named = singles.get(name)
            members = _members(architecture, name, layer) if named is None else [named] * (named.layer == layer)
            found_components |= dict.fromkeys(members)
    return tuple(found_components)


def partition(architecture: Architecture, level: str) -> tuple[Component, ...]:
    """Components that together own every parameter exactly once.

    Args:
        architecture: The model's architecture.
        level: One of `LEVELS`: whole blocks; attentions and MLPs; heads and groups with whole MLPs; neurons too.
    """
    units = {
        "blocks": "ends,blocks",
        "modules": "ends,norms,attns,mlps",
        "heads": "ends,norms,heads,kvs,rests,mlps",
        "neurons": "ends,norms,heads,kvs,rests,neurons",
    }
    if level not in units:
        raise ComponentError(f"unknown partition {level!r}. Name one of {', '.join(LEVELS)}.")
    members = components(architecture, units[level])
    if level == "heads":  # whole MLPs own the MLP's rest
        members = tuple(member for member in members if not member.address.endswith(".mlp.rest"))
    return members


def _is_address(name: str) -> bool:
    return any(re.fullmatch(form, name) for _, form in _FORMS)


def _members(architecture: Architecture, unit: str, layer: int | None) -> Iterator[Component]:
    if (unit == "ends") != (layer is None):
        return
    counts = {
        "heads": architecture.n_heads,
        "heads.q": architecture.n_heads,
        "heads.o": architecture.n_heads,
        "kvs": architecture.n_kv_heads,
        "neurons": architecture.n_neurons,
    }
    patterns = {
        "ends": ("embed", "norm", "unembed"),
        "blocks": ("L{layer}",),
        "attns": ("L{layer}.attn",),
        "mlps": ("L{layer}.mlp",),
        "heads": ("L{layer}.H{index}",),
        "heads.q": ("L{layer}.H{index}.q",),
        "heads.o": ("L{layer}.H{index}.o",),
        "kvs": ("L{layer}.KV{index}",),
        "neurons": ("L{layer}.N{index}",),
        "norms": ("L{layer}.norm.attn", "L{layer}.norm.mlp"),
        "rests": ("L{layer}.attn.rest", "L{layer}.mlp.rest"),
    }
    has_index = unit in counts
    for index in range(counts.get(unit, 1)):
        for pattern in patterns[unit]:
            address = pattern.format(layer=layer, index=index)
            component = Component(address=address, unit=unit, layer=layer, index=index if has_index else None)
            if has_index or any(True for _ in _owned(architecture, component)):
                yield component


def _check_exists(architecture: Architecture, component: Component) -> None:
    if component.layer is not None and component.layer >= architecture.n_layers:
        last = architecture.n_layers - 1
        raise ComponentError(f"{component}: this model has layers L0 to L{last}. Name one of these.")
    limits = {
        "heads": ("H", architecture.n_heads),
        "heads.q": ("H", architecture.n_heads),
        "heads.o": ("H", architecture.n_heads),
        "kvs": ("KV", architecture.n_kv_heads),
        "neurons": ("N", architecture.n_neurons),
    }
    if component.index is not None:
        letter, limit = limits[component.unit]
        if component.index >= limit:
            raise ComponentError(f"{component}: a layer of this model has {letter}0 to {letter}{limit - 1}.")


def _owned(architecture: Architecture, component: Component) -> Iterator[Slice]:  # noqa: PLR0912  one case to a unit
    """Slices of a component; nothing for one that owns no parameter in this model."""
    family = architecture.family
    if component.layer is None:
        paths = {"embed": family.embed, "norm": (family.norm,), "unembed": (family.unembed,)}[component.address]
        yield from _whole(architecture, paths)
        return
    prefix = architecture.layer_prefix(component.layer)
    index = component.index or 0
    match component.unit:
        case "blocks":
            yield from _whole(architecture, (prefix.rstrip("."),))
        case "heads" | "heads.q" | "heads.o":
            if component.unit != "heads.o":
                yield from _outputs(architecture, prefix + family.q, *architecture.head_outputs("q", index))
            if component.unit != "heads.q":
                yield _inputs(architecture, prefix + family.o, index * architecture.head_dim, architecture.head_dim)
        case "kvs":
            yield from _outputs(architecture, prefix + family.k, *architecture.head_outputs("k", index))
            yield from _outputs(architecture, prefix + family.v, *architecture.head_outputs("v", index))
        case "neurons":
            for module in family.mlp_in:
                yield from _outputs(architecture, prefix + module, index, index + 1)
            yield _inputs(architecture, prefix + family.mlp_out, index, 1)
        case "attns":
            attn = dict.fromkeys((family.q, family.k, family.v, family.o, *family.attn_rest))
            yield from _whole(architecture, tuple(prefix + module for module in attn))
        case "mlps":
            yield from _whole(architecture, (prefix + family.mlp,))
        case "norms":
            norms = family.norm_attn if component.address.endswith("attn") else family.norm_mlp
            yield from _whole(architecture, tuple(prefix + norm for norm in norms))
        case "rests":
            if component.address.endswith(".mlp.rest"):
                yield from _bias(architecture, prefix + family.mlp_out)
            else:
                yield from _bias(architecture, prefix + family.o)
                yield from _whole(architecture, tuple(prefix + module for module in family.attn_rest))


def _whole(architecture: Architecture, paths: Iterable[str]) -> Iterator[Slice]:
    for path in paths:
        for name in architecture.parameters_under(path):
            yield Slice(parameter=name, axis=0, start=0, stop=architecture.parameters[name][0])


def _outputs(architecture: Architecture, module: str, start: int, stop: int) -> Iterator[Slice]:
    """Rows `start` to `stop` of a projection, and its bias there."""
    axis = 1 if architecture.family.transposed else 0
    yield Slice(parameter=f"{module}.weight", axis=axis, start=start, stop=stop)
    if f"{module}.bias" in architecture.parameters:
        yield Slice(parameter=f"{module}.bias", axis=0, start=start, stop=stop)


def _inputs(architecture: Architecture, module: str, start: int, length: int) -> Slice:
    axis = 0 if architecture.family.transposed else 1
    return Slice(parameter=f"{module}.weight", axis=axis, start=start, stop=start + length)


def _bias(architecture: Architecture, module: str) -> Iterator[Slice]:
    name = f"{module}.bias"
    if name in architecture.parameters:
        yield Slice(parameter=name, axis=0, start=0, stop=architecture.parameters[name][0])
