"""Spatial transforms of a batch: drawn per image, composed into one sampling grid, applied with one interpolation.

Coordinates inside this file are those of `torch.nn.functional.grid_sample` with `align_corners=False`: (x, y), -1 and 1
are the outer edges of the image, pixel i of n has its centre at (2 i + 1) / n - 1. They make a draw independent of
resolution: the same draw moves an image, its labels and a feature map of half the size alike, as long as the sides keep
their proportions.

Position v of a view comes from position A (v + d(v)) + c of the source: the elastic displacement d acts in the view,
before the affine part. So A is undone exactly, and what is left to invert, v + d(v), knows no rotation or zoom.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import grid_sample

from glocal.options import or_none
from glocal.views.ranges import PositiveRange, Probability, ShareRange, log_uniform, moved, uniform

Knots = Annotated[int, Field(ge=2)]


class SpatialOptions(BaseModel):
    """How far each image may be moved; every default leaves it where it is."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    _none = or_none()

    rotation: float = Field(0.0, ge=0, description="Largest rotation to either side, in degrees.")
    scale: PositiveRange = Field((1.0, 1.0), description="Zoom, each doubling equally likely; above 1 enlarges.")
    anisotropy: float = Field(0.0, ge=0, lt=1, description="Largest stretch of one axis relative to the other.")
    shift: float = Field(0.0, ge=0, description="Largest shift along each axis, as a fraction of the image's side.")
    crop: ShareRange = Field(
        (1.0, 1.0), description="Side of a random window, as a fraction of the image's side; resized to the full size."
    )
    flip: tuple[Probability, Probability] = Field(
        (0.0, 0.0), description="Probability of mirroring along the vertical axis y and along the horizontal axis x."
    )
    elastic: float = Field(
        0.0, ge=0, description="Standard deviation of the elastic displacements at the control points, in pixels."
    )
    elastic_grid: Knots | tuple[Knots, Knots] = Field(
        6, description="Control points per axis, or (vertical, horizontal); the outermost lie on the image's edges."
    )
    probability: Probability = Field(1.0, description="Probability that an image is moved at all, mirroring apart.")


@dataclass(frozen=True)
class Spatial:
    """One draw of spatial transforms for B images; apply it as often as wanted, to images and labels alike.

    `matrix` (B, 2, 3) float32: [A c], from view to source, in the coordinates of this file. `displacement`
    (B, 2, gh, gw): d at the control points, (x, y), same coordinates, or None. `still`: nothing moves.
    """

    matrix: Tensor
    displacement: Tensor | None = None
    still: bool = False

    @staticmethod
    def identity(batch: int) -> "Spatial":
        """The draw that leaves `batch` images where they are."""
        return Spatial(torch.eye(2, 3).repeat(batch, 1, 1), still=True)

    def __len__(self) -> int:
        return len(self.matrix)

    def __getitem__(self, rows: slice | Tensor) -> "Spatial":
        return replace(
            self, matrix=self.matrix[rows], displacement=None if self.displacement is None else self.displacement[rows]
        )

    def to(self, device: torch.device | str) -> "Spatial":
        """The same draw on another device (a few hundred numbers)."""
        displacement = None if self.displacement is None else moved(self.displacement, device)
        return replace(self, matrix=moved(self.matrix, device), displacement=displacement)

    def grid(self, size: tuple[int, int]) -> Tensor:
        """Where each pixel of a view of `size` (H, W) comes from: (B, H, W, 2) float32, for `grid_sample`."""
        x, y = (centres(side, self.matrix.device) for side in (size[1], size[0]))
        along, across, offset = self.matrix.unbind(2)
        grid = (along[..., None] * x)[:, :, None] + (across[..., None] * y + offset[..., None])[..., None]
        if self.displacement is not None:
            # Autocast would round the matrix products to bfloat16: half a pixel.
            with torch.autocast(grid.device.type, enabled=False):
                # The affine part acts on the few control points instead of on every pixel.
                knots = torch.einsum("bij,bjhw->bihw", self.matrix[:, :, :2], self.displacement)
                knots = knots @ bicubic(x, knots.shape[3]).T
                down = bicubic(y, knots.shape[2]).expand(2 * len(self), -1, -1)
                grid.view(-1, *size).baddbmm_(down, knots.flatten(0, 1))
        return grid.permute(0, 2, 3, 1)

    def source(self, places: Tensor) -> Tensor:
        """Where positions (B, P, 2) of the view come from, in the coordinates of this file: (B, P, 2) float32."""
        with torch.autocast(places.device.type, enabled=False):
            draw = self.to(places.device)
            places = places.float() + draw.bend(places.float())
            return torch.baddbmm(draw.matrix[:, None, :, 2], places, draw.matrix[:, :, :2].mT)

    def bend(self, places: Tensor) -> Tensor:
        """The elastic displacement d at positions (B, P, 2) of the view: (B, P, 2)."""
        if self.displacement is None:
            return torch.zeros_like(places)
        down = bicubic(places[..., 1], self.displacement.shape[2])
        right = bicubic(places[..., 0], self.displacement.shape[3])
        return torch.einsum("bph,bchw,bpw->bpc", down, self.displacement, right)

    def image(self, x: Tensor) -> Tensor:
        """The views of images or maps (B, C, H, W): same shape and dtype, bilinear, zero outside; x if still."""
        return x if self.still else self._sample(x, "bilinear")

    def labels(self, y: Tensor) -> Tensor:
        """The views of label maps (B, H, W) or (B, 1, H, W), integer: same shape and dtype, nearest, 0 outside."""
        if self.still:
            return y
        return self._sample(y if y.ndim == 4 else y[:, None], "nearest").reshape(y.shape)

    def _sample(self, x: Tensor, mode: str) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()  # positions need float32 whatever the image's type
        grid = self.to(x.device).grid((x.shape[2], x.shape[3])).to(wide.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return grid_sample(wide, grid, mode=mode, align_corners=False).to(x.dtype)


def centres(side: int, device: torch.device | str = "cpu") -> Tensor:
    """Positions of the centres of `side` pixels between -1 and 1."""
    return (2 * torch.arange(side, device=device, dtype=torch.float32) + 1) / side - 1


def bicubic(places: Tensor, count: int) -> Tensor:
    """Weights (..., count) of `count` control points between -1 and 1 at `places` (...).

    Cubic convolution through the control points (Keys 1981, a = -1/2); beyond the edge the outermost are repeated.
    """
    place = ((places + 1) / 2).clamp(0, 1) * (count - 1)
    gap = (place[..., None] - torch.arange(-1, count + 1, device=places.device)).abs()
    near = (1.5 * gap - 2.5) * gap**2 + 1
    far = ((2.5 - 0.5 * gap) * gap - 4) * gap + 2
    weights = torch.where(gap <= 1, near, torch.where(gap < 2, far, 0.0))
    inner = weights[..., 1:-1].clone()
    inner[..., 0] += weights[..., 0]
    inner[..., -1] += weights[..., -1]
    return inner


def draw_spatial(options: SpatialOptions, batch: int, size: tuple[int, int], generator: torch.Generator) -> Spatial:
    """Draw transforms for `batch` images of `size` (H, W) from a CPU generator.

    The view is a window of the source (crop), its anatomy stretched (anisotropy), zoomed and rotated about the window's
    centre, then shifted, then mirrored. Every option has its own random numbers: changing one leaves the others' draws.
    """
    chances = torch.rand(11, batch, generator=generator, dtype=torch.float64)
    chosen = chances[10] < options.probability
    matrix = torch.where(chosen[:, None, None], _affine(options, size, chances), torch.eye(2, 3, dtype=torch.float64))
    matrix[:, :, :2] *= torch.where(torch.tensor(options.flip[::-1]) > chances[8:10].T, -1.0, 1.0)[:, None]
    displacement = None
    if options.elastic:
        knots = options.elastic_grid if isinstance(options.elastic_grid, tuple) else (options.elastic_grid,) * 2
        pixels = torch.randn(batch, 2, *knots, generator=generator) * options.elastic
        displacement = pixels * 2 / torch.tensor([size[1], size[0]]).view(2, 1, 1) * chosen.view(-1, 1, 1, 1)
    still = displacement is None and torch.equal(matrix, torch.eye(2, 3, dtype=torch.float64).expand_as(matrix))
    return Spatial(matrix.float(), displacement, still)


def _affine(options: SpatialOptions, size: tuple[int, int], chances: Tensor) -> Tensor:
    """View to source but for mirroring, (B, 2, 3) float64, from uniform numbers (8 or more, B)."""
    angle = torch.deg2rad(options.rotation * (2 * chances[0] - 1))
    zoom = log_uniform(chances[1], options.scale)
    stretch = (1 + options.anisotropy * (2 * chances[2] - 1)).sqrt()
    cos, sin, zoom_x, zoom_y = angle.cos(), angle.sin(), zoom * stretch, zoom / stretch
    # Off the diagonal, positions in half heights become positions in half widths and back: rotations stay rigid.
    wide = size[1] / size[0]
    linear = torch.stack([cos / zoom_x, sin / zoom_x / wide, -sin / zoom_y * wide, cos / zoom_y], 1).view(-1, 2, 2)
    window = uniform(chances[3], options.crop)
    linear = linear * window[:, None, None]
    shift = 2 * options.shift * (2 * chances[4:6].T - 1)
    centre = (1 - window[:, None]) * (2 * chances[6:8].T - 1)
    offset = centre[..., None] - linear @ shift[..., None]
    return torch.cat([linear, offset], 2)
