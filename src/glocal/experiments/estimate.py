"""How long the trainings of an experiment will take: as the finished ones of their kind, else from a few iterations."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from shutil import rmtree
from statistics import mean, median
from tempfile import mkdtemp
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from glocal import runs
from glocal.errors import Busy
from glocal.experiments.executors import Executors, Work
from glocal.experiments.jobs import Failure, Job, do
from glocal.files import read_json, write_json

ITERATIONS = 30  # of a short training
WARM_UP = 3  # the first ones, which pay for memory and kernels
LONG = 4  # times the median: such an iteration did something besides, as self-training does that labels all volumes
SCRATCH = ".measuring-"  # begins the names of folders of short trainings


@dataclass(frozen=True)
class Kind:
    """Trainings that cost the same: seconds per iteration, and beside them for loading, predicting and measuring."""

    name: str
    jobs: tuple[Job, ...]
    step: float = 0.0
    fixed: float = 0.0
    problem: str = ""  # why it could not be measured, and so most likely will fail

    @property
    def open_jobs(self) -> list[Job]:
        """Those that are not done yet; some may be trained, and only have to be measured."""
        return [job for job in self.jobs if not job.done()]

    @property
    def seconds(self) -> float:
        """All that is left to train, one after the other."""
        return sum(self.fixed + self.step * job.left for job in self.open_jobs)


def estimate(jobs: Sequence[Job], executor: Executors, out: Path) -> list[Kind]:
    """Look how long each kind of training took, or measure iterations, as many at the same time as will run later.

    Args:
        jobs: of the experiment.
        executor: where they will run.
        out: a folder that the workers see, too.

    Returns:
        Every kind; what one of its trainings refuses is its `problem`, known before hours are spent.
    """
    kinds: dict[str, list[Job]] = {}
    for job in jobs:
        kinds.setdefault(_kind(job), []).append(job)
    facts = {kind: _spent(found) for kind, found in kinds.items()}
    unknown = [(kind, found[0]) for kind, found in kinds.items() if not facts[kind]]
    with _scratch(out) as folder:
        # They slow each other down, since cores share their caches and their way to memory: so none is measured alone.
        at_once = max(1, min(executor.slots(), sum(not job.done() for job in jobs)))
        copies = -(-at_once // max(1, len(unknown)))
        probes: dict[str, list[Job]] = {
            kind: [_probe(first, folder / f"{number}-{copy}") for copy in range(copies)]
            for number, (kind, first) in enumerate(unknown)
        }
        failures = do([probe for of in probes.values() for probe in of], "Measuring a step", executor, keep_going=True)
        facts |= {kind: _facts(of, failures) for kind, of in probes.items()}
    names = dict(zip(kinds, _names([found[0] for found in kinds.values()]), strict=True))
    return [Kind(names[kind], tuple(found), **facts[kind]) for kind, found in kinds.items()]


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder for measuring, removed at the end; with those of processes that were killed before their end."""
    for folder in out.glob(f"{SCRATCH}*"):
        with suppress(Busy, FileNotFoundError):
            # One without a lock may be a moment old, or what a worker wrote after its folder was removed.
            if (folder / ".lock").exists() or time.time() - folder.stat().st_mtime > 60:
                with runs.held(folder):
                    rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=SCRATCH, dir=out))
    with runs.held(folder):
        try:
            yield folder
        finally:
            rmtree(folder, ignore_errors=True)


def _spent(jobs: Sequence[Job]) -> dict[str, Any]:
    """Seconds per iteration of those that are finished; empty if none is."""
    # The median, because one may have been slow beside others, or on another machine.
    rates = [read_json(job.folder / "manifest.json")["seconds"] / job.iterations for job in jobs if not job.left]
    return {"step": median(rates)} if rates else {}


def _facts(probes: Sequence[Job], failures: Sequence[Failure]) -> dict[str, Any]:
    """The means of what the copies of one kind took, or why one of them failed."""
    if problems := [failure.reason for failure in failures if failure.job in probes]:
        return {"problem": problems[0]}
    times = [read_json(probe.folder / "manifest.json") for probe in probes]
    return {key: mean(time[key] for time in times) for key in ("step", "fixed")}


def _kind(job: Job) -> str:
    """What a training's time depends on, and nothing else."""
    return json.dumps([job.folder.parent.name, str(job.arguments["store"]), _paid(job)], sort_keys=True, default=str)


def _paid(job: Job) -> dict[str, Any]:
    """The settings on which the time of an iteration depends."""
    free = ("labels", "draw", "seed", "max_iterations")
    return {key: value for key, value in job.arguments["settings"].items() if key not in free}


def _names(jobs: Sequence[Job]) -> list[str]:
    """What kinds are called; those that would be called the same say in which settings they differ."""
    names, settings = [_name(job) for job in jobs], [runs.flatten(_paid(job)) for job in jobs]
    told = []
    for name, own in zip(names, settings, strict=True):
        keys = _telling([other for other, same in zip(settings, names, strict=True) if same == name])
        said = ", ".join(f"{key.rpartition('.')[2]}={own[key]}" for key in keys if key in own)
        told.append(f"{name} ({said})" if said else name)
    return told


def _telling(kinds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of few settings that tell kinds apart: again and again the one that, with those before, tells most apart."""
    keys, found = sorted({key for kind in kinds for key in kind}), list[str]()

    def apart(chosen: Sequence[str]) -> int:
        return len({str([kind.get(key) for key in chosen]) for kind in kinds})

    while apart(found) < apart(keys):
        found.append(max(keys, key=lambda key: apart([*found, key])))
    return found


def _name(job: Job) -> str:
    settings = job.arguments["settings"]
    name = settings.get("method") or settings.get("strategy", "supervised")
    return f"{'fine-tuning' if job.folder.parent.name == 'finetune' else 'pre-training'}, {name}"


def _probe(job: Job, folder: Path) -> Job:
    arguments = {key: value for key, value in job.arguments.items() if key not in ("run", "pretrained")}
    return Job(measure, {"work": job.work, "folder": folder, **arguments}, folder, ITERATIONS)


def measure(work: Work, folder: Path, settings: dict[str, Any], **arguments: Any) -> None:
    """Time a short training; write seconds per iteration (`step`) and of all besides (`fixed`)."""
    begun, steps = time.monotonic(), list[float]()

    def after_a_step(*_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        steps.append(time.monotonic())

    handle = register_optimizer_step_post_hook(after_a_step)
    try:
        work(run=folder / "run", settings=settings | {"max_iterations": ITERATIONS}, **arguments)
    finally:
        handle.remove()
        rmtree(folder / "run", ignore_errors=True)  # there may be many kinds, and space may be short
    step = _usual([later - earlier for earlier, later in pairwise(steps)])
    fixed = time.monotonic() - begun - step * len(steps)
    write_json(folder / "manifest.json", {"step": step, "fixed": max(0.0, fixed)})


def _usual(laps: Sequence[float]) -> float:
    """The mean of what iterations took, without the first and without those that did something besides."""
    usual = laps[WARM_UP:] or laps
    return mean(lap for lap in usual if lap <= LONG * median(usual)) if usual else 0.0
