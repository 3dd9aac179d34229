"""Random slices of a store that is not held in memory, beside other ways to read them from disk.

All contenders read the same slices from files that the page cache holds, and give them as one float32 tensor.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Row, compared, main
from glocal.data.orientation import Undo
from glocal.data.plan import Plan, PreprocessOptions
from glocal.data.store import Store
from glocal.devices import keep_freed_memory
from glocal.files import write_json
from glocal.randomness import generator

BATCH, VOLUMES = 40, 40
NOTE = "float16 files in the page cache, as float32; one thread; glocal is bound by memory traffic, most at 384x384"
KEPT = (
    "glocal keeps no maps: each holds address space and small allocations for ever, and with them anonymous "
    "memory grew with every batch; a store may have 40,000 volumes, and the system allows 65,530 maps"
)


def rows() -> Iterator[Row]:
    """Against memory maps that are opened for each slice, against maps that are kept, and against blosc2."""
    keep_freed_memory()  # as every training does
    blosc2 = find_spec("blosc2") is not None
    if not blosc2:
        print("blosc2 is not installed: `make bench-peers` measures it too.")
    for side, slices in ((192, 50), (384, 25)):
        with TemporaryDirectory() as name:
            folder = Path(name)
            fill(folder, side, slices, blosc2)
            store = Store.open(folder, memory_limit=0)
            rng = generator(side)
            batches = [torch.randint(len(store.volume_of), (BATCH,), generator=rng) for _ in range(50)]
            places = [list(zip(store.volume_of[b].tolist(), store.slice_of[b].tolist(), strict=True)) for b in batches]
            what = f"fetch {BATCH} random slices of {side}x{side}"
            ours = partial(in_turn, store.images, batches)
            yield beside(what, ours(), "np.load(mmap_mode='r')", in_turn(mapped(folder), places), 10.0)
            yield beside(what, ours(), "memory maps kept open", in_turn(kept_open(folder), places), note=KEPT)
            if blosc2:
                yield beside(what, ours(), "blosc2.open", in_turn(unpacked(folder), places), 2.0)


def beside(
    what: str,
    ours: Callable[[], Tensor],
    against: str,
    theirs: Callable[[], Tensor],
    goal: float | None = None,
    note: str = NOTE,
) -> Row:
    """Time one pair after every batch was found equal."""
    assert all(torch.equal(ours(), theirs()) for _ in range(50))
    return compared(what, ours, against, theirs, goal, note=note)


def in_turn(work: Callable[[Any], Tensor], batches: Sequence[Any]) -> Callable[[], Tensor]:
    """Each call takes the next batch."""
    following = cycle(batches)
    return lambda: work(next(following))


def mapped(folder: Path) -> Callable[[list[tuple[int, int]]], Tensor]:
    """The memory map is opened for each slice."""
    paths = volume_files(folder)
    return lambda places: torch.from_numpy(np.stack([np.load(paths[v], mmap_mode="r")[s] for v, s in places])).float()


def kept_open(folder: Path) -> Callable[[list[tuple[int, int]]], Tensor]:
    """The memory maps of all volumes are opened once, before the time is taken."""
    maps = [np.load(path, mmap_mode="r") for path in volume_files(folder)]
    return lambda places: torch.from_numpy(np.stack([maps[v][s] for v, s in places])).float()


def volume_files(folder: Path) -> list[Path]:
    """The volumes of the store, by number."""
    return [folder / "images" / f"case{number:06d}.npy" for number in range(VOLUMES)]


def unpacked(folder: Path) -> Callable[[list[tuple[int, int]]], Tensor]:
    """The compressed file is opened, memory mapped, for each slice; blocks are slices, so that no other is unpacked."""
    import blosc2

    paths = [str(folder / f"case{number:06d}.b2nd") for number in range(VOLUMES)]
    setting: dict[str, Any] = {"mode": "r", "dparams": {"nthreads": 1}, "mmap_mode": "r"}
    return lambda places: torch.from_numpy(
        np.stack([blosc2.open(paths[v], **setting)[s] for v, s in places])  # type: ignore[index]
    ).float()


def fill(folder: Path, side: int, slices: int, blosc2: bool) -> None:
    """A store of smooth, noisy discs on a background of 0, and the same volumes for blosc2."""
    write_index(folder, [slices] * VOLUMES, side)
    (folder / "images").mkdir()
    place = torch.linspace(-1, 1, side)
    disc = (place[:, None] ** 2 + place**2) < 0.64
    for number in range(VOLUMES):
        rng = generator(side, "volume", number)
        smooth = functional.interpolate(torch.rand(slices, 1, 8, 8, generator=rng), (side, side), mode="bicubic")
        noisy = smooth + 0.05 * torch.randn(smooth.shape, generator=rng)
        images = (noisy.clamp(0, 1) * disc).half().numpy()
        np.save(folder / "images" / f"case{number:06d}.npy", images)
        if blosc2:
            pack(images, folder / f"case{number:06d}.b2nd")


def pack(images: np.ndarray, path: Path) -> None:
    """Compress a volume with Zstandard, at the level that nnU-Net uses."""
    import blosc2

    part = (1, *images.shape[1:])
    setting: dict[str, Any] = {"codec": blosc2.Codec.ZSTD, "clevel": 8, "nthreads": 1}
    blosc2.asarray(images, urlpath=str(path), chunks=part, blocks=part, cparams=setting)


def write_index(folder: Path, counts: Sequence[int], side: int) -> None:
    """What `preprocess` writes of a dataset without labels whose volumes have so many slices, but for the volumes."""
    axes = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))
    options = PreprocessOptions(size=(side, side))
    plan = Plan(options=options, channels=1, labels={"background": 0, "one": 1}, slice_axis="z", axes=axes)
    manifest = {
        "glocal": "0",
        "name": "synthetic",
        "dataset": str(folder),
        "channels": ["MRI"],
        "labels": plan.labels,
        "split": None,
        "plan": plan.model_dump(mode="json"),
    }
    write_json(folder / "plan.json", {"name": manifest["name"], "plan": manifest["plan"]})
    write_json(folder / "index.json", {"manifest": manifest, "cases": [case(*of, side) for of in enumerate(counts)]})


def case(number: int, slices: int, side: int) -> dict[str, Any]:
    """The record of one volume."""
    name, square = f"case{number:06d}", (side, side)
    undo = Undo((0, 1, 2), (False, False, False), (slices, *square), square, square, square)
    digest = hashlib.sha256(name.encode()).hexdigest()
    return {
        "name": name,
        "sources": {f"{name}_0000.nii.gz": digest},
        "subject": f"subject{number:06d}",
        "plan": digest,
        "voxels": digest,
        "slices": slices,
        "labelled": False,
        "spacing": (1.0, 1.0, 5.0),
        "kept": None,
        "warnings": [],
        "undo": asdict(undo),
    }


if __name__ == "__main__":
    main(rows)
