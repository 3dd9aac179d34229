"""The sections of a report: tables, pictures and curves made from what a run left behind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from glocal import runs
from glocal.data.dataset import Dataset, read_dataset
from glocal.data.image import read_image, read_labels
from glocal.data.inputs import mask_name
from glocal.data.orientation import Undo
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.evaluation.cases import doubt
from glocal.evaluation.evaluate import FOREGROUND, note_counts, pooled_dice, summary
from glocal.evaluation.metrics import EMPTY_POLICY
from glocal.files import read_json
from glocal.finetuning.measure import predictions_folder
from glocal.overview import read_cases
from glocal.predictions import CASES, PAGE
from glocal.reporting.figures import class_boxes, learning_curves, overlay_row
from glocal.reporting.html import Picture, Section, Table
from glocal.reporting.rows import slice_rows

METRIC_NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "hd95": "HD95 (mm)",
    "hd": "HD (mm)",
    "assd": "ASSD (mm)",
    "nsd": "Surface Dice",
}
DECIMALS = {"hd95": 1, "hd": 1, "assd": 2}  # of millimetres; 3 of all else


def measured(frame: pd.DataFrame) -> list[Section]:
    """Tables and boxes of the cases in `frame`, rows of `evaluate`."""
    shown = [metric for metric in METRIC_NAMES if frame[metric].notna().any()]
    statistics = summary(frame).set_index(["class", "metric"])
    names = [str(name) for name in statistics.index.get_level_values("class").unique()]
    mean, sd = (statistics[column].astype(float).to_dict() for column in ("mean", "sd"))
    per_class = [[name, *(_spread(mean[(name, m)], sd[(name, m)], m) for m in shown)] for name in names]
    counts = note_counts(frame).sum()
    odd = ", ".join(f"{int(number)} {note}" for note, number in counts.items() if number)
    headings = [METRIC_NAMES[metric] for metric in shown]
    note = EMPTY_POLICY + (f" Here: {odd}." if odd else "")
    note += " Surface Dice: the part of both surfaces that is within 1 mm of the other." * ("nsd" in shown)
    note += f" All cases pooled as one, as Zeng et al. report it: Dice {pooled_dice(frame)[FOREGROUND]:.3f}."
    tables = [Table("By structure", ["Structure", *headings], per_class, note)]
    per_case = [
        [str(row["case"]), str(row["class"]), *(_number(row[m], m) for m in shown), _text(row["note"])]
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


def _spread(mean: float, sd: float, metric: str) -> str:
    spread = "" if np.isnan(sd) else f" ± {_number(sd, metric)}"  # one case has no deviation
    return _number(mean, metric) + spread


def _number(value: float, metric: str) -> str:
    return f"{value:.{DECIMALS.get(metric, 3)}f}"


def _text(value: Any) -> str:
    return "" if not isinstance(value, str) else value


def best_and_worst(runs_of: Mapping[str, Path], frame: pd.DataFrame, what: str) -> list[Section]:
    """Best, median and worst case of `what` was measured, at the slice with most of the structures.

    Args:
        runs_of: the training that predicted each case.
        frame: rows of `evaluate`.
        what: was measured: see `ProtocolOptions.measured`.
    """
    folders = {case: predictions_folder(run, what) for case, run in runs_of.items()}
    store_path = _store_of(next(iter(runs_of.values())))
    if store_path is None or not all(folder.is_dir() for folder in folders.values()):
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
            _overlay(store, dataset, folders[case], case),
            "png",
            wide=True,
        )
        for name, case in picks.items()
    ]
    return [Section("Best, median and worst case", pictures=pictures)]


def examples(run: Path, class_names: Mapping[str, int]) -> list[Section]:
    """The pictures that a strategy kept of its training: pseudo-labels, generated images; most keep none."""
    if not (run / "examples.npz").exists():
        return []
    with np.load(run / "examples.npz") as file:
        titles = dict.fromkeys(key.rpartition("/")[0] for key in file)
        rows = [(title, file[f"{title}/images"], file.get(f"{title}/labels")) for title in titles]
    picture = Picture(
        "Slices with the labels they were trained with", slice_rows(rows, None, class_names), "png", wide=True
    )
    return [Section("What the strategy made", pictures=[picture])]


def _store_of(run: Path) -> Path | None:
    """Where the slices of a fine-tuning are: said in its manifest."""
    path = Path(runs.manifest_of(run).get("store", ""))
    return path if (path / "index.json").exists() else None


def masks(run: Path, store: Store) -> list[Section]:
    """Some masks of the unlabelled volumes, for the eye: those that need it first."""
    folder = run / "masks"
    if not (folder / CASES).exists():
        return []
    dataset, table = read_dataset(store.dataset), read_cases(folder)
    there = [(folder / mask_name(case, dataset.file_ending)).exists() for case in table["case"]]  # others were moved
    flags = dict(zip(table["case"][there].astype(str), table["flags"][there].astype(str), strict=True))
    pictures = [
        Picture(
            f"{case}: {flags[case]}" if flags[case] else case, _overlay(store, dataset, folder, case), "png", wide=True
        )
        for case in list(flags)[:4]
    ]
    text = (
        f"The masks of {count(list(flags), 'unlabelled volume')} are in {folder}, made by "
        f"{runs.manifest_of(run)['masks_by']}, the last of all fine-tunings; the figures above may be of others. Those "
        f"that need a human's eye come first in {CASES} there; {PAGE} shows them with maps of where the network is "
        f"unsure. The first:"
    )
    return [Section("Masks of the unlabelled volumes", text=text, pictures=pictures)]


def doubts(run: Path) -> list[str]:
    """What to beware of in the masks of the unlabelled volumes."""
    doubtful = doubt(read_cases(run / "masks")) if (run / "masks" / CASES).exists() else None
    return [f"Masks of the unlabelled volumes: {doubtful}"] if doubtful else []


@dataclass(frozen=True)
class ShownSlice:
    """A slice of a case for a picture: image, expert's labels if there are any, and masks, all `(H, W)`."""

    title: str
    image: NDArray[Any]
    truth: NDArray[Any] | None
    masks: tuple[NDArray[Any], ...]
    aspect: float


def shown_slice(store: Store, dataset: Dataset, folders: Sequence[Path], name: str) -> ShownSlice:
    """The slice of a case that shows most of its structures, with the masks of it in some folders."""
    case = next(case for case in dataset.cases if case.name == name)
    undo = store.volumes[store.index_of(name)].undo
    image = undo.oriented(read_image(case.images[:1]).array)[:, 0]
    files = [folder / mask_name(name, dataset.file_ending) for folder in folders]
    masks = [undo.oriented(read_labels(file).array)[:, 0] for file in files]
    truth = undo.oriented(read_labels(case.label).array)[:, 0] if case.label else None
    place = fullest_slice(masks[0] if truth is None else truth)
    title = f"{name}, slice {place + 1} of {len(image)}"
    expert = None if truth is None else truth[place]
    return ShownSlice(title, image[place], expert, tuple(mask[place] for mask in masks), _aspect(store, undo, name))


def fullest_slice(mask: NDArray[Any]) -> int:
    """The slice of `(n, rows, columns)` that shows most of its structures, small ones counting as much as large."""
    shown = np.zeros(len(mask))
    for value in np.unique(mask[mask != 0]):
        area = (mask == value).sum((1, 2))
        shown += area / area.max()  # the share of its own largest section
    return int(np.argmax(shown))


def _overlay(store: Store, dataset: Dataset, masks: Path, name: str) -> bytes:
    shown = shown_slice(store, dataset, [masks], name)
    return overlay_row(shown.image, shown.truth, shown.masks[0], store.labels, shown.title, shown.aspect)


def _aspect(store: Store, undo: Undo, name: str) -> float:
    """Height of a pixel against its width."""
    spacing = store.volumes[store.index_of(name)].spacing[::-1]
    _, rows, columns = undo.order
    return spacing[rows] / spacing[columns] if store.plan.options.spacing_known else 1.0


def _read_log(folder: Path, key: str) -> list[tuple[float, float]]:
    try:
        lines = pd.read_json(folder / "metrics.jsonl", lines=True)
    except (OSError, ValueError) as error:
        raise GlocalError(
            f"{folder / 'metrics.jsonl'} is missing or damaged: put a copy back, or train in another folder."
        ) from error
    if key not in lines:
        return []
    kept = lines[lines[key].notna()]
    return [(float(i), float(v)) for i, v in zip(kept["iteration"], kept[key], strict=True)]


def curve(folder: Path, key: str) -> Picture:
    """The curve of one figure (`loss` or `validation_dice`) of one training or stage."""
    name = f"{folder.parent.name}, {folder.name}" if folder.name.startswith("stage-") else folder.name
    label = {"loss": "Loss", "validation_dice": "Dice on validation volumes"}[key]
    series = {name: _read_log(folder, key)}
    labelled = _read_log(folder, "supervised") if key == "loss" else []
    if labelled:  # what is learnt from unlabelled slices comes on top, where it begins
        series = {"all": series[name], "of labelled slices": labelled}
    return Picture(f"{label}: {name}", learning_curves(series, "", label), "svg")


def curves_together(folders: Sequence[Path]) -> Picture:
    """The losses of several fine-tunings in one picture; more than twelve could not be told apart."""
    shown = folders[:12]
    series = {f"{f.parent.name} {f.name.removeprefix('labels-')}": _smooth(_read_log(f, "loss")) for f in shown}
    few = f", the first {len(shown)} of {len(folders)}" if len(shown) < len(folders) else ""
    caption = f"Loss of the fine-tunings{few} (means of 50 iterations)"
    return Picture(caption, learning_curves(series, "", "Loss"), "svg", wide=True)


def _smooth(points: list[tuple[float, float]], width: int = 5) -> list[tuple[float, float]]:
    groups = [points[k : k + width] for k in range(0, len(points), width)]
    return [(float(np.mean([p[0] for p in g])), float(np.mean([p[1] for p in g]))) for g in groups]


def weights(files: Any) -> list[Section]:
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


def closing(run: Path) -> list[Section]:
    """Settings and versions of a run."""
    settings = yaml.safe_dump(runs.settings_of(run), sort_keys=False, allow_unicode=True)
    flat = runs.flatten(yaml.safe_load(settings))
    rows = [[key, str(value)] for key, value in flat.items() if value not in (None, "")]
    made = runs.manifest_of(run)
    versions = [["glocal", made["glocal"]], ["Python", made["python"]], *([k, v] for k, v in made["packages"].items())]
    facts = [
        ["machine", made["machine"]],
        ["time, last start to end" if made["kind"] == "run" else "time", f"{made['seconds']:.0f} s"],
        ["peak memory of the process", f"{made['peak_memory_mib']} MiB"],
        *([["on the GPU", f"{made['peak_gpu_memory_mib']} MiB"]] if "peak_gpu_memory_mib" in made else []),
    ]
    return [
        Section("Settings", tables=[Table("recipe.yaml", ["Key", "Value"], rows)], collapsed=True),
        Section("Versions", tables=[Table("manifest.json", ["What", "Value"], versions + facts)], collapsed=True),
    ]


def count(items: Sequence[Any], noun: str) -> str:
    """`1 volume`, `2 volumes`."""
    return f"{len(items)} {noun}{'s' if len(items) != 1 else ''}"
