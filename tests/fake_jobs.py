"""Jobs that train nothing, for tests of what runs jobs: worker processes import them from here."""

import os
import signal
import time
from pathlib import Path

from glocal.errors import Busy, GlocalError
from glocal.files import write_json


def train(run: Path, diary: Path | None = None) -> None:
    """Leave a manifest, as a finished run does, and a line in a diary that all jobs share."""
    if diary is not None:
        with open(diary, "a", encoding="utf-8") as file:
            file.write(f"{run.name}\n")
    write_json(run / "manifest.json", {"process": os.getpid()})


def refuse(run: Path) -> None:
    raise GlocalError(f"{run.name} has no labels: label some.")


class UnsendableError(Exception):
    """Its arguments are not those of `Exception`, so that unpickling it fails."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def stumble(run: Path) -> None:
    raise UnsendableError("no\nway", run.name)


def be_killed(run: Path, times: int) -> None:
    """Kill this process the first `times` times, then train."""
    before = len(list(run.glob("killed-*")))
    if before < times:
        write_json(run / f"killed-{before}.json", {})
        os.kill(os.getpid(), signal.SIGKILL)
    train(run)


def find_busy(run: Path, times: int, file: Path | None = None, diary: Path | None = None) -> None:
    """Find another process at work the first `times` times, and as long as a file is missing, then train."""
    before = len(list(run.glob("busy-*")))
    if before < times or (file is not None and not file.exists() and before < 1000):
        write_json(run / f"busy-{before}.json", {})
        raise Busy(f"Another process is working in {run}.")
    train(run, diary)


def wait_for(run: Path, file: Path, diary: Path | None = None) -> None:
    """Train when there is a file, of a job that must run at the same time."""
    end = time.monotonic() + 60
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.02)
    train(run, diary)


def tell_threads(run: Path) -> None:
    import torch

    write_json(run / "manifest.json", {"torch": torch.get_num_threads(), "openmp": os.environ.get("OMP_NUM_THREADS")})


def sleep(run: Path) -> None:
    write_json(run / "process.json", os.getpid())
    time.sleep(300)
