"""The jobs of an experiment on a Dask cluster."""

import logging
from concurrent.futures import Executor, Future
from typing import Any

from glocal import __version__
from glocal.errors import GlocalError
from glocal.experiments.executors import LOST, Executors, Work, attempt, told

CONNECT_SECONDS = 10
ONE_THREAD = (
    "A Dask worker has several threads, which would train at the same time in one process and disturb each other's "
    "random numbers: start every worker with `dask worker --nthreads 1` (`--nworkers N` gives several on one machine)."
)


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
