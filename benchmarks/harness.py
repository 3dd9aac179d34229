"""How everything here is measured: contenders take turns in one process, threads pinned, results compared first.

A benchmark is a file with `rows() -> Iterator[Row]`. Each runs in a process of its own, prints its rows and writes
them to `results/NAME.json` beside a description of the machine.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Literal

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "monai", "lightly", "torchio", "batchgeneratorsv2", "blosc2", "SimpleITK", "numpy")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: the work, with its size.
        unit: of the two figures.
        ours: minimum and median of glocal.
        against: what it is compared with; empty for an absolute figure.
        theirs: its minimum and median.
        ratio: of the minima, turned so that the goal can be read off it: `theirs / ours`, or `ours / theirs` where
            the goal is "at most"; of an absolute figure, the figure itself.
        goal: what the ratio must reach, or None where nothing is promised.
        sense: whether the goal is a least or a most.
        note: what a reader must know to read the figures rightly.
    """

    what: str
    unit: str
    ours: tuple[float, float]
    against: str = ""
    theirs: tuple[float, float] | None = None
    ratio: float | None = None
    goal: float | None = None
    sense: Literal["at least", "at most"] = "at least"
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio >= self.goal if self.sense == "at least" else self.ratio <= self.goal


def pinned(threads: int = 1) -> None:
    """Pin the threads of everything that computes; call it before the first import of a numeric library."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLOSC_NTHREADS"):
        os.environ[name] = str(threads)
    import torch

    torch.set_num_threads(threads)


def take_turns(
    contenders: Mapping[str, Callable[[], Any]], seconds: float = 4.0, rounds: int = 5
) -> dict[str, tuple[float, float]]:
    """Minimum and median time of one call of each contender, in seconds; they alternate for `rounds` rounds or more.

    One untimed call of each comes first. Calls shorter than 20 ms are timed in groups.
    """
    calls = {}
    for name, work in contenders.items():
        work()
        start = time.perf_counter()
        work()
        calls[name] = max(1, int(0.02 / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    begun = time.perf_counter()
    while len(next(iter(times.values()))) < rounds or time.perf_counter() - begun < seconds:
        for name, work in contenders.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                work()
            finish()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: (min(taken), median(taken)) for name, taken in times.items()}


def finish() -> None:
    """Wait until the GPU, if there is one, has done what it was told."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compared(
    what: str,
    ours: Callable[[], Any],
    against: str,
    theirs: Callable[[], Any],
    goal: float | None = None,
    sense: Literal["at least", "at most"] = "at least",
    note: str = "",
    seconds: float = 4.0,
) -> Row:
    """Time glocal beside one peer; results must have been found equal before. Times are given in milliseconds."""
    taken = take_turns({"ours": ours, "theirs": theirs}, seconds)
    a, b = taken["ours"], taken["theirs"]
    ratio = b[0] / a[0] if sense == "at least" else a[0] / b[0]
    return Row(what, "ms", _ms(a), against, _ms(b), ratio, goal, sense, note)


def _ms(times: tuple[float, float]) -> tuple[float, float]:
    return times[0] * 1e3, times[1] * 1e3


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "packages": found,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def record(name: str, rows: Iterable[Row]) -> None:
    """Print the rows as they come, and keep them with the machine in `results/NAME.json`."""
    described = machine()
    print(f"{name}: {described['processor']}, {described['threads']} thread(s), load {described['load average']}")
    done = []
    for row in rows:
        print(line(row), flush=True)
        done.append(asdict(row))
    RESULTS.mkdir(exist_ok=True)
    content = json.dumps({"machine": described, "rows": done}, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(content + "\n", encoding="utf-8")


def recorded(name: str) -> list[Row]:
    """The rows that `record` kept."""
    rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")).get("rows", [])
    return [Row(**{key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}) for row in rows]


def line(row: Row) -> str:
    """A row as text: what, ours, theirs, ratio, goal."""
    figures = [figure(row.ours, row.unit)]
    if row.theirs is not None:
        figures.append(f"{row.against} {figure(row.theirs, row.unit)}")
    ratio = "" if row.ratio is None else f"{row.ratio:.3g}{' x' if row.theirs else ''}"
    goal = "" if row.goal is None else f"{row.sense} {row.goal:g}: {'reached' if row.reached else 'NOT REACHED'}"
    return "  ".join(part for part in (row.what, *figures, ratio, goal, row.note) if part)


def figure(times: tuple[float, float], unit: str) -> str:
    """Minimum, and in brackets the median."""
    return f"{times[0]:.4g} ({times[1]:.4g}) {unit}"


def main(rows: Callable[[], Iterable[Row]], threads: int = 1) -> None:
    """Run one benchmark file as a program: `python -m benchmarks.NAME`."""
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "start it as python -m benchmarks.NAME"
    pinned(threads)
    # The environment with peers has another PyTorch: its figures are kept apart.
    record(spec.name.rpartition(".")[2] + "-peers" * (find_spec("lightly") is not None), rows())
