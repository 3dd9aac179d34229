"""One volume to slices for the network, and the network's probabilities back to the volume."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from torch import Tensor

from glocal.data.image import Geometry, Volume
from glocal.data.orientation import ARRAY_AXES, Undo, orient
from glocal.data.plan import Plan, PreprocessOptions
from glocal.errors import GlocalError

T = TypeVar("T", bound=np.generic)
_CHUNK = 4  # slices interpolated at once: few enough to stay in the processor's cache
_LARGEST = float(np.finfo(np.float16).max)
VERSION = 1  # raised by hand when the slices made of a volume change (see `runs.identity`); stores are then made anew


@dataclass(frozen=True)
class Scale:
    """Values are cut off at `cut`, then `zero` becomes 0 and `one` becomes 1."""

    cut: tuple[float, float]
    zero: float
    one: float

    def apply(self, values: NDArray[np.float32]) -> None:
        """Scale `values` in place."""
        np.clip(values, *self.cut, out=values)
        values -= self.zero
        values /= self.one - self.zero


@dataclass(frozen=True)
class Prepared:
    """A volume as the network sees it: images `(n, C, H, W)` float32, the way back, and what was odd about it."""

    images: Tensor
    undo: Undo
    warnings: tuple[str, ...]


def prepare(volume: Volume, plan: Plan) -> Prepared:
    """Bring one volume `(C, z, y, x)` to the slices that `plan` describes.

    Order of work as in Chaitanya et al. 2020: bias field and intensities on the native volume, then pixel size, centre
    crop or padding, network size.

    Raises:
        GlocalError: wrong number of channels, NaN or infinite values, or a channel without contrast.
    """
    if len(volume.array) != plan.channels:
        raise GlocalError(
            f"The image has {len(volume.array)} channels, {plan.channels} are expected: give one file for each."
        )
    array = volume.array.astype(np.float32, copy=False)
    for channel in array:
        _require_contrast(channel)
    if plan.options.n4:
        array = np.stack([_n4(channel, volume.geometry) for channel in array])
    scales = [_scale(channel, plan.options) for channel in array]
    undo, warnings = _undo(volume.geometry, plan)
    chunks = []
    for chunk in _chunks(undo.oriented(array), np.float32):
        for channel, scale in zip(chunk.swapaxes(0, 1), scales, strict=True):
            scale.apply(channel)
        chunks.append(undo.to_network(torch.from_numpy(chunk)))
    images = torch.cat(chunks)
    low, high = images.aminmax()
    if max(-low, high) > _LARGEST:
        warnings.append("Some values are extreme outliers and were cut off: set clip to true.")
        images = images.clamp(-_LARGEST, _LARGEST)
    return Prepared(images, undo, tuple(warnings))


def prepare_labels(labels: Volume, undo: Undo, plan: Plan) -> Tensor:
    """Bring a label map `(1, z, y, x)` to slices `(n, H, W)` uint8, in the geometry of its prepared image.

    Raises:
        GlocalError: another size than the image, or values that dataset.json does not name.
    """
    slices = undo.oriented(labels.array)
    if (len(slices), *slices.shape[2:]) != undo.shape:
        raise GlocalError("The label map and the image differ in size: draw or export the label map again.")
    lowest, highest = int(labels.array.min()), int(labels.array.max())
    if lowest < 0 or highest >= len(plan.labels):
        raise GlocalError(
            f"The label map holds the value {lowest if lowest < 0 else highest}, which dataset.json does not name: "
            "add or relabel it."
        )
    return torch.cat([undo.labels_to_network(torch.from_numpy(chunk[:, 0])) for chunk in _chunks(slices, np.uint8)])


def restore(
    parts: Iterable[Tensor], undo: Undo, watch: Callable[[slice, Tensor], None] | None = None
) -> NDArray[np.uint8]:
    """The native mask `(z, y, x)` of successive slices' probabilities `(m, K, H, W)`; outside the field all is class 0.

    Linear interpolation of probabilities, so that the arg max is taken at native resolution (METHODS of Chaitanya et
    al. 2020). Part by part: the native probabilities of a whole volume would be its largest array by far.

    Args:
        parts: on any device.
        undo: the way back.
        watch: is shown each part's native probabilities `(m, K, rows, columns)` and which slices of `undo.oriented`
            arrays they are.
    """
    mask = np.empty([undo.shape[undo.order.index(axis)] for axis in range(3)], dtype=np.uint8)
    slices, start = undo.oriented(mask[None])[:, 0], 0
    for part in parts:
        native, place = undo.to_native(part.float()).cpu(), slice(start, start := start + len(part))
        slices[place] = native.max(1).indices.numpy()  # argmax would be the same, slower
        if watch is not None:
            watch(place, native)
    return mask


def _chunks(slices: NDArray[Any], dtype: type[T]) -> Iterator[NDArray[T]]:
    # Copied: torch knows no reversed axes.
    return (slices[start : start + _CHUNK].astype(dtype, order="C") for start in range(0, len(slices), _CHUNK))


def _undo(geometry: Geometry, plan: Plan) -> tuple[Undo, list[str]]:
    options = plan.options
    order, back, warnings = orient(geometry, plan.axes, ARRAY_AXES.index(plan.slice_axis), options.spacing_known)
    slices, rows, columns = (geometry.size[2 - axis] for axis in order)
    canvas = (rows, columns)
    if options.spacing is not None:
        row_mm, column_mm = (geometry.spacing[2 - axis] for axis in order[1:])
        canvas = (
            max(1, round(rows * row_mm / options.spacing[0])),
            max(1, round(columns * column_mm / options.spacing[1])),
        )
    return Undo(order, back, (slices, rows, columns), canvas, options.field or canvas, options.size), warnings


def _require_contrast(channel: NDArray[np.float32]) -> None:
    low, high = channel.min(), channel.max()  # NaN where any voxel is
    if not np.isfinite([low, high]).all():
        raise GlocalError("The image holds NaN or infinite values: export it again, or replace them.")
    if low == high:
        raise GlocalError(f"The image has the same value everywhere ({low:g}): it is empty, export it again.")


def _scale(channel: NDArray[np.float32], options: PreprocessOptions) -> Scale:
    low, high = options.window or _percentiles(channel, options.percentiles)
    cut = (low, high) if options.clip or options.window is not None else (-np.inf, np.inf)
    if options.intensity == "zscore":
        kept = channel.clip(*cut)
        low = float(kept.mean(dtype=np.float64))
        high = low + float(kept.std(dtype=np.float64))
    if not low < high:
        raise GlocalError(
            f"Nearly all voxels have the value {low:g}, so the percentiles {options.percentiles} coincide: widen "
            "percentiles, or crop the image to what it shows."
        )
    return Scale(cut, low, high)


def _percentiles(values: NDArray[np.float32], percents: Iterable[float]) -> Iterator[float]:
    """`np.percentile` in a fraction of its time: NumPy's fast selection finds one place at once only."""
    ordered = values.flatten()
    for percent in percents:
        place = percent / 100 * (ordered.size - 1)
        below = int(place)
        ordered.partition(below)
        low, share = ordered[below], place - below
        high = ordered[below + 1 :].min() if share else low
        step = float(high - low)
        yield float(low) + step * share if share < 0.5 else float(high) - step * (1 - share)  # rounded as NumPy does


def _n4(channel: NDArray[np.float32], geometry: Geometry) -> NDArray[np.float32]:
    image = sitk.GetImageFromArray(channel)
    image.SetSpacing(geometry.spacing)
    correct = sitk.N4BiasFieldCorrectionImageFilter()
    correct.SetMaximumNumberOfIterations([50] * 4)
    correct.SetConvergenceThreshold(1e-3)
    try:
        corrected: NDArray[np.float32] = sitk.GetArrayFromImage(correct.Execute(image))
    except RuntimeError as error:
        raise GlocalError("The bias field correction (N4) failed on this image: set n4 to false.") from error
    if not np.isfinite(corrected).all():
        raise GlocalError("The bias field correction (N4) gave values that are not finite: set n4 to false.")
    return corrected
