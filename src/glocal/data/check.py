"""Check a raw dataset before anything is computed from it: every file is read once, all problems are told at once."""

import gzip
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from glocal.data import dataset as raw
from glocal.data.findings import CheckReport, Finding, finding
from glocal.data.image import FILE_ENDINGS, Geometry, file_ending, geometry_of, is_volume_file, read_file, same_grid
from glocal.data.nifti import forms_of, is_nifti
from glocal.errors import GlocalError
from glocal.processes import cores
from glocal.progress import track

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

TOLERANCE = 1e-3  # of direction cosines
ROUNDING = 1e-5  # relative to the spacing; NIfTI rounds to single precision
DISTINCT = 1.1  # slices lie along the axis whose spacing is this much larger than the others, as in preprocessing
_FRAMES = 6  # of one person, at most: time points, sequences
_FORMS_APART = 0.1  # voxels, as with two files
TINY = 20  # voxels of foreground
FLAT = 3  # a volume this much wider than high hardly has cubic voxels
PLANES = dict(zip("LRPASI", ("sagittal", "sagittal", "coronal", "coronal", "axial", "axial"), strict=True))


@dataclass
class _Layout:
    """What the folder holds, as far as it can be understood: files, what dataset.json says, subjects by case."""

    images: dict[str, dict[int, Path]]
    labels: dict[str, Path]
    description: raw.Description | None
    subjects: dict[str, str] = field(default_factory=dict)


@dataclass
class _Facts:
    """What reading one case gave; `values` are those of its label map."""

    case: str
    geometry: Geometry | None = None
    digest: str | None = None
    values: frozenset[int] = frozenset()
    findings: list[Finding] = field(default_factory=list)

    def add(self, code: str, message: str) -> None:
        self.findings.append(finding(code, message, self.case))


def check(root: Path, workers: int | None = None) -> CheckReport:
    """Read every file of a raw dataset and report what is wrong with it; a bad dataset is reported, never raised.

    `workers` threads (default: one per core this process may use) hold one case each in memory.
    """
    layout, findings = _read_layout(root)
    with ThreadPoolExecutor(workers or cores()) as pool:
        inspected = pool.map(lambda case: _inspect(case, layout), layout.images)
        facts = list(track(inspected, "Checking", len(layout.images)))
    findings += [finding for fact in facts for finding in fact.findings]
    geometries = {fact.case: fact.geometry for fact in facts if fact.geometry}
    findings += [*_absent_labels(layout, facts), *_duplicates(layout, facts), *_named_alike(layout)]
    findings += [*_orientations(geometries), *_slice_axes(geometries), *_placeholder(list(geometries.values()))]
    order = ("error", "warning", "note")
    findings.sort(key=lambda finding: order.index(finding.severity))
    return CheckReport(root, findings, _summary(layout, list(geometries.values())))


# ---- what the folder holds ----


def _read_layout(root: Path) -> tuple[_Layout, list[Finding]]:
    """List the dataset leniently: what cannot be understood becomes a finding, and the rest is still checked."""
    findings: list[Finding] = []

    def attempt(code: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except GlocalError as error:
            findings.append(finding(code, str(error)))
            return None

    description = attempt("description", lambda: raw.read_description(root))
    ending = description.file_ending if description else _commonest_ending(root / "imagesTr")
    images, misnamed = raw.list_images(root, ending)
    label_files, misnamed_labels = raw.volumes_in(root / "labelsTr", ending)
    labels = {path.name.removesuffix(ending): path for path in label_files}
    layout = _Layout(images, labels, description)
    subjects = attempt("subjects", lambda: raw.read_subjects(root, list(images))) or {}
    layout.subjects = {case: subjects.get(case, case) for case in images}
    attempt("split", lambda: raw.read_split(root, layout.subjects))
    findings += [finding("image-name", sentence) for sentence in [*misnamed, *misnamed_labels]]
    channels = len(description.channels) if description else max(map(len, images.values()), default=1)
    for case, files in images.items():
        if problem := raw.channel_problem(files, channels):
            findings.append(finding("channels", f"The case {problem}.", case))
    if not images:
        findings.append(finding("no-images", f"{root / 'imagesTr'} holds no images named CASE_0000{ending}."))
    for case in sorted(set(labels) - set(images)):
        findings.append(finding("label-without-image", f"{labels[case]} has no image.", case))
    return layout, findings + _wrong_counts(layout)


def _commonest_ending(folder: Path) -> str:
    endings = Counter(file_ending(path) for path in folder.glob("*") if is_volume_file(path))
    return endings.most_common(1)[0][0] if endings else FILE_ENDINGS[0]


def _wrong_counts(layout: _Layout) -> list[Finding]:
    findings = []
    cases, labelled = len(layout.images), len(layout.labels.keys() & layout.images.keys())
    announced = layout.description.count if layout.description else None
    if cases and not labelled:
        findings.append(finding("no-labels", "labelsTr holds no label map of any case."))
    if announced is not None and announced not in (cases, labelled):
        message = f"dataset.json says numTraining {announced}, but {cases} cases are here, {labelled} of them labelled."
        findings.append(finding("count", message))
    return findings


# ---- one case ----


def _inspect(case: str, layout: _Layout) -> _Facts:
    """Read the files of one case, one after the other."""
    facts = _Facts(case)
    digest = hashlib.sha256()
    for _, path in sorted(layout.images[case].items()):
        image = _open(path, facts)
        if image is None:
            break
        array, geometry = sitk.GetArrayViewFromImage(image), geometry_of(image)
        digest.update(str(array.shape).encode())
        for plane in array:  # one that fits the processor's cache; an image is the same in any voxel type
            digest.update(np.ascontiguousarray(plane, dtype=np.float32).data)
        _inspect_image(path, array, facts)
        if facts.geometry is None:
            facts.geometry = geometry
            _inspect_geometry(path, geometry, facts)
        elif differences := _differences(facts.geometry, geometry):
            facts.add("channel-geometry", f"{path.name} differs from the first channel in {differences}.")
    else:  # the digest of half a case would say nothing
        facts.digest = digest.hexdigest()
    if case in layout.labels and (image := _open(layout.labels[case], facts)) is not None:
        if facts.geometry and (differences := _differences(facts.geometry, geometry_of(image))):
            facts.add("label-geometry", f"The label map differs from the image in {differences}.")
        _inspect_label(sitk.GetArrayViewFromImage(image), layout.description, facts)
    return facts


def _open(path: Path, facts: _Facts) -> sitk.Image | None:
    """One scalar volume, or None and the finding that says why not."""
    try:
        image = read_file(path)
    except GlocalError as error:
        facts.add("unreadable", str(error))
        return None
    values = image.GetNumberOfComponentsPerPixel()
    if image.GetDimension() != 3 or values != 1:
        facts.add("dimensions", f"{path.name} is {image.GetDimension()}-D with {values} value(s) per voxel.")
        return None
    if odd := _hidden_by_itk(path, image):
        facts.add("not-finite-read-as-0", f"{path.name} has {odd} voxel(s) that are NaN or infinite, and read as 0.")
    forms = forms_of(path) if is_nifti(path) else None
    if forms and (apart := forms.apart(image.GetSize())) > _FORMS_APART * min(abs(size) for size in forms.pixdim[1:]):
        facts.add("two-places", f"qform and sform of {path.name} place voxels up to {apart:.3g} mm apart.")
    return image


def _hidden_by_itk(path: Path, image: sitk.Image) -> int:
    """The number of voxels of a NIfTI file that are NaN or infinite: ITK reads them as 0 and does not say so."""
    kind = {"16": "f4", "64": "f8"}.get(image.GetMetaData("datatype") if image.HasMetaDataKey("datatype") else "")
    if kind is None:
        return 0
    content = path.read_bytes()
    content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    order = "<" if content[2:4] == b"\0\0" else ">"  # the header begins with its length, 348 or 540
    offset = int(float(image.GetMetaData("vox_offset")))
    voxels = np.frombuffer(content, order + kind, math.prod(image.GetSize()), offset)
    return voxels.size - int(np.count_nonzero(np.isfinite(voxels)))


def _inspect_image(path: Path, array: NDArray[Any], facts: _Facts) -> None:
    low, high = array.min(), array.max()  # NaN wins in both
    if not (np.isfinite(low) and np.isfinite(high)):
        odd = int(np.count_nonzero(~np.isfinite(array)))
        facts.add("not-finite", f"{path.name} has {odd} voxel(s) that are NaN or infinite.")
    elif low == high:
        facts.add("constant", f"{path.name} has the value {low} everywhere.")


def _inspect_geometry(path: Path, geometry: Geometry, facts: _Facts) -> None:
    if 1 in geometry.size:
        facts.add("single-slice", f"{path.name} is a single slice, of size {_text(geometry.size)}.")
    if not np.allclose(geometry.axes.T @ geometry.axes, np.eye(3), atol=TOLERANCE):
        facts.add("direction", f"The axes of {path.name} are not at right angles.")
    if not geometry.direction_known:
        facts.add("direction-unknown", f"The header of {path.name} does not say how it lies in the patient.")


def _inspect_label(array: NDArray[Any], description: raw.Description | None, facts: _Facts) -> None:
    voxels = array.ravel()
    values = np.unique(voxels[np.append(True, voxels[1:] != voxels[:-1])])  # of equal neighbours one: few to sort
    odd = [f"{value:g}" for value in values if not float(value).is_integer()]
    if odd:
        facts.add("label-not-whole", f"The label map holds values that are not whole numbers: {raw.some(odd)}.")
        return
    facts.values = frozenset(map(int, values))
    if description and (odd := [str(v) for v in sorted(facts.values - set(description.labels.values()))]):
        facts.add("label-unknown", f"The label map holds values that dataset.json does not name: {raw.some(odd)}.")
    foreground = np.count_nonzero(array)
    if foreground == 0:
        facts.add("label-empty", "The label map has no foreground.")
    elif foreground < TINY:
        facts.add("label-tiny", f"The label map has only {foreground} voxel(s) of foreground.")


def _differences(first: Geometry, second: Geometry) -> str:
    """In what two geometries differ, with the values; empty if they are near enough to be preprocessed."""
    if same_grid(second, first):
        return ""
    names = ("size", "spacing", "origin", "direction")
    return " and ".join(
        f"{name} ({_text(a)} against {_text(b)})"
        for name, a, b in ((name, getattr(first, name), getattr(second, name)) for name in names)
        if not np.allclose(a, b, rtol=1e-6, atol=ROUNDING * min(first.spacing))
    )


def _text(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


# ---- all cases together ----


def _group(items: Iterable[tuple[K, str]]) -> dict[K, list[str]]:
    """The cases of each key, the commonest key first."""
    groups: dict[K, list[str]] = defaultdict(list)
    for key, case in items:
        groups[key].append(case)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _absent_labels(layout: _Layout, facts: Sequence[_Facts]) -> list[Finding]:
    present = {value for fact in facts for value in fact.values}
    labels = layout.description.labels if layout.description and present else {}
    absent = [name for name, value in labels.items() if value not in present | {0}]  # no background need be left
    return [finding("label-missing", f"No label map holds the label {name} ({labels[name]}).") for name in absent]


def _duplicates(layout: _Layout, facts: Sequence[_Facts]) -> list[Finding]:
    findings = []
    for cases in _group((fact.digest, fact.case) for fact in facts if fact.digest).values():
        if len(cases) > 1:
            code = "duplicate" if len({layout.subjects[case] for case in cases}) > 1 else "duplicate-in-subject"
            findings.append(finding(code, f"The same image is in {', '.join(cases)}.", cases[0]))
    return findings


def _letters(geometry: Geometry) -> str:
    """Where the axes point: x, y, z of DICOM point to Left, Posterior, Superior."""
    rows = np.abs(geometry.axes).argmax(axis=0)
    return "".join("LPS"[row] if geometry.axes[row, k] > 0 else "RAI"[row] for k, row in enumerate(rows))


def _named_alike(layout: _Layout) -> list[Finding]:
    """Cases of names such as p01_frame01 and p01_frame12, two or three to a name, that count as different people."""
    begins = {case: re.fullmatch(r"(.*[0-9].*)[_-][^_-]+", case) for case in layout.images}
    groups = _group((match[1], case) for case, match in begins.items() if match)
    several = {begin: cases for begin, cases in groups.items() if len(cases) > 1}
    parted = [f"{a} and {b}" for a, b, *_ in several.values() if layout.subjects[a] != layout.subjects[b]]
    if len(parted) < 2 or max(map(len, several.values())) > _FRAMES:  # one group, or long ones: scanners, studies
        return []
    return [finding("named-alike", f"{raw.some(parted)} have names alike, but count as different subjects.")]


def _orientations(geometries: dict[str, Geometry]) -> list[Finding]:
    groups = _group((_letters(geometry), case) for case, geometry in geometries.items())
    usual, *others = groups or [""]
    return [
        finding("orientation", f"The axes of {raw.some(groups[found])} point to {found}, most others' to {usual}.")
        for found in others
    ]


def _slice_axes(geometries: dict[str, Geometry]) -> list[Finding]:
    """Volumes cut in different planes, and volumes that do not say along which axis they were cut."""
    planes: list[tuple[str, str]] = []
    guesses: list[tuple[str, str]] = []
    for case, geometry in geometries.items():
        axis = max(range(3), key=lambda k: geometry.spacing[k])
        if geometry.spacing[axis] > DISTINCT * sorted(geometry.spacing)[1]:
            planes.append((PLANES[_letters(geometry)[axis]], case))
        else:
            guesses.append(("xyz"[min(range(3), key=lambda k: geometry.size[k])], case))
    findings = []
    if len(groups := _group(planes)) > 1:
        parts = "; ".join(f"{len(cases)} {plane} ({raw.some(cases)})" for plane, cases in groups.items())
        findings.append(finding("slice-axis-mixed", f"Slices are cut in different planes: {parts}."))
    if groups := _group(guesses):
        parts = ", ".join(f"{axis} in {len(cases)}" for axis, cases in groups.items())
        message = f"No axis has a clearly larger spacing in {len(guesses)} case(s); fewest slices lie along {parts}."
        findings.append(finding("slice-axis-guessed", message))
    return findings


def _placeholder(geometries: Sequence[Geometry]) -> list[Finding]:
    flat = sum(max(geometry.size) >= FLAT * min(geometry.size) for geometry in geometries)
    if any(geometry.spacing != (1.0, 1.0, 1.0) for geometry in geometries) or 2 * flat <= len(geometries):
        return []
    message = "The spacing is exactly 1 mm in every case though the volumes are flat: it looks like a placeholder."
    return [finding("placeholder-spacing", message)]


def _summary(layout: _Layout, geometries: Sequence[Geometry]) -> dict[str, Any]:
    def span(values: Sequence[Sequence[float]]) -> list[list[float]] | None:
        return [np.min(values, axis=0).tolist(), np.max(values, axis=0).tolist()] if values else None

    return {
        "cases": len(layout.images),
        "labelled": len(layout.labels.keys() & layout.images.keys()),
        "subjects": len(set(layout.subjects.values())),
        "labels": layout.description.labels if layout.description else None,
        "size": span([geometry.size for geometry in geometries]),
        "spacing": span([geometry.spacing for geometry in geometries]),
    }
