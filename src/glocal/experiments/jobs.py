"""The runs a recipe asks for, and doing them: in this process, or several processes at once."""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from glocal import runs
from glocal.errors import GlocalError
from glocal.processes import cores, follow_parent
from glocal.progress import progress


@dataclass(frozen=True)
class Job:
    """One run: a top-level function with its arguments, its folder, and the iterations it will do."""

    work: Callable[..., Any]
    arguments: dict[str, Any]
    folder: Path
    iterations: int

    def done(self) -> bool:
        """Whether the run was finished before."""
        return runs.finished(self.folder)


def do(jobs: Sequence[Job], description: str, workers: int, gpus: Sequence[str] = ()) -> None:
    """Do the jobs that are not done yet, `workers` of them at the same time, which share out the GPUs (see `gpus`).

    Raises:
        GlocalError: a job's own, after the jobs that were running have been stopped; or a process was killed.
    """
    open_jobs = [job for job in jobs if not job.done()]
    if workers == 1 or len(open_jobs) < 2:
        for job in open_jobs:
            job.work(**job.arguments)
        return
    _do_at_once(open_jobs, description, workers, gpus)


def _do_at_once(jobs: Sequence[Job], description: str, workers: int, gpus: Sequence[str]) -> None:
    total = sum(job.iterations for job in jobs)
    context = get_context("spawn")
    of_workers = context.SimpleQueue()
    for worker in range(workers):
        of_workers.put(gpus[worker % len(gpus)] if gpus else None)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_on_its_own, initargs=(of_workers,))
    try:
        waiting: set[Future[Any]] = {pool.submit(job.work, **job.arguments) for job in jobs}
        with progress() as bar:
            task = bar.add_task(description, total=total, info="")
            while waiting:
                finished, waiting = wait(waiting, timeout=2, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                bar.update(task, completed=sum(_iterations_done(job) for job in jobs))
    except BrokenProcessPool as error:
        _stop(pool)
        raise GlocalError(
            "A training process was killed, most likely for lack of memory: start the same command again with "
            "--workers 1, it continues."
        ) from error
    except BaseException:
        _stop(pool)
        raise
    pool.shutdown()


def _on_its_own(gpus: "SimpleQueue[str | None]") -> None:
    """Initialise a worker: one thread, a GPU of its own where there are some, and no word."""
    follow_parent()
    os.environ["OMP_NUM_THREADS"] = "1"
    if gpu := gpus.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch

    torch.set_num_threads(1)
    # Bars of several processes would write over each other.
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _stop(pool: ProcessPoolExecutor) -> None:
    # A run continues from its checkpoint, so that ending it at once loses seconds.
    for process in list((pool._processes or {}).values()):
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)


def _iterations_done(job: Job) -> int:
    """Read off the logs, so that workers need not report."""
    if job.done():
        return job.iterations
    return sum(_last_iteration(log) for log in job.folder.glob("**/metrics.jsonl"))


def _last_iteration(log: Path) -> int:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 400))
            last = file.read().rstrip(b"\n").rsplit(b"\n", 1)[-1]
        return int(last.split(b'"iteration": ')[1].split(b",")[0])
    except (OSError, IndexError, ValueError):
        return 0


def default_workers(device: str) -> int:
    """As many processes as there are cores; with GPUs one for each, because a training is fastest alone on its GPU."""
    import torch

    return cores() if device == "cpu" or not torch.cuda.is_available() else max(1, len(gpus_for(device)))


def gpus_for(device: str) -> list[str]:
    """The GPUs that workers share out with `device=auto`, as `CUDA_VISIBLE_DEVICES` names them; else none."""
    import torch

    if device != "auto" or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())]
