"""Two views of a batch of slices, beside the same transforms in MONAI, TorchIO and batchgeneratorsv2.

The peers transform one slice after another, as they are meant to, and their results are stacked to a batch; glocal
moves the whole batch at once. Ranges, order and interpolation (bilinear, zero outside) are the same wherever a peer can
be told, and every slice gets every transform. The affine part is compared pixel by pixel before anything is timed;
elastic deformation and intensities are matched in range and order only. Drawing the random numbers is part of the work,
for all.
"""

import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.harness import Row, compared, main, take_turns
from glocal.views.intensity import IntensityOptions
from glocal.views.spatial import Spatial, SpatialOptions, draw_spatial
from glocal.views.view import ViewOptions, draw_view

SLICES, SIDE = 40, 192
DEGREES, ZOOM, SHIFT = 30.0, (0.8, 1.25), 0.1
ELASTIC, KNOTS = 2.0, 6  # pixels, control points per axis
BRIGHTNESS, CONTRAST, GAMMA, NOISE = 0.3, 0.3, (0.7, 1.5), 0.1

Change = Callable[[Tensor], Tensor]  # a slice (1, H, W) to its view

AFFINE = SpatialOptions(rotation=DEGREES, scale=ZOOM, shift=SHIFT, flip=(0.5, 0.5))
BENT = AFFINE.model_copy(update={"elastic": ELASTIC, "elastic_grid": KNOTS})
INTENSITY = IntensityOptions(brightness=BRIGHTNESS, contrast=CONTRAST, gamma=GAMMA, noise=NOISE)


class Move(NamedTuple):
    """How a slice is moved: zoomed and rotated about its middle, then shifted, then mirrored."""

    radians: float
    zoom: float
    shift: tuple[float, float]  # pixels along (H, W)
    mirrored: tuple[int, ...]  # axes of (H, W)


def monai_move(image: Tensor, move: Move) -> Tensor:
    """MONAI moves one slice (1, H, W) as told."""
    from monai.transforms import Affine, Flip

    affine = Affine(
        rotate_params=move.radians,
        translate_params=[-step / move.zoom for step in move.shift],
        scale_params=[1 / move.zoom] * 2,
        padding_mode="zeros",
        image_only=True,
    )
    return Flip(move.mirrored)(affine(image))


def monai_random(elastic: bool) -> Change:
    """Its elastic transform brings the affine one with it, in one interpolation."""
    from monai import transforms as mt
    from monai.data import set_track_meta

    set_track_meta(False)  # nothing is inverted here, and with it MONAI is slower
    scale = (1 / ZOOM[1] - 1, 1 / ZOOM[0] - 1)  # its factors shrink, and 1 is added to them
    ranges = {
        "rotate_range": math.radians(DEGREES),
        "translate_range": (SHIFT * SIDE, SHIFT * SIDE),
        "scale_range": (scale, scale),
        "padding_mode": "zeros",
    }
    changes = [
        mt.Rand2DElastic(SIDE / (KNOTS - 1), (ELASTIC, ELASTIC), prob=1, **ranges)
        if elastic
        else mt.RandAffine(prob=1, **ranges),
        mt.RandFlip(prob=0.5, spatial_axis=0),
        mt.RandFlip(prob=0.5, spatial_axis=1),
        mt.RandAdjustContrast(prob=1, gamma=GAMMA),
        mt.RandScaleIntensityFixedMean(prob=1, factors=CONTRAST),
        mt.RandShiftIntensity(prob=1, offsets=BRIGHTNESS),
        mt.RandGaussianNoise(prob=1, std=NOISE),
    ]
    return mt.Compose(changes).set_random_state(0)


def torchio_move(image: Tensor, move: Move) -> Tensor:
    """TorchIO moves one slice (1, H, W) as told."""
    from torchio import Affine

    affine = Affine(
        scales=(move.zoom, move.zoom, 1),
        degrees=(0, 0, -math.degrees(move.radians)),
        translation=(*(step / move.zoom for step in move.shift), 0),
        default_pad_value=0,
    )
    return affine(image[..., None])[..., 0].flip([axis + 1 for axis in move.mirrored])


def torchio_random(elastic: bool) -> Change:
    """Both spatial transforms in one interpolation; brightness and contrast it has none."""
    import torchio as tio

    pixels = SHIFT * SIDE
    affine = {
        "scales": (*ZOOM, *ZOOM, 1, 1),
        "degrees": (0, 0, 0, 0, -DEGREES, DEGREES),
        "translation": (-pixels, pixels, -pixels, pixels, 0, 0),
        "default_pad_value": 0,
    }
    reach = ELASTIC * math.sqrt(3)  # of uniform displacements with our standard deviation
    bend = {  # two of its control points per axis lie outside the image
        "num_control_points": (KNOTS + 2, KNOTS + 2, 4),
        "max_displacement": (reach, reach, 0),
        "locked_borders": 0,
    }
    changes = [
        tio.RandomAffineElasticDeformation(True, affine, bend) if elastic else tio.RandomAffine(**affine),
        tio.RandomFlip(axes=(0, 1), flip_probability=0.5),
        tio.RandomGamma(log_gamma=(math.log(GAMMA[0]), math.log(GAMMA[1]))),
        tio.RandomNoise(std=(0, NOISE)),
    ]
    change = tio.Compose(changes)
    return lambda image: change(image[..., None])[..., 0]


def batchgenerators_move(image: Tensor, move: Move) -> Tensor:
    """batchgeneratorsv2 moves one slice (1, H, W) as told, but for the shift: it draws where it crops."""
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

    affine = SpatialTransform(
        (SIDE, SIDE), 0, random_crop=False, p_rotation=1, rotation=move.radians, p_scaling=1, scaling=1 / move.zoom
    )
    return affine(image=image)["image"].flip([axis + 1 for axis in move.mirrored])


def batchgenerators_random(elastic: bool) -> Change:
    """The transforms of nnU-Net, which leaves elastic deformation out by default."""
    from batchgeneratorsv2.transforms.intensity.brightness import BrightnessAdditiveTransform
    from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

    spatial = SpatialTransform(
        (SIDE, SIDE),
        SIDE * (0.5 - SHIFT),
        random_crop=True,
        p_elastic_deform=float(elastic),
        elastic_deform_scale=0.5 / (KNOTS - 1),  # half the distance of control points
        elastic_deform_magnitude=2 * ELASTIC,  # the largest: two standard deviations
        p_rotation=1,
        rotation=(-math.radians(DEGREES), math.radians(DEGREES)),
        p_scaling=1,
        scaling=(1 / ZOOM[1], 1 / ZOOM[0]),
        p_synchronize_scaling_across_axes=1,
    )
    changes = [
        spatial,
        MirrorTransform((0, 1)),
        GammaTransform(GAMMA, p_invert_image=0, synchronize_channels=True, p_per_channel=1, p_retain_stats=0),
        ContrastTransform((1 - CONTRAST, 1 + CONTRAST), preserve_range=False, synchronize_channels=True),
        BrightnessAdditiveTransform(-BRIGHTNESS, BRIGHTNESS),  # uniform between the two
        GaussianNoiseTransform((0, NOISE), synchronize_channels=True),
    ]
    change = ComposeTransforms(changes)
    return lambda image: change(image=image)["image"]


class Peer(NamedTuple):
    """`move` moves one slice (1, H, W) as told, `random` makes a random view of one."""

    package: str
    goal: float
    move: Callable[[Tensor, Move], Tensor]
    random: Callable[[bool], Change]
    shifts: bool = True  # whether `move` can be told a shift
    note: str = ""


MATCHED = "affine part equal pixel by pixel; elastic and intensity matched in range and order only"
PEERS = {
    "MONAI": Peer("monai", 2, monai_move, monai_random, note="; without meta data"),
    "TorchIO": Peer("torchio", 5, torchio_move, torchio_random, note="; has no contrast, no brightness"),
    "batchgeneratorsv2": Peer(
        "batchgeneratorsv2", 1, batchgenerators_move, batchgenerators_random, shifts=False, note=", as are shifts"
    ),
}


def moves(draw: Spatial) -> list[Move]:
    """The draw in the words of the peers; rotations are below a quarter turn, so a negative diagonal is a mirror."""
    found = []
    for matrix in draw.matrix.double().numpy():
        sign = np.sign(np.diag(matrix))
        linear = matrix[:, :2] * sign
        right, down = (-np.linalg.solve(linear, matrix[:, 2]) * SIDE / 2).tolist()
        zoom = float(np.linalg.det(linear)) ** -0.5
        mirrored = tuple(axis for axis in (0, 1) if sign[1 - axis] < 0)
        found.append(Move(math.atan2(linear[0, 1], linear[0, 0]), zoom, (down, right), mirrored))
    return found


def smooth(seed: int = 0) -> Tensor:
    """Slices (B, 1, H, W) with values from 0 to 1."""
    coarse = torch.rand(SLICES, 1, 24, 24, generator=torch.Generator().manual_seed(seed))
    return interpolate(coarse, (SIDE, SIDE), mode="bicubic").clamp(0, 1)


def agree(peer: Peer, x: Tensor) -> None:
    """Moved alike, slices of glocal and of the peer are equal wherever they come from inside the source.

    This is the affine part alone; elastic deformation and intensities are not compared pixel by pixel.
    """
    options = AFFINE if peer.shifts else AFFINE.model_copy(update={"shift": 0.0})
    draw = draw_spatial(options, len(x), (SIDE, SIDE), torch.Generator().manual_seed(0))
    theirs = torch.stack([peer.move(image, move) for image, move in zip(x, moves(draw), strict=True)])
    inside = (draw.grid((SIDE, SIDE)).abs() <= 1 - 1 / SIDE).all(-1)[:, None]
    assert inside.float().mean() > 0.7
    assert (theirs - draw.image(x))[inside].abs().max() < 1e-3, peer.package


def two_views(options: ViewOptions, x: Tensor) -> Callable[[], list[Tensor]]:
    """Draw two views of all slices and make them: two batches (B, 1, H, W)."""
    generator = torch.Generator().manual_seed(0)
    return lambda: [draw_view(options, len(x), (SIDE, SIDE), generator).image(x) for _ in range(2)]


def one_by_one(change: Change, x: Tensor) -> Callable[[], list[Tensor]]:
    """The same with a peer."""
    return lambda: [torch.stack([change(image) for image in x]) for _ in range(2)]


def rows() -> Iterator[Row]:
    """Our two views beside those of each peer that is installed, and by themselves with blur."""
    x = smooth()
    what = f"two views of {SLICES} slices, {SIDE} x {SIDE}: affine, flips, gamma, contrast, brightness, noise"
    for name, peer in PEERS.items():
        if find_spec(peer.package) is None:
            print(f"{name} is not installed: `make bench-peers` measures it.")
            continue
        agree(peer, x)
        for spatial, added in ((AFFINE, ""), (BENT, ", elastic")):
            ours, theirs = (
                two_views(ViewOptions(spatial=spatial, intensity=INTENSITY), x),
                one_by_one(peer.random(bool(added)), x),
            )
            assert all(view.shape == x.shape and view.isfinite().all() for view in (*ours(), *theirs()))
            yield compared(what + added, ours, name, theirs, peer.goal, note=f"{MATCHED}{peer.note}", seconds=2)
    blurred = ViewOptions(spatial=BENT, intensity=INTENSITY.model_copy(update={"blur": 1.0}))
    fastest, middle = take_turns({"ours": two_views(blurred, x)}, seconds=2)["ours"]
    yield Row(f"{what}, elastic, blur", "ms", (fastest * 1e3, middle * 1e3))


if __name__ == "__main__":
    main(rows)
