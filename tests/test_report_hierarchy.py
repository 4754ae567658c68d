"""A trace in the report: figures that show the run's numbers, and runs that have only a part of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from test_report import ANCHOR_LAYER, HOSTILE, N_LAYERS, Page, make_run
from weightpatch.executors import Executors
from weightpatch.graph import Edge, Graph, Node, Round, Share
from weightpatch.report import behaviour, hierarchy, render
from weightpatch.run import Run, write_whole
from weightpatch.stability import Overlap

PLACE = {"n_layers": N_LAYERS, "anchor_layer": ANCHOR_LAYER}
BELOW = [f"L{layer}.{part}" for layer in range(ANCHOR_LAYER) for part in ("H0", "H1", "KV0", "mlp")]
PAST = [f"L{ANCHOR_LAYER}.{part}" for part in ("H0", "H1", "mlp")]
TARGETS = ["embed", *(f"L{layer}.{part}" for layer in range(ANCHOR_LAYER) for part in ("H0", "H1", "attn.rest", "mlp"))]
ARMS = ("top", "random 1", "random 2", "layer-matched 1", "largest differences", "activation", "bottom")
UNITS = {"H": "heads", "K": "kvs", "m": "mlps"}


def make_table(roles: tuple[str, ...] = ("source", "router", "none"), *, seed: int = 0) -> pd.DataFrame:
    """Roles by turns; values of every size and sign."""
    draw = np.random.default_rng(seed)
    n, names = len(BELOW), [*BELOW, *PAST]
    table = pd.DataFrame({"component": names, "unit": [UNITS[name.partition(".")[2][0]] for name in names]})
    table["layer"] = pd.array([int(name[1]) for name in names], dtype="Int64")
    own = [roles[place % len(roles)] for place in range(n)]
    table["role"] = [*own, *("none" if "executor" not in roles else "executor" for _ in PAST)]
    for name, low, high, is_below in (
        ("recovery", "ci_low", "ci_high", True),
        ("activation", "activation_low", "activation_high", True),
        ("loss", "loss_low", "loss_high", False),
    ):
        values = np.full(len(names), np.nan)
        chosen = slice(None, n) if is_below else slice(n, None)
        values[chosen] = draw.standard_t(2, len(values[chosen])) / 10
        table[name], table[low], table[high] = values, values - 0.01, values + 0.01
    return table


def make_graph(n_supplies: int = 60) -> Graph:
    """Many suppliers, each weaker than the one before; a few edges of the other kinds."""
    suppliers = [f"L0.N{number}" for number in range(n_supplies)]
    edges = [edge(name, "L2.H0", "supplies", 0.5 / (1 + place)) for place, name in enumerate(suppliers)]
    edges += [edge("L1.H0", "L2.H0", "relays", 0.2), edge("L2.H0", "anchor", "delivers", -0.4)]
    edges += [edge("anchor", PAST[2], "executes", 0.3), edge(PAST[2], "output", "executes", 0.3)]
    nodes = [Node(component=name, role=None, layer=0) for name in suppliers]
    nodes += [Node(component=f"L{layer}.H0", role="router", layer=layer, activation=0.3) for layer in (1, 2)]
    nodes += [Node(component="anchor", role=None, layer=ANCHOR_LAYER), Node(component="output", role=None, layer=None)]
    nodes.append(Node(component=PAST[2], role="executor", layer=ANCHOR_LAYER, loss=0.3))
    joint = Share(value=0.4, low=0.3, high=0.5)
    first = Round(
        targets=("L2.H0",), suppliers=("L0.N0",), joint=joint, n_candidates=1234, n_exact=48, stopped="enough <b>"
    )
    overlap = Overlap(k=20, n=1234, n_common=13, expected=0.324, p=6e-25)
    control = Overlap(k=20, n=1234, n_common=7, expected=0.324, p=0.1)
    return Graph(nodes=tuple(nodes), edges=tuple(edges), rounds=(first,), overlaps=(overlap,), control=(control,))


def edge(source: str, target: str, kind: Any, value: float) -> Edge:
    """An edge whose total is twice its direct share; relays have no total."""
    share = Share(value=value, low=value - 0.01, high=None)
    whole = None if kind == "relays" else Share(value=2 * value, low=None, high=None)
    return Edge(source=source, target=target, kind=kind, total=whole, direct=None if kind == "executes" else share)


def write_trace(
    run: Run, table: pd.DataFrame, graph: Graph | None, *, task: str = "title", executors: bool = True
) -> None:
    """What the stage `trace` leaves, and targets beside the effects."""
    counts = table["role"].value_counts()
    depth = {"mean": dict.fromkeys(counts.index, 0.25), "n": counts.to_dict(), "difference": 0.125, "p": 0.031}
    if not {"source", "router"} <= set(counts.index):
        depth |= {"difference": None, "p": None}
    record: dict[str, Any] = {"rule": {"level": 0.05, "share": 0.5, "n_shuffles": 10, "plain": True}, "depth": depth}
    about = {"restored": 0.74, "level": 0.11, "n_components": len(PAST), "n_prompts": 12}
    record |= {"executors": about if executors else None, **(graph.record() if graph else {})}
    folder = run.folder(task)
    write_whole(folder / "trace.json", json.dumps(record))
    table.to_parquet(folder / "roles.parquet", index=False)
    lines = [{"seed": seed, "weights": [0.01, 0.02], "activation": [None, 0.03]} for seed in range(3)]
    write_whole(folder / "null.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_whole(folder / "executors.json", json.dumps(make_losses() if executors else {}))


def make_losses() -> dict[str, Any]:
    draw = np.random.default_rng(1)
    null = draw.normal(0, 0.1, (2, len(PAST), 5)).tolist()
    return {"components": PAST, "level": 0.11, "null": null, "base_kl": draw.uniform(1, 2, 5).tolist()}


def write_targets(run: Run, task: str = "title", *, names: list[str] | None = None) -> pd.DataFrame:
    """Deliveries that add up to recoveries."""
    folder, targets = run.folder(task), names or TARGETS
    effects, reference = run.effects(task), run.reference(task)
    write_whole(folder / "reference.json", json.dumps({**reference, "targets": targets}))
    lines = ""
    for component, values in zip(effects.components, effects.per_prompt, strict=True):
        parts = np.random.default_rng(len(lines)).dirichlet(np.ones(len(targets)))
        delivered = (parts * float(values.mean())).tolist()
        lines += json.dumps({"component": str(component), "effects": values.tolist(), "delivered": delivered}) + "\n"
    write_whole(folder / "effects.jsonl", lines)
    matrix = run.matrix(task)
    assert matrix is not None
    return matrix


def make_points(recipient: str = "base") -> list[dict[str, Any]]:
    points = []
    for k in (0, 1, 4, 12):
        for place, arm in enumerate(ARMS):
            if k not in (0, 12) or arm == "top":
                value = k / 12 - 0.01 * place
                about = {"recipient": recipient, "arm": arm, "k": k, "share": k / 12, "kl_recovery": value / 2}
                about["recovery"] = {"estimate": value, "low": value - 0.1, "high": None}
                about["passed"] = {"estimate": 0.5, "low": 0.4, "high": 0.6} if arm in ("top", "random 1") else None
                points.append({**about, "kl": about["recovery"], "n_passed": None, "n_prompts": 7, "patch": []})
    return points


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", units=("L{}.H0", "L{}.H1", "L{}.KV0", "L{}.mlp"))


def square(values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Back from the scale of square roots."""
    roots = np.array(values, dtype=float)
    return np.sign(roots) * roots**2


def named(figure: go.Figure) -> list[str]:
    return [trace.name for trace in figure.data if trace.name]


def test_every_component_is_a_point_at_its_two_recoveries() -> None:
    table = make_table()
    figure = hierarchy.roles_figure(table, share=0.5)
    points = {
        about[0]: (x, y)
        for trace in figure.data
        if trace.customdata is not None
        for about, x, y in zip(trace.customdata, square(trace.x), square(trace.y), strict=True)
    }
    below = table[table["recovery"].notna()].set_index("component")
    assert set(points) == set(below.index)
    for name, row in below.iterrows():
        assert points[str(name)] == pytest.approx((row["recovery"], row["activation"]), abs=1e-4)
    words = [
        text for trace in figure.data if trace.customdata is not None for about in trace.customdata for text in about
    ]
    row = below.iloc[0]
    assert f"{row['recovery']:.4f} [{row['ci_low']:.4f}, {row['ci_high']:.4f}]" in words
    assert f"{row['activation']:.4f} [{row['activation_low']:.4f}, {row['activation_high']:.4f}]" in words


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_on_the_line_weights_are_that_share_of_activation(share: float) -> None:
    line = hierarchy.roles_figure(make_table(), share=share).data[0]
    assert square(line.x) == pytest.approx(share * square(line.y), rel=1e-3)
    assert max(line.y) > 0


def test_ticks_stand_at_the_values_they_name() -> None:
    for scale in (1e-4, 0.3, 40.0):
        table = make_table().assign(**{name: make_table()[name] * scale for name in ("recovery", "activation")})
        figure = hierarchy.roles_figure(table, share=0.5)
        for axis in (figure.layout.xaxis, figure.layout.yaxis):
            assert len(axis.tickvals) >= 3
            assert square(axis.tickvals) == pytest.approx([float(text) for text in axis.ticktext], rel=1e-3, abs=1e-4)


def test_roles_differ_by_marker_and_by_color() -> None:
    traces = [trace for trace in hierarchy.roles_figure(make_table(), share=0.5).data if trace.mode != "lines"]
    assert len({trace.marker.color for trace in traces}) == len(traces) == 3
    assert len({trace.marker.symbol for trace in traces}) == len(traces)


def test_the_strip_has_every_component_at_its_layer_in_the_row_of_its_role() -> None:
    table = make_table(("source", "router", "executor", "none"))
    figure = hierarchy.depth_figure(table, **PLACE, means={"source": 0.5})
    rows = dict(zip(figure.layout.yaxis.ticktext, figure.layout.yaxis.tickvals, strict=True))
    found = {
        name: (x, role, y)
        for trace in figure.data
        if trace.customdata is not None
        for (name, role), x, y in zip(trace.customdata, trace.x, trace.y, strict=True)
    }
    assert set(found) == set(table["component"])
    for row in table.itertuples():
        x, role, y = found[str(row.component)]
        assert (x, role) == (row.layer, row.role)
        assert abs(y - rows[role]) < 0.5
    mean = figure.layout.shapes[0]
    assert mean.x0 == mean.x1 == 0.5 * N_LAYERS
    assert mean.y0 < rows["source"] < mean.y1


@pytest.mark.parametrize("most", [1, 4, 40, 1000])
def test_edges_are_drawn_or_counted_and_no_stronger_one_of_a_kind_is_left_out(most: int) -> None:
    graph = make_graph()
    kept = hierarchy.strongest(graph, most=most)
    assert len(kept) == min(most, len(graph.edges)) == len(set(kept))
    for kind in {one.kind for one in kept}:
        sizes = [abs(one.total.value) for one in graph.edges if one.kind == kind and one.total]
        drawn = [abs(one.total.value) for one in kept if one.kind == kind and one.total]
        assert sorted(drawn) == sorted(sizes, reverse=True)[: len(drawn)][::-1]
    figure = hierarchy.graph_figure(graph, **PLACE, most=most)
    assert sum(trace.mode == "lines" for trace in figure.data) == len(kept)
    assert figure.layout.title.text == f"The {len(kept)} strongest of {len(graph.edges)} edges"


def test_lines_begin_and_end_at_their_nodes_and_are_as_wide_as_their_share() -> None:
    graph = make_graph(3)
    figure = hierarchy.graph_figure(graph, **PLACE)
    places = {
        about[0]: (x, y)
        for trace in figure.data
        if trace.mode != "lines"
        for about, x, y in zip(trace.customdata, trace.x, trace.y, strict=True)
    }
    assert set(places) == {node.component for node in graph.nodes}
    widths = {}
    for trace in (one for one in figure.data if one.mode == "lines"):
        source, target = (part.partition("</b>")[0] for part in trace.text.split("<b>")[1:])
        assert (trace.x[0], trace.y[0]) == pytest.approx(places[source], abs=1e-3)
        assert (trace.x[-1], trace.y[-1]) == pytest.approx(places[target], abs=1e-3)
        widths[source, target] = trace.line.width, trace.line.dash
    sizes = [1.0, 0.5, 1 / 3]  # totals of suppliers; the others: direct 0.2 and -0.4, total 0.6
    expected = {(f"L0.N{place}", "L2.H0"): size for place, size in enumerate(sizes)}
    expected |= {("L1.H0", "L2.H0"): 0.2, ("L2.H0", "anchor"): 0.4, ("anchor", PAST[2]): 0.6, (PAST[2], "output"): 0.6}
    assert {name: width for name, (width, _) in widths.items()} == pytest.approx(
        {name: 1 + 7 * size for name, size in expected.items()}, abs=0.01
    )
    assert widths["L2.H0", "anchor"][1] == "dot"  # negative
    assert places["L0.N0"][0] < places["L1.H0"][0] < places["anchor"][0] < places[PAST[2]][0] < places["output"][0]


def test_cells_add_up_to_the_row_and_to_the_heads_of_a_layer(run: Run) -> None:
    matrix = write_targets(run)
    rows = list(matrix.index[:5])
    (cells,) = hierarchy.delivery_figure(matrix, rows=rows).data
    assert list(cells.y) == rows
    values = np.array(cells.z, dtype=float)
    assert np.nansum(values, axis=1) == pytest.approx(matrix.loc[rows].sum(axis=1).to_numpy(), rel=2e-3)
    labels = list(cells.customdata[0])
    own = [f"L1.{part}" for part in ("H0", "H1", "attn.rest")]
    of_attention = values[:, labels.index("attention of layer 1")]
    assert of_attention == pytest.approx(matrix.loc[rows, own].sum(axis=1).to_numpy(), rel=2e-3)
    assert values[:, labels.index("MLP of layer 2")] == pytest.approx(matrix.loc[rows, "L2.mlp"].to_numpy(), rel=2e-3)
    assert values[:, labels.index("embed")] == pytest.approx(matrix.loc[rows, "embed"].to_numpy(), rel=2e-3)
    assert sorted(filter(None, labels)) == sorted(
        ["embed", *(f"{part} of layer {layer}" for part in ("attention", "MLP") for layer in range(ANCHOR_LAYER))]
    )


def test_rows_are_the_leading_sources_or_else_the_leading_components(run: Run) -> None:
    matrix, table = write_targets(run), make_table()
    found = hierarchy.rows_of_matrix(matrix, table, most=3)
    sources = table[table["role"] == "source"].nlargest(3, "recovery")["component"]
    assert found == sources.tolist()
    none = table.assign(role="none")
    assert hierarchy.rows_of_matrix(matrix, none, most=3) == none.nlargest(3, "recovery")["component"].tolist()


def test_bars_are_the_largest_losses_with_their_intervals() -> None:
    table = make_table(("source", "executor"))
    figure = behaviour.executors_figure(table, null=0.05, most=2)
    own = table.nlargest(2, "loss")
    (bars,) = figure.data
    assert list(bars.y) == own["component"].tolist()
    assert list(bars.x) == pytest.approx(own["loss"].tolist())
    assert list(bars.error_x.array) == pytest.approx([0.01, 0.01])
    assert figure.layout.shapes[0].x0 == 0.05
    assert not behaviour.executors_figure(table).layout.shapes


def test_the_null_of_losses_is_that_which_roles_were_judged_by() -> None:
    import torch

    record = make_losses()
    null, base = (torch.tensor(record[name], dtype=torch.float64) for name in ("null", "base_kl"))
    known = Executors(
        components=(), lost=null[0], null=null, base_kl=base, steered_kl=base, level=0, queries=("q",) * 5
    )
    assert behaviour.null_of_losses(record) == pytest.approx(np.quantile(known.null_shares, 0.95))
    assert behaviour.null_of_losses({}) is None
    assert behaviour.null_of_losses({"null": [], "base_kl": [1.0]}) is None


def test_the_null_of_roles_leaves_out_what_has_no_output() -> None:
    draws = [{"weights": [0.0, 1.0], "activation": [None, 0.5]}]
    assert hierarchy.null_of_roles(draws) == pytest.approx({"weights": 0.95, "activation": 0.5})
    assert hierarchy.null_of_roles([]) == {}


@pytest.mark.parametrize("recipient", ["base", "specialized"])
def test_a_curve_has_all_sets_for_the_readout_and_two_for_the_output(recipient: str) -> None:
    points = make_points(recipient)
    figure = behaviour.curve_figure(points, recipient=recipient)
    above = [trace for trace in figure.data if trace.yaxis == "y"]
    below = [trace for trace in figure.data if trace.yaxis == "y2"]
    assert len(above) == len(ARMS)
    assert len({trace.line.dash for trace in above}) == len({trace.name for trace in above}) == 6  # two random draws
    assert sum(bool(trace.showlegend) for trace in above) == 6
    assert {trace.name.partition(", ")[2] for trace in below} == {"leading", "random"}
    leading = above[-1]
    assert leading.name == "leading"
    assert leading.line.dash == "solid"
    assert leading.line.width > max(trace.line.width for trace in above[:-1])
    top = [point for point in points if point["arm"] == "top"]
    assert list(leading.y) == pytest.approx([point["recovery"]["estimate"] for point in top])
    assert list(leading.x) == ["0", "1", "4", "12"] == list(figure.layout.xaxis.categoryarray)
    for trace in above:  # none and all belong to every set
        assert (trace.y[0], trace.y[-1]) == pytest.approx((0.0, 1.0))


def test_the_page_says_how_many_prompts_what_was_left_out_and_what_controls_gave(run: Run) -> None:
    write_targets(run)
    write_trace(run, make_table(("source", "router", "executor")), make_graph())
    points = make_points()
    areas = [{"recipient": "base", "arm": arm, "measure": "recovery", "cpr": 0.625, "cmd": 0.375} for arm in ARMS]
    halves = {"n": 100, "spearman": 0.912, "spearman_low": 0.8, "spearman_high": 0.95, "jaccard": {"10": 0.75}}
    other = {"n": 1, "spearman": None, "spearman_low": None, "spearman_high": None, "jaccard": {}, "cosine": 0.987}
    record = {"points": points, "areas": areas, "stability": {"halves": halves, "paraphrases": None, "seed": other}}
    write_whole(run.folder("title") / "validation.json", json.dumps(record))
    text = Page(render(run)).text
    for words in (
        "In words",
        "on 5 prompts",
        "24 weaker ones are left out",
        "of the 20 leading suppliers of the routers, 13 are among the 20",
        "of those of other components in the same layers, 7",
        "95 % of recoveries lie below 0.0200 by weights and 0.0300 by activation",
        "difference +0.12, p = 0.031",
        "along 2 random directions, 95 % of 6 losses lie below",
        "Rows add up to the recovery",
        "1,234",
        "enough <b>",
        "0.625 0.375",
        "0.912 [0.800, 0.950]",
        "0.75 at 10",
        "cosine of the anchors 0.987",
        "Measured on 7 prompts",
    ):
        assert words in text, words
    assert "paraphrases of the instruction" not in text


def test_curves_of_an_old_run_without_areas_and_stability_are_shown(run: Run) -> None:
    old = [point for point in make_points() if point["arm"] in ("top", "random 1")]
    write_whole(run.folder("title") / "validation.json", json.dumps({"points": old}))
    page = Page(render(run))
    assert "Patched together: specialized weights into the base" in page.text
    assert not any(words in page.text for words in ("CPR", "How stable"))


def test_a_run_without_a_trace_says_nothing_of_roles(run: Run) -> None:
    text = Page(render(run)).text
    assert not any(words in text for words in ("Roles", "The graph", "Executors", "In words", "Patched together"))


def test_a_trace_without_a_graph_and_without_executors_is_shown_as_far_as_it_goes(run: Run) -> None:
    table = make_table()
    for name in ("loss", "loss_low", "loss_high"):
        table[name] = np.nan
    write_trace(run, table, None, executors=False)
    for name in ("null.jsonl", "executors.json"):
        (run.folder("title") / name).unlink()
    text = Page(render(run)).text
    assert "this anchor is no projection" in text
    assert "the null that roles were judged against" in text
    assert "Nothing past the anchor was held" in text
    assert "Recoveries by who writes them" not in text


@pytest.mark.parametrize("missing", ["source", "router", "executor", "none"])
def test_a_role_may_be_missing(run: Run, missing: str) -> None:
    roles = tuple(role for role in ("source", "router", "executor", "none") if role != missing)
    table = make_table(roles)
    if missing == "none":
        table["role"] = table["role"].replace("none", "source")
    write_targets(run)
    write_trace(run, table, make_graph())
    text = Page(render(run)).text
    assert ("cannot be compared" in text) == (missing in ("source", "router"))
    assert ("Who delivers what the components start" in text) == (missing == "source")


def test_a_trace_that_found_no_edge_and_one_without_any_activation_can_be_shown(run: Run) -> None:
    table = make_table().assign(activation=np.nan, activation_low=np.nan, activation_high=np.nan, role="none")
    write_trace(run, table, Graph(nodes=(), edges=()))
    text = Page(render(run)).text
    assert "No edge was found." in text
    assert "What weights restore" not in text
    assert "Where they lie" in text


def test_a_trace_of_which_everything_is_zero_can_be_drawn() -> None:
    table = make_table()
    for name in ("recovery", "ci_low", "ci_high", "activation", "activation_low", "activation_high"):
        table[name] = table[name] * 0
    assert list(hierarchy.roles_figure(table, share=0.5).layout.xaxis.ticktext) == ["0"]
    zero = Edge(
        source="L0.H0", target="anchor", kind="delivers", total=None, direct=Share(value=0, low=None, high=None)
    )
    nodes = [Node(component="L0.H0", role="none", layer=0), Node(component="anchor", role=None, layer=ANCHOR_LAYER)]
    assert named(hierarchy.graph_figure(Graph(nodes=tuple(nodes), edges=(zero,)), **PLACE))


def test_hostile_names_stay_text(run: Run) -> None:
    write_targets(run, names=[HOSTILE, *TARGETS])
    table = make_table(("source", "router", "executor"))
    table["component"] = table["component"].replace({"L0.H1": HOSTILE, PAST[0]: HOSTILE})
    nodes = [Node(component=HOSTILE, role="router", layer=1), Node(component="anchor", role=None, layer=ANCHOR_LAYER)]
    graph = Graph(nodes=tuple(nodes), edges=(edge(HOSTILE, "anchor", "delivers", 0.1),))
    write_trace(run, table, graph)
    point = {**make_points()[0], "arm": HOSTILE, "k": 3, "share": 0.3}
    record = {"points": [*make_points(), point], "areas": [], "stability": None}
    write_whole(run.folder("title") / "validation.json", json.dumps(record))
    page = Page(render(run))
    assert not page.of("img")
    ours = [attributes for attributes in page.of("script") if attributes.get("type") != "application/json"]
    assert ours == [{}, {}]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    allowed = {"<b>", "</b>", "<br>", "<extra>", "</extra>"}
    for figure in page.figures:
        for text in strings(figure):
            tags = {"<" + part.partition(">")[0] + ">" for part in text.split("<")[1:]}
            assert tags <= allowed, text


def strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in strings(part)]
