"""The raw dataset: nnU-Net v2 layout, with subjects and splits beside it.

dataset.json                what the channels and labels are called
imagesTr/CASE_0000.nii.gz   one file per channel
labelsTr/CASE.nii.gz        absent: the case is unlabelled
subjects.tsv                optional: case <TAB> subject; without it every case is its own subject
split.json                  optional: lists of cases under pretrain, development, test
"""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from glocal.data.image import FILE_ENDINGS, is_volume_file, readable_name, require_target
from glocal.errors import GlocalError
from glocal.files import read_json, write_json

SPLITS = ("pretrain", "development", "test")


class Listed(NamedTuple):
    """A case as its dataset lists it, before anything was read."""

    case: str
    subject: str
    labelled: bool


@dataclass(frozen=True)
class Case:
    """One image, its label map if there is one, and the person it shows."""

    name: str
    subject: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class Description:
    """What `dataset.json` says."""

    name: str
    channels: tuple[str, ...]
    labels: dict[str, int]
    file_ending: str
    count: int | None


@dataclass(frozen=True)
class Dataset:
    """A raw dataset; `labels` holds every name and value, background included; `split` lists case names."""

    root: Path
    name: str
    channels: tuple[str, ...]
    labels: dict[str, int]
    file_ending: str
    cases: tuple[Case, ...]
    split: dict[str, list[str]] | None

    @property
    def labelled(self) -> tuple[Case, ...]:
        """The cases that have a label map."""
        return tuple(case for case in self.cases if case.label is not None)

    @property
    def members(self) -> tuple[Listed, ...]:
        """The cases as a split sees them."""
        return tuple(Listed(case.name, case.subject, case.label is not None) for case in self.cases)

    @property
    def foreground(self) -> dict[str, int]:
        """Names and values of all labels but the background."""
        return {name: value for name, value in self.labels.items() if value != 0}


def read_dataset(root: Path) -> Dataset:
    """Read a raw dataset's files of text and list its cases; no volume is opened.

    Raises:
        GlocalError: no dataset here, or dataset.json, the images, subjects.tsv or split.json contradict the layout.
    """
    description = read_description(root)
    images, misnamed = list_images(root, description.file_ending)
    label_files, misnamed_labels = volumes_in(root / "labelsTr", description.file_ending)
    misnamed += misnamed_labels
    if misnamed:
        raise GlocalError(misnamed[0])
    if not images:
        raise GlocalError(f"{root / 'imagesTr'} holds no images with the ending {description.file_ending}.")
    labels = {path.name.removesuffix(description.file_ending): path for path in label_files}
    if alone := sorted(set(labels) - set(images)):
        raise GlocalError(
            f"{root / 'labelsTr'} holds label maps of cases that have no image: {some(alone)}. "
            "Add the images, or move these label maps out of labelsTr."
        )
    for case, files in images.items():
        problem = channel_problem(files, len(description.channels))
        if problem:
            raise GlocalError(f"Case {case} in {root / 'imagesTr'} {problem}.")
    subjects = read_subjects(root, list(images))
    cases = tuple(
        Case(
            name=name,
            subject=subjects[name],
            images=tuple(path for _, path in sorted(files.items())),
            label=labels.get(name),
        )
        for name, files in images.items()
    )
    return Dataset(
        root=root,
        name=description.name,
        channels=description.channels,
        labels=description.labels,
        file_ending=description.file_ending,
        cases=cases,
        split=read_split(root, subjects),
    )


def read_description(root: Path) -> Description:
    """Read and check `dataset.json`.

    Raises:
        GlocalError: missing or malformed; the sentence names the key.
    """
    path = root / "dataset.json"
    if not path.is_file():
        raise GlocalError(f"{root} has no dataset.json: make a dataset of your images with `glocal collect`.")
    content = read_json(path)
    if not isinstance(content, dict):
        raise GlocalError(f"{path} must hold an object in braces, with channel_names, labels and file_ending.")
    for key in ("channel_names", "labels", "file_ending"):
        if key not in content:
            raise GlocalError(f"{path} has no key {key!r}: add it, as nnU-Net v2 describes.")
    channels = content["channel_names"]
    if (
        not isinstance(channels, dict)
        or not channels
        or set(channels) != {str(number) for number in range(len(channels))}
    ):
        raise GlocalError(f'{path}: channel_names must read {{"0": "MRI", "1": ...}}, numbered from 0 without gaps.')
    ending = content["file_ending"]
    if ending not in FILE_ENDINGS:
        raise GlocalError(f"{path}: file_ending is {ending!r}, but must be one of {', '.join(FILE_ENDINGS)}.")
    count = content.get("numTraining")
    return Description(
        name=str(content.get("name") or root.resolve().name),
        channels=tuple(str(channels[str(number)]) for number in range(len(channels))),
        labels=_read_labels(path, content["labels"]),
        file_ending=ending,
        count=count if isinstance(count, int) else None,
    )


def _read_labels(path: Path, labels: Any) -> dict[str, int]:
    if not isinstance(labels, dict) or labels.get("background") != 0:
        raise GlocalError(f'{path}: labels must read {{"background": 0, "name": 1, ...}}.')
    if "ignore" in labels:
        raise GlocalError(f"{path}: the label 'ignore' is not supported: remove it and relabel its voxels.")
    for name, value in labels.items():
        if isinstance(value, list):
            raise GlocalError(
                f"{path}: label {name!r} is a region, a list of values; regions are not supported: give every label "
                "one whole number."
            )
        if not isinstance(value, int) or isinstance(value, bool):
            raise GlocalError(f"{path}: label {name!r} is {value!r}, but must be one whole number.")
    if sorted(labels.values()) != list(range(len(labels))):
        raise GlocalError(
            f"{path}: the values of labels are {sorted(labels.values())}, but must be 0, 1, 2, ... without gaps or "
            "repetitions: `glocal collect` renumbers label maps."
        )
    return dict(labels)


def list_images(root: Path, ending: str) -> tuple[dict[str, dict[int, Path]], list[str]]:
    """The files of `imagesTr` by case and channel number, and a sentence for each that is misnamed."""
    cases: dict[str, dict[int, Path]] = {}
    paths, misnamed = volumes_in(root / "imagesTr", ending)
    for path in paths:
        match = re.fullmatch(r"(.+)_(\d{4})", path.name.removesuffix(ending))
        if match:
            cases.setdefault(match[1], {})[int(match[2])] = path
        else:
            stem = path.name.removesuffix(ending)
            misnamed.append(f"{path} has no channel number: name it {stem}_0000{ending}.")
    return dict(sorted(cases.items())), misnamed


def volumes_in(folder: Path, ending: str) -> tuple[list[Path], list[str]]:
    """The volumes of a folder with an ending, sorted, and a sentence for every other; none if there is no folder."""
    found, misnamed = [], []
    for path in sorted(path for path in folder.glob("*") if is_volume_file(path) and not path.is_dir()):
        try:
            require_target(path)
            readable_name(path)
        except GlocalError as error:
            misnamed.append(str(error))
            continue
        if path.name.endswith(ending):
            found.append(path)
        else:
            way_out = "convert or remove it, or correct file_ending in dataset.json"
            misnamed.append(f"{path} does not end in {ending} and would be left out: {way_out}.")
    return found, misnamed


def channel_problem(files: Mapping[int, Path], channels: int) -> str | None:
    """What is wrong with a case's channel numbers, as the end of a sentence; None if nothing."""
    missing = [f"_{number:04d}" for number in range(channels) if number not in files]
    if missing:
        return f"lacks the channel file {', '.join(missing)}: add it, or correct channel_names in dataset.json"
    extra = [f"_{number:04d}" for number in files if number >= channels]
    if extra:
        return f"has a channel file {', '.join(extra)} that channel_names in dataset.json does not name: add it there"
    return None


def read_subjects(root: Path, cases: Sequence[str]) -> dict[str, str]:
    """The subject of every case, from `subjects.tsv`; without the file every case is its own subject.

    Raises:
        GlocalError: malformed, unknown or repeated cases, or cases left out.
    """
    path = root / "subjects.tsv"
    if not path.is_file():
        return {case: case for case in cases}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except UnicodeDecodeError as error:
        raise GlocalError(f"{path} cannot be read: save it as plain text (UTF-8).") from error
    except (OSError, csv.Error) as error:
        raise GlocalError(f"{path} cannot be read: {error}.") from error
    subjects: dict[str, str] = {}
    for line, row in enumerate(rows, start=2):
        case, subject = (row.get("case") or "").strip(), (row.get("subject") or "").strip()
        if not case or not subject:
            raise GlocalError(f"{path}, line {line}: expected a case and its subject under `case<TAB>subject`.")
        if case in subjects:
            raise GlocalError(f"{path}, line {line}: case {case} is listed twice.")
        subjects[case] = subject
    unknown, left_out = sorted(set(subjects) - set(cases)), sorted(set(cases) - set(subjects))
    if unknown:
        raise GlocalError(f"{path} names cases that have no image: {some(unknown)}. Correct or remove these lines.")
    if left_out:
        raise GlocalError(f"{path} leaves out cases: {some(left_out)}. Add a line with the subject of each.")
    return subjects


def read_split(root: Path, subjects: Mapping[str, str]) -> dict[str, list[str]] | None:
    """The lists of `split.json`, or None without the file.

    Raises:
        GlocalError: malformed, unknown cases, or a subject in two lists.
    """
    path = root / "split.json"
    if not path.is_file():
        return None
    split = read_json(path)
    if not isinstance(split, dict) or not all(
        isinstance(cases, list) and all(isinstance(case, str) for case in cases) for cases in split.values()
    ):
        raise GlocalError(f"{path} must hold lists of case names under {', '.join(SPLITS)}.")
    if not set(split) <= set(SPLITS):
        raise GlocalError(f"{path} has the list {min(set(split) - set(SPLITS))!r}, but knows only {', '.join(SPLITS)}.")
    place: dict[str, str] = {}
    for part, cases in split.items():
        unknown = [case for case in cases if case not in subjects]
        if unknown:
            raise GlocalError(f"{path}: {part} names cases that have no image: {some(unknown)}.")
        if len(set(cases)) != len(cases):
            raise GlocalError(f"{path}: {part} names a case twice.")
        for case in cases:
            if place.setdefault(subjects[case], part) != part:
                raise GlocalError(
                    f"{path}: subject {subjects[case]} (case {case}) is in both {place[subjects[case]]} and {part}: "
                    "keep all cases of a person in one list."
                )
    return split


def some(names: Sequence[str], shown: int = 3) -> str:
    """The first names of a list, for a sentence."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def write_dataset_json(
    root: Path,
    name: str,
    channels: Sequence[str],
    labels: Mapping[str, int],
    count: int,
    file_ending: str = ".nii.gz",
    **extra: Any,
) -> None:
    """Write `dataset.json`: `labels` with or without background, `count` cases, `extra` further keys."""
    content = {
        "name": name,
        "channel_names": {str(number): channel for number, channel in enumerate(channels)},
        "labels": {"background": 0, **labels},
        "numTraining": count,
        "file_ending": file_ending,
        **extra,
    }
    write_json(root / "dataset.json", content)
