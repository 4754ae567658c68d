"""The report: one file, no network, nothing hidden, and text that stays text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch

from weightpatch import Anchor
from weightpatch.anchor import AnchorReport, Gate, Levels
from weightpatch.errors import RunError
from weightpatch.report import figures, maps, render, write_report
from weightpatch.report.sharing import share
from weightpatch.run import Run, RunConfig, write_whole

HOSTILE = '<script>alert(1)</script></script>"><img src=x onerror=alert(2)>{{ 7 * 7 }}{% raw %}</title>&lt;b&gt;'
N_LAYERS, ANCHOR_LAYER = 4, 3
FAILURE = "the two models do not differ measurably in this readout: <b>mean gap</b> 0.01"


class Page(HTMLParser):
    """A page as a browser reads it: its elements, its text, and what its scripts hold."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.elements[-1] if self.elements else ("", {})
        if tag == "script" and self.cdata_elem == "script":
            self.scripts.append((attributes, data))
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def figures(self) -> list[dict[str, Any]]:
        texts = [text for attributes, text in self.scripts if attributes.get("type") == "application/json"]
        return [json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for text in texts]


def make_run(
    folder: Path,
    *,
    tasks: tuple[str, ...] = ("title", "quotation"),
    units: tuple[str, ...] = ("L{}", "L{}.attn", "L{}.mlp", "L{}.H0", "L{}.H1", "L{}.KV0"),
    unstable: tuple[str, ...] = (),
    failed: tuple[str, ...] = (),
    n_prompts: int = 5,
    prompt: str = "Tell me about rivers.",
    base: str = "org/base",
) -> Run:
    """A run folder written by hand; each component's recovery is known from its place."""
    config = RunConfig(base=base, specialized="org/specialized", layer=ANCHOR_LAYER)
    parts = [f"L{layer}.{part}" for layer in range(N_LAYERS) for part in ("attn", "mlp")]
    manifest = {
        "format": "weightpatch.run/1",
        "created": "2026-01-02T03:04:05+00:00",
        "config": config.model_dump(mode="json"),
        "digests": {name: name[0] * 64 for name in ("base", "specialized", "prompts")},
        "tasks": list(tasks),
        "architecture": {
            "model_type": "llama", "n_layers": N_LAYERS, "n_heads": 2, "n_kv_heads": 1, "n_neurons": 20,
            "n_features": 8, "n_parameters": 1234567,
        },
        "differences": [{"component": part, "relative_norm": 0.1, "n_parameters": 10} for part in parts],
        "versions": {"weightpatch": "0.1.0", "torch": "2", "python": "3.11", "threads": 1, "device": "cpu"},
    }  # fmt: skip
    folder.mkdir(parents=True)
    write_whole(folder / "manifest.json", json.dumps(manifest))
    rows = [
        {
            "id": f"{task}-{split}",
            "task": task,
            "prompt": prompt if split == "localize" else split,
            "instruction": f"Use a {task}.",
            "split": split,
        }
        for task in tasks
        for split in ("fit", "localize", "validate")
    ]
    write_whole(folder / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for place, task in enumerate(tasks):
        (folder / "tasks" / task).mkdir(parents=True)
        make_anchor(stable=task not in unstable).save(folder / "tasks" / task / "anchor.safetensors")
        write_effects(folder / "tasks" / task, units, place=place, n_prompts=n_prompts, failed=task in failed)
    return Run.open(folder)


def make_anchor(*, stable: bool = True) -> Anchor:
    gates = (
        Gate(name="split-half-cosine", value=0.95, threshold=0.8, passed=True, meaning="directions agree"),
        Gate(name="auc", value=0.97 if stable else 0.61, threshold=0.9, passed=stable, meaning="told apart"),
    )
    report = AnchorReport(
        estimator="mean-difference", gates=gates, gap=4.0, gap_low=3.0, gap_high=5.0, n_prompts=6, n_held_out=3,
        search={2: 1.5, 3: 2.5}, levels=Levels(base_with=1, base_without=0, specialized_with=5, specialized_without=0),
    )  # fmt: skip
    return Anchor(layer=ANCHOR_LAYER, direction=torch.eye(8)[0], report=report)


def write_effects(folder: Path, units: tuple[str, ...], *, place: int, n_prompts: int, failed: bool) -> None:
    addresses = [unit.format(layer) for layer in range(N_LAYERS) for unit in units]
    gap = torch.linspace(3, 5, n_prompts, dtype=torch.float64)
    past = [address for address in addresses if address.startswith(f"L{ANCHOR_LAYER}")]
    reference: dict[str, object] = {"base": [1.0] * n_prompts, "specialized": (1 + gap).tolist(), "past_anchor": past}
    reference["queries"] = [f"q{number}" for number in range(n_prompts)]
    reference["planned"] = [address for address in addresses if address not in past]
    reference |= {"prompts": [f"p{number}" for number in range(n_prompts)], "failure": FAILURE if failed else None}
    write_whole(folder / "reference.json", json.dumps(reference))
    lines = ""
    for number, address in enumerate(addresses):
        if failed or address in past:
            continue
        # One component of every second task moves the base away from the specialized model: negative recovery.
        share = -0.2 if number == 3 and place % 2 else 0.05 * ((number * 7 + place) % 11) + 0.9 * (number == 0)
        wobble = torch.linspace(-0.05, 0.05, n_prompts, dtype=torch.float64)
        lines += json.dumps({"component": address, "effects": (share * gap + wobble).tolist()}) + "\n"
    if lines:
        write_whole(folder / "effects.jsonl", lines)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("runs") / "run", prompt=HOSTILE, base=f"./models/{HOSTILE}")


@pytest.fixture(scope="module")
def page(run: Run) -> Page:
    return Page(render(run))


def test_the_report_is_one_whole_file_in_the_run_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = {file.name for file in run.path.iterdir()}
    assert write_report(run) == run.path / "report.html"
    assert {file.name for file in run.path.iterdir()} == before | {"report.html"}
    assert run.report.read_text(encoding="utf-8") == render(run)


def test_the_same_run_folder_gives_the_same_bytes(run: Run) -> None:
    assert render(run) == render(Run.open(run.path))


def test_nothing_is_loaded_from_outside(page: Page) -> None:
    for tag, attributes in page.elements:
        references = {name: attributes[name] or "" for name in ("src", "href", "action", "data") if name in attributes}
        if tag == "a":
            href = references.pop("href")
            assert href.startswith("#") or href == "https://arxiv.org/abs/2604.13694"
        assert references == {}, (tag, attributes)
    styles = [text for text in page.texts if "{" in text and "font" in text]
    assert styles
    assert not any(word in text for text in styles for word in ("@import", "url(", "http"))


def test_the_browser_is_told_to_load_nothing_and_to_run_only_our_two_scripts(page: Page) -> None:
    policy = next(meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert policy.count("sha256-") == 2
    assert "unsafe-eval" not in policy


def test_plotly_is_in_it_once_and_the_file_stays_small(run: Run) -> None:
    source = render(run)
    assert source.count("plotly.js v") == 1
    assert len(source.encode()) < 6_000_000


def test_hostile_text_stays_text(page: Page) -> None:
    assert not page.of("img")
    assert HOSTILE in " ".join(page.texts)
    ours = [attributes for attributes in page.of("script") if attributes.get("type") != "application/json"]
    assert ours == [{}, {}]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert not any("alert(" in text for attributes, text in page.scripts if attributes)


def test_figures_cannot_close_their_script_element(run: Run) -> None:
    source = render(run)
    blocks = source.split('<script type="application/json"')[1:]
    assert blocks
    for block in blocks:
        inside = block.partition(">")[2].partition("</script>")[0]
        assert not set(inside) & set("<>&")
        assert json.loads(inside)["data"]


def test_every_top_component_is_there_with_its_interval(run: Run, page: Page) -> None:
    for task in run.tasks:
        for row in run.effects(task).top(20).itertuples():
            assert f"{row.component}" in page.texts
            assert f"[{row.ci_low:.3f}, {row.ci_high:.3f}]" in page.text


def test_values_below_zero_and_the_largest_one_are_on_the_scale_and_not_clipped(run: Run, page: Page) -> None:
    table = run.effects("quotation").table()
    assert table["recovery"].min() < 0
    figure = maps.head_map(table, n_layers=N_LAYERS, anchor_layer=ANCHOR_LAYER)
    heads = table[table["unit"].isin(["heads", "kvs"])]
    scale = figure.layout.coloraxis
    assert scale.cmin == -scale.cmax
    assert scale.cmax == pytest.approx(heads["recovery"].abs().max())
    assert sorted(cells(figure)) == pytest.approx(sorted(heads["recovery"]))
    assert "never clipped" in page.text


def cells(figure: go.Figure) -> Iterator[float]:
    for trace in figure.to_dict()["data"]:
        yield from (value for row in trace["z"] for value in row if value is not None)


def test_layers_past_the_anchor_are_blank_and_labelled(run: Run) -> None:
    figure = maps.head_map(run.effects("title").table(), n_layers=N_LAYERS, anchor_layer=ANCHOR_LAYER)
    assert all(list(row[ANCHOR_LAYER:]) == [None] for trace in figure.to_dict()["data"] for row in trace["z"])
    assert "at or past the anchor" in str(figure.layout.annotations[0].text)


def test_an_anchor_at_the_last_layer_leaves_nothing_to_shade(run: Run) -> None:
    figure = figures.layer_figure(run.effects("title").table(), n_layers=3, anchor_layer=3)
    assert not figure.layout.annotations


def test_a_component_serves_a_task_when_its_interval_and_recovery_say_so(run: Run) -> None:
    tables = {task: run.effects(task).table() for task in run.tasks}
    for row in share(tables):
        for address in row.in_all:
            for table in tables.values():
                found = table.set_index("component").loc[address]
                assert found["recovery"] > 0.02
                assert found["ci_low"] > 0
        serving = len(row.in_all) + len(row.in_several) + sum(map(len, row.in_one.values()))
        assert serving + row.n_in_none == row.n_compared


def test_an_unstable_anchor_is_said_in_words(tmp_path: Path) -> None:
    page = Page(render(make_run(tmp_path / "run", unstable=("quotation",))))
    assert page.text.count("The anchor is unstable.") == 1
    assert "It failed auc" in page.text
    assert "unstable: 1 of 2 passed" in page.text
    assert "all 2 passed" in page.text


def test_a_task_without_a_gap_shows_why_and_no_figure_of_effects(tmp_path: Path) -> None:
    page = Page(render(make_run(tmp_path / "run", failed=("quotation",))))
    assert "This task could not be measured:" in page.text
    assert FAILURE in " ".join(page.texts)
    titles = [attributes["aria-label"] or "" for attributes in page.of("div") if attributes.get("class") == "plot"]
    assert sum("highest recovery" in title for title in titles) == 1


def test_a_run_that_has_not_got_far_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run.folder("title") / "effects.jsonl").unlink()
    (run.folder("quotation") / "anchor.safetensors").unlink()
    page = Page(render(run))
    assert page.text.count("This task has no effects:") == 2
    assert "weightpatch localize run" in page.text
    assert "weightpatch anchor run" in page.text


def test_a_task_that_is_half_measured_says_how_much_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "Not finished:" not in Page(render(run)).text
    file = run.folder("title") / "effects.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-2]))
    assert "Not finished: 2 of the planned components" in Page(render(run)).text


def test_one_task_without_heads_has_neither_summary_nor_map_of_heads(tmp_path: Path) -> None:
    page = Page(render(make_run(tmp_path / "run", tasks=("title",), units=("L{}.mlp",))))
    titles = [attributes["aria-label"] or "" for attributes in page.of("div") if attributes.get("class") == "plot"]
    assert "Summary over" not in page.text
    assert len(titles) == len(page.figures) == 5  # weights, levels, search, layers, top components
    assert not any("head" in title for title in titles)


def test_experts_and_their_neurons_are_shown_by_their_names(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", units=("L{}.router", "L{}.E0", "L{}.E1", "L{}.E1.N3"))
    figure = maps.head_map(run.effects("title").table(), n_layers=N_LAYERS, anchor_layer=ANCHOR_LAYER)
    assert list(figure.data[0]["y"]) == ["E0", "E1"]
    text = json.dumps(Page(render(run)).figures)
    assert all(address in text for address in ("L0.router", "L0.E1", "L0.E1.N3"))


def test_a_single_prompt_gives_no_interval_and_valid_json(tmp_path: Path) -> None:
    page = Page(render(make_run(tmp_path / "run", n_prompts=1)))
    assert "no interval" in page.text
    assert page.figures


def test_a_damaged_file_is_an_error_and_not_a_report_that_hides_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run.folder("title") / "effects.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match="is no record"):
        render(run)


def test_the_report_says_how_it_was_made(page: Page, run: Run) -> None:
    digests = {attributes["title"] for attributes in page.of("code") if attributes.get("title")}
    assert digests == set(run.manifest["digests"].values())
    assert "--layer=3 --out RUN" in page.text
    assert "not corrected for" in page.text
    assert "Nothing here claims to reproduce a number of the paper." in page.text
