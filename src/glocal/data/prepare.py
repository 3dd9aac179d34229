"""One volume to slices for the network, and the network's probabilities back to the volume."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from torch import Tensor

from glocal.data.image import Geometry, Volume
from glocal.data.orientation import ARRAY_AXES, Undo, orient
from glocal.data.plan import Plan, PreprocessOptions
from glocal.errors import GlocalError

_CHUNK = 16  # slices interpolated at once: bounds the memory of large volumes
_LARGEST = float(np.finfo(np.float16).max)


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
    if not np.isfinite(volume.array).all():
        raise GlocalError("The image holds NaN or infinite values: export it again, or replace them.")
    channels = [_normalise(channel.astype(np.float32), volume.geometry, plan.options) for channel in volume.array]
    undo, warnings = _undo(volume.geometry, plan)
    slices = undo.oriented(np.stack(channels))
    images = torch.cat([undo.to_network(chunk) for chunk in _chunks(slices)])
    if images.abs().max() > _LARGEST:
        warnings.append("Some values are extreme outliers and were cut off: set clip to true.")
    return Prepared(images.clamp(-_LARGEST, _LARGEST), undo, tuple(warnings))


def prepare_labels(labels: Volume, undo: Undo, plan: Plan) -> Tensor:
    """Bring a label map `(1, z, y, x)` to slices `(n, H, W)` uint8, in the geometry of its prepared image.

    Raises:
        GlocalError: another size than the image, or values that dataset.json does not name.
    """
    slices = undo.oriented(labels.array)
    if (len(slices), *slices.shape[2:]) != undo.shape:
        raise GlocalError("The label map and the image differ in size: draw or export the label map again.")
    unknown = sorted(set(np.unique(labels.array).tolist()) - set(plan.labels.values()))
    if unknown:
        raise GlocalError(
            f"The label map holds the value {unknown[0]}, which dataset.json does not name: add or relabel it."
        )
    classes = len(plan.labels)
    return torch.cat([undo.labels_to_network(chunk[:, 0], classes) for chunk in _chunks(slices.astype(np.uint8))])


def restore(probabilities: Tensor, undo: Undo) -> NDArray[np.float32]:
    """Bring probabilities `(n, K, H, W)` back to the native array `(K, z, y, x)`; outside the field all is class 0.

    Linear interpolation of probabilities, so that the arg max is taken at native resolution (METHODS of Chaitanya et
    al. 2020).
    """
    native = [undo.shape[undo.order.index(axis)] for axis in range(3)]
    result = np.empty((probabilities.shape[1], *native), dtype=np.float32)
    slices = undo.oriented(result)
    for start in range(0, len(slices), _CHUNK):
        chunk = probabilities[start : start + _CHUNK]
        slices[start : start + _CHUNK] = undo.to_native(chunk.float()).cpu().numpy()
    return result


def _chunks(slices: NDArray[Any]) -> Iterator[Tensor]:
    # Copied: torch knows no reversed axes.
    return (torch.from_numpy(slices[start : start + _CHUNK].copy()) for start in range(0, len(slices), _CHUNK))


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


def _normalise(channel: NDArray[np.float32], geometry: Geometry, options: PreprocessOptions) -> NDArray[np.float32]:
    if channel.min() == channel.max():
        raise GlocalError(
            f"The image has the same value everywhere ({channel.flat[0]:g}): it is empty, export it again."
        )
    if options.n4:
        channel = _n4(channel, geometry)
    low, high = options.window or np.percentile(channel, options.percentiles).tolist()
    if options.clip or options.window is not None:
        np.clip(channel, low, high, out=channel)
    if options.intensity == "zscore":
        low = float(channel.mean(dtype=np.float64))
        high = low + float(channel.std(dtype=np.float64))
    if not low < high:
        raise GlocalError(
            f"Nearly all voxels have the value {low:g}, so the percentiles {options.percentiles} coincide: widen "
            "percentiles, or crop the image to what it shows."
        )
    return ((channel - low) / (high - low)).astype(np.float32, copy=False)


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
