"""What the `auto` recipe leaves open, derived from the data: a part with `auto: true` is filled in, keys given stay."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, log2
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from glocal.data.dataset import Case, Dataset, read_dataset
from glocal.data.image import Geometry, geometry_of, read_image, read_labels
from glocal.data.orientation import ARRAY_AXES, distinct_axis, frame_of, orient
from glocal.data.plan import PreprocessOptions
from glocal.data.split import ProtocolOptions, make_split
from glocal.errors import GlocalError
from glocal.networks.registry import network_options
from glocal.options import merged, validated
from glocal.runs import flatten

LARGEST_SIDE = {"cpu": 128, "cuda": 256}
SMALLEST_BOTTLENECK = 5
# Iterations of pre-training (each stage) and fine-tuning: minutes on two cores, the papers' on a GPU.
ITERATIONS = {"cpu": (1500, 2000), "cuda": (10_000, 10_000)}
UNKNOWN_SCALE = [0.5, 2]  # of labelled slices, where nothing says how wide a pixel is


Order = tuple[int, int, int]


@dataclass(frozen=True)
class Fingerprint:
    """What the headers and some voxels of a dataset say."""

    axis: int  # array axis across the slices of the first case
    geometries: list[Geometry]
    orders: list[Order]  # array axes of slices, rows and columns of each
    window: tuple[float, float] | None  # of a CT dataset


def derived(settings: Mapping[str, Any], vary: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Settings with every part that says `auto: true` filled in from the data.

    Args:
        settings: of the recipe without its part `experiment`.
        vary: the axes of an experiment, of which some may change what is tested on.

    Raises:
        GlocalError: no dataset, an unreadable image, or a given key or value that does not fit.
    """
    parts = {name for name, part in settings.items() if isinstance(part, Mapping) and part.get("auto") is True}
    result = {name: _without_auto(part) if isinstance(part, Mapping) else part for name, part in settings.items()}
    if not parts:
        return result
    if "data" not in settings:
        raise GlocalError("This recipe is derived from the data: say which with data=DATASET.")
    whole = read_dataset(Path(str(settings["data"])))
    dataset = _without_closed_labels(whole, settings, vary)
    where = "cuda" if torch.cuda.is_available() and str(settings.get("device", "auto")) != "cpu" else "cpu"
    if "preprocess" in parts:
        result["preprocess"] = _preprocess(dataset, _checked(result["preprocess"]), LARGEST_SIDE[where])
    if parts & {"network", "finetune"}:
        preprocess = validated(PreprocessOptions, result.get("preprocess", {}), "preprocess")
    if "network" in parts:
        result["network"] = _widths(result["network"], min(preprocess.size)) | result["network"]
    pretraining, finetuning = ITERATIONS[where]
    if "pretrain" in parts:
        volumes = {"volumes": min(5, len(dataset.cases))}
        for name, part in result["pretrain"].items():
            if isinstance(part, Mapping):  # anything else is refused when the recipe is validated
                defaults = {"max_iterations": pretraining} | (volumes if part.get("method") == "gcl" else {})
                result["pretrain"][name] = defaults | dict(part)
    if "finetune" in parts:
        views = {} if preprocess.spacing_known else {"augmentation": {"spatial": {"scale": UNKNOWN_SCALE}}}
        result["finetune"] = merged({"max_iterations": finetuning} | views, result["finetune"])
        result["finetune"] |= _strategy(whole, result["finetune"])
    return result


def _strategy(dataset: Dataset, part: Mapping[str, Any]) -> dict[str, Any]:
    """Self-training where there is something to learn from, with pseudo-labels from moved views where slices move."""
    unlabelled = part.get("labels") not in ("all", ["all"]) or any(case.label is None for case in dataset.cases)
    strategy = part.get("strategy", "self-training" if unlabelled else "supervised")
    still = any(flatten(dict(part)).get(key) == "none" for key in ("augmentation", "augmentation.spatial"))
    tta = {"tta": True} if strategy == "self-training" and "tta" not in part and not still else {}
    return {"strategy": strategy} | tta


def _without_closed_labels(dataset: Dataset, settings: Mapping[str, Any], vary: Mapping[str, Any]) -> Dataset:
    """The dataset as if its test and development cases had no labels: nothing may be fitted to those."""
    protocol = validated(ProtocolOptions, settings.get("protocol", {}), "protocol")
    resplit = any({"seed", "protocol"} & set(key.split(".")) for key in flatten(dict(vary)))
    if protocol.leave_one_out or protocol.folds or resplit:  # every label map may be tested on in its turn
        return replace(dataset, cases=tuple(replace(case, label=None) for case in dataset.cases))
    splits = range(protocol.splits)
    seed = settings.get("seed", 0)
    made = [make_split(dataset.members, dataset.split, protocol, seed, index) for index in splits]
    open_ = set.intersection(*(set(split.pretrain) for split in made))
    cases = (case if case.name in open_ else replace(case, label=None) for case in dataset.cases)
    return replace(dataset, cases=tuple(cases))


def _without_auto(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != "auto" or not isinstance(value, bool)}


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """The given keys, checked before they are computed with; stand-ins take the place of what will be derived."""
    implied: dict[str, Any] = {"intensity": "window"} if given.get("window") else {}
    stand_in: dict[str, Any] = {"size": (1, 1)} | ({"window": (0, 1)} if given.get("intensity") == "window" else {})
    options = validated(PreprocessOptions, stand_in | implied | given, "preprocess").model_dump(mode="json")
    return {key: options[key] for key in implied | given}


def _preprocess(dataset: Dataset, given: dict[str, Any], largest_side: int) -> dict[str, Any]:
    seen = fingerprint(dataset, given)
    lying = list(zip(seen.geometries, seen.orders, strict=True))
    spacings = np.array([[geometry.spacing[2 - axis] for axis in order[1:]] for geometry, order in lying])
    sizes = np.array([[geometry.size[2 - axis] for axis in order[1:]] for geometry, order in lying])
    spacing = given.get("spacing")
    if "spacing" not in given and given.get("spacing_known", True) and (spacings.max(0) > 1.02 * spacings.min(0)).any():
        spacing = [round(float(np.median(spacings)), 3)] * 2
    if spacing:
        sizes = np.rint(sizes * spacings / spacing)
    wanted = np.maximum(np.median(sizes, axis=0), _foreground_field(dataset, seen.orders, spacing))
    field, size = _frame(given.get("field") or wanted.tolist(), given.get("size"), largest_side)
    intensity = {"intensity": "window", "window": list(seen.window)} if seen.window else {"intensity": "percentile"}
    fixed = {"spacing": spacing, "slice_axis": ARRAY_AXES[seen.axis], "field": field, "size": size}
    return intensity | fixed | given


def _frame(wanted: list[float], size: list[int] | None, largest_side: int) -> tuple[list[int], list[int]]:
    """Field and size (rows, columns): the field holds what is wanted, and both axes are zoomed alike."""
    if size is None:
        factor = max(1.0, max(wanted) / largest_side)
        size = [max(16, 16 * ceil(side / factor / 16)) for side in wanted]
    else:
        factor = max(1.0, *(side / pixels for side, pixels in zip(wanted, size, strict=True)))
    return [round(pixels * factor) for pixels in size], size


def fingerprint(dataset: Dataset, given: Mapping[str, Any]) -> Fingerprint:
    """Headers of all cases, and for CT the intensities of a few.

    Raises:
        GlocalError: no case, or an unreadable image.
    """
    if not dataset.cases:
        raise GlocalError(f"{dataset.root} holds no case: put images into its imagesTr folder.")
    geometries = [_header(case.images[0]) for case in dataset.cases]
    axis = distinct_axis(geometries[0]) if given.get("spacing_known", True) else None
    if given.get("slice_axis", "auto") != "auto" and axis is None:
        axis = ARRAY_AXES.index(given["slice_axis"])
    if axis is None:
        axis = min(range(3), key=lambda k: geometries[0].size[2 - k])
    frame = frame_of(geometries[0], axis) if geometries[0].direction_known else None
    orders = [orient(geometry, frame, axis, given.get("spacing_known", True))[0] for geometry in geometries]
    is_ct = all(name.strip().lower() == "ct" for name in dataset.channels)  # one window for all channels
    wants_window = is_ct and "window" not in given and given.get("intensity", "window") == "window"
    return Fingerprint(axis, geometries, orders, _window(dataset) if wants_window else None)


def _header(path: Path) -> Geometry:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise GlocalError(f"{path} cannot be read: run `glocal check` on the dataset.") from error
    if reader.GetDimension() != 3:
        raise GlocalError(f"{path} is not a three-dimensional volume: run `glocal check` on the dataset.")
    return geometry_of(reader)


def _window(dataset: Dataset) -> tuple[float, float]:
    """Percentiles 0.5 and 99.5 of the labelled structures (of everything inside the body without labels)."""
    cases = (dataset.labelled or dataset.cases)[:10]
    values = [_interesting(case) for case in cases]
    low, high = np.percentile(np.concatenate(values), (0.5, 99.5))
    return float(np.floor(low)), float(np.ceil(high))


def _interesting(case: Case) -> Any:
    image = read_image(case.images[:1]).array[0]
    inside = read_labels(case.label).array[0] > 0 if case.label else image > -500
    if inside.shape != image.shape:
        raise GlocalError(f"{case.label} and its image differ in size: run `glocal check` on the dataset.")
    inside &= np.isfinite(image)
    values = image[inside] if inside.any() else image.ravel()
    return values[:: max(1, len(values) // 100_000)]


def _foreground_field(dataset: Dataset, orders: list[Order], spacing: list[float] | None) -> Any:
    """The centred field (rows, columns) that holds every labelled structure of up to 20 cases, with a margin."""
    needed = np.zeros(2)
    labelled = [(case.label, order) for case, order in zip(dataset.cases, orders, strict=True) if case.label]
    for file, order in labelled[:20]:
        labels = read_labels(file)
        plane = (labels.array[0] > 0).transpose(order).any(0)
        if not plane.any():
            continue
        for k, array_axis in enumerate(order[1:]):
            hits = np.flatnonzero(plane.any(1 - k))
            centre = (plane.shape[k] - 1) / 2
            side = 2 * max(centre - hits[0], hits[-1] - centre) + 1
            zoom = labels.geometry.spacing[2 - array_axis] / spacing[k] if spacing else 1.0
            needed[k] = max(needed[k], 1.1 * side * zoom)
    return needed


def _widths(network: Mapping[str, Any], side: int) -> dict[str, list[int]]:
    """As many of the network's levels as the image is large enough for; a network of fixed levels keeps its own."""
    field = type(network_options(network)).model_fields.get("widths")
    levels = max(3, int(log2(side / SMALLEST_BOTTLENECK)) + 1)
    return {} if field is None else {"widths": list(field.default[:levels])}
