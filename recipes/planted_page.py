"""The page of a suite of plants: full table, figure, calibration; and whether another suite gives the same figures.

    python recipes/planted_page.py [--suite tiny] [--out docs/planted-tiny.md] [--against FOLDER]

Twenty minutes on 2 cores for forty plants, as many again with `--against`. What was measured is kept in the work
folder, so that a second call only writes. The figure is drawn by headless Chromium where there is one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from weightpatch.planted.calibration import calibrate
from weightpatch.planted.designs import UNITS, VARIANTS
from weightpatch.planted.figure import score_figure
from weightpatch.planted.scoring import ALL, Row, score_suite, summarize
from weightpatch.planted.suite import Suite

WIDTH = 1200
MAIN = {
    ("below,", f"{method},", f"among {among}")
    for method in ("exact", "activation", "|delta|", "|delta| relative")
    for among in ("unit", ALL)
}
"""What the benchmark claims first, as `_figures` names it."""


def main(
    suite: Annotated[str, typer.Option(help="A shipped suite, or the folder of one.")] = "tiny",
    against: Annotated[Path | None, typer.Option(help="A suite of another seed, to compare with.")] = None,
    out: Annotated[Path, typer.Option(help="The page; the figure stands beside it.")] = Path("docs/planted-tiny.md"),
    work: Annotated[Path, typer.Option(help="Where measurements are kept.")] = Path("~/.cache/weightpatch/planted"),
    jobs: Annotated[int | None, typer.Option(help="Processes; all cores without it.")] = None,
) -> None:
    """Measure what is not there yet, and write the page."""
    work = work.expanduser()
    work.mkdir(parents=True, exist_ok=True)
    found = Suite.open(suite)
    own = _measured(found, work, jobs=jobs)
    other = _measured(Suite.open(against), work, jobs=jobs) if against else None
    rows = [Row(**row) for row in own["rows"]]
    picture = out.with_suffix(".png")
    drawn = _draw(rows, picture)
    out.write_text(
        "\n".join(_page(found, own, rows, picture=picture.name if drawn else "", other=other)) + "\n", encoding="utf-8"
    )
    print(f"{out}: scored in {own['scored_in']:.0f} s, calibrated in {own['calibrated_in']:.0f} s")


def _measured(suite: Suite, work: Path, *, jobs: int | None) -> dict[str, Any]:
    """Rows of a suite, rates and coverage; what the work folder has is not measured again."""
    file = work / f"{suite.folder.name}-seed-{suite.seed}.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "rows" not in found:
        begun = time.monotonic()
        rows = summarize(score_suite(suite, jobs=jobs))
        found |= {
            "seed": suite.seed,
            "n_plants": len(suite.plants),
            "rows": [asdict(row) for row in rows],
            "scored_in": time.monotonic() - begun,
        }
        found["jobs"] = jobs or os.cpu_count()
        file.write_text(json.dumps(found), encoding="utf-8")
    if "rates" not in found:
        begun = time.monotonic()
        calibration = calibrate(suite, jobs=jobs)
        found["rates"] = [asdict(row) for row in calibration.rates]
        found["coverage"] = [asdict(row) for row in calibration.coverage]
        found["calibrated_in"] = time.monotonic() - begun
        file.write_text(json.dumps(found), encoding="utf-8")
    return found


def _page(
    suite: Suite, own: dict[str, Any], rows: Sequence[Row], *, picture: str, other: dict[str, Any] | None
) -> list[str]:
    redrawn = sum(len(attempts) for attempts in suite.failures.values())
    lines = [
        f"# The suite `{suite.folder.name}`{', version ' + suite.version if suite.version else ''}: all figures",
        "",
        f"Written by `python recipes/planted_page.py` from {len(suite.plants)} plants of seed {suite.seed} ({redrawn} "
        "further designs did not take); what numbers mean stands in [planted.md](planted.md). Means over plants with "
        "95 % intervals (Student, over plants; none for two plants); AUROCs pile up at 1, so an interval may reach "
        "beyond it.",
        "",
        f"Scored in {own['scored_in']:.0f} s, calibrated in {own['calibrated_in']:.0f} s, by {own['jobs']} processes "
        "of one thread each.",
    ]
    if picture:
        lines += ["", f"![AUROC of every method, variant by variant, with intervals over plants]({picture})"]
    for among, title in (("unit", "components of the same unit"), (ALL, "all components with a difference")):
        lines += ["", f"## Among {title}"]
        for variant in (*VARIANTS, ALL):
            lines += [
                "",
                f"### {'all variants' if variant == ALL else f'`{variant}`'}",
                "",
                *_table(rows, among, variant),
            ]
    lines += ["", "## Calibration", "", *_calibration(own)]
    if other:
        lines += ["", "## Another seed", "", *_comparison(own, other)]
    return lines


def _table(rows: Sequence[Row], among: str, variant: str) -> list[str]:
    chosen = {(row.method, row.unit): row for row in rows if (row.among, row.variant) == (among, variant)}
    methods = list(dict.fromkeys(method for method, _ in chosen))
    head = [
        "method",
        *(f"AUROC {unit}" for unit in UNITS),
        "AUROC all",
        "behind `exact`",
        "average precision",
        "precision",
    ]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for method in methods:
        whole = chosen[method, ALL]
        cells = [
            method.replace("|", "\\|"),
            *(
                _interval(row.auroc, row.ci_low, row.ci_high) if row.n_plants > 2 else f"{row.auroc:.3f}"
                for row in (chosen[method, unit] for unit in (*UNITS, ALL))
            ),
            _interval(whole.behind, whole.behind_low, whole.behind_high),
            f"{whole.average_precision:.3f}",
            f"{whole.precision:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _calibration(own: dict[str, Any]) -> list[str]:
    lines = [
        "Share of components that carry nothing which are called source; means over pairs, 95 % intervals over pairs.",
        "",
        "| pair, anchor | pairs | no gap | unstable anchors | by the rule | p <= 5 %, uncorrected | the same by "
        "shuffles alone | pairs with any source | carriers called source | by shuffles alone |",
        f"|{' --- |' * 10}",
    ]
    for row in own["rates"]:
        shares = [_interval(*(row[name][key] for key in ("estimate", "low", "high"))) for name in _SHARES]
        has = row["carriers"] == row["carriers"]
        ends = [f"{row['carriers']:.2f}", f"{row['carriers_shuffled']:.2f}"] if has else ["", ""]
        cells = [row["kind"], *(str(row[name]) for name in ("n_pairs", "n_refused", "n_unstable")), *shares]
        lines.append(f"| {' | '.join([*cells, format(row['any_source'], '.2f'), *ends])} |")
    lines += [
        "",
        "How often the 95 % interval of a recovery holds the recovery over all queries (drawn with replacement):",
        "",
        "| plant | queries | of | covered |",
        "| --- | --- | --- | --- |",
    ]
    return lines + [
        f"| {row['plant']} | {row['n']} | {row['n_population']} | {row['covered']:.3f} |" for row in own["coverage"]
    ]


_SHARES = ("sources", "at_level", "at_level_shuffled")


def _comparison(own: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Whether plants of another seed give the same figures."""
    ours, theirs = _figures(own), _figures(other)
    both = {name: (one, theirs[name]) for name, one in ours.items() if name in theirs}
    within = {name: one[1] <= two[0] <= one[2] for name, (one, two) in both.items()}
    alike = {name: abs(one[0] - two[0]) <= math.hypot(_half(one), _half(two)) for name, (one, two) in both.items()}
    lines = [
        f"The same from {other['n_plants']} plants of seed {other['seed']} (scored in {other['scored_in']:.0f} s, "
        f"calibrated in {other['calibrated_in']:.0f} s). *Within*: the other mean lies in this suite's interval; as it "
        "has an error of its own, about one in six would not if nothing differed but the seed. *Alike*: the difference "
        "is no greater than the errors of both allow (their half-widths added in squares); about one in twenty would "
        "not be.",
        "",
        "| | this suite | the other | within | alike |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, (one, two) in both.items():
        if name in MAIN or not alike[name]:
            answers = ["yes" if found[name] else "**no**" for found in (within, alike)]
            cells = [" ".join(name).replace("|", "\\|"), _interval(*one), _interval(*two), *answers]
            lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"Of all {len(both)} figures (every method and variant over all units, among both kinds of components, and the "
        f"rates of the calibration) {sum(within.values())} are within and {sum(alike.values())} alike; the table has "
        "those that the benchmark claims first, and all that are not alike.",
    ]


def _figures(found: dict[str, Any]) -> dict[tuple[str, ...], tuple[float, float, float]]:
    """Name -> mean and interval of everything that is compared."""
    figures: dict[tuple[str, ...], tuple[float, float, float]] = {}
    for row in found["rows"]:
        if row["unit"] == ALL:
            name = (f"{row['variant']},", f"{row['method']},", f"among {row['among']}")
            figures[name] = (row["auroc"], row["ci_low"], row["ci_high"])
    for row in found["rates"]:
        for share, title in zip(_SHARES, ("by the rule", "p <= 5 %", "p <= 5 % by shuffles alone"), strict=True):
            rate = row[share]
            figures["called source,", f"{row['kind']},", title] = (rate["estimate"], rate["low"], rate["high"])
    return figures


def _half(figure: tuple[float, float, float]) -> float:
    return (figure[2] - figure[1]) / 2


def _interval(estimate: float, low: float, high: float) -> str:
    return f"{estimate:.3f} ({low:.3f} to {high:.3f})"


def _draw(rows: Sequence[Row], picture: Path) -> bool:
    """The figure as PNG, if a browser is there."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        print("no Chromium here: the page gets no picture")
        return False
    figure = score_figure(rows)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        figure.write_html(page, include_plotlyjs=True, config={"displayModeBar": False})
        size = f"--window-size={WIDTH},{int(figure.layout.height or WIDTH) + 20}"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size]
        command += ["--virtual-time-budget=8000", f"--user-data-dir={folder}/profile"]
        command += [f"--screenshot={picture.resolve()}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)  # noqa: S603  the browser's own path
    return True


if __name__ == "__main__":
    typer.run(main)
