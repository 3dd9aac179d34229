"""Each intensity transform against its definition."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from glocal.views.intensity import (
    Intensity,
    IntensityOptions,
    draw_intensity,
    gaussian_blur,
    signed_power,
    smooth_field,
)


def images(batch: int = 50, channels: int = 2) -> Tensor:
    return torch.rand(batch, channels, 12, 17, generator=torch.Generator().manual_seed(0))


def draw(batch: int = 50, seed: int = 0, **options: object) -> Intensity:
    return draw_intensity(IntensityOptions.model_validate(options), batch, torch.Generator().manual_seed(seed))


def test_brightness_adds_one_number_per_image() -> None:
    x = images()
    added = draw(brightness=0.3).image(x) - x
    assert added.flatten(1).std(1).max() < 1e-6
    assert -0.3 <= added.min() < -0.25
    assert 0.25 < added.max() <= 0.3


def test_contrast_scales_about_the_mean_of_each_channel() -> None:
    x = images()
    viewed = draw(contrast=0.5).image(x)
    mean = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(viewed.mean((2, 3), keepdim=True), mean, atol=1e-5, rtol=0)
    factor = ((viewed - mean) / (x - mean)).flatten(1).median(1).values
    torch.testing.assert_close(viewed, mean + factor.view(-1, 1, 1, 1) * (x - mean), atol=1e-4, rtol=0)
    assert 0.5 <= factor.min() < 0.55
    assert 1.45 < factor.max() <= 1.5


def test_brightness_and_contrast_together_are_glcl_s() -> None:
    x = images()
    both = draw(brightness=0.3, contrast=0.5)
    assert both.brightness is not None
    assert both.contrast is not None
    bright = x + both.brightness.view(-1, 1, 1, 1)
    mean = bright.mean((2, 3), keepdim=True)
    torch.testing.assert_close(both.image(x), (bright - mean) * both.contrast.view(-1, 1, 1, 1) + mean)


def test_gamma_keeps_zero_one_and_signs() -> None:
    x = torch.tensor([0.0, 1.0, 0.5, -0.5, -1.0, 2.0]).expand(50, 1, 1, -1)
    gamma = draw(gamma=(0.5, 2.0))
    viewed = gamma.image(x)
    assert gamma.gamma is not None
    torch.testing.assert_close(viewed[:, 0, 0, 2], 0.5**gamma.gamma)
    torch.testing.assert_close(viewed[:, 0, 0, 3], -viewed[:, 0, 0, 2])
    assert torch.equal(viewed[:, 0, 0, :2], x[:, 0, 0, :2])
    assert abs((gamma.gamma > 1).float().mean() - 0.5) < 0.2


@pytest.mark.parametrize("exponent", [0.3, 1.0, 2.5])
def test_signed_power_is_the_power_to_float_rounding(exponent: float) -> None:
    size = torch.logspace(-12, 4, 5000, dtype=torch.float64)
    x = torch.cat([-size, torch.tensor([0.0]), size])
    power = signed_power(x.float(), torch.tensor(exponent))
    torch.testing.assert_close(power.double(), x.sign() * x.abs() ** exponent, rtol=1e-5, atol=1e-9)
    assert torch.equal(power.sign().double(), x.sign())


def test_noise_has_the_drawn_deviation_and_is_independent_between_pixels_and_images() -> None:
    x = torch.zeros(50, 1, 40, 40)
    noisy = draw(noise=0.2)
    viewed = noisy.image(x)
    assert noisy.noise is not None
    torch.testing.assert_close(viewed.flatten(1).std(1), noisy.noise, rtol=0.15, atol=0)
    assert noisy.noise.min() >= 0
    assert 0.18 < noisy.noise.max() <= 0.2
    between = torch.corrcoef(viewed.flatten(1)).fill_diagonal_(0)
    assert between.abs().max() < 0.15
    assert not torch.allclose(draw(noise=0.2, seed=1).image(x), viewed)


def test_noise_does_not_touch_global_random_state() -> None:
    before = torch.random.get_rng_state()
    draw(noise=0.2).image(images())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_blur_is_a_gaussian_convolution() -> None:
    x, sigma, radius = images(3), torch.tensor([0.4, 1.0, 1.7]), 6
    blurred = gaussian_blur(x, sigma, radius)
    for image, width, result in zip(x, sigma.tolist(), blurred, strict=True):
        line = torch.tensor([math.exp(-0.5 * (step / width) ** 2) for step in range(-radius, radius + 1)])
        kernel = torch.outer(line, line) / line.sum() ** 2
        expected = conv2d(pad(image[:, None], (radius,) * 4, mode="replicate"), kernel[None, None])[:, 0]
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_blur_of_nothing_and_of_a_constant_change_nothing() -> None:
    x = images(2)
    assert torch.equal(gaussian_blur(x, torch.zeros(2), 3), x)
    constant = torch.full((2, 1, 5, 5), 0.7)
    torch.testing.assert_close(gaussian_blur(constant, torch.tensor([1.0, 2.0]), 6), constant)


def test_blur_is_drawn_up_to_the_option_and_not_cut_short() -> None:
    soft = draw(blur=2.0)
    assert soft.blur is not None
    assert soft.blur.min() >= 0
    assert 1.8 < soft.blur.max() <= 2.0
    spot = torch.zeros(50, 1, 31, 31)
    spot[:, :, 15, 15] = 1.0
    line = soft.image(spot).sum((1, 2))
    spread = (line * (torch.arange(31) - 15) ** 2).sum(1).sqrt()
    wide = soft.blur > 0.7  # narrower ones are no Gaussian on whole pixels
    torch.testing.assert_close(spread[wide], soft.blur[wide], rtol=0.03, atol=0)


def test_bias_field_multiplies_with_a_smooth_field_within_the_option() -> None:
    x = 0.5 + images(400)
    coil = draw(400, bias_field=0.8)
    assert coil.bias_field is not None
    field = (coil.image(x) / x).log()
    torch.testing.assert_close(field[:, 0], field[:, 1])  # one for all channels
    largest = field.flatten(1).abs().amax(1)
    assert largest.max() <= 0.8
    assert largest.max() > 0.7
    assert (largest < 0.1).float().mean() > 0.05  # any strength up to it
    for number in (0, 7):
        a, b, c, d, e = coil.bias_field[number].tolist()
        for row, column in ((0, 0), (3, 11), (11, 16)):
            v, u = (2 * row + 1) / 12 - 1, (2 * column + 1) / 17 - 1
            expected = a * u + b * v + c * u * u + d * u * v + e * v * v
            assert field[number, 0, row, column].item() == pytest.approx(expected, abs=1e-4)


def test_values_are_changed_in_full_precision_whatever_is_trained_in() -> None:
    every = draw(brightness=0.3, contrast=0.5, gamma=(0.5, 2.0), noise=0.1, blur=1.0, bias_field=1.0)
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = every.image(x)
    assert torch.equal(mixed, every.image(x))


def test_bias_field_of_zeros_is_one() -> None:
    assert torch.equal(smooth_field(torch.zeros(2, 5), 4, 6), torch.ones(2, 1, 4, 6))


def test_bias_field_lets_some_images_be() -> None:
    half = draw(400, bias_field=0.8, probability=0.5).bias_field
    assert half is not None
    assert 0.4 < (half == 0).all(1).float().mean() < 0.6


def test_each_change_is_chosen_on_its_own() -> None:
    half = draw(400, brightness=0.3, contrast=0.5, gamma=(0.5, 2.0), noise=0.1, blur=1.0, probability=0.5)
    assert half.gamma is not None
    assert half.contrast is not None
    neutral = torch.stack([half.brightness == 0, half.contrast == 1, half.gamma == 1, half.noise == 0, half.blur == 0])
    assert (torch.corrcoef(neutral.float()).fill_diagonal_(0).abs() < 0.2).all()


def test_clip_is_last() -> None:
    viewed = draw(brightness=1.0, noise=0.5, clip=(0.0, 1.5)).image(images())
    assert viewed.min() == 0.0
    assert viewed.max() == 1.5


@pytest.mark.parametrize("name", ["brightness", "contrast", "gamma", "noise", "blur", "bias_field"])
def test_an_option_leaves_the_draws_of_the_others(name: str) -> None:
    options: dict[str, object] = {"brightness": 0.3, "contrast": 0.5, "gamma": (0.5, 2.0), "noise": 0.1, "blur": 1.0}
    options["bias_field"] = 0.5
    everything = draw(**options)
    del options[name]
    fewer = draw(**options)
    assert getattr(fewer, name) is None
    assert fewer.seed == everything.seed
    for other in options:
        assert torch.equal(getattr(fewer, other), getattr(everything, other))


def test_gradients_flow() -> None:
    x = images(2).requires_grad_()
    draw(2, brightness=0.1, contrast=0.1, gamma=(0.9, 1.1), noise=0.1, blur=1.0).image(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad > 0).all()


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))]
)
def test_values_follow_the_images_device(device: str) -> None:
    x, changed = images(), draw(brightness=0.3, contrast=0.5, gamma=(0.5, 2.0), blur=1.0)
    viewed = changed.image(x.to(device))
    assert viewed.device.type == device
    torch.testing.assert_close(viewed.cpu(), changed.image(x), atol=1e-5, rtol=1e-4)
