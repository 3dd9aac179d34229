"""Where slices come from and how they go back: slice axis, orientation, in-plane geometry, all of it undone exactly."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from glocal.data.image import Geometry

Direction = tuple[float, float, float]
Frame = tuple[Direction, Direction, Direction]
Pair = tuple[int, int]
T = TypeVar("T", bound=np.generic)

ARRAY_AXES: tuple[Literal["z"], Literal["y"], Literal["x"]] = ("z", "y", "x")


def distinct_axis(geometry: Geometry) -> int | None:
    """The array axis (0 = z) whose spacing exceeds both others by more than 10 %, if there is one."""
    spacing = geometry.spacing[::-1]
    axis = int(np.argmax(spacing))
    others = [value for k, value in enumerate(spacing) if k != axis]
    return axis if spacing[axis] > 1.1 * max(others) else None


def frame_of(geometry: Geometry, axis: int) -> Frame:
    """LPS directions of the slice axis `axis`, the rows and the columns, each turned to a positive main component."""
    directions = geometry.axes.T[::-1][[axis, *_others(axis)]]
    main = np.abs(directions).argmax(axis=1)
    directions = directions * np.where(directions[range(3), main] < 0, -1.0, 1.0)[:, None]
    slices, rows, columns = (tuple(map(float, direction)) for direction in directions)
    return slices, rows, columns  # type: ignore[return-value]


def _others(axis: int) -> Pair:
    first, second = (k for k in range(3) if k != axis)
    return first, second


def orient(
    geometry: Geometry, frame: Frame | None, default_axis: int, spacing_known: bool
) -> tuple[tuple[int, int, int], tuple[bool, bool, bool], list[str]]:
    """Which array axes are slices, rows and columns, which of these to reverse to match `frame`, and warnings.

    The slice axis is the one with clearly the largest spacing, else the one nearest to the frame's, else
    `default_axis`. Without a frame, or without a direction in the header, nothing is swapped or reversed.
    """
    directions = geometry.axes.T[::-1]
    axis = distinct_axis(geometry) if spacing_known else None
    if frame is None or not geometry.direction_known:
        axis = default_axis if axis is None else axis
        unknown = "The header states no direction: the volume is taken as it lies in the file, perhaps mirrored."
        return (axis, *_others(axis)), (False, False, False), [] if frame is None else [unknown]
    cosines = directions @ np.asarray(frame).T  # (array axis, frame axis)
    axis = int(np.abs(cosines[:, 0]).argmax()) if axis is None else axis
    a, b = _others(axis)
    order = max(((axis, a, b), (axis, b, a)), key=lambda o: abs(cosines[o[1], 1]) + abs(cosines[o[2], 2]))
    slices, rows, columns = (float(cosines[order[k], k]) for k in range(3))
    warnings = []
    if min(abs(slices), abs(rows), abs(columns)) < 0.3:
        warnings.append(
            "The volume lies across the others (its slice, row and column directions have cosines "
            f"{slices:.2f}, {rows:.2f}, {columns:.2f} with theirs): its slices may show another view."
        )
    return order, (slices < 0, rows < 0, columns < 0), warnings


@dataclass(frozen=True)
class Undo:
    """How a volume became slices and how to go back; pairs are (rows, columns) in pixels.

    Every interpolation keeps the outer edges of the picture in place (half-pixel centres), so that going back meets
    the native pixels without a shift.
    """

    order: tuple[int, int, int]  # the array axes (0 = z, 1 = y, 2 = x) that became slices, rows and columns
    reversed: tuple[bool, bool, bool]
    shape: tuple[int, int, int]  # native slices, rows, columns
    canvas: Pair  # after resampling to the pixel size in mm
    field: Pair  # after the centre crop or padding
    size: Pair  # as the network sees it

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Undo":
        """The inverse of `as_dict`, also after JSON made lists of the tuples."""
        return cls(**{key: tuple(value) for key, value in content.items()})

    def oriented(self, array: NDArray[T]) -> NDArray[T]:
        """A view of `array` `(C, z, y, x)` as slices `(n, C, rows, columns)`: writing to it writes to the array."""
        view = array.transpose(0, *(axis + 1 for axis in self.order))
        slices, rows, columns = (slice(None, None, -1 if back else 1) for back in self.reversed)
        return view[:, slices, rows, columns].swapaxes(0, 1)

    def to_network(self, slices: Tensor) -> Tensor:
        """`(n, C, *native)` → `(n, C, *size)`; what is padded is 0."""
        return resize(place(resize(slices, self.canvas), self.field), self.size)

    def labels_to_network(self, labels: Tensor) -> Tensor:
        """`(n, *native)` → `(n, *size)`, integers; each pixel takes the class that covers most of it.

        Not the nearest pixel's: halved, a pixel has four nearest ones, and always choosing the same of them would
        shift the labels by half a native pixel against the image.
        """
        return _resize_labels(place(_resize_labels(labels, self.canvas), self.field), self.size)

    def to_native(self, probabilities: Tensor) -> Tensor:
        """`(n, K, *size)` → `(n, K, *native)`; outside the field all probability is the background's (class 0)."""
        inside = resize(probabilities, self.field)
        canvas = place(inside, self.canvas)
        canvas[:, :1] = place(inside[:, :1], self.canvas, 1.0)
        return resize(canvas, (self.shape[1], self.shape[2]))

    def kept(self, foreground: NDArray[np.bool_]) -> float:
        """Share of the `foreground` `(n, *native)` that the field keeps; 1 if there is none."""
        rows, columns = (
            np.abs((np.arange(native) + 0.5) * canvas / native + _offset(canvas, field) - field / 2) < field / 2
            for native, canvas, field in zip(self.shape[1:], self.canvas, self.field, strict=True)
        )
        where = foreground.sum(axis=0, dtype=np.uint32)
        total = int(where.sum())
        return int(where[rows][:, columns].sum()) / total if total else 1.0


def resize(slices: Tensor, size: Pair) -> Tensor:
    """`(n, C, H, W)` → `(n, C, *size)`, linear; where it shrinks each pixel averages what it covers (no aliasing)."""
    if tuple(slices.shape[-2:]) == tuple(size):
        return slices
    return functional.interpolate(slices, tuple(size), mode="bilinear", align_corners=False, antialias=True)


def place(slices: Tensor, size: Pair, value: float = 0.0) -> Tensor:
    """Centre crop or pad with `value` to `size`; `place(place(x, b), a)` puts what was kept back where it was."""
    height, width = slices.shape[-2:]
    top, left = _offset(height, size[0]), _offset(width, size[1])
    margins = (left, size[1] - width - left, top, size[0] - height - top)  # negative ones crop
    return functional.pad(slices, margins, value=value)


def _offset(old: int, new: int) -> int:
    # Rounded towards zero, so that going there and back gives the same margins with opposite signs.
    return int((new - old) / 2)


def _resize_labels(labels: Tensor, size: Pair) -> Tensor:
    """`(n, H, W)` → `(n, *size)`; of values that cover equal parts of a pixel the lowest wins."""
    if tuple(labels.shape[-2:]) == tuple(size):
        return labels
    result = labels.new_empty((len(labels), *size))
    for slice_, winner in zip(labels, result, strict=True):  # one by one: most hold few of the values, many only one
        first, last = (int(value) for value in slice_.aminmax())
        winner.fill_(first)
        if first == last:
            continue
        largest = _share(slice_, first, size)
        for value in slice_.ravel().bincount().nonzero().ravel().tolist()[1:]:
            share = _share(slice_, value, size)
            winner.masked_fill_(share > largest, value)
            largest = torch.maximum(largest, share)
    return result


def _share(labels: Tensor, value: int, size: Pair) -> Tensor:
    return resize((labels == value).float()[None, None], size)[0, 0]
