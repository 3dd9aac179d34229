"""The trainings that are asked for, as jobs, and doing them: in order, each as soon as what it needs is done."""

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from glocal import runs
from glocal.errors import Busy, GlocalError
from glocal.experiments.executors import LOST, Executors, JobError, Work, told
from glocal.files import write_text
from glocal.finetuning.measure import is_measured
from glocal.progress import console, duration, progress
from glocal.runs import FAILURE

LOOK_SECONDS = 2.0  # between two looks at the logs
REST_SECONDS = 10.0  # before a folder is tried again in which another process works


@dataclass(frozen=True)
class Job:
    """One run: a top-level function with its arguments, its folder, the iterations it will do, the runs it needs."""

    work: Work
    arguments: dict[str, Any]
    folder: Path
    iterations: int
    needs: tuple[Path, ...] = ()  # folders of other jobs
    measured: str = ""  # what must have been measured, see `ProtocolOptions.measured`; of a pre-training nothing

    def done(self) -> bool:
        """Whether the run was finished before, and measured as it is to be."""
        return is_measured(self.folder, self.measured) if self.measured else runs.finished(self.folder)

    @property
    def left(self) -> int:
        """Iterations of a training that is not finished; one that is may have to be measured still."""
        return 0 if runs.finished(self.folder) else self.iterations


@dataclass(frozen=True)
class Failure:
    """A job that was not done, and why, in one sentence."""

    job: Job
    reason: str


def do(jobs: Sequence[Job], description: str, executor: Executors, keep_going: bool = False) -> list[Failure]:
    """Do the jobs that are not done yet, the first ones first, each as soon as the jobs it needs are done.

    A job in whose folder another process works is put back and looked at again some seconds later.

    Args:
        keep_going: whether a failing job is put on record, in `failure.txt` of its folder too, while the others go on.

    Returns:
        What failed, and what was not run because of it; empty without `keep_going`.

    Raises:
        GlocalError: without `keep_going` the first failing job's own; the connection to a cluster was lost.
        JobError: without `keep_going`, anything else that a job raised.
    """
    board, started, said = _Board(jobs, executor, keep_going), time.monotonic(), ""
    begun = board.state()["completed"]
    if not board.open:
        return []
    with nullcontext(Progress(disable=True)) if executor.shows else progress() as bar:
        task = bar.add_task(description, info="", **board.state())
        while board.open:
            board.submit()
            board.collect()
            bar.update(task, info=board.info(), **board.state())
            if not console.is_terminal and board.info() != said:  # a line in the log of a long night, now and then
                said, state = board.info(), board.state()
                seconds = time.monotonic() - started
                pace = (state["completed"] - begun) / seconds if seconds > 60 else 0  # the first minute says little
                left = f", about {duration((state['total'] - state['completed']) / pace)} left" if pace else ""
                console.print(f"{description}: {said}{left}.", soft_wrap=True, highlight=False)
    return board.failures


class _Board:
    """Which jobs are open (in order), which of them are in flight, which must rest, and what has failed."""

    def __init__(self, jobs: Sequence[Job], executor: Executors, keep_going: bool) -> None:
        self.jobs = list({job.folder: job for job in jobs}.values())  # several may name the same pre-training
        self.executor, self.keep_going = executor, keep_going
        self.open = {job.folder: job for job in self.jobs if not job.done()}
        self.flying: dict[Future[Any], Job] = {}
        self.resting: dict[Path, float] = {}  # until when
        self.kills: Counter[Path] = Counter()
        self.failures: list[Failure] = []
        self.slots = 0

    def submit(self) -> None:
        """Submit what may begin, while there are free workers; a last chance alone, after all others."""
        self.slots = self.executor.slots()
        for job in sorted(self.open.values(), key=self._on_last_chance):
            alone = self._on_last_chance(job) or any(map(self._on_last_chance, self.flying.values()))
            if len(self.flying) >= (min(1, self.slots) if alone else self.slots):
                return
            if not self._ready(job):
                continue
            if job.done():  # by another process, meanwhile
                del self.open[job.folder]
                continue
            (job.folder / FAILURE).unlink(missing_ok=True)
            self.flying[self.executor.submit(job.work, job.arguments)] = job

    def collect(self) -> None:
        """Wait until a job has ended, or for some seconds; what ended is done, put back, or has failed."""
        if not self.flying:
            time.sleep(LOOK_SECONDS if self.open else 0)  # all that is left must rest
            return
        ended, _ = wait(self.flying, LOOK_SECONDS, FIRST_COMPLETED)
        for future in ended:
            job = self.flying.pop(future)
            if future.cancelled():
                raise GlocalError(LOST)
            self._judge(job, future.exception())

    def _judge(self, job: Job, error: BaseException | None) -> None:
        if error is None:
            del self.open[job.folder]
        elif isinstance(error, Busy):
            self.resting[job.folder] = time.monotonic() + REST_SECONDS
        elif not isinstance(error, self.executor.killed):
            self._fail(job, error)
        else:
            self.kills[job.folder] += 1
            if self.kills[job.folder] == self.executor.patience:
                self._fail(job, GlocalError(_killed(job)))

    def _on_last_chance(self, job: Job) -> bool:
        """Whether every chance but the last is gone: it needs memory, so it gets all there is."""
        return 0 < self.kills[job.folder] == self.executor.patience - 1

    def _ready(self, job: Job) -> bool:
        waits = self._flies(job) or any(need in self.open for need in job.needs)
        return not waits and time.monotonic() >= self.resting.get(job.folder, 0)

    def _flies(self, job: Job) -> bool:
        return any(other is job for other in self.flying.values())

    def _fail(self, job: Job, error: BaseException) -> None:
        if not self.keep_going:
            raise error
        note = job.folder / FAILURE
        if isinstance(error, GlocalError):
            reason = text = str(error)
        else:
            line, trace = error.args if isinstance(error, JobError) else told(error)
            reason, text = f"{line} (the whole traceback is in {note}).", trace
        write_text(note, f"{text.rstrip()}\n")
        self._give_up(job, reason)

    def _give_up(self, job: Job, reason: str) -> None:
        self.failures.append(Failure(job, reason))
        del self.open[job.folder]
        for other in list(self.open.values()):
            if job.folder in other.needs and other.folder in self.open:  # it may have needed two that failed
                self._give_up(other, f"Not run, because it needs {job.folder}, which failed.")

    def state(self) -> dict[str, Any]:
        """Iterations done and to be done, as arguments of the bar."""
        failed = {failure.job.folder for failure in self.failures}
        total = sum(job.iterations for job in self.jobs if job.folder not in failed)
        to_do = sum(job.left for job in self.open.values())
        begun = [job for job in self.open.values() if job.folder in self.resting or self._flies(job)]
        return {"total": total, "completed": total - to_do + sum(_iterations_done(job) for job in begun)}

    def info(self) -> str:
        """How many jobs are done and have failed."""
        failed = f", {len(self.failures)} failed" if self.failures else ""
        nobody = ", waiting for workers" if self.open and not self.slots else ""
        return f"{len(self.jobs) - len(self.open) - len(self.failures)} of {len(self.jobs)} done{failed}{nobody}"


def _killed(job: Job) -> str:
    return (
        f"The process that worked on {job.folder} was killed, and again when it was tried anew, most likely for lack "
        "of memory: use a smaller batch, fewer workers, or a machine with more memory."
    )


def _iterations_done(job: Job) -> int:
    """Read off the logs, so that workers need not report."""
    return min(job.left, sum(_last_iteration(log) for log in job.folder.glob("**/metrics.jsonl")))


def _last_iteration(log: Path) -> int:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 400))
            last = file.read().rstrip(b"\n").rsplit(b"\n", 1)[-1]
        return int(last.split(b'"iteration": ')[1].split(b",")[0])
    except (OSError, IndexError, ValueError):
        return 0
