"""Raw dataset to store: glocal beside the script one would write with SimpleITK, and two workers beside one."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from benchmarks.harness import Row, compared, main, take_turns
from glocal.data.image import Geometry, write_volume
from glocal.data.plan import PreprocessOptions
from glocal.data.preprocess import preprocess
from glocal.files import stamp, write_json

BESIDES = "ours besides: digests of sources and voxels, checks, files flushed to disk, an index to continue from"


@dataclass(frozen=True)
class Kind:
    """Volumes of one kind and what is made of them; sizes and spacings are (x, y, z), the pixel and field square."""

    name: str
    count: int
    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    pixel: float
    field: int

    @property
    def options(self) -> PreprocessOptions:
        """The same as options of glocal."""
        square = (self.field, self.field)
        return PreprocessOptions(spacing=(self.pixel, self.pixel), field=square, size=square)


CINE = Kind("216x256x10, 1.5 mm to 192x192, 1.367 mm", 16, (216, 256, 10), (1.5, 1.5, 10.0), 1.367, 192)
CT = Kind("512x512x100, 0.8 mm to 256x256, 1.5 mm", 2, (512, 512, 100), (0.8, 0.8, 3.0), 1.5, 256)


def dataset(root: Path, kind: Kind) -> Path:
    """Write volumes in the nnU-Net layout: smooth tissue with noise, two nested organs; every fifth is upside down."""
    x, y, z = kind.size
    away = [
        np.linspace(-1, 1, n, dtype=np.float32).reshape(shape) for n, shape in ((z, (-1, 1, 1)), (y, (-1, 1)), (x, -1))
    ]
    radius = np.sqrt(1.5 * away[0] ** 2 + 8 * (away[1] - 0.1) ** 2 + 6 * away[2] ** 2)
    for number in range(kind.count):
        generator = np.random.default_rng(number)
        tissue = gaussian_filter(generator.standard_normal((z, y // 4, x // 4), dtype=np.float32), (1, 4, 4))
        tissue = tissue.repeat(4, 1).repeat(4, 2) * 3000 + 400 * (radius < 1) + 200 * (radius < 0.6)
        image = np.rint(tissue + 15 * generator.standard_normal(tissue.shape, dtype=np.float32)).astype(np.int16)
        labels = (radius < 1).astype(np.uint8) + (radius < 0.6)
        up = -1.0 if number % 5 == 4 else 1.0
        geometry = Geometry(kind.size, kind.spacing, (9.0, -5.0, 3.0), (1, 0, 0, 0, 1, 0, 0, 0, up))
        write_volume(root / "imagesTr" / f"{number:03d}_0000.nii.gz", image, geometry)
        write_volume(root / "labelsTr" / f"{number:03d}.nii.gz", labels, geometry)
    labels_named = {"background": 0, "outer": 1, "inner": 2}
    content = {"name": "made", "channel_names": {"0": "X"}, "labels": labels_named, "file_ending": ".nii.gz"}
    write_json(root / "dataset.json", content | {"numTraining": kind.count})
    return root


def with_simpleitk(raw: Path, out: Path, kind: Kind, carefully: bool) -> None:
    """The peer: read, orient, normalise, resample straight into the field, save.

    `carefully`, as glocal: labels by majority (linear interpolation of each), blurred where it shrinks. Otherwise
    labels from the nearest pixel, and noise that aliases.
    """
    for part in ("images", "labels"):
        (out / part).mkdir(parents=True)
    for label_file in sorted((raw / "labelsTr").iterdir()):
        case = label_file.name.removesuffix(".nii.gz")
        image = sitk.ReadImage(str(raw / "imagesTr" / f"{case}_0000.nii.gz"), sitk.sitkFloat32)
        image = sitk.DICOMOrient(image, "LPS")
        labels = sitk.DICOMOrient(sitk.ReadImage(str(label_file), sitk.sitkUInt8), "LPS")

        array = sitk.GetArrayFromImage(image)
        low, high = (float(value) for value in np.percentile(array, (1, 99)))
        np.clip(array, low, high, out=array)
        array -= low
        array /= high - low
        normalised = sitk.GetImageFromArray(array)
        normalised.CopyInformation(image)

        shrinks = kind.pixel / image.GetSpacing()[0]
        if carefully and shrinks > 1:
            width = kind.pixel / 6**0.5  # as wide as the triangle of glocal, in mm
            for axis in (0, 1):
                normalised = sitk.RecursiveGaussian(normalised, width, direction=axis)
        resample = sitk.ResampleImageFilter()
        into_field(resample, image, kind)
        resample.SetInterpolator(sitk.sitkLinear)
        slices = resample.Execute(normalised)
        resample.SetInterpolator(sitk.sitkLabelLinear if carefully else sitk.sitkNearestNeighbor)
        maps = resample.Execute(labels)
        np.save(out / "images" / f"{case}.npy", sitk.GetArrayViewFromImage(slices)[:, None].astype(np.float16))
        np.save(out / "labels" / f"{case}.npy", sitk.GetArrayViewFromImage(maps))


def into_field(resample: sitk.ResampleImageFilter, image: sitk.Image, kind: Kind) -> None:
    """Set the grid: whole pixels in the picture's outer edges, centred crop or padding with 0, slices as they are."""
    pixels = [
        max(1, round(n * mm / kind.pixel)) for n, mm in zip(image.GetSize()[:2], image.GetSpacing()[:2], strict=True)
    ]
    zoom = [n / p for n, p in zip(image.GetSize()[:2], pixels, strict=True)]
    first = [(0.5 - int((kind.field - p) / 2)) * z - 0.5 for p, z in zip(pixels, zoom, strict=True)]
    resample.SetSize((kind.field, kind.field, image.GetSize()[2]))
    resample.SetOutputSpacing([z * mm for z, mm in zip((*zoom, 1.0), image.GetSpacing(), strict=True)])
    resample.SetOutputOrigin(image.TransformContinuousIndexToPhysicalPoint((*first, 0.0)))
    resample.SetOutputDirection(image.GetDirection())


def require_alike(ours: Path, theirs: Path, image_tolerance: float, label_tolerance: float) -> None:
    """The same shapes; of images the mean difference (0 to 1), of labels the share of other pixels within a bound."""
    for file in sorted((theirs / "images").iterdir()):
        a, b = np.load(ours / "images" / file.name), np.load(file)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert _mean_difference(a, b) <= image_tolerance, _mean_difference(a, b)
        a, b = np.load(ours / "labels" / file.name), np.load(theirs / "labels" / file.name)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert (a != b).mean() <= label_tolerance, (a != b).mean()


def _mean_difference(a: NDArray[np.float16], b: NDArray[np.float16]) -> float:
    return float(np.abs(a.astype(np.float32) - b.astype(np.float32)).mean())


def in_new_folder(work: Callable[[Path], object]) -> Callable[[], None]:
    """Call `work` with a folder that does not exist yet and is removed afterwards."""

    def call() -> None:
        folder = Path(tempfile.mkdtemp()) / "out"
        work(folder)
        shutil.rmtree(folder.parent)

    return call


def beside_simpleitk(root: Path, kind: Kind, tolerances: dict[bool, float]) -> Iterator[Row]:
    """One core, one thread, all volumes of a kind; small ones also without waiting for the disk, as the script.

    `tolerances` are the largest mean differences of images, from the careful script and from the plain one.
    """
    raw = dataset(root / str(kind.field), kind)
    preprocess(raw, root / "ours", kind.options, workers=1)
    what = f"preprocess {kind.count} x {kind.name}, one worker"
    ours = in_new_folder(lambda out: preprocess(raw, out, kind.options, workers=1))
    for carefully, tolerance in tolerances.items():
        with_simpleitk(raw, root / "theirs", kind, carefully)
        require_alike(root / "ours", root / "theirs", tolerance, label_tolerance=0.002)
        shutil.rmtree(root / "theirs")

        def script(out: Path, carefully: bool = carefully) -> None:
            with_simpleitk(raw, out, kind, carefully)

        theirs = in_new_folder(script)
        if carefully:
            note = f"labels by majority{', anti-aliasing' if kind is CT else ''}; {BESIDES}"
            yield compared(what, ours, "SimpleITK script that does the same", theirs, goal=1.0, note=note)
        else:
            yield compared(what, ours, "SimpleITK script, nearest labels, no anti-aliasing", theirs)
    shutil.rmtree(root / "ours")
    if kind is CINE:
        unflushed = mock.patch("os.fsync", new=int)(ours)
        against, note = "SimpleITK script, nearest labels, no anti-aliasing", "ours without waiting for the disk"
        yield compared(f"{what}, files not flushed", unflushed, against, theirs, note=note)


def multiply(raw: Path, copies: int) -> None:
    """Every volume so many times, as hard links."""
    for file in sorted(raw.glob("*Tr/*")):
        for copy in range(1, copies):
            os.link(file, file.with_name(f"{copies}-{copy}-{file.name}"))


def two_workers(raw: Path) -> Iterator[Row]:
    """Speed-up of two workers over one: threads, as by default, and processes, which start by importing torch."""
    count = len(list((raw / "labelsTr").iterdir()))

    def processes(out: Path) -> None:
        with ProcessPoolExecutor(2, get_context("spawn")) as executor:
            preprocess(raw, out, CINE.options, executor=executor)

    contenders = {
        "one": in_new_folder(lambda out: preprocess(raw, out, CINE.options, workers=1)),
        "two workers": in_new_folder(lambda out: preprocess(raw, out, CINE.options, workers=2)),
        "two workers in processes": in_new_folder(processes),
    }
    seconds = take_turns(contenders, seconds=0, rounds=2)
    cores = len(os.sched_getaffinity(0))
    for name in ("two workers", "two workers in processes"):
        speed_up = seconds["one"][0] / seconds[name][0]
        note = f"{cores} cores, efficiency {speed_up / 2:.0%}, start of the workers included"
        what = f"preprocess {count} x {CINE.name}, {name}"
        yield Row(what, "s", seconds[name], "one worker", seconds["one"], speed_up, note=note)


def unchanged(raw: Path, root: Path) -> Row:
    """What a start costs that finds everything done: no source is read, no worker is started."""
    while any(stamp(file) is None for file in raw.glob("*Tr/*")):  # too young: they would be read again
        time.sleep(1)
    count = len(preprocess(raw, root / "done", CINE.options, workers=2).volumes)
    refused = mock.Mock(side_effect=AssertionError("this start is not idle"))
    patched = dict.fromkeys(("digest", "_prepare_case", "_pool"), refused)
    with mock.patch.multiple("glocal.data.preprocess", **patched):
        again = take_turns({"ours": lambda: preprocess(raw, root / "done", CINE.options, workers=2)}, seconds=1)["ours"]
    figures = (again[0] * 1e3, again[1] * 1e3)
    return Row(
        f"preprocess again, {count} unchanged volumes", "ms", figures, ratio=figures[0], goal=500.0, sense="at most"
    )


def rows() -> Iterator[Row]:
    """The table."""
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        # Enlarged, images are equal to the rounding of half precision; shrunk, filters differ, or there is none.
        yield from beside_simpleitk(root, CINE, {True: 1e-5, False: 1e-5})
        yield from beside_simpleitk(root, CT, {True: 0.01, False: 0.03})
        raw = root / str(CINE.field)
        multiply(raw, 8)
        yield from two_workers(raw)
        multiply(raw, 2)
        yield unchanged(raw, root)


if __name__ == "__main__":
    main(rows)
