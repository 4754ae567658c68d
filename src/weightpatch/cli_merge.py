"""The command `merge` of the command line. Nothing at the top imports torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from weightpatch.cli_options import AllowPickle, AnyAdapterBase, ArchitectureRow, AsJson, Base, DeviceMap, quiet
from weightpatch.errors import MergeError
from weightpatch.terminal import counting, print_json, print_table, status

if TYPE_CHECKING:
    from weightpatch.merging.combining import Method
    from weightpatch.merging.explaining import Plan
    from weightpatch.merging.learning import Step
    from weightpatch.merging.merge import Prepared
    from weightpatch.merging.resolving import Rule


def merge(
    base: Base,
    expert: Annotated[
        list[str],
        typer.Option(
            metavar="SPECIALIZED=RUN[:WEIGHT]", help="An expert, the run that scored it, and its weight; repeat it."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The merged folder; the same command continues an interrupted one.")
    ] = None,
    policy: Annotated[
        Literal["uniform", "soft", "top", "owner", "sources", "anchors", "streams", "outputs", "streams+outputs"]
        | None,
        typer.Option(
            help="From runs to coefficients (streams+outputs). uniform: task arithmetic, needs no run. soft, top, "
            "owner: by ranks of recovery. sources: the components with this role. anchors: learned, so that every "
            "anchor is restored. streams, outputs, streams+outputs: learned, so that residual streams, or what the "
            "next token will be, or both, are restored where anchors are read."
        ),
    ] = None,
    units: Annotated[
        str | None,
        typer.Option(help="Units with coefficients: those that every run measured; heads,kvs,neurons if learned."),
    ] = None,
    rest: Annotated[
        Literal["task-arithmetic", "base"] | None,
        typer.Option(help="What becomes of what no scored component owns (task-arithmetic)."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of soft: 0.25.")] = None,
    share: Annotated[
        float | None, typer.Option(help="Of top: the share of each unit that an expert brings, 0.3.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Of what is learned: steps of learning, 80.")] = None,
    stop_at: Annotated[
        int | None, typer.Option(min=0, help="Of what is learned: the step to stop behind, the last one.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of what is learned: 0.05.")] = None,
    penalty: Annotated[
        float | None, typer.Option(help="Of what is learned: for leaving the weights given, 0.1.")
    ] = None,
    answer_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of streams, outputs and both: restored along so many tokens of each expert's own answers; 0: where "
            "anchors are read.",
        ),
    ] = None,
    coefficients: Annotated[
        Path | None, typer.Option(help="A coefficient file instead of a policy, as --save-coefficients writes it.")
    ] = None,
    save_coefficients: Annotated[Path | None, typer.Option(help="Write the coefficients to this file.")] = None,
    method: Annotated[
        str,
        typer.Option(
            help="task-arithmetic, ties, dare-linear, dare-ties, della, della-linear, breadcrumbs or "
            "localize-and-stitch."
        ),
    ] = "task-arithmetic",
    scale: Annotated[float | None, typer.Option(help="What the sum is multiplied by in the end (lambda).")] = None,
    density: Annotated[float | None, typer.Option(help="Share of entries that the method keeps.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Of breadcrumbs: share of outliers that go.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Of della: half the span of probabilities.")] = None,
    rescale: Annotated[Literal["none", "inverse", "l1"] | None, typer.Option(help="How what is kept grows.")] = None,
    over: Annotated[
        Literal["tensor", "model"] | None, typer.Option(help="Of ties: what is ranked together; mergekit: tensor.")
    ] = None,
    election: Annotated[
        Literal["none", "weighted", "unweighted"] | None, typer.Option(help="How signs are voted on.")
    ] = None,
    average: Annotated[Literal["none", "all", "kept"] | None, typer.Option(help="What the sum is divided by.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of what is written; as the base's files have it.")] = None,
    seed: Annotated[int, typer.Option(help="Of what a method leaves to chance.")] = 0,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of one file of weights.")] = 4_000_000_000,
    plan: Annotated[
        bool, typer.Option("--plan", help="Tell what would be done, tensor by tensor; write no model.")
    ] = False,
    emit_mergekit: Annotated[Path | None, typer.Option(help="Write a mergekit recipe of the same merge.")] = None,
    device_map: DeviceMap = None,
    allow_pickle: AllowPickle = False,
    any_adapter_base: AnyAdapterBase = False,
    architecture: ArchitectureRow = "table",
    as_json: AsJson = False,
) -> None:
    """Merge experts of one base, each by the components that its run says it needs."""
    _check_outputs(out, plan=plan, others=[one for one in (emit_mergekit, save_coefficients) if one])
    quiet()
    from weightpatch.checkpoint import find, read_dtype
    from weightpatch.merging.experts import Expert
    from weightpatch.merging.exporting import check_exportable
    from weightpatch.merging.learning import Training
    from weightpatch.merging.merge import prepare
    from weightpatch.merging.resolving import Rule
    from weightpatch.merging.writing import LEARNING, check_free

    if out is not None:
        check_free(out)
    learning = _given(
        {
            "n_steps": steps,
            "stop_at": stop_at,
            "learning_rate": learning_rate,
            "penalty": penalty,
            "answer_tokens": answer_tokens,
        }
    )
    ways = _given({"units": units, "rest": rest, "temperature": temperature, "share": share})
    rule = None
    if coefficients is None:
        rule = Rule(policy=policy or Rule.policy, training=Training(**learning), **ways)
        _check_used(f"--policy {rule.policy}", ways | learning, _USED_BY[rule.policy])
    elif policy is not None:
        raise MergeError("--coefficients and --policy are two ways to the same thing: leave one out.")
    else:
        _check_used("--coefficients", ways | learning, ())
    how = _method(
        method,
        {"scale": scale, "election": election, "average": average},
        {"density": density, "gamma": gamma, "epsilon": epsilon, "rescale": rescale, "over": over},
    )
    if emit_mergekit:
        check_exportable([find(base), *(find(Expert.parse(one).specialized) for one in expert)], how)
    with _preparing(rule) as on_step:
        prepared = prepare(
            base,
            expert,
            rule=rule,
            coefficients=coefficients,
            method=how,
            dtype=read_dtype(dtype) if dtype else None,
            seed=seed,
            shard_bytes=shard_bytes,
            device_map=device_map,
            allow_pickle=allow_pickle,
            any_adapter_base=any_adapter_base,
            architecture=architecture,
            bookmark=out / LEARNING if out else None,
            on_step=on_step,
        )
    _print_doubts(prepared)
    if save_coefficients:
        prepared.resolved.coefficients.save(save_coefficients)
    if emit_mergekit:
        _emit(prepared, emit_mergekit)
    if plan:
        _print_plan(prepared, as_json=as_json)
        return
    if out is not None:
        with counting("tensors", len(prepared.merge.inputs.ours.shapes)) as on_done:
            prepared.write(out, on_parameter=lambda done, _: on_done(done))
    if as_json:
        restored = [one.__dict__ for one in prepared.resolved.restored]
        print_json({"merged": str(out) if out else None, "experts": [*prepared.experts], "restored": restored})
        return
    _print_restored(prepared)
    if out is not None:
        print(f"merged: {out}")


_LEARNING = ("n_steps", "stop_at", "learning_rate", "penalty")
_USED_BY = {
    "uniform": (),
    "soft": ("units", "rest", "temperature"),
    "top": ("units", "rest", "share"),
    "owner": ("units", "rest"),
    "sources": ("units", "rest"),
    "anchors": ("units", "rest", *_LEARNING),
    **dict.fromkeys(("streams", "outputs", "streams+outputs"), ("units", "rest", *_LEARNING, "answer_tokens")),
}
"""Policy -> settings that it reads."""
_THINNING_USED_BY = {
    "none": (),
    "trim": ("density", "rescale", "over"),
    "drop": ("density", "rescale"),
    "magprune": ("density", "rescale", "epsilon"),
    "breadcrumbs": ("density", "rescale", "gamma"),
}
"""Kind of sparsifier -> settings that it reads."""


def _check_outputs(out: Path | None, *, plan: bool, others: Sequence[Path]) -> None:
    if out is None and not (plan or others):
        raise MergeError("nothing to do: name a folder (--out DIR), or ask for the --plan.")
    if plan and out is not None:
        raise MergeError("--plan writes no model, so --out would stay empty. Leave one of the two out.")
    for file in others:
        if not file.parent.is_dir() or file.is_dir():
            raise MergeError(f"{file} cannot be written: {file.parent} has to be a folder that is there, {file} none.")


def _print_doubts(prepared: Prepared) -> None:
    for name, own in prepared.resolved.doubts.items():
        for task, why in own.items():
            print(f"note: {name}, {task}: {why}", file=sys.stderr)


@contextmanager
def _preparing(rule: Rule | None) -> Iterator[Callable[[Step], None] | None]:
    """Show what goes on until coefficients are known."""
    if rule is None or "n_steps" not in _USED_BY[rule.policy]:
        with status("reading experts and their runs"):
            yield None
        return
    with counting("steps of learning", rule.training.n_taken) as on_done:
        yield lambda step: on_done(step.number)


def _check_used(by: str, given: Iterable[str], used: Collection[str]) -> None:
    if unused := [name for name in given if name not in used]:
        option = unused[0].removeprefix("n_").replace("_", "-")
        raise MergeError(f"{by} does not read --{option}, so it would change nothing. Leave it out.")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _method(name: str, own: dict[str, Any], thinning: dict[str, Any]) -> Method:
    """A method with some of its settings changed."""
    from weightpatch.merging.combining import method_of

    known = method_of(name)
    _check_used(f"--method {name}", _given(thinning), _THINNING_USED_BY[known.sparsifier.kind])
    return replace(known, sparsifier=replace(known.sparsifier, **_given(thinning)), **_given(own))


def _emit(prepared: Prepared, file: Path) -> None:
    """Write the recipe, and say loudly what it cannot hold."""
    from weightpatch.files import write_whole
    from weightpatch.merging.exporting import mergekit_recipe

    recipe, averaged = mergekit_recipe(prepared.merge)
    write_whole(file, recipe)
    if averaged:
        print(
            f"WARNING: {file} is NOT this merge: mergekit knows one coefficient to a tensor; {len(averaged)} tensors "
            f"have finer ones, which are averaged away (the first is {averaged[0]}). For the very same checkpoint "
            "give coefficients to whole modules: --units attns,mlps",
            file=sys.stderr,
        )


def _print_plan(prepared: Prepared, *, as_json: bool) -> None:
    from weightpatch.merging.explaining import explain

    found = explain(prepared.merge, prepared.resolved.weights)
    if as_json:
        print_json(
            {
                "experts": list(found.experts),
                "tensors": {
                    name: {expert: own.__dict__ for expert, own in zip(found.experts, every, strict=True)}
                    for name, every in found.tensors.items()
                },
                "total": {expert: own.__dict__ for expert, own in found.total.items()},
                "cosines": _matrix(found, found.cosines),
                "opposed": _matrix(found, found.opposed),
                "overlaps": _matrix(found, found.overlaps),
                "unscored": {name: [str(one) for one in own] for name, own in prepared.resolved.unscored.items()},
                "restored": [one.__dict__ for one in prepared.resolved.restored],
            }
        )
        return
    rows = [
        (name, *(_span(own.low, own.mean, own.high) for own in every), *(f"{own.kept:.1%}" for own in every))
        for name, every in found.tensors.items()
    ]
    print_table(
        ("tensor", *(f"{one}: coefficient" for one in found.experts), *(f"{one}: kept" for one in found.experts)), rows
    )
    print("\nin all")
    print_table(
        ("expert", "mean coefficient", "entries kept", "norm added", "norm of its difference"),
        [
            (one, f"{own.mean:.3f}", f"{own.kept:.1%}", f"{own.norm:.4g}", f"{own.whole_norm:.4g}")
            for one, own in found.total.items()
        ],
    )
    for title, table in (
        ("components that both bring, of those that either brings", found.overlaps),
        ("cosine of what is added", found.cosines),
        ("conflicts: entries pushed in opposite directions, of those that both push", found.opposed),
    ):
        if table:
            print(f"\n{title}")
            print_table(
                ("", *found.experts),
                [(one, *(f"{table[one, other]:.3f}" for other in found.experts)) for one in found.experts],
            )
    for name, own in prepared.resolved.unscored.items():
        if own:
            print(f"\n{name}: {len(own)} components have no score and are treated as the rest, the first {own[0]}")
    _print_restored(prepared)


def _print_restored(prepared: Prepared) -> None:
    if restored := prepared.resolved.restored:
        print("\nanchors, as shares of the gap, on prompts that coefficients were not learned from")
        rows = [(one.expert, one.task, f"{one.before:.3f}", f"{one.after:.3f}") for one in restored]
        print_table(("expert", "task", "before learning", "learned"), rows)


def _matrix(found: Plan, table: Any) -> list[list[float]]:
    return [[table[one, other] for other in found.experts] for one in found.experts] if table else []


def _span(low: float, mean: float, high: float) -> str:
    return f"{mean:.3f}" if low == high else f"{low:.3f} to {high:.3f}, mean {mean:.3f}"
