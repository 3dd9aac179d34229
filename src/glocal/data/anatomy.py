"""The anatomy of the phantom: a heart in a chest, painted tissue by tissue on the grid of one subject.

Sizes are those of adult end-diastolic anatomy in textbooks; nothing is fitted to patients.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

LABELS = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}

# How hard it is to see what is heart.
WARP = 4.0  # standard deviation of the smooth displacement of all outlines, mm
TRABECULAE = (0.0, 0.6)  # how far muscle reaches into the cavities, per subject
RINGS = (2, 5)  # bowel loops and the like, built as the left ventricle is: dark wall, bright core

Field = NDArray[np.float32]
Mask = NDArray[np.bool_]


class Tissue(IntEnum):
    """What a voxel consists of."""

    AIR, LUNG, FAT, MUSCLE, BONE, LIVER, FLUID, WALL, MYOCARDIUM, BLOOD = range(10)


@dataclass
class Scene:
    """One subject while it is painted; all arrays broadcast to `(z, y, x)`.

    `u`, `v` are millimetres from the middle of the left ventricle, to the right and down; `h` is the height on the
    heart's long axis, 0 at the base and 1 at the apex; `coarse` and `fine` are random fields of unit variance.
    """

    rng: np.random.Generator
    u: Field
    v: Field
    h: Field
    coarse: Field
    fine: Field
    tissue: NDArray[np.uint8]
    labels: NDArray[np.uint8]

    def paint(self, where: Mask, tissue: Tissue, label: int = 0) -> None:
        """Fill a mask with a tissue; what was there is gone."""
        self.tissue[where] = tissue
        self.labels[where] = label

    def ellipse(
        self, u: Field | float, v: Field | float, a: Field | float, b: Field | float, turn: float = 0, power: float = 2
    ) -> Field:
        """Relative distance from the centre of an ellipse, to a power: below 1 inside. Above 2 it is boxier."""
        du, dv = self.u - u, self.v - v
        along, across = du * math.cos(turn) + dv * math.sin(turn), dv * math.cos(turn) - du * math.sin(turn)
        distance = np.abs(along / np.maximum(a, 1e-3)) ** power + np.abs(across / np.maximum(b, 1e-3)) ** power
        return distance.astype(np.float32)


def smooth(rng: np.random.Generator, shape: tuple[int, ...], sigma: tuple[float, ...]) -> Field:
    """A random field of zero mean and unit variance, as smooth as a Gaussian of `sigma` voxels."""
    # Drawn on a coarser grid and repeated where it is very smooth: filters cost as their width.
    step = max(1, int(sigma[-1] / 2))
    small = rng.standard_normal((shape[0], -(-shape[1] // step), -(-shape[2] // step)), dtype=np.float32)
    field: Field = gaussian_filter(small, (sigma[0], sigma[1] / step, sigma[2] / step), mode="wrap", truncate=3)
    field = field.repeat(step, axis=1).repeat(step, axis=2)[:, : shape[1], : shape[2]]
    if step > 1:
        field = gaussian_filter(field, (0, step / 2, step / 2), truncate=2)
    normal: Field = ((field - field.mean()) / field.std()).astype(np.float32)
    return normal


def empty_scene(rng: np.random.Generator) -> tuple[Scene, tuple[float, float, float]]:
    """An empty grid in a subject: spacing (x, y, z) in mm, coverage, posture, breathing and a smooth deformation."""
    pixel, thickness, length = rng.uniform(1.3, 1.8), rng.uniform(8, 10), rng.uniform(72, 100)
    rows, columns = (int(np.clip(2 * round(rng.uniform(170, 225) / pixel / 2), 110, 150)) for _ in range(2))
    # Some stacks begin above the base, some below it; some end before the apex.
    first, last = rng.uniform(-1.6, 0.6) * thickness / length, rng.uniform(0.8, 1.12)
    slices = int(np.clip(round((last - first) * length / thickness) + 1, 7, 14))
    shape = (slices, rows, columns)
    h = (first + np.arange(slices) * thickness / length).astype(np.float32)[:, None, None]
    turn, (shift_u, shift_v) = rng.normal(0, 0.12), rng.normal(0, 9, size=2)
    breath = np.cumsum(rng.normal(0, 0.8, size=(2, slices, 1, 1)), axis=1) + rng.normal(0, 0.7, size=(2, slices, 1, 1))
    x = (np.arange(columns)[None, None] - columns / 2) * pixel - shift_u
    y = (np.arange(rows)[None, :, None] - rows / 2) * pixel - shift_v
    sway_u, sway_v = (WARP * smooth(rng, shape, (1.5, 16, 16)) for _ in range(2))
    u = (x * math.cos(turn) - y * math.sin(turn) + 0.5 * breath[0] + sway_u).astype(np.float32)
    v = (x * math.sin(turn) + y * math.cos(turn) + breath[1] + sway_v).astype(np.float32)
    coarse, fine = smooth(rng, shape, (0.7, 3.5, 3.5)), smooth(rng, shape, (0.3, 1.1, 1.1))
    empty = np.zeros(shape, dtype=np.uint8)
    return Scene(rng, u, v, h, coarse, fine, empty, empty.copy()), (pixel, pixel, thickness)


def paint_chest(scene: Scene) -> None:
    """Body outline, fat, chest wall with ribs, lungs with vessels, mediastinum, spine and descending aorta."""
    rng, paint = scene.rng, scene.paint
    half = rng.uniform(100, 130), rng.uniform(78, 98)
    # The chest's front and side keep clear of the heart.
    centre = half[0] - rng.uniform(72, 90), half[1] - rng.uniform(46, 62)
    fat, wall = rng.uniform(5, 24), rng.uniform(8, 14)
    body, chest, lung = (
        scene.ellipse(*centre, half[0] + rim, half[1] + rim, power=2.6) for rim in (wall + fat, wall, 0)
    )
    paint(body < 1, Tissue.FAT)
    paint(chest < 1, Tissue.MUSCLE)
    around = np.arctan2(scene.v - centre[1], scene.u - centre[0])
    ribs = np.cos(rng.integers(11, 16) * around + rng.uniform(0, 6) + rng.uniform(3, 8) * scene.h) > 0.3
    paint(ribs & (chest < 0.93) & (lung > 1.05), Tissue.BONE)
    paint(lung < 1, Tissue.LUNG)
    paint((lung < 0.95) & (scene.fine > 2.5), Tissue.BLOOD)
    spine = (rng.uniform(-45, 0), rng.uniform(68, 88))
    between = scene.ellipse(spine[0] / 2, spine[1] / 2, rng.uniform(22, 38), rng.uniform(50, 65), rng.normal(0, 0.2))
    paint(between < 1, Tissue.FAT)
    paint((between < 1) & (scene.coarse > 0.2), Tissue.MUSCLE)
    paint((between < 1) & (scene.coarse < -1.5), Tissue.BLOOD)
    paint(scene.ellipse(*spine, rng.uniform(19, 25), rng.uniform(15, 20)) < 1, Tissue.BONE)
    paint(scene.ellipse(spine[0], spine[1] + 24, 8, 8) < 1, Tissue.FLUID)
    aorta = (spine[0] + rng.uniform(18, 34), spine[1] - rng.uniform(5, 18), *(rng.uniform(9, 13) * np.ones(2)))
    paint(scene.ellipse(*aorta) < 1.25, Tissue.WALL)
    paint(scene.ellipse(*aorta) < 1, Tissue.BLOOD)


def paint_abdomen(scene: Scene) -> None:
    """Below the diaphragm, which comes closer towards the apex: liver, vessels, stomach, and rings like ventricles."""
    rng, paint = scene.rng, scene.paint
    top = rng.uniform(50, 66) - rng.uniform(18, 36) * scene.h
    dome = rng.uniform(8, 22) * (1 - ((scene.u - rng.uniform(-30, 30)) / 90) ** 2)
    below = (scene.v > top - dome) & (scene.tissue != Tissue.AIR)
    inside = below & ((scene.tissue == Tissue.LUNG) | (scene.coarse > -0.5)) & (scene.tissue != Tissue.BONE)
    inside &= scene.tissue != Tissue.FAT if rng.random() < 0.5 else True
    paint(inside, Tissue.LIVER)
    paint(inside & (scene.coarse > 1.5), Tissue.BLOOD)
    paint(inside & (scene.u > rng.uniform(0, 40)) & (scene.coarse < -0.7), Tissue.FAT)
    stomach = scene.ellipse(
        rng.uniform(35, 75), top + rng.uniform(10, 30), rng.uniform(22, 38), rng.uniform(14, 24), rng.normal(0, 0.4)
    )
    paint(below & (stomach < 1.3), Tissue.WALL)
    content = rng.choice([Tissue.FLUID, Tissue.LUNG, Tissue.LIVER])
    paint(below & (stomach < 1), Tissue(content))
    for _ in range(rng.integers(*RINGS, endpoint=True)):
        middle, reach, radius = rng.uniform(0.2, 1.1), rng.uniform(0.15, 0.4), rng.uniform(9, 19)
        size = radius * np.sqrt(np.maximum(1 - ((scene.h - middle) / reach) ** 2, 0))
        ring = scene.ellipse(rng.uniform(-60, 85), top + rng.uniform(6, 40), size, size * rng.uniform(0.7, 1))
        paint(below & (ring < 1), Tissue.WALL)
        paint(below & (ring < rng.uniform(0.3, 0.55)), Tissue(rng.choice([Tissue.FLUID, Tissue.BLOOD])))


def paint_heart(scene: Scene) -> None:
    """Pericardial fat, right ventricle, left ventricle, papillary muscles; atria and outflow tract without a label."""
    rng, paint, h = scene.rng, scene.paint, scene.h
    inside = (h >= 0) & (h <= 1)
    radius, wall = rng.uniform(25, 35), rng.uniform(6.5, 13)
    profile = np.sqrt(np.clip(1 - np.clip(h, 0, 1) ** rng.uniform(2, 3.2), 0, 1))
    u, v = rng.normal(0, 8) * (h - 0.5), rng.normal(0, 8) * (h - 0.5)
    du, dv = scene.u - u, scene.v - v
    angle, distance = np.arctan2(dv, du), np.hypot(du, dv)
    oval = 1 + rng.uniform(0, 0.09) * np.cos(2 * (angle - rng.uniform(0, math.pi)))
    outer = radius * profile * oval
    inner = outer - wall * (1 - 0.35 * h) * (1 + rng.uniform(0, 0.25) * np.cos(angle - rng.uniform(0, 2 * math.pi)))
    towards = math.pi + rng.normal(0, 0.25) + rng.uniform(0, 0.35) * h  # the septum turns towards the apex
    right, fade = _right_ventricle(scene, du, dv, radius, towards)
    thin, trabeculae = rng.uniform(2, 4) / radius, rng.uniform(*TRABECULAE)
    fat = rng.uniform(0, 9) * (1 + 0.5 * scene.coarse)
    paint(((distance < outer + fat) | (right < (1 + (fat + 3) / radius) ** 2)) & (fat > 1) & (h < 1.05), Tissue.FAT)
    _atria(scene, radius, towards)
    paint(inside & (right < (1 + thin) ** 2), Tissue.MYOCARDIUM)
    paint(inside & (right < 1), Tissue.BLOOD, LABELS["RV"])
    paint(inside & (right < 1) & (scene.fine > 1.3 - trabeculae + 0.8 * fade), Tissue.MYOCARDIUM, LABELS["RV"])
    paint(inside & (distance < outer), Tissue.MYOCARDIUM, LABELS["MYO"])
    cavity = inside & (distance < inner)
    paint(cavity, Tissue.BLOOD, LABELS["LV"])
    # Muscle inside the cavity counts as cavity, as in clinical contours.
    depth = 1 - distance / np.maximum(inner, 1)
    paint(cavity & (scene.fine > 0.5 - trabeculae + 5 * depth), Tissue.MYOCARDIUM, LABELS["LV"])
    for side in (0.9, -1.1):
        spot = towards + math.pi + side * rng.uniform(0.8, 1.3)
        reach = 0.6 * (radius * profile - wall)
        size = rng.uniform(3, 5.5) * np.sqrt(np.maximum(1 - ((h - 0.5) / 0.32) ** 2, 0))
        pillar = scene.ellipse(u + reach * np.cos(spot), v + reach * np.sin(spot), size, size)
        paint(cavity & (pillar < 1), Tissue.MYOCARDIUM, LABELS["LV"])


def _right_ventricle(scene: Scene, du: Field, dv: Field, radius: float, towards: Field) -> tuple[Field, Field]:
    """Squared relative distance from the right ventricle's middle (below 1 inside) and how large it is at each height.

    A crescent, because the left ventricle is painted over it; wide with an outflow lobe at the base, gone at the apex.
    """
    rng, h = scene.rng, np.clip(scene.h, 0, 1)
    fade = np.sqrt(np.clip(1 - (h / rng.uniform(0.72, 0.95)) ** 2, 0, 1))
    out, up = du * np.cos(towards) + dv * np.sin(towards), dv * np.cos(towards) - du * np.sin(towards)
    depth = radius * rng.uniform(0.75, 1.1) * fade
    span = radius * rng.uniform(1.0, 1.3) * fade * (1 - 0.22 * np.tanh(out / radius - 0.8))
    offset = radius * rng.uniform(0.65, 0.85) * (0.5 + 0.5 * fade)
    crescent = ((out - offset) / np.maximum(depth, 1e-3)) ** 2 + (up / np.maximum(span, 1e-3)) ** 2
    lobe_size = radius * rng.uniform(0.5, 0.7) * np.clip(1 - h / rng.uniform(0.2, 0.4), 0, 1)
    lobe = (out - 0.95 * radius) ** 2 + (up - 0.85 * radius) ** 2
    joined: Field = np.minimum(crescent, lobe / np.maximum(lobe_size, 1e-3) ** 2)
    return joined, fade


def _atria(scene: Scene, radius: float, towards: Field) -> None:
    """Left and right atrium, aortic root and outflow tract: blood above the base, none of it labelled."""
    rng, h = scene.rng, scene.h
    lower = rng.uniform(0.05, 0.2)  # the right atrium reaches below the base, beside the right ventricle
    angle = float(np.mean(towards))
    for reach, turn, size, limit in (
        (rng.uniform(0.1, 0.3), 2.6, 0.95, 0.0),
        (rng.uniform(1.2, 1.5), -0.65, 0.7, lower),
        (rng.uniform(0.55, 0.7), 0.45, 0.42, 0.0),
        (rng.uniform(1.1, 1.3), 0.95, 0.42, 0.0),
    ):
        at = angle + turn + rng.normal(0, 0.15)
        blob = scene.ellipse(
            reach * radius * math.cos(at),
            reach * radius * math.sin(at),
            size * radius * rng.uniform(0.85, 1.1),
            size * radius * rng.uniform(0.75, 1),
            at,
        )
        paint_here = h < limit
        scene.paint(paint_here & (blob < 1.25), Tissue.WALL)
        scene.paint(paint_here & (blob < 1), Tissue.BLOOD)
