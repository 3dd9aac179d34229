"""The report of a run: what was done, what came out and what to beware of, as one HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from glocal import runs
from glocal.data.dataset import Dataset, read_dataset
from glocal.data.image import read_image, read_labels
from glocal.data.orientation import Undo
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.evaluation.evaluate import note_counts, summary
from glocal.evaluation.metrics import EMPTY_POLICY
from glocal.experiments.tables import HEADINGS, caption, collect_results, paired, read_table, scores
from glocal.files import read_json
from glocal.model import read_header
from glocal.reporting.figures import class_boxes, learning_curves, overlay_row, paired_differences
from glocal.reporting.html import Picture, Report, Section, Table, write_report

METRIC_NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "hd95": "HD95 (mm)",
    "hd": "HD (mm)",
    "assd": "ASSD (mm)",
    "nsd": "Surface Dice",
}
NO_TEST = (
    "No labelled volume was kept for testing, so nothing here says how good the masks of unseen cases are. Look at "
    "them, or measure by leave-one-out: protocol.leave_one_out=true, with finetune.labels one less than you have and "
    "another run folder, trains once per labelled volume and tests on it."
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
    provenance = read_header(run / "model.safetensors").provenance
    lead = (
        f"A network was pre-trained without labels by {settings['method']} on the images of "
        f"{len(provenance['subjects'])} subjects, {settings['max_iterations']} iterations per stage."
    )
    figures = [("method", settings["method"]), ("subjects", str(len(provenance["subjects"])))]
    curves = Section(
        "Learning curves", pictures=[_curve(log.parent, "loss") for log in sorted(run.glob("stage-*/metrics.jsonl"))]
    )
    sections = [curves, *_weights(run.glob("stage-*/transfer.json")), *_closing(run)]
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
        f"A network was fine-tuned on {_count(provenance['labelled'], 'labelled volume')} of {provenance['dataset']} "
        f"({', '.join(provenance['labelled'])}), starting from {start}, for {settings['max_iterations']} iterations."
    )
    labelled = str(len(provenance["labelled"]))
    if provenance["validation"]:
        lead += f" {_count(provenance['validation'], 'further labelled volume')} chose the best checkpoint."
        labelled += f" + {len(provenance['validation'])} for validation"
    figures = [("labelled volumes", labelled)]
    curves = [_curve(run, "loss")] + ([_curve(run, "validation_dice")] if provenance["validation"] else [])
    sections = [Section("Learning curves", pictures=curves)]
    warnings = _warnings(manifest)
    if (run / "evaluation.csv").exists():
        frame = pd.read_csv(run / "evaluation.csv")
        last = frame[frame["checkpoint"] == "last"]
        figures += [
            ("mean Dice", f"{last.groupby('case')['dice'].mean().mean():.3f}"),
            ("cases measured", str(last["case"].nunique())),
        ]
        sections = [*_measured(last), *_pictures(run, last), *sections]
    else:
        warnings.append(NO_TEST)
    sections += [*_weights([run / "transfer.json"]), *_closing(run)]
    return Report("Fine-tuning", lead, figures, warnings, sections, _footer(manifest))


def _of_run(run: Path) -> Report:
    settings, manifest = runs.settings_of(run), runs.manifest_of(run)
    store = Store.open(run / "store")
    results = collect_results(run)
    contenders = list(dict.fromkeys(path.parent.name for path in sorted(run.glob("finetune/split-*/*/labels-*"))))
    lead = _lead(settings, store, contenders)
    trainings = sorted(run.glob("finetune/split-*/*/labels-*"))
    warnings = [*_warnings(manifest), *store.warnings, *warnings_below(run)]
    figures: list[tuple[str, str]] = []
    sections: list[Section] = []
    if results.empty:
        warnings.insert(0, NO_TEST)
    else:
        figures = _key_figures(run)
        sections.append(_comparison(run, results))
        best = _shown_training(run, results)
        frame = pd.read_csv(best / "evaluation.csv")
        frame = frame[frame["checkpoint"] == "last"]
        shown = f"Of the best contender, the training with the median Dice: {best.relative_to(run / 'finetune')}."
        for section in (*_measured(frame), *_pictures(best, frame)):
            section.text = f"{shown} {section.text}" if section.tables or section.pictures else section.text
            sections.append(section)
    sections += _masks(run, store)
    curves = [_curve(log.parent, "loss") for log in sorted(run.glob("pretrain/split-0/*/stage-*/metrics.jsonl"))]
    curves.append(_curves_together(trainings[:12]))
    sections.append(Section("Learning curves", pictures=curves, collapsed=not results.empty))
    sections += [*_weights(run.glob("finetune/split-0/*/labels-*-draw-0/transfer.json")), *_closing(run)]
    return Report(f"{settings['name']}: {store.name}", lead, figures, warnings, sections, _footer(manifest))


def _lead(settings: dict[str, Any], store: Store, contenders: Sequence[str]) -> str:
    protocol, finetuning = settings["protocol"], settings["finetune"]
    others = [name for name in contenders if name != "random"]
    labelled = sum(volume.labelled for volume in store.volumes)
    before = f"pre-trained without labels ({', '.join(others)}), then " if others else ""
    text = (
        f"The dataset {store.name} has {len(store.volumes)} volumes, {labelled} of them labelled. "
        f"A network was {before}fine-tuned on {_budget(finetuning.get('labels', 2))}"
    )
    if protocol["draws"] > 1:
        text += f", chosen {protocol['draws']} times at random"
    if finetuning.get("validation"):
        text += f" (and {finetuning['validation']} more to choose the best checkpoint)"
    if others and "random" in contenders:
        text += ", and compared with the same training from random weights"
    if protocol["leave_one_out"]:
        text += ", once for each labelled subject, who was left out and then tested on (leave-one-out)"
    elif protocol["splits"] > 1:
        text += f", in {protocol['splits']} splits of the subjects"
    text += "."
    if protocol["transductive"]:
        text += " Transductive: the images of test subjects, not their labels, were part of the pre-training."
    return text


def _budget(labels: Any) -> str:
    if isinstance(labels, list) and isinstance(labels[0], str):
        return f"the labelled volumes {', '.join(labels)}"
    several = isinstance(labels, list) or labels != 1
    count = " or ".join(map(str, labels)) if isinstance(labels, list) else str(labels)
    return f"{count} labelled volume{'s' if several else ''}"


def _key_figures(run: Path) -> list[tuple[str, str]]:
    rows = read_table(run)
    smallest = [row for row in rows if row["labels"] == rows[0]["labels"]]
    figures = [(f"Dice, {row['contender']}, {row['labels']} labelled", row["dice"].split(" ")[0]) for row in smallest]
    gains = [
        (f"{row['contender']} against random", row["difference"].split(" ")[0]) for row in smallest if row["difference"]
    ]
    return (figures + gains)[:6]


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


def _shown_training(run: Path, results: pd.DataFrame) -> Path:
    """The training with the median score of the best contender at the smallest budget: neither luck nor bad luck."""
    table = scores(results).query("checkpoint == 'last'")
    table = table[table["labels"] == table["labels"].min()]
    best = table.groupby("contender")["dice"].mean().idxmax()
    mine = table[table["contender"] == best].sort_values("dice").reset_index()
    row = mine.iloc[(len(mine) - 1) // 2]
    return run / "finetune" / f"split-{row['split']}" / str(best) / f"labels-{row['labels']}-draw-{row['draw']}"


def _measured(frame: pd.DataFrame) -> list[Section]:
    """Tables and boxes of the cases in `frame`, rows of `evaluate`."""
    shown = [metric for metric in METRIC_NAMES if frame[metric].notna().any()]
    statistics = summary(frame).set_index(["class", "metric"])
    names = [str(name) for name in statistics.index.get_level_values("class").unique()]
    mean, sd = (statistics[column].astype(float).to_dict() for column in ("mean", "sd"))
    per_class = [[name, *(_spread(mean[(name, m)], sd[(name, m)]) for m in shown)] for name in names]
    counts = note_counts(frame).sum()
    odd = ", ".join(f"{int(count)} {note}" for note, count in counts.items() if count)
    headings = [METRIC_NAMES[metric] for metric in shown]
    tables = [
        Table("By structure", ["Structure", *headings], per_class, EMPTY_POLICY + (f" Here: {odd}." if odd else "")),
    ]
    per_case = [
        [str(row["case"]), str(row["class"]), *(f"{row[metric]:.3f}" for metric in shown), _text(row["note"])]
        for _, row in frame.iterrows()
    ]
    pictures = [Picture("Dice of every case", class_boxes(frame, "dice", "Dice"), "svg")]
    if "hd95" in shown:
        pictures.append(Picture("HD95 of every case", class_boxes(frame, "hd95", "HD95 (mm)"), "svg"))
    all_cases = Table("Every case and structure", ["Case", "Structure", *headings, "Note"], per_case)
    return [
        Section("By structure", tables=tables, pictures=pictures),
        Section("Every case", tables=[all_cases], collapsed=True),
    ]


def _spread(mean: float, sd: float) -> str:
    return f"{mean:.3f}" if np.isnan(sd) else f"{mean:.3f} ± {sd:.3f}"  # one case has no deviation


def _text(value: Any) -> str:
    return "" if not isinstance(value, str) else value


def _pictures(run: Path, frame: pd.DataFrame) -> list[Section]:
    """Best, median and worst case, at the slice with most of the structures."""
    store_path = _store_of(run)
    if store_path is None or not (run / "predictions").is_dir():
        return []
    store = Store.open(store_path)
    try:
        dataset = read_dataset(store.dataset)
    except GlocalError:
        return [Section("Pictures", text=f"The images are no longer in {store.dataset}, so none can be shown.")]
    order = frame.groupby("case")["dice"].mean().sort_values(ascending=False)
    places = {(len(order) - 1) // 2: "Median", len(order) - 1: "Worst", 0: "Best"}  # with few cases some coincide
    picks = {name: str(order.index[place]) for place, name in sorted(places.items())}
    pictures = [
        Picture(
            f"{name} case: {case}, mean Dice {order[case]:.3f}",
            _overlay(store, dataset, run / "predictions", case),
            "png",
            wide=True,
        )
        for name, case in picks.items()
    ]
    return [Section("Best, median and worst case", pictures=pictures)]


def _store_of(run: Path) -> Path | None:
    """Where the slices of a fine-tuning are: said in its manifest."""
    path = Path(runs.manifest_of(run).get("store", ""))
    return path if (path / "index.json").exists() else None


def _masks(run: Path, store: Store) -> list[Section]:
    """Some masks of the unlabelled volumes, for the eye."""
    files = sorted(path for path in (run / "masks").glob("*") if not path.name.startswith("."))
    if not files:
        return []
    dataset = read_dataset(store.dataset)
    names = [path.name.removesuffix(dataset.file_ending) for path in files]
    shown = names[:: max(1, len(names) // 4)][:4]
    pictures = [Picture(name, _overlay(store, dataset, run / "masks", name), "png", wide=True) for name in shown]
    text = f"The masks of {_count(names, 'unlabelled volume')} are in {run / 'masks'}; some of them:"
    return [Section("Masks of the unlabelled volumes", text=text, pictures=pictures)]


def _overlay(store: Store, dataset: Dataset, masks: Path, name: str) -> bytes:
    """The slice of a case with most of the structures: image, expert's labels if there are any, mask."""
    case = next(case for case in dataset.cases if case.name == name)
    undo = store.volumes[store.index_of(name)].undo
    image = undo.oriented(read_image(case.images[:1]).array)[:, 0]
    prediction = undo.oriented(read_labels(masks / f"{name}{dataset.file_ending}").array)[:, 0]
    truth = undo.oriented(read_labels(case.label).array)[:, 0] if case.label else None
    place = int(np.argmax(((prediction if truth is None else truth) != 0).sum((1, 2))))
    title = f"{name}, slice {place + 1} of {len(image)}"
    expert = None if truth is None else truth[place]
    return overlay_row(image[place], expert, prediction[place], store.labels, title, _aspect(store, undo, name))


def _aspect(store: Store, undo: Undo, name: str) -> float:
    """Height of a pixel against its width."""
    spacing = store.volumes[store.index_of(name)].spacing[::-1]
    _, rows, columns = undo.order
    return spacing[rows] / spacing[columns] if store.plan.options.spacing_known else 1.0


def _read_log(folder: Path, key: str) -> list[tuple[float, float]]:
    lines = pd.read_json(folder / "metrics.jsonl", lines=True)
    if key not in lines:
        return []
    kept = lines[lines[key].notna()]
    return [(float(i), float(v)) for i, v in zip(kept["iteration"], kept[key], strict=True)]


def _curve(folder: Path, key: str) -> Picture:
    name = f"{folder.parent.name}, {folder.name}" if folder.name.startswith("stage-") else folder.name
    label = {"loss": "Loss", "validation_dice": "Dice on validation volumes"}[key]
    return Picture(f"{label}: {name}", learning_curves({name: _read_log(folder, key)}, "", label), "svg")


def _curves_together(folders: Sequence[Path]) -> Picture:
    series = {f"{f.parent.name} {f.name.removeprefix('labels-')}": _smooth(_read_log(f, "loss")) for f in folders}
    return Picture(
        "Loss of the fine-tunings (means of 50 iterations)", learning_curves(series, "", "Loss"), "svg", wide=True
    )


def _smooth(points: list[tuple[float, float]], width: int = 5) -> list[tuple[float, float]]:
    groups = [points[k : k + width] for k in range(0, len(points), width)]
    return [(float(np.mean([p[0] for p in g])), float(np.mean([p[1] for p in g]))) for g in groups]


def _weights(files: Any) -> list[Section]:
    """What was and was not transferred, once per set of weights."""
    tables = []
    for path in sorted(files):
        if not path.exists():
            continue
        content = read_json(path)
        rows = [[kind, str(len(names)), ", ".join(_parts(names))] for kind, names in content.items() if names]
        tables.append(Table(f"{path.parent.parent.name}, {path.parent.name}", ["Weights", "Count", "Parts"], rows))
    return [Section("Weights transferred", tables=tables, collapsed=True)] if tables else []


def _parts(names: Sequence[str]) -> list[str]:
    """`encoder.0.1.weight` -> `encoder`, `decoder.2...` -> `decoder.2`."""
    return list(dict.fromkeys(".".join(n.split(".")[: 2 if n.startswith("decoder") else 1]) for n in names))


def _closing(run: Path) -> list[Section]:
    settings = yaml.safe_dump(runs.settings_of(run), sort_keys=False, allow_unicode=True)
    flat = runs.flatten(yaml.safe_load(settings))
    rows = [[key, str(value)] for key, value in flat.items() if value not in (None, "")]
    made = runs.manifest_of(run)
    versions = [["glocal", made["glocal"]], ["Python", made["python"]], *([k, v] for k, v in made["packages"].items())]
    facts = [
        ["machine", made["machine"]],
        ["time, last start to end", f"{made['seconds']:.0f} s"],
        ["peak memory of the process", f"{made['peak_memory_mib']} MiB"],
    ]
    return [
        Section("Settings", tables=[Table("recipe.yaml", ["Key", "Value"], rows)], collapsed=True),
        Section("Versions", tables=[Table("manifest.json", ["What", "Value"], versions + facts)], collapsed=True),
    ]


def _warnings(manifest: dict[str, Any]) -> list[str]:
    return list(manifest.get("warnings", []))


def warnings_below(run: Path) -> list[str]:
    """The warnings of all trainings of a run, each with its place."""
    found = []
    for manifest in sorted([*run.glob("pretrain/*/*/manifest.json"), *run.glob("finetune/*/*/*/manifest.json")]):
        place = manifest.parent.relative_to(run)
        found += [f"{place}: {warning}" for warning in read_json(manifest).get("warnings", [])]
    return found


def _count(items: Sequence[Any], noun: str) -> str:
    return f"{len(items)} {noun}{'s' if len(items) != 1 else ''}"


def _footer(manifest: dict[str, Any]) -> str:
    return (
        f"Made by glocal {manifest['glocal']} on {manifest['finished'][:10]}. Research software, not a medical device."
    )
