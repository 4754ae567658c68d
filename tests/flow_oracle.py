"""A second opinion on what flows along which path: whole forward passes of unmodified transformers models.

Nothing of `weightpatch` is imported. Weights are patched by writing them into a copy of the base, outputs by hooks on
the base that put in what the specialized model's own run on the same tokens put out. Every run keeps all that
its sublayers take and give, so a target's contribution is looked up, never derived from the engine's idea of it. One
prompt at a time, without padding. Layouts come from `hook_oracle`; norms behind a sublayer are RMS norms here.

All readouts: the mean over some positions of <stream, direction>, with the direction as given (make it of length 1).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flow_runs import NORMS_BEHIND, Edit, Run, _front, _projection, _put, _put_each, _sizes, run
from hook_oracle import FAMILIES, _locate, _run_expert, _run_neuron, _weight

Patched = tuple[PreTrainedModel, list[Run]]
"""The base with a component patched by weights, or the base itself where outputs were put in; a run for each prompt."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two models, the prompts and the readout; the plain runs of both are made once.

    `layer` is the anchor's: the readout is of the stream that enters it.
    """

    base: PreTrainedModel
    specialized: PreTrainedModel
    token_ids: Sequence[list[int]]
    layer: int
    positions: Sequence[int]
    direction: Tensor

    @cached_property
    def patched(self) -> dict[tuple[str, str, str], Patched]:
        """What `patched` has made already."""
        return {}

    @cached_property
    def base_runs(self) -> list[Run]:
        return [run(self.base, ids) for ids in self.token_ids]

    @cached_property
    def specialized_runs(self) -> list[Run]:
        return [run(self.specialized, ids) for ids in self.token_ids]

    def read(self, stream: Tensor) -> Tensor:
        """Mean over the positions of <stream, direction>; stream (token, feature)."""
        return (stream[list(self.positions)].double() @ self.direction.double()).mean()

    def anchor(self, one: Run) -> Tensor:
        return self.read(one[self.layer, "entering"])

    def exchanged(self) -> Case:
        """The same with the two models in each other's place."""
        return Case(
            base=self.specialized, specialized=self.base, token_ids=self.token_ids,
            layer=self.layer, positions=self.positions, direction=self.direction,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The four questions.


def readouts(case: Case) -> Tensor:
    """The base's, shape (prompt,)."""
    return torch.stack([case.anchor(one) for one in case.base_runs])


def patched_readouts(case: Case, address: str, *, method: str, at: str = "all") -> Tensor:
    """The base's with a component patched, by `weights` or by `activation`; shape (prompt,)."""
    _, runs = patched(case, address, method=method, at=at)
    return torch.stack([case.anchor(one) for one in runs])


def total_effects(case: Case, address: str, targets: Sequence[str], *, method: str, at: str = "all") -> Tensor:
    """F_T(base with the component patched) - F_T(base); shape (target, prompt)."""
    model, runs = patched(case, address, method=method, at=at)
    clamped = members(address) if method == "activation" else []
    rows = []
    for target in targets:
        before = [contribution(case.base, one, target) for one in case.base_runs]
        after = []
        for one, donor in zip(runs, case.specialized_runs, strict=True):
            if target != "embed" and f"L{_sublayer_of(target)[0]}" in clamped:  # with its whole block
                after.append(contribution(case.specialized, donor, target))
            else:
                part_of = (case.specialized, donor) if _holds(clamped, target) else None
                after.append(contribution(model, one, target, part_of=part_of))
        rows.append(torch.stack([case.read(new - old) for new, old in zip(after, before, strict=True)]))
    return torch.stack(rows)


def direct_edges(
    case: Case, supplier: str, target: str, *, receives: str = "all", method: str, at: str = "all"
) -> Tensor:
    """F_T(base whose T alone takes the supplier's new write) - F_T(base); shape (prompt,). T may be `anchor`."""
    if not is_upstream(case, supplier, target):
        return torch.zeros(len(case.token_ids), dtype=torch.float64)
    _, runs = patched(case, supplier, method=method, at=at)
    return torch.stack(
        [
            _direct_edge(case, (ids, plain), _write_of(one, supplier) - _write_of(plain, supplier), target, receives)
            for ids, plain, one in zip(case.token_ids, case.base_runs, runs, strict=True)
        ]
    )


def _direct_edge(case: Case, prompt: tuple[list[int], Run], change: Tensor, target: str, receives: str) -> Tensor:
    """The edge on one prompt, given with the base's run on it; `change` is of the stream, (token, feature)."""
    ids, plain = prompt
    if target == "anchor":
        return case.read(change)
    layer, sublayer = _sublayer_of(target)
    front = _front(case.base, layer, sublayer)
    changed = run(case.base, ids, [(front, "input", lambda value, _: value + change.to(value.dtype))], only=layer)
    if receives != "all":
        path, rows = _projection(case.base, layer, receives)
        new = changed[layer, receives]
        changed = run(case.base, ids, [(path, "output", lambda value, _: _put(value, new, rows=rows))], only=layer)
    return case.read(contribution(case.base, changed, target) - contribution(case.base, plain, target))


def is_upstream(case: Case, supplier: str, target: str) -> bool:
    """Whether what the supplier writes is in the stream that the target takes."""
    if supplier == "embed":
        return True
    layer, sublayer = _sublayer_of(supplier)
    if target == "anchor":
        return layer < case.layer
    parallel = getattr(case.base.config, "use_parallel_residual", False)
    at_layer, at_sublayer = _sublayer_of(target)
    return layer < at_layer or (layer == at_layer and (sublayer, at_sublayer) == ("attn", "mlp") and not parallel)


# ---------------------------------------------------------------------------------------------------------------------
# Addresses.


def members(address: str) -> list[str]:
    return address.strip("{}").split(",")


def _sublayer_of(address: str) -> tuple[int, str]:
    """The layer, and whose write the component takes part in: `attn`, `mlp` or `block`; embed writes in front of 0."""
    match = re.fullmatch(r"L(\d+)(?:\.(.+))?", address)
    if match is None:
        raise ValueError(f"{address!r} has no layer")
    if match[2] is None:
        return int(match[1]), "block"
    return int(match[1]), "attn" if re.match(r"attn|norm\.attn|H|KV", match[2]) else "mlp"


def _holds(clamped: Iterable[str], target: str) -> bool:
    """Whether what the target writes is given by one of these, all of it."""
    whole = {target, f"{target}.o"}
    if target != "embed":
        layer, sublayer = _sublayer_of(target)
        whole |= {f"L{layer}.{sublayer}", re.sub(r"(\.E\d+)\.N\d+$", r"\1", target)}
    return bool(whole & set(clamped))


# ---------------------------------------------------------------------------------------------------------------------
# Exactness.


def with_exact_norms(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose RMS norms no longer go through float32: parts then add up to rounding in float64."""
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = MethodType(_rms_norm, module)  # type: ignore[method-assign]
    return model


def exact_softmax(x: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **_: object) -> Tensor:
    """In place of `torch.nn.functional.softmax`: float64 stays float64, whatever a model asks for."""
    return torch.softmax(x, dim, dtype=torch.float64 if x.dtype == torch.float64 else dtype)


def _rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    gamma = module.weight + (1.0 if "Gemma" in type(module).__name__ else 0.0)
    epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return gamma * x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# Contributions.


def contribution(
    model: PreTrainedModel, one: Run, target: str, *, part_of: tuple[PreTrainedModel, Run] | None = None
) -> Tensor:
    """What the target adds to the stream, (token, feature) float64.

    Args:
        part_of: The model and the run that the target's own part of the write comes from, where it was put there from
            elsewhere; the norm behind is always that of `model` and of the whole write in `one`.
    """
    if re.fullmatch(r"embed|L\d+(\.attn|\.mlp)?", target):
        return _write_of(one, target)
    layer, sublayer = _sublayer_of(target)
    return _part(*(part_of or (model, one)), target) * _factor(model, one, layer, sublayer)


def _write_of(one: Run, supplier: str) -> Tensor:
    """What the module that a component belongs to adds to the stream, (token, feature) float64."""
    if supplier == "embed":
        return one[0, "entering"].double()
    layer, sublayer = _sublayer_of(supplier)
    if sublayer == "block":
        return one[layer, "leaving"].double() - one[layer, "entering"].double()
    return one[layer, f"{sublayer}_added"].double()


def _factor(model: PreTrainedModel, one: Run, layer: int, sublayer: str) -> Tensor | float:
    """What turns a part of a write into a part of what is added."""
    kind = model.config.model_type
    if kind not in NORMS_BEHIND:
        return float(getattr(model.config, "residual_multiplier", 1.0))
    norm = model.base_model.get_submodule(f"{FAMILIES[kind].layers}.{layer}.{NORMS_BEHIND[kind][sublayer]}")
    gamma = norm.weight.detach().double() + (1.0 if kind.startswith("gemma") else 0.0)
    epsilon = model.config.rms_norm_eps
    return gamma / (one[layer, sublayer].double().square().mean(-1, keepdim=True) + epsilon).sqrt()


def _part(model: PreTrainedModel, one: Run, target: str) -> Tensor:
    """A head's, a neuron's, an expert's or a bias's part of what its module puts out; (token, feature) float64."""
    family = FAMILIES[model.config.model_type]
    layer, sublayer = _sublayer_of(target)
    block = model.base_model.get_submodule(f"{family.layers}.{layer}")
    if match := re.search(r"\.E(\d+)(?:\.N(\d+))?$", target):
        neuron = None if match[2] is None else int(match[2])
        return expert_part(block.get_submodule("mlp.experts"), one[layer, "experts"], int(match[1]), neuron)  # type: ignore
    out = block.get_submodule(f"{family.attention}.{family.out}" if sublayer == "attn" else family.mlp_out)
    if target.endswith(".rest"):
        write = one[layer, sublayer].double()
        return torch.zeros_like(write) if out.bias is None else out.bias.detach().double().expand_as(write)
    match = re.search(r"\.([HN])(\d+)(?:\.o)?$", target)
    if match is None:
        raise ValueError(f"{target} writes nothing of its own")
    width = _sizes(model)[2] if match[1] == "H" else 1
    columns = slice(int(match[2]) * width, (int(match[2]) + 1) * width)
    taken = one[layer, "z" if match[1] == "H" else "a"]
    return taken[:, columns].double() @ _weight(out).detach()[:, columns].double().T


def expert_part(experts: nn.Module, args: tuple[Tensor, Tensor, Tensor], expert: int, neuron: int | None) -> Tensor:
    """Routing weight times what an expert, or one neuron of it, puts out; (token, feature) float64."""
    x, chosen, weights = args
    token, slot = torch.where(chosen == expert)
    with torch.no_grad():
        one = (experts, expert) if neuron is None else (experts, expert, neuron)
        write = (_run_expert if neuron is None else _run_neuron)(*one, x[token])  # type: ignore[operator]
    part = torch.zeros_like(x, dtype=torch.float64)
    return part.index_add(0, token, write.double() * weights[token, slot, None].double())


# ---------------------------------------------------------------------------------------------------------------------
# Patches.


def patched(case: Case, address: str, *, method: str, at: str = "all") -> Patched:
    """The base with a component patched by its specialized `weights`, or by what it puts out: `activation`."""
    key = address, method, at
    if key not in case.patched:
        case.patched[key] = _with_weights(case, address) if method == "weights" else _with_outputs(case, address, at)
    return case.patched[key]


def _with_weights(case: Case, address: str) -> Patched:
    model = transplanted(case.base, case.specialized, address)
    return model, [run(model, ids) for ids in case.token_ids]


def _with_outputs(case: Case, address: str, at: str) -> Patched:
    runs = []
    for ids, donor in zip(case.token_ids, case.specialized_runs, strict=True):
        tokens = None if at == "all" else [range(len(ids))[place] for place in case.positions]
        edits = [e for member in members(address) for e in clamps(case.base, case.specialized, donor, member, tokens)]
        runs.append(run(case.base, ids, edits))
    return case.base, runs


def clamps(
    base: PreTrainedModel, specialized: PreTrainedModel, donor: Run, address: str, tokens: list[int] | None
) -> list[Edit]:
    """The edits of the base that put out, for one component, what the specialized model's run `donor` put out."""
    if ".norm." in address or address.endswith(".rest"):
        raise ValueError(f"{address} puts nothing out")
    family = FAMILIES[base.config.model_type]
    if address == "embed":
        return [(f"{family.layers}.0", "input", lambda value, _: _put(value, donor[0, "entering"], tokens=tokens))]
    layer, sublayer = _sublayer_of(address)
    prefix = f"{family.layers}.{layer}"
    out, mlp = f"{prefix}.{family.attention}.{family.out}", f"{prefix}.{family.mlp[-1]}"
    if sublayer == "block":
        added = donor[layer, "leaving"] - donor[layer, "entering"]
        return [(prefix, "output", lambda value, entering: _put(value, entering + added, tokens=tokens))]
    if address.endswith((".attn", ".mlp")):
        path = {"attn": out, "mlp": mlp}[sublayer]
        return [(path, "output", lambda value, _: _put(value, donor[layer, sublayer], tokens=tokens))]
    if address.endswith(".router"):
        return [(f"{mlp}.gate", "output", lambda value, _: _put_each(value, donor[layer, "gate"], tokens))]
    if match := re.search(r"\.(?:H(\d+)\.q|KV(\d+))$", address):
        index = int(match[1] or match[2])
        return [_clamp_rows(base, donor, (layer, name), index, tokens) for name in ("q" if match[1] else "kv")]
    part = _part(specialized, donor, address)
    if ".E" in address:
        path, name = f"{mlp}.experts", "experts"
    else:
        path, name = (out, "z") if sublayer == "attn" else (f"{prefix}.{family.mlp_out}", "a")

    def change(value: Tensor, taken: Tensor) -> Tensor:
        current = _part(base, {(layer, name): taken}, address)
        return _put(value, value.double() - current + part, tokens=tokens)

    return [(path, "output", change)]


def _clamp_rows(
    base: PreTrainedModel, donor: Run, place: tuple[int, str], index: int, tokens: list[int] | None
) -> Edit:
    path, rows = _projection(base, *place, index)
    width = _sizes(base)[2]
    new = donor[place][:, index * width : (index + 1) * width]
    return path, "output", lambda value, _: _put(value, new, rows=rows, tokens=tokens)


def transplanted(base: PreTrainedModel, specialized: PreTrainedModel, address: str) -> PreTrainedModel:
    """A copy of the base with the specialized weights of a component, or of every member of a set."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for member in members(address):
            roots, parts = _locate(model, specialized, member)
            if not parts:
                raise ValueError(f"{member} owns nothing in this {base.config.model_type}")
            for action, path, which in parts:
                _write(action, *(root.get_submodule(path) for root in roots), which)
    return model


def _write(action: str, ours: nn.Module, theirs: nn.Module, which: list[int]) -> None:
    if action == "module":
        ours.load_state_dict(theirs.state_dict())
    elif action == "bias":
        ours.bias.copy_(theirs.bias)
    elif action == "rows":
        _weight(ours)[which] = _weight(theirs)[which]
        if ours.bias is not None:
            ours.bias[which] = theirs.bias[which]
    elif action == "columns":
        _weight(ours)[:, which] = _weight(theirs)[:, which]
    else:  # an expert, or one neuron of it: gate rows first, then up rows
        expert, *neurons = which
        if not neurons:
            ours.gate_up_proj[expert], ours.down_proj[expert] = theirs.gate_up_proj[expert], theirs.down_proj[expert]
        for neuron in neurons:
            for row in (neuron, neuron + ours.down_proj.shape[2]):
                ours.gate_up_proj[expert, row] = theirs.gate_up_proj[expert, row]
            ours.down_proj[expert, :, neuron] = theirs.down_proj[expert, :, neuron]
