"""A synthetic short-axis cardiac MR dataset: everything can be tried, taught and tested without patients.

A heart (labelled: right ventricle, myocardium, left ventricle) lies in a chest full of structures that look like its
parts: vessels and bowel as bright as blood, rings with a bright core, atria and outflow tract that carry no label.
Subjects differ in anatomy, coverage, contrast, coil sensitivity, noise, blur and grid.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from glocal.data.anatomy import LABELS, Scene, Tissue, empty_scene, paint_abdomen, paint_chest, paint_heart
from glocal.data.image import Geometry, write_volume
from glocal.errors import GlocalError
from glocal.files import appearing, write_json, write_text
from glocal.progress import track

# How hard the images are; ranges are drawn from uniformly, per subject. More such numbers stand in `anatomy`.
NOISE = (0.02, 0.08)  # Rician, share of the brightness of blood
BLUR = (0.4, 0.9)  # in-plane standard deviation, pixels
COIL = 0.6  # largest exponent of the coil's sensitivity towards an edge of the image
GAIN = 0.18  # standard deviation of the logarithm of each tissue's brightness
FAT_SUPPRESSED = 0.25  # share of subjects in whom fat is darker than muscle
ENHANCED = 0.15  # share of subjects whose myocardium took up contrast agent: nearly as bright as blood

# Balanced steady-state free precession.
BRIGHTNESS = {
    Tissue.AIR: 0.01,
    Tissue.LUNG: 0.08,
    Tissue.FAT: 0.80,
    Tissue.MUSCLE: 0.24,
    Tissue.BONE: 0.36,
    Tissue.LIVER: 0.36,
    Tissue.FLUID: 0.85,
    Tissue.WALL: 0.27,
    Tissue.MYOCARDIUM: 0.27,
    Tissue.BLOOD: 0.80,
}


def _acquire(scene: Scene) -> NDArray[np.int16]:
    """Tissues -> what a scanner makes of them: contrast, texture, blur, coil sensitivity, Rician noise, any scale."""
    rng, shape = scene.rng, scene.tissue.shape
    brightness = np.array([BRIGHTNESS[t] for t in Tissue], dtype=np.float32)
    brightness *= np.exp(rng.normal(0, GAIN, size=len(Tissue))).astype(np.float32)
    blood = brightness[Tissue.BLOOD]
    brightness[Tissue.WALL] = brightness[Tissue.MYOCARDIUM]
    if rng.random() < FAT_SUPPRESSED:
        brightness[Tissue.FAT] *= 0.22
    if rng.random() < ENHANCED:
        brightness[[Tissue.MYOCARDIUM, Tissue.WALL]] = blood * rng.uniform(0.5, 0.65)
    image = brightness[scene.tissue] * (1 + 0.07 * scene.coarse + 0.05 * scene.fine)
    image *= 1 + 0.08 * rng.standard_normal((shape[0], 1, 1), dtype=np.float32)
    blur = rng.uniform(*BLUR)
    # A slice is thick: it shows a little of its neighbours.
    image = gaussian_filter(image, (0.3, blur, blur), truncate=3, mode="nearest")
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape[1:])
    slope_y, slope_x, bend_y, bend_x = (COIL * rng.uniform(-1, 1, size=4)).astype(np.float32)
    image *= np.exp(slope_y * y + bend_y * y**2)[None, :, None] * np.exp(slope_x * x + bend_x * x**2)[None, None]
    real, imaginary = rng.standard_normal((2, *shape), dtype=np.float32) * blood * np.float32(rng.uniform(*NOISE))
    scaled = rng.uniform(150, 900) / blood * np.hypot(image + real, imaginary)
    whole: NDArray[np.int16] = np.rint(scaled).clip(0, 32767).astype(np.int16)
    return whole


def subject(seed: int, number: int) -> tuple[NDArray[np.int16], NDArray[np.uint8], Geometry]:
    """Image and labels `(z, y, x)` of one subject, and their geometry; a function of `seed` and `number` only."""
    rng = np.random.default_rng([seed, number])
    scene, spacing = empty_scene(rng)
    paint_chest(scene)
    paint_abdomen(scene)
    paint_heart(scene)
    image, labels = _acquire(scene), scene.labels
    slices, rows, columns = image.shape
    origin = rng.uniform(-60, 60, size=3)
    third = 1.0
    # Some files hold the apex first and say so in their header: the order of slices must be read from there.
    if rng.random() < 0.2:
        image, labels, third = image[::-1], labels[::-1], -1.0
        origin[2] += (slices - 1) * spacing[2]
    direction = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, third)
    return image, labels, Geometry((columns, rows, slices), spacing, (origin[0], origin[1], origin[2]), direction)


def phantom(root: Path, subjects: int = 40, labelled: int | None = None, seed: int = 0) -> None:
    """Write a synthetic raw dataset: images, labels, `dataset.json`, `subjects.tsv` and `split.json`.

    A quarter of the subjects are for testing, a tenth for development, both always labelled; the rest is the training
    pool, of which the first `labelled` subjects carry labels (all of them if None). Subject number k is the same
    however many are written. The folder appears whole or not at all.

    Raises:
        GlocalError: `root` exists and is not empty, fewer than 3 subjects, or more labelled ones than the pool holds.
    """
    if subjects < 3:
        raise GlocalError(f"A phantom of {subjects} subject(s) cannot be split: ask for at least 3.")
    tests, development = max(1, subjects // 4), max(1, subjects // 10)
    pool = subjects - tests - development
    if labelled is not None and not 0 <= labelled <= pool:
        raise GlocalError(
            f"{labelled} labelled subjects were asked for, the training pool holds {pool}: ask for fewer."
        )
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise GlocalError(f"{root} exists already: choose another folder, or remove this one.")
    unlabelled = range(pool if labelled is None else labelled, pool)
    cases = [f"phantom{number:03d}" for number in range(subjects)]
    split = {"pretrain": cases[:pool], "development": cases[pool:-tests], "test": cases[-tests:]}
    with appearing(root) as folder:
        for number in track(range(subjects), "drawing hearts", subjects):
            image, labels, geometry = subject(seed, number)
            write_volume(folder / "imagesTr" / f"{cases[number]}_0000.nii.gz", image, geometry)
            if number not in unlabelled:
                write_volume(folder / "labelsTr" / f"{cases[number]}.nii.gz", labels, geometry)
        write_json(folder / "dataset.json", _description(subjects - len(unlabelled), seed))
        write_json(folder / "split.json", split)
        write_text(folder / "subjects.tsv", "case\tsubject\n" + "".join(f"{case}\t{case}\n" for case in cases))


def _description(labelled: int, seed: int) -> dict[str, object]:
    return {
        "name": "Phantom",
        "description": f"Synthetic short-axis cardiac MR, drawn by glocal with seed {seed}: no patient was measured.",
        "licence": "CC0",
        "channel_names": {"0": "MRI"},
        "labels": LABELS,
        "numTraining": labelled,
        "file_ending": ".nii.gz",
    }
