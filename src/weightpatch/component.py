"""Addresses, the components they name, and the slices of tensors that each component owns.

The address is the whole notation: `L5` block, `L5.attn`, `L5.H3` head, `L5.H3.q`, `L5.H3.o`, `L5.KV1` key/value group,
`L5.mlp`, `L5.N812` neuron, `L5.E3` expert, `L5.E3.N12` an expert's neuron, `L5.router`, `L5.norm.attn`, `L5.norm.mlp`,
`L5.attn.rest`, `L5.mlp.rest`, `embed`, `norm`, `unembed`; sets of these, patched together: `{L5.H3,L7.mlp}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from weightpatch.architecture import Architecture
from weightpatch.errors import ComponentError

UNITS: tuple[str, ...] = (
    "blocks", "attns", "mlps", "heads", "heads.q", "heads.o", "kvs", "neurons", "experts", "routers", "norms", "rests",
    "ends",
)  # fmt: skip
"""Kinds of components. `rests`: what no head, group or neuron of a layer owns; `ends`: embed, norm, unembed."""

LEVELS: tuple[str, ...] = ("blocks", "modules", "heads", "neurons")
"""Partitions of all parameters, coarse to fine."""

_PART_OF: dict[str, str] = {
    "attns": "blocks", "mlps": "blocks", "norms": "blocks", "rests": "blocks", "heads": "attns", "kvs": "attns",
    "heads.q": "heads", "heads.o": "heads", "experts": "mlps", "routers": "mlps", "neurons": "experts",
}  # fmt: skip


def disjoint(units: Iterable[str]) -> tuple[str, ...]:
    """The finest of some units: without those that hold another one of them."""
    given = tuple(units)
    holding: set[str] = set()
    for unit in given:
        whole = _PART_OF.get(unit)
        while whole:
            holding.add(whole)
            whole = _PART_OF.get(whole)
    return tuple(unit for unit in given if unit not in holding)


_N = "(0|[1-9][0-9]*)"
_LAYER = rf"L(?P<layer>{_N})"
_FORMS: tuple[tuple[str, str], ...] = (
    ("blocks", _LAYER),
    ("attns", rf"{_LAYER}\.attn"),
    ("mlps", rf"{_LAYER}\.mlp"),
    ("heads", rf"{_LAYER}\.H(?P<index>{_N})"),
    ("heads.q", rf"{_LAYER}\.H(?P<index>{_N})\.q"),
    ("heads.o", rf"{_LAYER}\.H(?P<index>{_N})\.o"),
    ("kvs", rf"{_LAYER}\.KV(?P<index>{_N})"),
    ("neurons", rf"{_LAYER}(?:\.E(?P<expert>{_N}))?\.N(?P<index>{_N})"),
    ("experts", rf"{_LAYER}\.E(?P<index>{_N})"),
    ("routers", rf"{_LAYER}\.router"),
    ("norms", rf"{_LAYER}\.norm\.(?:attn|mlp)"),
    ("rests", rf"{_LAYER}\.(?:attn|mlp)\.rest"),
    ("ends", r"embed|norm|unembed"),
)


@dataclass(frozen=True, kw_only=True)
class Component:
    """Something that can be patched; `str()` of it is its address.

    Attributes:
        address: Its name, for instance `L5.H3`.
        unit: Its kind, one of `UNITS`; `sets` for a set.
        layer: Its decoder layer, a set's lowest; None for `embed`, `norm` and `unembed`, and sets with one of them.
        index: Which head, group, expert or neuron of the layer; None for what a layer has once.
        expert: Which expert a neuron belongs to; None for the neurons of a plain MLP.
        members: What a set holds, from the lowest layer up; empty for everything else.
    """

    address: str
    unit: str
    layer: int | None
    index: int | None = None
    expert: int | None = None
    members: tuple[Component, ...] = ()

    @classmethod
    def joint(cls, members: Iterable[Component]) -> Component:
        """Several components that are patched together, as one: a set. Its address lists them from the lowest layer up.

        Raises:
            ComponentError: none, or a set within a set.
        """
        ordered = tuple(sorted(dict.fromkeys(members), key=_place))
        if not ordered or any(member.members for member in ordered):
            raise ComponentError("a set holds at least one component, and no sets: {L5.H3,L7.mlp}.")
        address = f"{{{','.join(member.address for member in ordered)}}}"
        return cls(address=address, unit="sets", layer=ordered[0].layer, members=ordered)

    @classmethod
    def parse(cls, address: str) -> Component:
        """Read an address.

        Raises:
            ComponentError: it follows none of the forms.
        """
        if address.startswith("{") and address.endswith("}") and "{" not in address[1:-1]:
            return cls.joint(cls.parse(name.strip()) for name in address[1:-1].split(","))
        for unit, form in _FORMS:
            if match := re.fullmatch(form, address):
                numbers = {name: int(number) for name, number in match.groupdict().items() if number is not None}
                return cls(
                    address=address,
                    unit=unit,
                    layer=numbers.get("layer"),
                    index=numbers.get("index"),
                    expert=numbers.get("expert"),
                )
        raise ComponentError(
            f"cannot read the component address {address!r}. Write one of L5, L5.attn, L5.mlp, L5.H3, L5.H3.q, "
            "L5.H3.o, L5.KV1, L5.N812, L5.E3, L5.E3.N12, L5.router, L5.norm.attn, L5.norm.mlp, L5.attn.rest, "
            "L5.mlp.rest, embed, norm, unembed, or a set {L5.H3,L7.mlp}."
        )

    def __str__(self) -> str:
        return self.address


def _place(component: Component) -> tuple[int, int, int, int, str]:
    """Where a component stands among others."""
    layer, expert, index = (-1 if n is None else n for n in (component.layer, component.expert, component.index))
    return layer, UNITS.index(component.unit) if component.unit in UNITS else -1, expert, index, component.address


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Part of one parameter that a component owns.

    Attributes:
        parameter: Full name of the parameter in the model.
        axis: The axis that is cut; 0 with the full length for a whole parameter.
        start: First index on that axis.
        stop: One past the last index.
        expert: Which matrix of a parameter that stacks those of all experts; the axis is one of that matrix. None: the
            whole parameter is meant.
    """

    parameter: str
    axis: int
    start: int
    stop: int
    expert: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The slice of a tensor of the parameter's shape, as a view."""
        matrix = tensor if self.expert is None else tensor[self.expert]
        return matrix.narrow(self.axis, self.start, self.stop - self.start)


def slices(architecture: Architecture, component: Component) -> tuple[Slice, ...]:
    """The slices of tensors that a component owns in this architecture.

    Raises:
        ComponentError: the model has no such component, or nothing in it can be owned alone.
    """
    if component.members:
        return tuple(dict.fromkeys(piece for member in component.members for piece in slices(architecture, member)))
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
        units: Units out of `UNITS`, addresses (`"heads,L5.N812"`, `"{L5.H3,L7.mlp}"`) and components, as a sequence
            or in one string.

    Raises:
        ComponentError: nothing named, or a name that is no unit and no address in this architecture.
    """
    names = [name.strip() for name in (_SEPARATOR.split(units) if isinstance(units, str) else map(str, units))]
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
    if not found_components:
        raise ComponentError(f"this model has no {', '.join(names)}. Name some of {', '.join(UNITS)}, or addresses.")
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
        "neurons": "ends,norms,heads,kvs,rests,routers,neurons",
    }
    if level not in units:
        raise ComponentError(f"unknown partition {level!r}. Name one of {', '.join(LEVELS)}.")
    members = components(architecture, units[level])
    if level == "heads":  # whole MLPs own the MLP's rest
        members = tuple(member for member in members if not member.address.endswith(".mlp.rest"))
    return members


_SEPARATOR = re.compile(r",(?![^{]*\})")
"""A comma that is not within a set."""


def _is_address(name: str) -> bool:
    return bool(re.fullmatch(r"\{.*\}", name)) or any(re.fullmatch(form, name) for _, form in _FORMS)


def _members(architecture: Architecture, unit: str, layer: int | None) -> Iterator[Component]:
    if (unit == "ends") != (layer is None):
        return
    if layer is not None and unit in _COUNTED:
        yield from _counted(architecture, unit, layer)
        return
    patterns = {
        "ends": ("embed", "norm", "unembed"),
        "blocks": ("L{layer}",),
        "attns": ("L{layer}.attn",),
        "mlps": ("L{layer}.mlp",),
        "routers": ("L{layer}.router",),
        "norms": ("L{layer}.norm.attn", "L{layer}.norm.mlp"),
        "rests": ("L{layer}.attn.rest", "L{layer}.mlp.rest"),
    }
    for pattern in patterns[unit]:
        component = Component(address=pattern.format(layer=layer), unit=unit, layer=layer)
        if any(True for _ in _owned(architecture, component)):
            yield component


_COUNTED = {"heads": "H{}", "heads.q": "H{}.q", "heads.o": "H{}.o", "kvs": "KV{}", "neurons": "N{}", "experts": "E{}"}
"""Units of which a layer has several, and how their address goes on."""


def _counted(architecture: Architecture, unit: str, layer: int) -> Iterator[Component]:
    for expert in range(architecture.n_experts_of(layer)) if unit == "neurons" else ():
        for index in range(architecture.n_expert_neurons_of(layer)):
            address = f"L{layer}.E{expert}.N{index}"
            yield Component(address=address, unit=unit, layer=layer, index=index, expert=expert)
    for index in range(_count(architecture, unit, layer)):
        address = f"L{layer}.{_COUNTED[unit].format(index)}"
        yield Component(address=address, unit=unit, layer=layer, index=index)


def _count(architecture: Architecture, unit: str, layer: int, *, expert: bool = False) -> int:
    """How many of a unit a layer has; with `expert`, how many neurons one of its experts has."""
    match unit:
        case "kvs":
            return architecture.n_kv_heads
        case "experts":
            return architecture.n_experts_of(layer)
        case "neurons":
            return architecture.n_expert_neurons_of(layer) if expert else architecture.n_neurons_of(layer)
        case _:
            return architecture.n_heads


def _check_exists(architecture: Architecture, component: Component) -> None:
    layer = component.layer
    if layer is None:
        return
    if layer >= architecture.n_layers:
        last = architecture.n_layers - 1
        raise ComponentError(f"{component}: this model has layers L0 to L{last}. Name one of these.")
    letter = _COUNTED.get(component.unit, "").partition("{")[0]
    if component.expert is not None and component.expert >= architecture.n_experts_of(layer):
        raise ComponentError(f"{component}: {_range(layer, 'E', architecture.n_experts_of(layer))}")
    if component.index is not None:
        limit = _count(architecture, component.unit, layer, expert=component.expert is not None)
        if component.index >= limit:
            raise ComponentError(f"{component}: {_range(layer, letter, limit)}")


def _range(layer: int, letter: str, limit: int) -> str:
    has = f"{letter}0 to {letter}{limit - 1}" if limit else f"no {letter}"
    return f"layer {layer} of this model has {has}."


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
        case "neurons" if component.expert is not None and family.experts:
            size, expert = architecture.n_expert_neurons_of(component.layer), component.expert
            for place, name in enumerate(family.experts.matrices_in):
                row = size * family.experts.matrices_in[:place].count(name) + index
                yield Slice(parameter=prefix + name, axis=0, start=row, stop=row + 1, expert=expert)
            name = prefix + family.experts.matrix_out
            yield Slice(parameter=name, axis=1, start=index, stop=index + 1, expert=expert)
        case "neurons":
            for place, module in enumerate(family.mlp_in):
                row = architecture.n_neurons_of(component.layer) * family.mlp_in[:place].count(module) + index
                yield from _outputs(architecture, prefix + module, row, row + 1)
            yield _inputs(architecture, prefix + family.mlp_out, index, 1)
        case "experts" if family.experts:
            for name in dict.fromkeys((*family.experts.matrices_in, family.experts.matrix_out)):
                yield Slice(parameter=prefix + name, axis=0, start=index, stop=index + 1)
        case "routers" if family.experts:
            yield from _whole(architecture, (prefix + family.experts.router,))
        case "attns":
            attn = dict.fromkeys((family.q, family.k, family.v, family.o, *family.attn_rest))
            yield from _whole(architecture, tuple(prefix + module for module in attn))
        case "mlps":
            yield from _whole(architecture, tuple(prefix + module for module in family.mlp))
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
