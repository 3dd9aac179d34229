"""How long one waits before anything happens: from the start of a process to its help, its report, its first step.

All processes are pinned to one core, but for `check` once with all that it would use. The least of five repeats is
what counts: its files are in the system's cache.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.harness import Row, main
from glocal.data.dataset import write_dataset_json
from glocal.data.image import Geometry, write_volume
from glocal.data.plan import PreprocessOptions
from glocal.data.preprocess import preprocess
from glocal.processes import cores

VOLUMES = 100
GEOMETRY = Geometry((256, 216, 10), (1.5, 1.5, 10.0))
REPEATS = 5
WARM = "fresh process, warm file cache"
OPTIMISER = "import torch; torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])"


def rows() -> Iterator[Row]:
    """Help, check, first step; and what importing torch takes of it."""
    with TemporaryDirectory() as folder:
        dataset, store = Path(folder, "dataset"), Path(folder, "store")
        _write(dataset, np.random.default_rng(0))
        preprocess(dataset, store, PreprocessOptions(size=(192, 192)), workers=1)

        size = " x ".join(map(str, GEOMETRY.size))
        work = f"glocal check, {VOLUMES} volumes of {size} and their label maps, cores: "
        note = "compressed NIfTI of 16 bits"
        yield _row(work + str(cores()), lambda: _whole("-m", "glocal", "check", str(dataset)), 1.5, note)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        note += "; four fifths of it are ITK's reading"
        yield _row(work + str(cores()), lambda: _whole("-m", "glocal", "check", str(dataset)), note=note)
        yield _row("glocal --help", lambda: _whole("-m", "glocal", "--help"), 0.3)
        work = "glocal pretrain --method gcl, first line of metrics.jsonl"
        yield _row(work, lambda: _first_step(store), 6.0, "192 x 192 pixels, defaults, device=cpu threads=1")
        yield _row("import torch", lambda: _whole("-c", "import torch"), note="what no training can do without")
        note = "likewise: torch imports its compiler with the first optimiser"
        yield _row("import torch, make an optimiser", lambda: _whole("-c", OPTIMISER), note=note)


def _write(root: Path, rng: np.random.Generator) -> None:
    """Noise over a bright middle that compresses to a half, as ACDC does, and label maps of three nested boxes."""
    y, x = np.ogrid[-1:1:216j, -1:1:256j]
    body = np.exp(-4 * (x**2 + y**2))
    labels = np.zeros(GEOMETRY.size[::-1], np.uint8)
    for value in (1, 2, 3):
        labels[:, 60 + 10 * value : -60 - 10 * value, 80 + 10 * value : -80 - 10 * value] = value
    for number in range(VOLUMES):
        image = rng.rayleigh(10, labels.shape) + body * rng.gamma(6, 40, labels.shape)
        write_volume(root / "imagesTr" / f"case{number:03d}_0000.nii.gz", image.astype(np.int16), GEOMETRY)
        write_volume(root / "labelsTr" / f"case{number:03d}.nii.gz", labels, GEOMETRY)
    write_dataset_json(root, "Startup", ["MRI"], {"RV": 1, "MYO": 2, "LV": 3}, VOLUMES)


def _row(what: str, seconds: Callable[[], float], goal: float | None = None, note: str = "") -> Row:
    """Run it `REPEATS` times; `seconds` says how long it took."""
    taken = [seconds() for _ in range(REPEATS)]
    note = f"{note}; {WARM}" if note else WARM
    return Row(what, "s", (min(taken), median(taken)), ratio=min(taken), goal=goal, sense="at most", note=note)


def _whole(*words: str) -> float:
    """How long Python takes from start to end; it must succeed (`check`: find no error)."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.perf_counter() - begun


def _first_step(store: Path) -> float:
    """From the start of a pre-training in a new folder to its first logged iteration; then it is ended."""
    with TemporaryDirectory() as folder:
        words = [str(store), f"{folder}/run", "--method", "gcl", "device=cpu", "threads=1"]
        begun = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "glocal", "pretrain", *words], stderr=subprocess.PIPE)
        try:
            while not any('"iteration": 1,' in log.read_text() for log in Path(folder).glob("run/*/metrics.jsonl")):
                assert process.poll() is None, process.stderr and process.stderr.read().decode()
                time.sleep(0.005)
            return time.perf_counter() - begun
        finally:
            process.kill()
            process.communicate()


if __name__ == "__main__":
    main(rows)
