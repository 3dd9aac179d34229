"""What an experiment leaves behind: tables, figures, every measured row, and one page that gathers them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import yaml

from glocal import runs
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.experiments.design import Experiment
from glocal.experiments.findings import (
    Finding,
    boxes_of,
    cautions,
    figures_of,
    findings,
    judged_on,
    pictures_of,
    ranks_of,
)
from glocal.experiments.jobs import Failure
from glocal.experiments.plan import Training
from glocal.experiments.report import report
from glocal.experiments.results import collect, scores_of
from glocal.experiments.sections import count
from glocal.files import replacing, write_bytes, write_text
from glocal.model import read_header
from glocal.progress import track
from glocal.reporting.html import Cell, Picture, Report, Section, Table, papers, write_report
from glocal.reporting.typeset import csv, html_table, latex, markdown

INDEX, RUNS = "index.html", "runs.html"
ENDINGS = {"md": markdown, "csv": csv, "tex": latex}  # of the files of a table


def write_results(
    design: Experiment,
    trainings: Sequence[Training],
    failures: Sequence[Failure],
    stores: Mapping[Path, Store],
    tuning: pd.DataFrame | None = None,
) -> Path:
    """Write the files of the results: `trainings.csv`, `results.csv`, `table-NAME.md|csv|tex`, `figures/`, the pages.

    Returns:
        The page, `index.html`.
    """
    write_text(
        design.folder / "recipe.yaml", yaml.safe_dump(dict(design.settings), sort_keys=False, allow_unicode=True)
    )
    for pattern in ("table-*.*", "figures/*", "results.csv", "tuning.csv"):
        for old in design.folder.glob(pattern):
            old.unlink()  # the recipe may no longer ask for it
    results = collect(trainings)
    done = [training for training in trainings if training.job.done()]
    for training in track(done, "Reports", len(done)):
        for job in (training.before, training.job):
            if job is not None and job.done() and not (job.folder / "report.html").exists():
                report(job.folder)
    scores = scores_of(trainings, results)
    _write_csv(design.folder / "trainings.csv", scores.assign(run=_relative(design, scores["run"])))
    if tuning is not None:
        _write_csv(design.folder / "tuning.csv", tuning)
    if not results.empty:
        _write_csv(design.folder / "results.csv", results.assign(run=_relative(design, results["run"])))
    found, missing = ([], []) if results.empty else findings(design, results)
    key_figures, sections = _measured(design, trainings, results, stores, found) if found else ([], [])
    write_report(_runs_page(design, trainings, scores), design.folder / RUNS)
    page = _page(design, trainings, failures)
    cited = (paper for training in done for paper in read_header(training.job.folder / "model.safetensors").papers)
    page.warnings += missing
    page.key_figures, page.sections = key_figures, [*sections, *_tuning(tuning), *papers(cited), *_closing(design)]
    write_report(page, design.folder / INDEX)
    return design.folder / INDEX


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    with replacing(path) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.6g")


def _relative(design: Experiment, folders: pd.Series) -> list[str]:
    return [os.path.relpath(folder, design.out) for folder in folders]


def _measured(
    design: Experiment,
    trainings: Sequence[Training],
    results: pd.DataFrame,
    stores: Mapping[Path, Store],
    found: Sequence[Finding],
) -> tuple[list[tuple[str, str]], list[Section]]:
    """Key figures, and all that can be shown of what was measured; tables and figures are files of their own, too."""
    tables, pictures = [], []
    drawn = set()
    for finding in found:
        for ending, written in ENDINGS.items():
            write_text(design.folder / f"table-{finding.name}.{ending}", written(finding.layout))
        table = _with_links(design, finding)
        # How to read them is long, and said once.
        layout = finding.layout
        rest = layout.caption if finding is found[0] else cautions(design)
        tables.append(replace(table, note=f"{layout.note} {rest}"))
        if finding.what not in drawn:
            drawn.add(finding.what)
            pictures += _kept(design, finding.name, figures_of(design, finding))
    first = found[0]
    text = "Click a number to see its trainings. The tables are also files for papers, listed below them."
    sections = [Section("What came out", text, [*tables, _files(found)], pictures)]
    if ranks := _ranks(design, first):
        sections.append(ranks)
    sections.append(Section("By structure", pictures=_kept(design, "structures", boxes_of(design, results))))
    try:
        grids = _kept(design, "pictures", pictures_of(design, trainings, results, stores))
        sections.append(Section("Pictures", pictures=grids))
    except GlocalError as error:
        sections.append(Section("Pictures", text=f"No pictures of cases: {error}"))
    return _key_figures(design, first), sections


def _files(found: Sequence[Finding]) -> Table:
    """Links to the files of every table."""
    rows: list[list[str | Cell]] = []
    for finding in found:
        files = [f"table-{finding.name}.{ending}" for ending in ENDINGS]
        rows.append([finding.layout.title, *(Cell(file, href=quote(file)) for file in files)])
    return Table("Files of the tables", ["Table", "Markdown", "CSV", "LaTeX"], rows)


def _key_figures(design: Experiment, finding: Finding) -> list[tuple[str, str]]:
    """For the first groups: the best method, what it is compared with, and by how much it is better."""
    figures: list[tuple[str, str]] = []
    named = {(design.method_name(v.axes), design.group_name(v)): v.axes for v in design.variants}
    means = finding.summary.set_index(["method", "group"])["mean"].to_dict()
    for group, rows in list(finding.summary.groupby("group", sort=False))[:2]:
        best = rows.sort_values("mean", ascending=not finding.higher_is_better).iloc[0]
        place = (str(best["method"]), str(group))
        beside = {**named[place], **design.baseline}  # the same in all that the baseline leaves open
        partners = [other for other, axes in named.items() if axes == beside and pd.notna(best["difference"])]
        figures += [(f"{finding.label}, {', '.join(which)}", f"{means[which]:.3f}") for which in (*partners, place)]
        figures += [(f"{place[0]} against {other}, {group}", f"{best['difference']:+.3f}") for other, _ in partners]
    return figures


def _kept(design: Experiment, name: str, pictures: Any) -> list[Picture]:
    """The pictures, each written to `figures/` as well."""
    kept = list(pictures)
    for number, picture in enumerate(kept, start=1):
        write_bytes(design.folder / "figures" / f"{name}-{number}.{picture.kind}", picture.data)
    return kept


def _with_links(design: Experiment, finding: Finding) -> Table:
    """The table with every number leading to its trainings."""
    table, options = html_table(finding.layout), finding.options
    figures = finding.layout.figures
    ours = [number for number, path in enumerate(finding.layout.header) if path[-1] != "paper" or not options.paper]
    per_row = len(ours)
    rows = []
    for number, row in enumerate(table.rows):
        cells = list(row)
        for place, column in enumerate(ours):
            cell = cells[len(options.rows) + column]
            where = figures.iloc[number * per_row + place].to_dict()
            if isinstance(cell, Cell):
                cells[len(options.rows) + column] = replace(cell, href=f"{RUNS}#{quote(_anchor(design, where))}")
        rows.append(cells)
    return replace(table, rows=rows)


def _anchor(design: Experiment, place: Mapping[Any, Any]) -> str:
    """The place of a cell as the end of a link: its options on the axes that vary."""
    return "|".join(str(place[axis]) for axis, options in design.axes.items() if len(options) > 1) or "all"


def _ranks(design: Experiment, finding: Finding) -> Section | None:
    """How sure the order of the methods is, for every group."""
    statistics = design.options.statistics
    rows, pictures, agreements = [], [], []
    for group, ranks, agreement, picture in ranks_of(design, finding):
        for row in ranks.to_dict("records"):
            interval = f"{row['rank']:.1f} [{row['low']:.0f}, {row['high']:.0f}]"
            rows.append([group, str(row["method"]), f"{row['mean']:.3f}", interval, f"{100 * row['first']:.0f} %"])
        if pd.notna(agreement):
            agreements.append(f"{agreement:.2f} with {group}")
        pictures += [picture] if picture else []
    if not rows:
        return None
    note = (
        f"Ranks under {statistics.resamples} bootstrap resamples of subjects and draws, 1 is best; First: how often a "
        "method comes first. Two draws or splits order the methods alike (Kendall's tau; 1 always, 0 by chance): "
        f"{', '.join(agreements) or 'not known from one'}."
    )
    table = Table(finding.label, ["Among", "Method", "Mean", "Rank", "First"], rows, note)
    return Section("How sure is the order?", tables=[table], pictures=_kept(design, "ranks", pictures))


def _runs_page(design: Experiment, trainings: Sequence[Training], scores: pd.DataFrame) -> Report:
    """The trainings behind every number, each with a link to its own report."""
    dice = scores.set_index("run")["dice"].to_dict()
    tables: dict[str, Table] = {}
    for training in trainings:
        anchor = _anchor(design, training.variant.axes)
        name = ", ".join(f"{axis} {option}" for axis, option in training.variant.axes.items())
        header = ["Training", "Split", "Draw", f"Dice, {judged_on(design)}", "Pre-training"]
        table = tables.setdefault(anchor, Table(name, header, [], anchor=anchor))
        value = dice.get(str(training.job.folder))
        score = "" if pd.isna(value) else f"{value:.3f}"
        before = _link(design, training.before.folder) if training.before else "none"
        row = [_link(design, training.job.folder), str(training.split.index), str(training.draw), score, before]
        table.rows = [*table.rows, row]
    lead = "Every training behind the numbers, with its own report: learning curves, every case, settings, versions."
    results = Table(
        "Results", ["Page", "What it shows"], [[Cell(design.name, href=INDEX), "tables, figures, pictures"]]
    )
    sections = [Section("Back to the experiment", tables=[results]), Section("Trainings", tables=list(tables.values()))]
    return Report(
        f"{design.name}: trainings", f"{lead} {cautions(design)}".strip(), sections=sections, footer=_footer()
    )


def _link(design: Experiment, folder: Path) -> str | Cell:
    if not (folder / "report.html").exists():
        return f"{folder.name} (not done)"
    return Cell(folder.name, href=quote(os.path.relpath(folder / "report.html", design.folder)))


def _page(design: Experiment, trainings: Sequence[Training], failures: Sequence[Failure]) -> Report:
    axes = {**design.axes, "split": {t.split.index for t in trainings}, "draw": {t.draw for t in trainings}}
    varied = ", ".join(f"{axis} ({len(options)})" for axis, options in axes.items() if len(options) > 1)
    done = sum(training.job.done() for training in trainings)
    summary = str(design.settings.get("summary", "")).strip()
    lead = f"{summary}\n\n{done} of {count(trainings, 'fine-tuning')} done. What varies: {varied or 'nothing'}."
    lead = f"{lead} {cautions(design)}".strip()
    warnings = [f"{failure.job.folder.relative_to(design.out)}: {failure.reason}" for failure in failures]
    warnings += _warnings(design, trainings)
    return Report(design.name, lead, warnings=warnings, footer=_footer())


def _footer() -> str:
    return f"Made by glocal {runs.environment()['glocal']}. Research software, not a medical device."


def _warnings(design: Experiment, trainings: Sequence[Training]) -> list[str]:
    """What trainings warned of, each sentence once, with how many said it and the first of them."""
    said: dict[str, list[Path]] = {}
    for folder in dict.fromkeys(job.folder for t in trainings for job in (t.before, t.job) if job and job.done()):
        for warning in runs.manifest_of(folder).get("warnings", []):
            said.setdefault(warning, []).append(folder)
    return [
        f"{count(folders, 'training')}, first {folders[0].relative_to(design.out)}: {warning}"
        for warning, folders in said.items()
    ]


def _tuning(tuning: pd.DataFrame | None) -> list[Section]:
    """Every trial of the tuning, and what it chose."""
    if tuning is None:
        return []
    rows = [
        [
            str(row["method"]),
            str(row["trial"]),
            str(row["settings"]),
            "failed" if pd.isna(row["dice"]) else f"{row['dice']:.3f}",
            "yes" if row["chosen"] else "",
        ]
        for row in tuning.to_dict("records")
    ]
    text = "Equally many trials for every method, judged on development subjects, which are never tested on here."
    table = Table("Trials", ["Method", "Trial", "Settings", "Dice", "Chosen"], rows)
    return [Section("Tuning", text, [table], collapsed=True)]


def _closing(design: Experiment) -> list[Section]:
    """Settings, and what made the results."""
    flat = runs.flatten(dict(design.settings))
    rows = [[key, str(value)] for key, value in flat.items() if value not in (None, "", [], {}, ())]
    made = runs.environment()
    versions = [["glocal", made["glocal"]], ["Python", made["python"]], *([k, v] for k, v in made["packages"].items())]
    return [
        Section("Settings", tables=[Table("recipe.yaml", ["Key", "Value"], rows)], collapsed=True),
        Section("Versions", tables=[Table("of this page", ["What", "Value"], versions)], collapsed=True),
    ]
