"""The report of a run: what was done, what came out and what to beware of, as one HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from glocal import runs
from glocal.data.split import ProtocolOptions
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.experiments.probed import all_probed, probed
from glocal.experiments.sections import (
    best_and_worst,
    closing,
    count,
    curve,
    curves_together,
    doubts,
    examples,
    masks,
    measured,
    weights,
)
from glocal.experiments.tables import HEADINGS, budget_size, caption, collect_results, paired, read_table, scores
from glocal.files import read_json
from glocal.finetuning.measure import evaluation_of, subjects_of, with_tta
from glocal.model import read_header
from glocal.reporting.figures import paired_differences
from glocal.reporting.html import Picture, Report, Section, Table, papers, write_report

NO_TEST = (
    "No labelled volume was kept for testing, so nothing here says how good the masks of unseen cases are. Look at "
    "them, or measure by leave-one-out: protocol.leave_one_out=true, with finetune.labels=all or one less than you "
    "have, and another run folder, trains once per labelled volume and tests on it."
)


def report(run: Path) -> Path:
    """Write `report.html` into a finished run of `run`, `pretrain` or `finetune`.

    Raises:
        GlocalError: no run, or not finished.
    """
    kind = runs.settings_of(run).get("kind")
    make = {"pretrain": _of_pretraining, "finetune": _of_finetuning, "run": _of_run}.get(str(kind))
    if make is None:
        raise GlocalError(f"{run} holds no run of glocal.")
    runs.manifest_of(run)
    write_report(make(run), run / "report.html")
    return run / "report.html"


def _of_pretraining(run: Path) -> Report:
    settings, manifest = runs.settings_of(run), runs.manifest_of(run)
    model = read_header(run / "model.safetensors")
    provenance = model.provenance
    split = read_json(run / "split.json")["split"]
    volumes = [*split["pretrain"], *(split["test"] if provenance["transductive"] else [])]
    lead = (
        f"A network was pre-trained without labels by {settings['method']} on the images of {count(volumes, 'volume')} "
        f"of {count(provenance['subjects'], 'subject')}, {settings['max_iterations']} iterations per stage."
    )
    figures = [("method", settings["method"]), ("subjects", str(len(provenance["subjects"])))]
    curves = Section(
        "Learning curves", pictures=[curve(log.parent, "loss") for log in sorted(run.glob("stage-*/metrics.jsonl"))]
    )
    sections = [*probed(run), curves, *weights(run.glob("stage-*/transfer.json")), *papers(model.papers), *closing(run)]
    return Report(
        f"Pre-training: {settings['method']}", lead, figures, _warnings(manifest), sections, _footer(manifest)
    )


def _of_finetuning(run: Path) -> Report:
    settings, manifest = runs.settings_of(run), runs.manifest_of(run)
    model = read_header(run / "model.safetensors")
    provenance = model.provenance
    before = provenance["pretraining"]
    start = f"weights pre-trained by {before['pretraining']['method']}" if before else "random weights"
    lead = (
        f"A network was fine-tuned on {count(provenance['labelled'], 'labelled volume')} of {provenance['dataset']} "
        f"({', '.join(provenance['labelled'])}), starting from {start}, for {settings['max_iterations']} iterations."
    )
    labelled = str(len(provenance["labelled"]))
    if provenance["validation"]:
        lead += f" {count(provenance['validation'], 'further labelled volume')} chose the best checkpoint."
        labelled += f" + {len(provenance['validation'])} for validation"
    figures = [("labelled volumes", labelled), ("probabilities", _calibration(provenance))]
    curves = [curve(run, "loss")] + ([curve(run, "validation_dice")] if provenance["validation"] else [])
    sections = [Section("Learning curves", pictures=curves)]
    warnings = _warnings(manifest)
    found: list[Section] = []
    for what, cases in sorted(manifest["evaluated"].items(), reverse=True):  # test subjects first
        if cases:
            last = evaluation_of(run, what).query("checkpoint == 'last'")
            dice, whose, how = last.groupby("case")["dice"].mean().mean(), subjects_of(what), with_tta(what)
            figures.append((f"mean Dice of {count(cases, f'{whose} case')}{how}", f"{dice:.3f}"))
            for section in (*measured(last), *best_and_worst(dict.fromkeys(last["case"], run), last, what)):
                section.title = f"{section.title}: {whose} cases{how}"
                found.append(section)
    if not found:
        warnings.append(NO_TEST)
    sections = [*found, *sections]
    sections += [*examples(run, model.labels), *weights([run / "transfer.json"]), *papers(model.papers), *closing(run)]
    return Report(f"Fine-tuning: {settings['strategy']}", lead, figures, warnings, sections, _footer(manifest))


def _calibration(provenance: dict[str, Any]) -> str:
    found = provenance.get("calibration")
    return f"calibrated on {count(range(found['volumes']), 'volume')}" if found else "uncalibrated"


def _of_run(run: Path) -> Report:
    settings, manifest = runs.settings_of(run), runs.manifest_of(run)
    store = Store.open(run / "store")
    results = collect_results(run)
    contenders = list(dict.fromkeys(path.parent.name for path in sorted(run.glob("finetune/split-*/*/labels-*"))))
    lead = _lead(settings, store, contenders)
    trainings = sorted(run.glob("finetune/split-*/*/labels-*"))
    warnings = [*_warnings(manifest), *store.warnings, *warnings_below(run), *doubts(run)]
    figures: list[tuple[str, str]] = []
    sections: list[Section] = []
    if results.empty:
        warnings.insert(0, NO_TEST)
    else:
        figures = _key_figures(run)
        sections.append(_comparison(run, results))
        protocol = ProtocolOptions.model_validate(settings["protocol"])
        best = _shown_trainings(run, results, protocol)
        what = protocol.measured
        parts = {training: evaluation_of(training, what).query("checkpoint == 'last'") for training in best}
        frame = pd.concat(parts.values())
        runs_of = {case: training for training, part in parts.items() for case in part["case"]}
        name = best[0].relative_to(run / "finetune")
        shown = f"Of the best contender, the training with the median Dice: {name}."
        if len(best) > 1:
            shown = (
                f"Of the best contender, every case as predicted by the training that had left it out ({len(best)} "
                f"trainings: {name.parent.parent.name.rstrip('0123456789')}*/{'/'.join(name.parts[1:])})."
            )
        for section in (*measured(frame), *best_and_worst(runs_of, frame, what)):
            section.text = f"{shown} {section.text}" if section.tables or section.pictures else section.text
            sections.append(section)
    sections += masks(run, store)
    sections += all_probed(run)
    curves = [curve(log.parent, "loss") for log in sorted(run.glob("pretrain/split-0/*/stage-*/metrics.jsonl"))]
    curves.append(curves_together(trainings))
    sections.append(Section("Learning curves", pictures=curves, collapsed=not results.empty))
    sections += weights(run.glob("finetune/split-0/*/labels-*-draw-0/transfer.json"))
    cited = (paper for training in trainings for paper in read_header(training / "model.safetensors").papers)
    sections += [*papers(cited), *closing(run)]
    return Report(f"{settings['name']}: {store.name}", lead, figures, warnings, sections, _footer(manifest))


def _lead(settings: dict[str, Any], store: Store, contenders: Sequence[str]) -> str:
    protocol, finetuning = settings["protocol"], settings["finetune"]
    others = [name for name in contenders if name != "random"]
    labelled = sum(volume.labelled for volume in store.volumes)
    before = f"pre-trained without labels ({', '.join(others)}), then " if others else ""
    text = (
        f"The dataset {store.name} has {len(store.volumes)} volumes, {labelled} of them labelled. "
        f"A network was {before}fine-tuned on {_budget(finetuning.get('labels', 2), protocol['budget'])}"
    )
    if protocol["draws"] > 1:
        chosen = "" if finetuning.get("labels") in ("all", ["all"]) else "chosen "
        text += f", {chosen}{protocol['draws']} times at random"
    if finetuning.get("validation"):
        text += f" (and {finetuning['validation']} more to choose the best checkpoint)"
    if others and "random" in contenders:
        text += ", and compared with the same training from random weights"
    if protocol["leave_one_out"]:
        text += ", once for each labelled subject, who was left out and then tested on (leave-one-out)"
    elif protocol["folds"]:
        text += f", in {protocol['folds']}-fold cross-validation by subject"
    elif protocol["splits"] > 1:
        text += f", in {protocol['splits']} splits of the subjects"
    text += "."
    if protocol["transductive"]:
        text += " Transductive: the images of test subjects, not their labels, were part of the pre-training."
    return text


def _budget(labels: Any, unit: str) -> str:
    budgets = labels if isinstance(labels, list) else [labels]
    if "all" not in budgets and isinstance(budgets[0], str):
        return f"the labelled volumes {', '.join(budgets)}"
    return f"{' or '.join(map(str, budgets))} labelled {unit if budgets != [1] else unit.removesuffix('s')}"


def _key_figures(run: Path) -> list[tuple[str, str]]:
    """For the smallest budgets: random weights, the best contender and what it gained."""
    rows = read_table(run)
    figures: list[tuple[str, str]] = []
    for labels in list(dict.fromkeys(row["labels"] for row in rows))[:2]:
        of_budget = [row for row in rows if row["labels"] == labels]
        base = next((row for row in of_budget if row["contender"] == "random"), None)
        best = max(of_budget, key=lambda row: float(row["dice"].split(" ")[0]) if row is not base else -1.0)
        for row in (base, best) if base not in (None, best) else (best,):
            assert row is not None
            figures.append((f"Dice, {row['contender']}, {labels} labelled", row["dice"].split(" ")[0]))
        if best["difference"]:
            figures.append((f"{best['contender']} against random", best["difference"].split(" ")[0]))
    return figures


def _comparison(run: Path, results: pd.DataFrame) -> Section:
    rows = read_table(run)
    shown = [key for key in HEADINGS if any(row[key] != "" for row in rows)]
    table = Table(
        "Comparison", [HEADINGS[key] for key in shown], [[str(row[key]) for key in shown] for row in rows], caption(run)
    )
    differences = paired(scores(results).query("checkpoint == 'last'"))
    pictures = []
    if not differences.empty:
        picture = paired_differences(differences)
        pictures.append(
            Picture("Each point is one pair of trainings with the same labelled volumes", picture, "svg", wide=True)
        )
    return Section("What came out", tables=[table], pictures=pictures)


def _shown_trainings(run: Path, results: pd.DataFrame, protocol: ProtocolOptions) -> list[Path]:
    """The training with the median score of the best contender at the smallest budget: neither luck nor bad luck.

    Where every split leaves out other subjects, those of all splits, of the median draw, so that all are shown.
    """
    table = scores(results).query("checkpoint == 'last'")
    table = table[table["labels"] == min(table["labels"], key=budget_size)]
    best = table.groupby("contender")["dice"].mean().idxmax()
    mine = table[table["contender"] == best].sort_values("dice").reset_index()
    if protocol.leave_one_out or protocol.folds:
        draws = mine.groupby("draw")["dice"].mean().sort_values().index
        mine = mine[mine["draw"] == draws[(len(draws) - 1) // 2]].sort_values("split")
    else:
        mine = mine.iloc[[(len(mine) - 1) // 2]]
    places = zip(mine["split"], mine["labels"], mine["draw"], strict=True)
    return [run / "finetune" / f"split-{s}" / str(best) / f"labels-{labels}-draw-{draw}" for s, labels, draw in places]


def _warnings(manifest: dict[str, Any]) -> list[str]:
    return list(manifest.get("warnings", []))


def warnings_below(run: Path) -> list[str]:
    """The warnings of all trainings of a run, each with its place."""
    found = []
    for manifest in sorted([*run.glob("pretrain/*/*/manifest.json"), *run.glob("finetune/*/*/*/manifest.json")]):
        place = manifest.parent.relative_to(run)
        found += [f"{place}: {warning}" for warning in read_json(manifest).get("warnings", [])]
    return found


def _footer(manifest: dict[str, Any]) -> str:
    return (
        f"Made by glocal {manifest['glocal']} on {manifest['finished'][:10]}. Research software, not a medical device."
    )
