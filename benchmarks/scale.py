"""What size costs: memory of a training, time to draw and fetch a batch, and start-up, up to 400,000 slices.

The large stores are sparse files: their length is real, their content is holes, which read as zeros.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import RESULTS, Row, main, take_turns
from benchmarks.store import write_index
from glocal.data.sampling import Pool
from glocal.data.store import Store
from glocal.devices import keep_freed_memory
from glocal.randomness import generator

SIDE, SLICES, BATCH = 384, 100, 20
WIDTHS, ITERATIONS = (8, 16, 32, 64, 64, 64), 20  # half the default network; the large store trains twice as long
DISTINCT = 1000  # slices that are read again and again: 0.3 GB
TRAIN = "import sys; from benchmarks.scale import trained; trained(sys.argv[1], int(sys.argv[2]))"


def rows() -> Iterator[Row]:
    """Memory, time of a batch, start-up; and the figure of the latter."""
    keep_freed_memory()  # as every training does
    with TemporaryDirectory() as name:
        small, large = Path(name) / "small", Path(name) / "large"
        sparse_store(small, DISTINCT // SLICES)
        sparse_store(large, 4000)
        yield from memory(small, large)
        yield from cached(small, large)
        yield from first_time(Path(name) / "real", large)
    with TemporaryDirectory() as name:
        yield from startup(Path(name))


def memory(small: Path, large: Path) -> Iterator[Row]:
    """Peak anonymous memory of a pre-training on 400,000 slices, also beside a shorter one on 1,000; none are held."""
    peak, beside = trained_apart(large, 2 * ITERATIONS), trained_apart(small, ITERATIONS)
    what = "pre-train on 118 GB (400,000 slices of 384x384)"
    network = f"GCL stage 1, widths {WIDTHS}, batch {BATCH} in two views"
    note = f"peak RssAnon of `pretrain`: {network}, {2 * ITERATIONS} iterations; slices are read, not mapped"
    yield Row(what, "GiB", (peak, peak), ratio=peak, goal=3, sense="at most", note=note)
    note = f"both read from disk; {network}, {2 * ITERATIONS} iterations beside {ITERATIONS}: leaked batches would show"
    yield Row(what, "GiB", (peak, peak), "on 0.3 GB", (beside, beside), peak / beside, 1.1, "at most", note)


def trained_apart(store: Path, iterations: int) -> float:
    """Peak anonymous memory, in GiB, of a process that pre-trains."""
    command = [sys.executable, "-c", TRAIN, str(store), str(iterations)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def trained(store: str, iterations: int, widths: tuple[int, ...] = WIDTHS) -> None:
    """Pre-train on a store that is not held in memory, and print the peak of this process's anonymous memory in GiB."""
    from glocal.pretraining.pretrain import pretrain

    peaks = [0.0]

    def watch() -> None:
        while True:
            peaks[0] = max(peaks[0], anonymous_memory())
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    settings = {"method": "gcl", "local": "none", "max_iterations": iterations, "log": [], "device": "cpu"}
    settings["network"] = {"widths": widths}
    with TemporaryDirectory() as folder:
        pretrain(Store.open(Path(store), memory_limit=0), Path(folder) / "run", settings)
    print(peaks[0])


def anonymous_memory() -> float:
    """RssAnon of this process, in GiB: what it allocated and touched, without the pages of files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20


def cached(small: Path, large: Path) -> Iterator[Row]:
    """Draw and fetch from pages that are in memory: as many slices of 4,000 volumes and of 10."""
    calls = {
        "small": drawn_and_fetched(pool_of(small), torch.arange(DISTINCT)),
        "large": drawn_and_fetched(pool_of(large), torch.arange(DISTINCT) * (4 * SLICES - 1)),
    }
    for call in calls.values():
        for _ in range(DISTINCT // BATCH):
            call()  # every chosen slice is touched
    taken = {name: (best * 1e3, usual * 1e3) for name, (best, usual) in take_turns(calls, seconds=8).items()}
    note = f"1,000 slices in the page cache, of 10 volumes and of 1,000 among 4,000; {BATCH} slices of 384x384"
    what, ratio = "draw and fetch a batch, 118 GB of 4,000 volumes", taken["large"][0] / taken["small"][0]
    yield Row(what, "ms", taken["large"], "0.3 GB of 10", taken["small"], ratio, 1.1, "at most", note)


def first_time(real: Path, large: Path) -> Iterator[Row]:
    """Fetch what is in no cache of this machine: holes, and files on a disk."""
    what, indices = f"fetch {BATCH} slices for the first time", torch.arange(DISTINCT) * (4 * SLICES - 1) + 7
    note = "sparse holes cost no disk read: the kernel's share only; headers are checked on the way"
    yield Row(f"{what}, sparse", "ms", once(pool_of(large), indices), note=note)
    sparse_store(real, DISTINCT // SLICES)
    make_real(real)
    note = "random bytes, dropped from the page cache before; caches below this machine's kernel remain"
    yield Row(f"{what}, from disk", "ms", once(pool_of(real), torch.arange(DISTINCT)), note=note)


def drawn_and_fetched(pool: Pool, indices: Tensor) -> Callable[[], Tensor]:
    """Draw partitions from the whole pool, then fetch the next of a round of batches of `indices`."""
    rng = generator(0)
    following = cycle(indices[torch.randperm(len(indices), generator=rng)].split(BATCH))

    def call() -> Tensor:
        pool.partitioned(BATCH // 4, 4, rng)
        return pool.store.images(next(following))

    return call


def once(pool: Pool, indices: Tensor) -> tuple[float, float]:
    """Minimum and median time in ms of batches that are all read once, in random order."""
    times = []
    for batch in indices[torch.randperm(len(indices), generator=generator(1))].split(BATCH):
        start = time.perf_counter()
        pool.store.images(batch)
        times.append((time.perf_counter() - start) * 1e3)
    return min(times), median(times)


def startup(folder: Path) -> Iterator[Row]:
    """Time until the first batch could be drawn, against the number of volumes, and its figure."""
    counts, taken = (100, 1000, 10_000, 40_000), []
    for count in counts:
        path = folder / str(count)
        write_index(path, [10] * count, SIDE)
        best, usual = (1e3 * t for t in take_turns({"open": lambda path=path: pool_of(path)}, 2.0, 3)["open"])
        taken.append(best)
        note = f"Store.open and Pool; {1e3 * best / count:.0f} µs a volume"
        yield Row(f"open a store of {count:,} volumes", "ms", (best, usual), note=note)
    draw_figure(counts, taken)
    ratio = (taken[-1] / counts[-1]) / (taken[1] / counts[1])
    share = [1e3 * t / count for t, count in zip(taken, counts, strict=True)]
    what, note = "open: a volume among 40,000", "linear if the ratio is near 1"
    yield Row(what, "µs", (share[-1],) * 2, "among 1,000", (share[1],) * 2, ratio, 1.5, "at most", note)


def draw_figure(counts: tuple[int, ...], taken: list[float]) -> None:
    """`results/scale.png`: start-up against the number of volumes, beside a line of slope one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.6), layout="constrained")
    share = taken[-1] / counts[-1]
    axes.loglog(counts, [share * count for count in counts], "--", color="0.6", label=f"{1e3 * share:.0f} µs a volume")
    axes.loglog(counts, taken, "o-", color="tab:blue", label="Store.open and Pool")
    axes.set(xlabel="volumes", ylabel="start-up (ms)", title="Start-up grows with the number of volumes")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "scale.png", dpi=150)


def pool_of(path: Path) -> Pool:
    """All slices of a store that is not held in memory."""
    store = Store.open(path, memory_limit=0)
    return Pool(store, [volume.case for volume in store.volumes])


def sparse_store(folder: Path, volumes: int) -> None:
    """A store whose files have their full length but occupy no disk."""
    write_index(folder, [SLICES] * volumes, SIDE)
    (folder / "images").mkdir()
    header = {"descr": "<f2", "fortran_order": False, "shape": (SLICES, 1, SIDE, SIDE)}
    for number in range(volumes):
        with open(folder / "images" / f"case{number:06d}.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + SLICES * SIDE * SIDE * 2)


def make_real(folder: Path) -> None:
    """Fill the volumes of a store with random bytes, on disk and out of the page cache."""
    rng = np.random.default_rng(0)
    for path in sorted((folder / "images").glob("*.npy")):
        np.save(path, rng.random((SLICES, 1, SIDE, SIDE), dtype=np.float32).astype(np.float16))
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


if __name__ == "__main__":
    main(rows)
