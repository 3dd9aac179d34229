"""Make a raw dataset of any folder of NIfTI, MHA or NRRD files, or of DICOM series."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from glocal.data.dataset import some, write_dataset_json
from glocal.data.dicom import Patient, dicom_files, dicom_series, holds_no_image, patient_of, read_dicom
from glocal.data.image import (
    dimensions,
    file_ending,
    is_volume_file,
    read_file,
    read_labels,
    require_target,
    without_label_suffix,
    write_image,
    write_like,
)
from glocal.data.nifti import copy_without_text, forms_of, is_nifti
from glocal.data.pseudonyms import case_names, subjects_of
from glocal.errors import GlocalError
from glocal.files import appearing, replacing, write_text
from glocal.progress import track

CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class Collected:
    """What `collect` made; `mapping` says how label values were renumbered (None: kept); `notes` what to look at."""

    dataset: Path
    name: str
    cases: int
    labelled: int
    subjects: int
    channels: int
    labels: dict[str, int]
    mapping: dict[int, int] | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """One case to be: its key (folder and name below the images), its files by channel or one DICOM series."""

    key: Path
    files: tuple[Path, ...] = ()
    series: str | None = None
    folder: Path | None = None
    patient: Patient = field(default_factory=Patient)
    label: Path | None = None


def collect(
    images: Path,
    dataset: Path,
    labels: Path | None = None,
    name: str | None = None,
    subject: str | None = None,
    exclude: Sequence[str] = (),
) -> Collected:
    """Collect volumes, and label maps of the same names, into a new raw dataset; the sources are only read.

    A label map belongs to the image of its name, with or without `_gt`, `_seg`, `_label` or `_mask` behind it. Label
    values that are not 1, 2, 3, ... are renumbered, and dataset.json says how. The dataset appears whole or not at all.

    Args:
        images: folder with the volumes.
        dataset: folder to make.
        labels: folder with the label maps.
        name: of the dataset; the folder's name if not given.
        subject: a regular expression that finds the subject in the path of a volume that is not DICOM with a patient's
            ID; its first group, if it has one, else all that it finds. Not given: each such volume is a subject.
        exclude: patterns such as `*_4d*`; what lies below `images` or `labels` at a path that fits one is left out.

    Raises:
        GlocalError: nothing to collect, an unreadable file, one that is not three-dimensional, a label map without
            image, channels that do not match, a path without subject, or a dataset folder that holds something already
            or lies within the sources.
    """
    _refuse_folders(images, dataset, labels)
    label_files = _label_files(images, labels, exclude)
    dicom_cases, left_out = _dicom_cases(images, exclude)
    sources = [*_file_cases(images, _image_files(images, label_files, exclude)), *dicom_cases]
    if not sources:
        raise GlocalError(f"{images} holds no NIfTI, MHA or NRRD file and no DICOM series: choose another folder.")
    _refuse_other_dimensions(sources)
    sources = _match(sorted(sources, key=lambda source: source.key), label_files, labels or images)
    values = _label_values([source.label for source in sources if source.label])
    renumbered = (
        {old: new for new, old in enumerate(values, start=1)} if values != list(range(1, len(values) + 1)) else {}
    )
    keys, patients = [source.key for source in sources], [source.patient for source in sources]
    known = subjects_of(keys, patients, subject)
    cases = case_names(keys, patients, known)
    collected = Collected(
        dataset=dataset,
        name=name or dataset.resolve().name,
        cases=len(sources),
        labelled=sum(source.label is not None for source in sources),
        subjects=len({subject or case for case, subject in zip(cases, known, strict=True)}),
        channels=_channel_count(sources),
        labels={f"label_{number}": number for number in range(1, len(values) + 1)},
        mapping=renumbered or None,
        notes=_notes(known, subject, renumbered, left_out),
    )
    with appearing(dataset) as folder:
        jobs = [_job(source, case, folder, renumbered) for source, case in zip(sources, cases, strict=True)]
        _run(jobs, "Collecting")
        lines = [f"{case}\t{subject or case}\n" for case, subject in zip(cases, known, strict=True)]
        write_text(folder / "subjects.tsv", "case\tsubject\n" + "".join(lines))
        _write_description(folder, collected)
    return collected


def _write_description(folder: Path, collected: Collected) -> None:
    mapping = {str(old): new for old, new in (collected.mapping or {}).items()}
    extra: dict[str, Any] = {"collected": {"renumbered": mapping}} if mapping else {}
    channels = [f"channel_{number}" for number in range(collected.channels)]
    write_dataset_json(folder, collected.name, channels, collected.labels, collected.cases, **extra)


def _refuse_folders(images: Path, dataset: Path, labels: Path | None) -> None:
    for folder in (images, labels):
        if folder is None:
            continue
        if not folder.is_dir():
            raise GlocalError(f"{folder} is not a folder: name the folder that holds the files.")
        if dataset.resolve().is_relative_to(folder.resolve()):
            raise GlocalError(f"{dataset} lies within {folder}, which is only read: choose a folder elsewhere.")
    if dataset.exists() and (not dataset.is_dir() or any(dataset.iterdir())):
        raise GlocalError(f"{dataset} exists and is not empty: choose a new folder for the dataset.")


# ---- what is there ----


def _volumes(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if is_volume_file(path) and not path.is_dir())
    found = sorted(path for path in files if _visible(path, folder))
    for path in found:
        require_target(path)
    return found


def _visible(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def _excluded(path: Path, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits a path below the images, or that of a folder it lies in."""
    places = [place.as_posix() for place in (path, *path.parents)]
    return any(fnmatch(place, pattern) for place in places[:-1] for pattern in patterns)  # the last is the root


def _stem(path: Path) -> str:
    return path.name[: -len(file_ending(path))]


def _label_files(images: Path, labels: Path | None, exclude: Sequence[str]) -> list[Path]:
    if labels is None:
        return []
    files = [path for path in _volumes(labels) if not _excluded(path.relative_to(labels), exclude)]
    if images.resolve().is_relative_to(labels.resolve()):  # one folder for both: the suffix tells
        files = [path for path in files if _stem(path) != without_label_suffix(_stem(path))]
    if not files:
        raise GlocalError(f"{labels} holds no label maps (NIfTI, MHA or NRRD files): choose another folder.")
    return files


def _image_files(images: Path, label_files: Sequence[Path], exclude: Sequence[str]) -> list[Path]:
    taken = {path.resolve() for path in label_files}
    files = [path for path in _volumes(images) if path.resolve() not in taken]
    files = [path for path in files if not _excluded(path.relative_to(images), exclude)]
    stems = {path.parent / _stem(path) for path in files}
    for path in files:
        bare = without_label_suffix(_stem(path))
        if bare != _stem(path) and stems & {path.parent / bare, path.parent / f"{bare}_0000"}:
            raise GlocalError(f"{path} looks like a label map: name the folder of the label maps with --labels.")
    return files


def _file_cases(images: Path, files: Sequence[Path]) -> list[_Source]:
    """Files NAME_0000, NAME_0001, ... are channels of one case; without a NAME_0000 such a number is part of a name."""
    by_key = {path.relative_to(images).parent / _stem(path): path for path in files}
    if len(by_key) < len(files):
        twice = Counter(path.parent / _stem(path) for path in files).most_common(1)[0][0]
        raise GlocalError(f"{twice} is there in two formats: move one of the files away.")
    groups: dict[Path, list[Path]] = defaultdict(list)
    for key, path in by_key.items():
        match = CHANNEL.fullmatch(key.name)
        first = key.with_name(f"{match[1]}_0000") if match else None
        groups[key.with_name(match[1]) if match and first in by_key else key].append(path)
    return [_Source(key, tuple(sorted(paths))) for key, paths in groups.items()]


def _dicom_cases(images: Path, exclude: Sequence[str]) -> tuple[list[_Source], list[str]]:
    """The DICOM series, and the DICOM files that are left out because they hold no image, or a segmentation."""
    folders = [images, *sorted(path for path in images.rglob("*") if path.is_dir() and _visible(path, images))]
    folders = [folder for folder in folders if not _excluded(folder.relative_to(images), exclude)]
    sources: list[_Source] = []
    left_out: list[str] = []
    for folder in folders:
        # GDCM opens every file to ask what it is: spare it folders that hold nothing but volumes.
        files = {str(p) for p in folder.iterdir() if p.is_file() and not is_volume_file(p) and p.name[0] != "."}
        series = dicom_series(folder) if files else ()
        key = folder.relative_to(images) if folder != images else Path(images.resolve().name)
        known: set[str] = set()
        for number, identifier in enumerate(series, start=1):
            members = dicom_files(folder, identifier)
            known.update(members)
            own = key.with_name(f"{key.name}_{number}") if len(series) > 1 else key
            patient = patient_of(members[0])
            if patient is None:
                left_out += members
            else:
                sources.append(_Source(own, series=identifier, folder=folder, patient=patient))
        lost = sorted(path for path in files - known if path.lower().endswith((".dcm", ".ima")))
        for path in lost:
            if not holds_no_image(Path(path)):
                raise GlocalError(f"{path} cannot be read as DICOM (truncated or corrupt): export its series again.")
        left_out += lost
    return sources, left_out


def _refuse_other_dimensions(sources: Sequence[_Source]) -> None:
    """Refuse before anything is copied what is no volume, all at once; of a file only the header is read."""
    odd = [str(path) for source in sources for path in source.files if dimensions(path) not in (3, None)]
    if odd:
        raise GlocalError(
            f"Not three-dimensional: {some(odd)}. Split such files into one per frame or channel, or leave them out "
            "with --exclude."
        )


def _channel_count(sources: Sequence[_Source]) -> int:
    wanted = [max(1, len(source.files)) for source in sources]
    usual = Counter(wanted).most_common(1)[0][0]
    odd = [str(source.key) for source, count in zip(sources, wanted, strict=True) if count != usual]
    if odd:
        raise GlocalError(
            f"Most cases have {usual} channel(s) (files _0000, _0001, ...), but not {some(odd)}: add or remove files."
        )
    for source in sources:
        numbers = [path for number, path in enumerate(source.files) if not _stem(path).endswith(f"_{number:04d}")]
        if usual > 1 and numbers:
            raise GlocalError(f"{numbers[0]} is not the next channel of its case: number them _0000, _0001, ...")
    return usual


def _match(sources: Sequence[_Source], label_files: Sequence[Path], labels: Path) -> list[_Source]:
    """Give every label map to the image of its name: in the same subfolder, or the only one if one side is flat."""
    by_name: dict[str, list[_Source]] = defaultdict(list)
    for source in sources:
        by_name[source.key.name].append(source)
    exact = {source.key: source for source in sources}
    found: dict[Path, Path] = {}
    unmatched = []
    for path in label_files:
        below = path.relative_to(labels).parent
        names = [_stem(path), without_label_suffix(_stem(path))]
        names += [match[1] for stem in names if (match := CHANNEL.fullmatch(stem)) and match[2] == "0000"]
        places = [below / name for name in names] + [below] * (below.name != "")
        near = [exact[place] for place in places if place in exact]
        alone = [by_name[name][0] for name in names if len(by_name.get(name, ())) == 1]
        far = [source for source in alone if not below.name or not source.key.parent.name]
        if not near + far:
            unmatched.append(str(path))
            continue
        source = (near + far)[0]
        if source.key in found:
            raise GlocalError(f"{path} and {found[source.key]} both fit the image {source.key}: remove one of them.")
        found[source.key] = path
    if unmatched:
        raise GlocalError(f"Label maps without an image of the same name: {some(unmatched)}. Rename or remove them.")
    return [replace(source, label=found.get(source.key)) for source in sources]


def _label_values(paths: Sequence[Path]) -> list[int]:
    found: set[int] = set()

    def read(path: Path) -> None:
        found.update(np.unique(read_labels(path).array).tolist())

    _run([lambda path=path: read(path) for path in paths], "Reading label maps")  # type: ignore[misc]
    if found and min(found) < 0:
        raise GlocalError(f"The label maps hold the negative value {min(found)}: relabel these voxels.")
    return sorted(found - {0})


def _notes(
    subjects: Sequence[str | None], pattern: str | None, renumbered: Mapping[int, int], left_out: Sequence[str]
) -> tuple[str, ...]:
    notes = []
    if pattern is None:
        known = sum(subject is not None for subject in subjects)
        guess = "one subject for every DICOM patient" if known else "one subject for every case"
        notes.append(
            f"subjects.tsv is a guess ({guess}): correct it, or find the subjects in the paths with --subject, so that "
            "cases of one person are never parted."
        )
    notes.append("Look whether the case names tell who a patient is; the voxels of a head can, too.")
    if renumbered:
        values = ", ".join(f"{old} became {new}" for old, new in renumbered.items())
        notes.append(f"Label values were renumbered: {values}. dataset.json keeps this under collected.")
    if left_out:
        notes.append(
            f"DICOM files that are no image (reports, structure sets, segmentations, ...) were left out: "
            f"{some(left_out)}. Convert what you want as a label map to NIfTI, and name its folder with --labels."
        )
    return tuple(notes)


# ---- the files ----


def _job(source: _Source, case: str, folder: Path, mapping: Mapping[int, int]) -> Callable[[], None]:
    def write() -> None:
        if source.folder is not None and source.series is not None:
            image = read_dicom(source.folder, source.series)
            write_image(folder / "imagesTr" / f"{case}_0000.nii.gz", image)
        for number, path in enumerate(source.files):
            _transfer(path, folder / "imagesTr" / f"{case}_{number:04d}.nii.gz")
        if source.label is not None:
            _transfer(source.label, folder / "labelsTr" / f"{case}.nii.gz", mapping)

    return write


def _transfer(source: Path, target: Path, mapping: Mapping[int, int] | None = None) -> None:
    """Copy a NIfTI's header and voxels, convert everything else; free text may name the patient and stays behind."""
    image = read_file(source)
    if mapping:
        array = sitk.GetArrayFromImage(image)
        renumbered = np.zeros(array.shape, np.uint8 if len(mapping) < 256 else np.int32)
        for old, new in mapping.items():
            renumbered[array == old] = new
        write_like(target, renumbered, source)
    elif is_nifti(source) and forms_of(source):
        with replacing(target) as temporary:
            copy_without_text(source, temporary)
    else:
        for key in image.GetMetaDataKeys():
            image.EraseMetaData(key)
        write_image(target, image)


def _run(jobs: Sequence[Callable[[], None]], description: str) -> None:
    """Run jobs in threads; the first failure cancels those not yet begun."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in track(futures, description, len(futures)):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
