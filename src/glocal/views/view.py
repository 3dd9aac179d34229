"""A view: one spatial and one intensity draw for a batch of images."""

from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from glocal.options import or_none
from glocal.views.intensity import Intensity, IntensityOptions, draw_intensity
from glocal.views.spatial import Spatial, SpatialOptions, draw_spatial

VERSION = 2  # raised by hand when the same draw gives another view (see `runs.identity`)


class ViewOptions(BaseModel):
    """What a view may change; every default leaves the images as they are, and so does the word `none`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    _none = or_none()

    spatial: SpatialOptions = Field(SpatialOptions(), description="How far images may be moved.")
    intensity: IntensityOptions = Field(IntensityOptions(), description="How far values may be changed.")


@dataclass(frozen=True)
class View:
    """One draw for B images; the same view may be taken of other images and of labels."""

    spatial: Spatial
    intensity: Intensity

    @staticmethod
    def identity(batch: int) -> "View":
        """The view that is the images themselves."""
        return View(Spatial.identity(batch), Intensity.identity(batch))

    def __len__(self) -> int:
        return len(self.spatial)

    def __getitem__(self, rows: slice | Tensor) -> "View":
        return View(self.spatial[rows], self.intensity[rows])

    def to(self, device: torch.device | str) -> "View":
        """The same view on another device."""
        return View(self.spatial.to(device), self.intensity.to(device))

    def image(self, x: Tensor) -> Tensor:
        """The views of images (B, C, H, W), moved first and then changed in value: same shape and dtype."""
        return self.intensity.image(self.spatial.image(x))

    def labels(self, y: Tensor) -> Tensor:
        """The views of label maps (B, H, W) or (B, 1, H, W), integer: same shape and dtype."""
        return self.spatial.labels(y)


def draw_view(options: ViewOptions, batch: int, size: tuple[int, int], generator: torch.Generator) -> View:
    """Draw a view of `batch` images of `size` (H, W) from a CPU generator."""
    return View(
        draw_spatial(options.spatial, batch, size, generator), draw_intensity(options.intensity, batch, generator)
    )
