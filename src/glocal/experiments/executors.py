"""Where the jobs of an experiment run: in this process, in several processes here, or on a Dask cluster."""

import logging
import os
import re
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from typing import Any, Self

from glocal import __version__
from glocal.errors import GlocalError
from glocal.files import explained
from glocal.processes import cores, follow_parent

Work = Callable[..., Any]
CONNECT_SECONDS = 10
LOST = "The connection to the Dask scheduler was lost: start the same command again when it is back, it continues."
ONE_THREAD = (
    "A Dask worker has several threads, which would train at the same time in one process and disturb each other's "
    "random numbers: start every worker with `dask worker --nthreads 1` (`--nworkers N` gives several on one machine)."
)


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
        patience: how many times a job may be in a process that was killed; before the last one it runs alone.
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


def executor_named(text: str, workers: int | None = None, device: str = "auto", threads: int = 1) -> Executors:
    """Where jobs are to run, in a user's words.

    Args:
        text: `local`, or `dask://HOST:PORT` for the Dask scheduler there.
        workers: jobs at the same time; None takes the machine's `default_workers`, or all workers of the cluster.
        device: the device that trainings are told; with `auto` local workers share out the GPUs.
        threads: of each worker.

    Raises:
        GlocalError: neither of the two, or the cluster cannot be used as it is.
    """
    if text == "local":
        workers = workers or default_workers(device)
        return Here() if workers == 1 else Processes(workers, gpus_for(device), threads)
    if found := re.fullmatch(r"dask://([^\s/:]+:\d+)", text):
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
    """A process for each worker, with threads, and a GPU where there are some, of its own; a killed one is replaced."""

    killed = BrokenProcessPool
    patience = 3

    def __init__(self, workers: int, gpus: Sequence[str] = (), threads: int = 1) -> None:
        self.workers, self.gpus, self.threads = workers, gpus, threads
        self._pool: ProcessPoolExecutor | None = None

    def slots(self) -> int:
        """One for each process: nothing waits in a queue, so that the first of the list is always the next."""
        return self.workers

    def submit(self, work: Work, arguments: dict[str, Any]) -> Future[Any]:
        """Begin it in a process of the pool; a pool in which one was killed is useless and makes way for a new one."""
        try:
            self._pool = self._pool or self._new()
            return self._pool.submit(attempt, work, arguments)
        except BrokenProcessPool:
            self.close(at_once=True)
            return self.submit(work, arguments)

    def close(self, at_once: bool) -> None:
        """Let the processes go, or end them."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        if at_once:
            for process in list((pool._processes or {}).values()):
                process.terminate()
        pool.shutdown(wait=not at_once, cancel_futures=at_once)

    def _new(self) -> ProcessPoolExecutor:
        context = get_context("spawn")
        gpus = context.SimpleQueue()
        for worker in range(self.workers):
            gpus.put(self.gpus[worker % len(self.gpus)] if self.gpus else None)
        return ProcessPoolExecutor(self.workers, context, initializer=_on_its_own, initargs=(gpus, self.threads))


class Dask(Executors):
    """The workers of a Dask cluster, which see the same folders under the same paths.

    Dask itself gives the job of a killed worker to another one, some times over.

    Raises:
        GlocalError: Dask is not installed, nobody answers, there is no worker, another version of glocal, or workers
            with several threads.
    """

    def __init__(self, address: str, workers: int | None = None, threads: int = 1) -> None:
        try:
            from distributed import Client
            from distributed.scheduler import KilledWorker
        except ImportError as error:
            raise GlocalError('Dask is missing: pip install "glocal[cluster]", here and on the workers.') from error
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # it is said here, in a sentence
        self.workers, self.threads, self.killed = workers, threads, KilledWorker
        try:
            self._client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except OSError as error:
            raise GlocalError(
                f"No Dask scheduler answers at {address}: start one there with `dask scheduler`, and workers with "
                f"`dask worker {address} --nthreads 1`."
            ) from error
        self._executor: Executor = self._client.get_executor(pure=False)
        try:
            self._inspect(address)
        except GlocalError:
            self.close(at_once=True)
            raise

    def _inspect(self, address: str) -> None:
        try:
            self._client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError as error:
            raise GlocalError(
                f"The Dask scheduler at {address} has no workers: start some with `dask worker {address} --nthreads 1`."
            ) from error
        try:
            found = {self._client.run_on_scheduler(_version), *self._client.run(_version).values()}
        except Exception as error:  # most likely there is none
            found = {told(error)[0]}
        if found != {__version__}:
            raise GlocalError(
                f"The Dask scheduler at {address} and its workers need glocal {__version__} as it is here, but they "
                f"have: {', '.join(sorted(found))}; install the same environment for all of them."
            )
        self.slots()

    def slots(self) -> int:
        """One for each worker there is now; some may join later.

        Raises:
            GlocalError: the scheduler is gone, or a worker has several threads.
        """
        if self._client.status != "running":
            raise GlocalError(LOST)
        try:
            threads = self._client.nthreads().values()
        except OSError as error:
            raise GlocalError(LOST) from error
        if any(count > 1 for count in threads):
            raise GlocalError(ONE_THREAD)
        return min(len(threads), self.workers or len(threads))

    def submit(self, work: Work, arguments: dict[str, Any]) -> Future[Any]:
        """Send it to the scheduler."""
        return self._executor.submit(_on_worker, work, arguments, self.threads)

    def close(self, at_once: bool) -> None:
        """Leave the cluster; what nobody has begun yet is cancelled, what runs there runs to its end."""
        self._client.close()


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


def _on_its_own(gpus: "SimpleQueue[str | None]", threads: int) -> None:
    """Initialise a process: its threads, a GPU of its own where there are some, and no word."""
    follow_parent()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if gpu := gpus.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch

    torch.set_num_threads(threads)
    # Bars of several processes would write over each other.
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _version() -> str:
    return __version__


def _on_worker(work: Work, arguments: dict[str, Any], threads: int) -> None:
    """Do the work on a Dask worker, in one of its threads: the number of PyTorch's own is set for each thread anew."""
    import torch
    from distributed import get_worker

    if get_worker().state.nthreads > 1:  # it has joined after the others were looked at
        raise GlocalError(ONE_THREAD)
    torch.set_num_threads(threads)
    attempt(work, arguments)


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
