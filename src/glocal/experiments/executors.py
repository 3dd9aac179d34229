"""Where the jobs of an experiment run: in this process, in several processes here, or wherever an executor does."""

import os
import re
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, Self

from glocal.errors import GlocalError
from glocal.files import explained
from glocal.processes import cores, follow_parent

Work = Callable[..., Any]
LOST = "The connection to the Dask scheduler was lost: start the same command again when it is back, it continues."


class JobError(Exception):
    """What a job did not expect: its type and text as one sentence, and the whole traceback, as the two arguments.

    Both are text, which every executor can carry: not every exception can be sent to another process.
    """

    def __str__(self) -> str:
        return str(self.args[1])


class Executors(ABC):
    """Where jobs run, several at the same time; as a context it ends them at once when anything goes wrong.

    Attributes:
        shows: whether jobs show their own progress bars here.
        killed: what the future of a job raises whose process was killed.
        patience: how many times the process of a job may be killed; the last time the job runs alone.
    """

    shows = False
    killed: type[Exception] = BrokenExecutor
    patience = 1

    @abstractmethod
    def slots(self) -> int:
        """How many jobs can run at the same time, as things are now."""

    @abstractmethod
    def submit(self, work: Work, arguments: dict[str, Any]) -> Future[Any]:
        """Begin `work(**arguments)`; its future raises `GlocalError`, `JobError` or `killed`."""

    @abstractmethod
    def close(self, at_once: bool) -> None:
        """Let go of the workers; `at_once` ends what is running, which continues from its checkpoints."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(at_once=kind is not None)


def executor_named(
    text: str | Executor, workers: int | None = None, device: str = "auto", threads: int = 1
) -> Executors:
    """Where jobs are to run, in a user's words.

    Args:
        text: `local`, or `dask://HOST:PORT` for the Dask scheduler there; from Python any executor of processes.
        workers: jobs at the same time; None takes the machine's `default_workers`, or all workers of the cluster.
        device: the device that trainings are told; with `auto` local workers share out the GPUs.
        threads: of each worker.

    Raises:
        GlocalError: neither of the two, or the cluster cannot be used as it is.
    """
    if isinstance(text, Executor):
        return Given(text, workers or cores())
    if text == "local":
        workers = workers or default_workers(device)
        return Here() if workers == 1 else Processes(workers, gpus_for(device), threads)
    if found := re.fullmatch(r"dask://([^\s/:]+:\d+)", text):
        from glocal.experiments.cluster import Dask

        return Dask(f"tcp://{found[1]}", workers, threads)
    raise GlocalError(
        f"There is no executor {text!r}: write `local` for this machine, or `dask://HOST:PORT` for a Dask scheduler, "
        "for example dask://localhost:8786."
    )


class Here(Executors):
    """One job after the other in this process, which shows the bar of each."""

    shows = True

    def slots(self) -> int:
        """One."""
        return 1

    def submit(self, work: Work, arguments: dict[str, Any]) -> Future[Any]:
        """Do it, and return when it is done; a Ctrl-C is not caught."""
        future: Future[Any] = Future()
        try:
            attempt(work, arguments)
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self, at_once: bool) -> None:
        """Nothing runs here any more."""


class Processes(Executors):
    """Processes that have threads, and a GPU where there are some, of their own; a killed one is replaced.

    Each is a pool by itself: a pool ends all its processes when one of them is killed.
    """

    killed = BrokenProcessPool
    patience = 3

    def __init__(self, workers: int, gpus: Sequence[str] = (), threads: int = 1) -> None:
        self.workers, self.gpus, self.threads = workers, gpus, threads
        self._pools: dict[int, ProcessPoolExecutor] = {}
        self._last: dict[int, Future[Any]] = {}

    def slots(self) -> int:
        """One for each process: nothing waits in a queue, so that the first of the list is always the next."""
        return self.workers

    def submit(self, work: Work, arguments: dict[str, Any]) -> Future[Any]:
        """Begin it in a process that has nothing to do; there must be one."""
        worker = next(number for number in range(self.workers) if number not in self._last or self._last[number].done())
        if worker not in self._pools:
            gpu = self.gpus[worker % len(self.gpus)] if self.gpus else None
            self._pools[worker] = ProcessPoolExecutor(
                1, get_context("spawn"), initializer=_on_its_own, initargs=(os.getpid(), gpu, self.threads)
            )
        try:
            self._last[worker] = self._pools[worker].submit(attempt, work, arguments)
        except BrokenProcessPool:
            del self._pools[worker]
            return self.submit(work, arguments)
        return self._last[worker]

    def close(self, at_once: bool) -> None:
        """Let the processes go, or end them."""
        for pool in self._pools.values():
            if at_once:
                for process in list((pool._processes or {}).values()):
                    process.terminate()
            pool.shutdown(wait=not at_once, cancel_futures=at_once)


class Given(Executors):
    """Any executor of `concurrent.futures` whose workers are processes; it stays open.

    Raises:
        GlocalError: it has threads for workers.
    """

    def __init__(self, executor: Executor, workers: int) -> None:
        if isinstance(executor, ThreadPoolExecutor):
            raise GlocalError(
                "Trainings cannot share a process, because they would disturb each other's random numbers: give an "
                "executor whose workers are processes, not threads."
            )
        self.executor, self.workers = executor, workers

    def slots(self) -> int:
        """As many as were said: an executor does not tell."""
        return self.workers

    def submit(self, work: Work, arguments: dict[str, Any]) -> Future[Any]:
        """Hand it on.

        Raises:
            GlocalError: one of its processes was killed, after which it takes no more jobs.
        """
        try:
            return self.executor.submit(attempt, work, arguments)
        except BrokenExecutor as error:
            raise GlocalError(
                "A process of the executor was killed, and it takes no more trainings: start again with a new one, it "
                "continues."
            ) from error

    def close(self, at_once: bool) -> None:
        """It belongs to who gave it."""


def attempt(work: Work, arguments: dict[str, Any]) -> None:
    """Do the work; what goes wrong becomes an exception that any process can receive.

    Raises:
        GlocalError: the work's own, or what the user can do about an error of the file system.
        JobError: anything else.
    """
    try:
        work(**arguments)
        return
    except GlocalError:
        raise
    except Exception as error:
        sentence = explained(error)
        unexpected = GlocalError(sentence) if sentence else JobError(*told(error))
    raise unexpected  # out here it does not refer to the original, which may not be sent


def told(error: BaseException) -> tuple[str, str]:
    """An exception's type and the first line of its text, and its whole traceback."""
    return f"{type(error).__name__}: {error}".splitlines()[0], "".join(traceback.format_exception(error))


def _on_its_own(parent: int, gpu: str | None, threads: int) -> None:
    """Initialise a process of this parent: its threads, a GPU of its own where there are some, and no word."""
    follow_parent(parent)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch

    torch.set_num_threads(threads)
    # Bars of several processes would write over each other.
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115


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
