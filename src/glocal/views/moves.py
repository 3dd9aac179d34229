"""Views of a slice for prediction, each with its way back to the place of the slice; the same each time."""

from dataclasses import dataclass
from itertools import product
from math import cos, radians, sin

import torch
from torch import Tensor

from glocal.errors import GlocalError
from glocal.views.spatial import Spatial, SpatialOptions

_PART = 1 / 3  # of what training moved its slices by at most: far enough to differ, and nothing that it hardly saw


@dataclass(frozen=True)
class Move:
    """A view of a slice and the way back; each is a draw for one image."""

    there: Spatial
    back: Spatial

    @staticmethod
    def by(matrix: Tensor) -> "Move":
        """The move `matrix` `(3, 3)` float64 from view to source, in the coordinates of `views.spatial`."""
        still = torch.equal(matrix, torch.eye(3, dtype=matrix.dtype))
        there, back = (m[None, :2].float() for m in (matrix, torch.linalg.inv(matrix)))
        return Move(Spatial(there, still=still), Spatial(back, still=still))

    def of(self, images: int) -> "Move":
        """The same move of so many images."""
        both = (Spatial(s.matrix.expand(images, -1, -1), still=s.still) for s in (self.there, self.back))
        return Move(*both)


def moves(trained: SpatialOptions, size: tuple[int, int]) -> list[Move]:
    """The views of a slice: as it is, turned, zoomed and shifted to both sides, and mirrored if training mirrored.

    The moved views hold every pair of (left, right) turn and (larger, smaller) zoom once, so that on average nothing is
    turned or shifted. Each is moved a third as far as training did at most. Anatomy has a left and a right: a network
    that has never seen it mirrored shall not.

    Args:
        trained: how far training moved its slices.
        size: of the slices, `(H, W)`.

    Returns:
        The slice as it is, alone if training moved nothing, and the others.
    """
    part = _PART if trained.probability else 0.0
    degrees, shift = part * trained.rotation, part * trained.shift
    zooms = {1: max(1.0, trained.scale[1]) ** part, -1: min(1.0, trained.scale[0]) ** part}
    found = [torch.eye(3, dtype=torch.float64)]
    for turn, zoom in product((1, -1), (1, -1)):
        found.append(_matrix(degrees * turn, zooms[zoom], (shift * turn * zoom, shift * turn), size))
    for down, right in product(*((1, -1) if chance else (1,) for chance in trained.flip)):
        found.append(torch.diag(torch.tensor([right, down, 1], dtype=torch.float64)))
    return [Move.by(matrix) for k, matrix in enumerate(found) if not any(map(matrix.equal, found[:k]))]


def refuse_still(trained: SpatialOptions, asked: str) -> None:
    """What is asked for in vain is said before anything is trained.

    Raises:
        GlocalError: training moves nothing, so that `moves` has but one view; `asked` is how more were asked for.
    """
    if len(moves(trained, (1, 1))) == 1:
        raise GlocalError(
            f"{asked}, but slices are never turned, zoomed, shifted or mirrored in this fine-tuning (windows, "
            "stretching and elastic changes do not count), so its network will know no moved views: leave it out, or "
            "move slices by augmentation.spatial."
        )


def _matrix(degrees: float, zoom: float, shift: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """View to source `(3, 3)` float64; turned and zoomed about the centre, then shifted by parts of the sides."""
    wide, angle = size[1] / size[0], radians(degrees)  # in half sides a rotation is only rigid with their ratio
    linear = torch.tensor([[cos(angle), sin(angle) / wide], [-sin(angle) * wide, cos(angle)]], dtype=torch.float64)
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[:2, :2] = linear / zoom
    matrix[:2, 2] = -matrix[:2, :2] @ (2 * torch.tensor(shift, dtype=torch.float64))
    return matrix
