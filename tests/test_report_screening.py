"""The screening in the report: verdicts, figures that stay small, and tokens that stay text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from test_report import ANCHOR_LAYER, HOSTILE, N_LAYERS, Page, make_run
from weightpatch.agreement import agreement
from weightpatch.errors import RunError
from weightpatch.report import render, screening, tokens
from weightpatch.run import Run, write_whole

SPANS = ("template", "query", "instruction", "last")
TEXTS = ["<|user|>", "\n", "</script>", "<b>", " the", " ", "&lt;", "<a href='https://x'>", "\u200b\u202e", HOSTILE]
NOWHERE = {"n_layers": N_LAYERS, "anchor_layer": ANCHOR_LAYER}


def make_table(
    n_neurons: int = 400, *, n_layers: int = ANCHOR_LAYER, n_heads: int = 4, n_patched: int = 30, seed: int = 0
) -> pd.DataFrame:
    """Neurons with heavy tails and heads a hundred times as large; exact effects near the estimates."""
    draw = np.random.default_rng(seed)
    parts = []
    for unit, letter, per_layer, scale in (
        ("heads", "H", n_heads, 0.1),
        ("neurons", "N", n_neurons // n_layers, 0.001),
    ):
        layers = np.repeat(np.arange(n_layers), per_layer)
        index = np.tile(np.arange(per_layer), n_layers)
        recovery = scale * draw.standard_t(3, len(layers))
        share = draw.dirichlet(np.ones(len(SPANS)), len(layers)) * recovery[:, None]
        names = "L" + pd.Series(layers).astype(str) + f".{letter}" + pd.Series(index).astype(str)
        part = pd.DataFrame({"component": names, "unit": unit, "layer": pd.array(layers, dtype="Int64")})
        part["effect"], part["recovery"] = 4 * recovery, recovery
        part["ci_low"], part["ci_high"] = recovery - scale / 9, recovery + scale / 9
        part["mean_of_ratios"] = recovery
        top = np.argsort(-np.abs(recovery))[:n_patched]
        drawn = draw.choice(len(layers), min(n_patched, len(layers)), replace=False)
        part["exact_recovery"] = np.nan
        patched = np.union1d(top, drawn)
        part.loc[patched, "exact_recovery"] = recovery[patched] * draw.normal(1, 0.1, len(patched))
        part["exact_effect"] = 4 * part["exact_recovery"]
        part["chosen"] = ""
        part.loc[top, "chosen"] = "top"
        part.loc[drawn, "chosen"] = np.where(part.loc[drawn, "chosen"] == "top", "both", "random")
        for name, values in zip(SPANS, share.T, strict=True):
            part[f"span.{name}"] = values
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def make_record(table: pd.DataFrame, *, poor: tuple[str, ...] = (), texts: list[str] | None = None) -> dict[str, Any]:
    """What the stage writes beside a table."""
    units = {}
    for unit, own in table.groupby("unit", sort=False):
        about: dict[str, Any] = {"n": len(own), "is_poor": unit in poor, "poor_layers": [], "confidence": 0.95}
        about |= {"verdict": f"{unit}: verdict <b>{unit}</b>.", "threshold": 0.0123, "missed_at_most": 1234}
        for name in ("top", "random"):
            among = own[own["chosen"].isin([name, "both"])]
            found = agreement(among["recovery"].to_numpy(), among["exact_recovery"].to_numpy())
            about[f"n_{name}"] = len(among)
            about[name] = vars(found) | {"overlap": {str(k): share for k, share in found.overlap.items()}}
        units[str(unit)] = about
    settings = {"units": "neurons,heads", "budget": 60, "threshold": None, "confidence": 0.95}
    settings["estimation"] = {"approximation": "outputs", "n_steps": 8, "grad_drop": False}
    return {"settings": settings, "units": units, "tokens": make_tokens(table, TEXTS if texts is None else texts)}


def make_tokens(table: pd.DataFrame, texts: list[str]) -> dict[str, Any]:
    leading = table.loc[table["exact_recovery"].abs().nlargest(12).index]
    n = len(texts)
    share = np.random.default_rng(1).dirichlet(np.full(n, 0.3), len(leading))
    values = share * leading["recovery"].to_numpy()[:, None]
    spans = [SPANS[min(3, 4 * place // n)] for place in range(n)]
    names = leading["component"].tolist()
    return {"prompt": HOSTILE, "texts": texts, "spans": spans, "components": names, "values": values.tolist()}


def write_screen(run: Run, task: str, table: pd.DataFrame, record: dict[str, Any]) -> None:
    table.to_parquet(run.folder(task) / "screen.parquet", index=False)
    write_whole(run.folder(task) / "screen.json", json.dumps(record, allow_nan=False, ensure_ascii=False))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run")


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return make_table()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, table: pd.DataFrame) -> str:
    run = make_run(tmp_path_factory.mktemp("screened") / "run")
    write_screen(run, "title", table, make_record(table, poor=("neurons",)))
    return render(run)


def strings(found: Any) -> Iterator[str]:
    if isinstance(found, str):
        yield found
    elif isinstance(found, dict):
        yield from (text for one in found.values() for text in strings(one))
    elif isinstance(found, list):
        yield from (text for one in found for text in strings(one))


def embedded(source: str) -> list[str]:
    return [
        block.partition(">")[2].partition("</script>")[0] for block in source.split('<script type="application/json"')
    ]


def test_a_run_without_a_screening_has_nothing_of_it_and_the_same_bytes_as_before(
    run: Run, table: pd.DataFrame
) -> None:
    before = render(run)
    ours = " ".join(Page(before).texts).lower()
    assert not any(word in ours for word in ("screening", "first order", "first-order", ".three", ".scroll"))
    write_screen(run, "title", table, make_record(table))
    during = render(run)
    assert "Screening:" in during
    for file in run.folder("title").glob("screen.*"):
        file.unlink()
    assert render(run) == before
    assert len(Page(during).figures) > len(Page(before).figures)
    assert all(figure in Page(during).figures for figure in Page(before).figures)


def test_verdicts_are_told_and_a_poor_one_is_a_warning(source: str) -> None:
    page = Page(source)
    assert "heads: verdict <b>heads</b>." in page.texts
    assert page.text.count("are poor.") == 1
    notice = source.partition("<strong>The estimates of neurons are poor.</strong>")
    assert notice[0].endswith('<div class="notice"><p>')
    assert notice[2].startswith(" neurons: verdict &lt;b&gt;neurons&lt;/b&gt;.</p></div>")
    assert source.count("Screening: everything estimated") == 1  # of one task of two


def test_the_agreement_of_both_sets_is_in_a_table_and_what_is_undefined_is_said(table: pd.DataFrame, run: Run) -> None:
    record = make_record(table)
    record["units"]["heads"]["random"] |= {"pearson": None, "error": None, "overlap": {}}
    write_screen(run, "title", table, record)
    text = Page(render(run)).text
    found = record["units"]["neurons"]
    assert f"random sample, {found['n_random']} {found['random']['pearson']:.3f}" in text
    assert f"largest estimates, {found['n_top']} {found['top']['pearson']:.3f}" in text
    assert "random sample, 12 none" in text
    assert "1,234 of 0.01230 or more" in text


def test_the_best_patched_components_are_listed_with_their_estimates(source: str, table: pd.DataFrame) -> None:
    best = screening.best_patched(table, 20)
    assert best["exact_recovery"].is_monotonic_decreasing
    assert best["exact_recovery"].iloc[0] == table["exact_recovery"].max()
    text = Page(source).text
    for place, row in enumerate(best.itertuples(), 1):
        unit = {"heads": "head", "neurons": "neuron"}[str(row.unit)]
        assert f"{place} {row.component} {unit} {row.exact_recovery:.5f} {row.recovery:.5f}" in text


def test_tokens_and_names_stay_text_in_the_page_and_in_figures(source: str) -> None:
    page = Page(source)
    assert not page.of("img")
    assert not page.of("b")
    ours = [attributes for attributes in page.of("script") if attributes.get("type") != "application/json"]
    assert ours == [{}, {}]
    for inside in embedded(source)[1:]:
        assert not set(inside) & set("<>&")
    titles = [attributes["aria-label"] or "" for attributes in page.of("div") if attributes.get("class") == "plot"]
    (figure,) = [one for one, title in zip(page.figures, titles, strict=True) if "act in the prompt" in title]
    labels = figure["layout"]["xaxis"]["ticktext"]
    assert labels[1:6] == ["\u21b5", "&lt;/script&gt;", "&lt;b&gt;", "the", "\u2423"]
    assert "&amp;lt;" in labels
    assert any("\\u200b\\u202e" in label for label in labels)
    allowed = {"<b>", "</b>", "<br>", "<extra>", "</extra>"}
    for text in strings(figure):
        tags = {"<" + part.partition(">")[0] + ">" for part in text.split("<")[1:]}
        assert tags <= allowed, text


def test_the_spread_holds_quantiles_and_the_largest_of_each_layer(table: pd.DataFrame) -> None:
    figure = screening.spread_figure(table, "neurons", **NOWHERE)
    own = table[table["unit"] == "neurons"]
    points = [trace for trace in figure.data if trace.type == "scatter" and trace.name.startswith("among")]
    assert sum(len(trace.x) for trace in points) == screening.PER_LAYER * ANCHOR_LAYER
    shown = {name for trace in points for name, _ in trace.customdata}
    for _, layer in own.groupby("layer"):
        assert set(layer.loc[layer["recovery"].abs().nlargest(screening.PER_LAYER).index, "component"]) <= shown
    wide, narrow = (trace for trace in figure.data if trace.type == "bar")
    of_first = own.loc[own["layer"] == 0, "recovery"]
    assert wide.base[0] == pytest.approx(of_first.quantile(0.01), rel=1e-3)
    assert wide.base[0] + wide.y[0] == pytest.approx(of_first.quantile(0.99), rel=1e-2)
    assert narrow.base[0] == pytest.approx(of_first.quantile(0.25), rel=1e-3)


def test_the_running_sum_ends_at_the_sum_and_the_shares_at_one(table: pd.DataFrame) -> None:
    for trace in screening.sum_figure(table).data:
        own = table.loc[table["unit"] == trace.name, "recovery"]
        assert trace.x[0] == 1
        assert trace.x[-1] == len(own)
        assert trace.y[0] == pytest.approx(own.max(), rel=1e-3)
        assert trace.y[-1] == pytest.approx(own.sum(), rel=1e-3)
        assert max(trace.y) == pytest.approx(own[own > 0].sum(), rel=0.01)
    for trace in screening.concentration_figure(table).data:
        assert list(trace.y) == sorted(trace.y)
        assert trace.y[-1] == 1


def test_every_patched_component_is_a_point_and_one_set_is_told_from_the_other(table: pd.DataFrame) -> None:
    own = table[(table["unit"] == "neurons") & table["exact_recovery"].notna()]
    figure = screening.agreement_figure(table, "neurons")
    points = [trace for trace in figure.data if trace.mode == "markers"]
    assert sum(len(trace.x) for trace in points) == len(own)
    assert len({trace.marker.symbol for trace in points}) == len(points) >= 2
    for trace in points:
        assert set(trace.text) == set(own.loc[own["chosen"] == trace.name, "component"])
    few = screening.agreement_figure(table, "neurons", most=10)
    kept = [value for trace in few.data if trace.mode == "markers" for value in trace.x]
    assert len(kept) == 10
    assert [min(kept), max(kept)] == pytest.approx([own["recovery"].min(), own["recovery"].max()], rel=1e-3)
    assert few.layout.title.text.endswith("10 drawn")


def test_spans_add_up_to_the_layers_sum(table: pd.DataFrame) -> None:
    figure = screening.span_figure(table, "neurons", **NOWHERE)
    sums = table[table["unit"] == "neurons"].groupby("layer")["recovery"].sum()
    bars = np.array([trace.y for trace in figure.data if trace.type == "bar"])
    assert bars.shape == (len(SPANS), ANCHOR_LAYER)
    assert bars.sum(axis=0) == pytest.approx(sums.to_numpy(), abs=1e-4)
    assert list(figure.data[-1].y) == pytest.approx(sums.tolist(), rel=1e-3)


@pytest.mark.parametrize("n", [1, 39, 40, 41, tokens.MOST_TOKENS, 700])
def test_a_row_of_the_token_map_adds_up_however_long_the_prompt(table: pd.DataFrame, n: int) -> None:
    found = make_tokens(table, [f" word{place}" for place in range(n)])
    figure = tokens.token_figure(found)
    assert row_sums(figure) == pytest.approx(np.sum(found["values"], axis=1), rel=0.01)
    widths = [len(trace.z[0]) for trace in figure.data]
    assert max(widths) <= tokens.PER_LINE
    if n <= tokens.MOST_TOKENS:
        assert sum(widths) == n
    else:
        assert sum(widths) <= 2 * tokens.N_KEPT + len(SPANS)
        assert any("tokens" in label for axis in axes(figure) for label in axis["ticktext"])
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax


def row_sums(figure: go.Figure) -> list[float]:
    return list(sum(np.sum(trace.z, axis=1) for trace in figure.data))


def axes(figure: go.Figure) -> list[dict[str, Any]]:
    layout = figure.to_dict()["layout"]
    return [axis for name, axis in layout.items() if name.startswith("xaxis")]


def test_sizes_are_not_added_up_and_what_has_no_spans_shows_none(run: Run, table: pd.DataFrame) -> None:
    record = make_record(table)
    record["settings"]["estimation"]["grad_drop"] = True
    record["tokens"] = None
    write_screen(run, "title", table.drop(columns=[f"span.{name}" for name in SPANS]), record)
    text = Page(render(run)).text
    assert "as sizes" in text
    assert not any(words in text for words in ("How estimates add up", "Where in the prompts", "act in the prompt"))
    assert "How few of them hold most" in text


def test_components_without_a_layer_and_without_any_effect_can_be_shown(run: Run) -> None:
    ends = make_table(9).head(2).assign(component=["embed", "norm"], unit="ends", recovery=0.0, exact_recovery=0.0)
    ends["layer"] = pd.array([None, None], dtype="Int64")
    write_screen(run, "title", ends.assign(chosen="both"), make_record(make_table(9)) | {"units": {}, "tokens": None})
    text = Page(render(run)).text
    assert "embed" in text
    assert "Estimated recovery of" not in text


def test_a_screened_task_that_was_not_measured_otherwise_still_shows_its_screening(
    run: Run, table: pd.DataFrame
) -> None:
    for name in ("effects.jsonl", "reference.json"):
        (run.folder("title") / name).unlink()
    write_screen(run, "title", table, make_record(table))
    text = Page(render(run)).text
    assert "This task has no effects:" in text
    assert "Screening: everything estimated" in text


def test_a_verdict_without_its_table_is_an_error(run: Run, table: pd.DataFrame) -> None:
    write_screen(run, "title", table, make_record(table))
    (run.folder("title") / "screen.parquet").write_bytes(b"no table")
    with pytest.raises(RunError, match=r"no readable table .*screen\.parquet and screen again: weightpatch screen"):
        render(run)


def test_a_million_neurons_are_drawn_in_seconds_and_stay_small(run: Run) -> None:
    table = make_table(1_000_000, n_layers=80, n_heads=64, n_patched=5000)
    run.manifest["architecture"]["n_layers"] = 81
    before = len(render(run).encode())
    write_screen(run, "title", table, make_record(table, texts=["</script>"] * 2000))
    start = time.monotonic()
    source = render(run)
    assert time.monotonic() - start < 10
    assert len(source.encode()) - before < 300_000
