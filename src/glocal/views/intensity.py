"""Intensity transforms of a batch: drawn per image, applied to all images at once."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import pad

from glocal.options import or_none
from glocal.views.ranges import PositiveRange, Probability, Range, log_uniform, moved
from glocal.views.spatial import centres


class IntensityOptions(BaseModel):
    """How far each image's values may be changed; every default leaves them as they are."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    _none = or_none()

    brightness: float = Field(0.0, ge=0, description="Largest value added or taken away.")
    contrast: float = Field(
        0.0, ge=0, description="Largest change of the factor 1 on the distance to the image's mean."
    )
    gamma: PositiveRange = Field((1.0, 1.0), description="Exponent of the values, each doubling equally likely.")
    noise: float = Field(0.0, ge=0, description="Largest standard deviation of the Gaussian noise.")
    blur: float = Field(0.0, ge=0, description="Largest standard deviation of the Gaussian blur, in pixels.")
    bias_field: float = Field(
        0.0, ge=0, description="Largest logarithm of the smooth field that values are multiplied with, as by a coil."
    )
    clip: Range | None = Field(None, description="Range that all values of all images are cut to at the end.")
    probability: Probability = Field(1.0, description="Probability of each of the six changes, for each image.")


@dataclass(frozen=True)
class Intensity:
    """One draw for B images. Each change has one number per image, (B,), or is None where its option is off.

    The bias field has five, (B, 5): of x, y, x^2, x y and y^2, whose sum is its logarithm; x and y go from -1 to 1.
    `rows` (B,) are the images' places among the `total` drawn together: a share of a draw gets its share of the noise.
    """

    rows: Tensor
    total: int
    seed: int
    radius: int = 0
    blur: Tensor | None = None
    bias_field: Tensor | None = None
    gamma: Tensor | None = None
    contrast: Tensor | None = None
    brightness: Tensor | None = None
    noise: Tensor | None = None
    clip: tuple[float, float] | None = None

    @staticmethod
    def identity(batch: int) -> "Intensity":
        """The draw that leaves `batch` images as they are."""
        return Intensity(torch.arange(batch), batch, 0)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | Tensor) -> "Intensity":
        return self._each(lambda numbers: numbers[rows])

    def to(self, device: torch.device | str) -> "Intensity":
        """The same draw on another device."""
        return self._each(lambda numbers: moved(numbers, device))

    def image(self, x: Tensor) -> Tensor:
        """The changed images (B, C, H, W), same shape and dtype (x itself if nothing is drawn).

        In this order: blur; bias field; gamma as sign(x) |x|^gamma, so that values below 0 keep their sign; contrast
        about each channel's mean, and brightness (GLCL, Chaitanya et al. 2020); noise; clip. The same draw gives the
        same noise on the same kind of device.
        """
        draw = self.to(x.device)
        out = x if x.dtype == torch.float64 else x.float()
        if draw.blur is not None:
            out = gaussian_blur(out, draw.blur, self.radius)
        if draw.bias_field is not None:
            out = out * smooth_field(draw.bias_field, *x.shape[2:]).to(out.dtype)
        if draw.gamma is not None:
            out = signed_power(out, _column(draw.gamma, out))
        if draw.contrast is not None or draw.brightness is not None:
            out = draw._linear(out)
        if draw.noise is not None:
            generator = torch.Generator(x.device).manual_seed(self.seed)
            noise = torch.randn(self.total, *x.shape[1:], generator=generator, device=x.device)[draw.rows]
            out = noise.to(out.dtype).mul_(_column(draw.noise, out)).add_(out)
        if self.clip is not None:
            out = out.clamp(*self.clip)
        return out.to(x.dtype)

    def _linear(self, x: Tensor) -> Tensor:
        """Contrast and brightness in one pass."""
        offset = torch.zeros_like(x[:, :1, :1, :1]) if self.brightness is None else _column(self.brightness, x)
        if self.contrast is None:
            return x + offset
        factor = _column(self.contrast, x)
        return torch.mul(x, factor).add_(x.mean((2, 3), keepdim=True) * (1 - factor) + offset)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Intensity":
        changed: dict[str, Any] = {name: change(kept) for name, kept in vars(self).items() if isinstance(kept, Tensor)}
        return replace(self, **changed)


def _column(numbers: Tensor, x: Tensor) -> Tensor:
    return numbers.to(x.dtype).view(-1, 1, 1, 1)


def signed_power(x: Tensor, exponent: Tensor) -> Tensor:
    """sign(x) |x|^exponent, right to a few millionths: half the time of `pow`."""
    # The logarithm of 0 (background, what lies outside a view) and its way back would take ten times as long.
    return x.sign().mul_(x.abs().clamp_min_(1e-18).log_().mul_(exponent).exp_())


def smooth_field(coefficients: Tensor, height: int, width: int) -> Tensor:
    """Fields (B, 1, height, width): exponentials of polynomials with `coefficients` (B, 5), see `Intensity`."""
    y, x = centres(height, coefficients.device)[:, None], centres(width, coefficients.device)
    logarithm = coefficients.new_zeros(())
    for factor, term in zip(coefficients.T, (x, y, x * x, x * y, y * y), strict=True):
        logarithm = logarithm + _column(factor, term) * term  # a matrix product would round in mixed precision
    return logarithm.exp()


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur images (B, C, H, W) with standard deviations `sigma` (B,), cut at `radius`, in pixels; edges repeated."""
    steps = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.exp(-0.5 * (steps / sigma[:, None].clamp_min(1e-3)) ** 2)
    weights = _column((weights / weights.sum(1, keepdim=True)).flatten(), x).view(len(x), -1, 1, 1, 1)
    for axis, border in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        # Shifted sums stay in full precision on every device, where a convolution may round.
        wide, side = pad(x, border, mode="replicate"), x.shape[axis]
        x = wide.narrow(axis, 0, side) * weights[:, 0]
        for step in range(1, 2 * radius + 1):
            x.addcmul_(wide.narrow(axis, step, side), weights[:, step])
    return x


def draw_intensity(options: IntensityOptions, batch: int, generator: torch.Generator) -> Intensity:
    """Draw changes for `batch` images from a CPU generator.

    Every option has its own random numbers: changing one leaves the others' draws as they were.
    """
    chances = torch.rand(10, batch, generator=generator)
    seed = int(torch.randint(2**62, (), generator=generator))
    chosen, chances = chances[5:] < options.probability, chances[:5]

    def numbers(index: int, wanted: bool, values: Tensor, neutral: float) -> Tensor | None:
        return torch.where(chosen[index], values, neutral) if wanted else None

    return Intensity(
        rows=torch.arange(batch),
        total=batch,
        seed=seed,
        radius=math.ceil(3 * options.blur),
        blur=numbers(0, options.blur > 0, options.blur * chances[0], 0.0),
        bias_field=_coefficients(options, batch, seed) if options.bias_field > 0 else None,
        gamma=numbers(1, options.gamma != (1, 1), log_uniform(chances[1], options.gamma), 1.0),
        contrast=numbers(2, options.contrast > 0, 1 + options.contrast * (2 * chances[2] - 1), 1.0),
        brightness=numbers(3, options.brightness > 0, options.brightness * (2 * chances[3] - 1), 0.0),
        noise=numbers(4, options.noise > 0, options.noise * chances[4], 0.0),
        clip=options.clip,
    )


def _coefficients(options: IntensityOptions, batch: int, seed: int) -> Tensor:
    """Coefficients (B, 5) of bias fields whose logarithm stays within the option.

    They come from a generator of their own: those who want no field draw everything else as they would without it.
    """
    chances = torch.rand(7, batch, generator=torch.Generator().manual_seed(seed ^ 1))
    shares = 2 * chances[2:] - 1
    shares /= shares.abs().sum(0).clamp_min(1e-6)  # no term is larger than its share, so the sum is not above 1
    strength = options.bias_field * chances[1] * (chances[0] < options.probability)
    return (strength * shares).T.contiguous()
