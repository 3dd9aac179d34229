"""Jobs are done in order, once, each after what it needs; what fails or is killed does not take the others with it."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster

from fake_jobs import (
    be_killed,
    find_busy,
    refuse,
    sleep,
    stumble,
    tell_threads,
    train,
    wait_for,
)
from glocal import __version__, runs
from glocal.errors import Busy, GlocalError
from glocal.experiments import cluster as on_dask
from glocal.experiments import executors, jobs
from glocal.experiments.cluster import ONE_THREAD, Dask
from glocal.experiments.executors import Executors, Given, Here, JobError, Processes, executor_named
from glocal.experiments.jobs import Job, do
from glocal.files import read_json


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "REST_SECONDS", 0.05)
    monkeypatch.setattr(jobs, "LOOK_SECONDS", 0.05)


@pytest.fixture(scope="module")
def pool() -> Iterator[Processes]:
    """Two processes that many tests share, because starting them takes seconds."""
    with Processes(2) as executor:
        yield executor


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as found:
        yield found


def job(folder: Path, work: Callable[..., Any] = train, needs: Sequence[Path] = (), **arguments: Any) -> Job:
    return Job(work, {"run": folder, **arguments}, folder, 10, tuple(needs))


def finished(root: Path) -> set[str]:
    return {path.parent.name for path in root.glob("*/manifest.json")}


def named(executor: Executors) -> str:
    return type(executor).__name__


@pytest.fixture(params=["here", "processes"])
def executor(request: pytest.FixtureRequest) -> Executors:
    return Here() if request.param == "here" else request.getfixturevalue("pool")


def test_jobs_are_done_in_order_and_after_what_they_need(tmp_path: Path) -> None:
    a, b, c, d = (tmp_path / name for name in "abcd")
    diary = tmp_path / "diary"
    listed = [job(a, needs=[c, d], diary=diary), job(b, diary=diary), job(c, needs=[b], diary=diary), job(d)]
    listed[3] = job(d, diary=diary)
    assert do(listed, "Testing", Here()) == []
    assert diary.read_text().split() == ["b", "c", "d", "a"]


def test_jobs_run_at_the_same_time(tmp_path: Path, pool: Processes) -> None:
    """The first can only end after the third, which needs the second: it is not kept back until a round is over."""
    a, b, c = (tmp_path / name for name in "abc")
    diary = tmp_path / "diary"
    waiting = job(a, wait_for, file=c / "manifest.json", diary=diary)
    assert do([waiting, job(b, diary=diary), job(c, needs=[b], diary=diary)], "Testing", pool) == []
    assert diary.read_text().split() == ["b", "c", "a"]


def test_a_job_that_was_done_is_not_repeated(tmp_path: Path, executor: Executors) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    diary = tmp_path / "diary"
    train(b)
    listed = [job(folder, diary=diary, needs=[b] if folder == c else []) for folder in (a, b, c, a)]
    for _ in range(2):
        assert do(listed, "Testing", executor) == []
        assert sorted(diary.read_text().split()) == ["a", "c"]


def test_failures_are_listed_and_the_others_go_on(tmp_path: Path, executor: Executors) -> None:
    a, b, c, d, e = (tmp_path / name for name in "abcde")
    listed = [job(a, refuse), job(b, needs=[a]), job(c, needs=[a, b]), job(d, stumble), job(e)]
    failures = {failure.job.folder.name: failure.reason for failure in do(listed, "Testing", executor, True)}
    assert finished(tmp_path) == {"e"}
    assert failures == {
        "a": "a has no labels: label some.",
        "b": f"Not run, because it needs {a}, which failed.",
        "c": failures["c"],
        "d": f"UnsendableError: no (the whole traceback is in {d / 'failure.txt'}).",
    }
    assert failures["c"] in {f"Not run, because it needs {folder}, which failed." for folder in (a, b)}
    note = (d / "failure.txt").read_text(encoding="utf-8")
    assert note.startswith("Traceback")
    assert 'raise UnsendableError("no\\nway", run.name)' in note
    assert (a / "failure.txt").read_text(encoding="utf-8") == "a has no labels: label some.\n"
    assert not b.exists()
    again = [job(a), *listed[1:3], job(d)]
    assert do(again, "Testing", executor, True) == []
    assert finished(tmp_path) == set("abcde")
    assert not list(tmp_path.glob("*/failure.txt"))


def test_the_first_failure_stops_all(tmp_path: Path, executor: Executors) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    with pytest.raises(GlocalError, match=r"^a has no labels: label some\.$"):
        do([job(a, refuse), job(b, needs=[a]), job(c, needs=[a])], "Testing", executor)
    with pytest.raises(JobError, match=r"(?s)Traceback.*in stumble.*UnsendableError: no\nway"):
        do([job(a, stumble), job(b, needs=[a])], "Testing", executor)
    assert finished(tmp_path) == set()
    assert not list(tmp_path.glob("*/failure.txt"))


def test_a_full_disk_is_no_traceback(tmp_path: Path) -> None:
    def fill(run: Path) -> None:
        raise OSError(28, "No space left on device", str(run))

    (failure,) = do([job(tmp_path / "a", fill)], "Testing", Here(), True)
    assert failure.reason.startswith("No space left on disk while writing")
    assert "traceback" not in failure.reason


def test_a_busy_job_is_put_back_and_the_next_goes_on(tmp_path: Path, executor: Executors) -> None:
    a, b, diary = tmp_path / "a", tmp_path / "b", tmp_path / "diary"
    busy = job(a, find_busy, times=3, file=b / "manifest.json", diary=diary)
    assert do([busy, job(b, diary=diary)], "Testing", executor) == []
    assert finished(tmp_path) == {"a", "b"}
    assert len(list(a.glob("busy-*"))) >= 3
    assert diary.read_text().split() == ["b", "a"]


def test_what_another_process_has_finished_meanwhile_is_done(tmp_path: Path) -> None:
    """The lock is real: held by another, who finishes the run."""
    a, attempts = tmp_path / "a", list[int]()

    def enter(run: Path) -> None:
        attempts.append(1)
        with runs.held(run):
            pytest.fail("the folder is held by another")

    def other() -> None:
        time.sleep(0.5)
        train(a)

    began = time.monotonic()
    with runs.held(a):
        thread = threading.Thread(target=other)
        thread.start()
        assert do([job(a, enter), job(tmp_path / "b", needs=[a])], "Testing", Here()) == []
    thread.join()
    assert 1 < len(attempts) <= 2 + (time.monotonic() - began) / jobs.REST_SECONDS  # it rested in between
    assert finished(tmp_path) == {"a", "b"}


def test_a_held_folder_is_busy(tmp_path: Path) -> None:
    with runs.held(tmp_path), pytest.raises(Busy, match="Another process is working in"), runs.held(tmp_path):
        pass


def test_a_killed_process_is_replaced_and_no_other_is_touched(tmp_path: Path) -> None:
    """One job is killed once, one whenever it runs: only that one fails, the last time alone, after all others."""
    a, b, c, d = (tmp_path / name for name in "abcd")
    diary = tmp_path / "diary"
    listed = [
        job(a, wait_for, file=b / "killed-1.json", diary=diary),
        job(b, be_killed, times=99),
        job(c, be_killed, times=1),
        job(d, needs=[c], diary=diary),
    ]
    with Processes(2) as executor:
        (failure,) = do(listed, "Testing", executor, True)
    assert failure.job.folder == b
    assert (
        "b was killed, and again when it was tried anew, most likely for lack of memory: use a smaller batch"
        in failure.reason
    )
    assert finished(tmp_path) == {"a", "c", "d"}
    assert diary.read_text().split() == ["a", "d"]
    assert [len(list(folder.glob("killed-*"))) for folder in (b, c)] == [3, 1]
    last = (b / "killed-2.json").stat().st_mtime_ns
    assert last > max((folder / "manifest.json").stat().st_mtime_ns for folder in (a, c, d))


def test_without_keep_going_a_process_that_is_always_killed_stops_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Processes, "patience", 1)
    with Processes(2) as executor, pytest.raises(GlocalError, match="was killed, and again"):
        do([job(tmp_path / "a", be_killed, times=99)], "Testing", executor)


def test_ctrl_c_ends_the_workers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = tmp_path / "a"

    def interrupted(*_: Any) -> Any:
        if (a / "process.json").exists():
            raise KeyboardInterrupt
        time.sleep(0.05)
        return set(), set()

    monkeypatch.setattr(jobs, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt), Processes(2) as executor:
        do([job(a, sleep)], "Testing", executor, True)
    process = read_json(a / "process.json")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    pytest.fail("a worker outlived the Ctrl-C by a minute")


def test_workers_have_the_threads_they_are_given(tmp_path: Path) -> None:
    with Processes(2, threads=2) as executor:
        do([job(tmp_path / "a", tell_threads)], "Testing", executor)
    assert read_json(tmp_path / "a" / "manifest.json") == {"torch": 2, "openmp": "2"}


def test_progress_says_how_far_it_is(tmp_path: Path) -> None:
    a, b, c, d = (tmp_path / name for name in "abcd")
    train(a)
    for folder, last in ((b, 4), (c, 7)):
        folder.mkdir()
        lines = [f'{{"iteration": {number}, "loss": 1.0}}\n' for number in (1, last)]
        (folder / "metrics.jsonl").write_text("".join(lines))
    board = jobs._Board([job(a), job(b), job(c), job(d), job(tmp_path / "e", needs=[d])], Here(), True)
    assert (board.state(), board.info().split(",")[0]) == ({"total": 50, "completed": 10}, "1 of 5 done")
    board.resting[b] = 0.0  # another process is at it; nobody has begun to continue c
    assert board.state()["completed"] == 14
    board._fail(board.open[d], GlocalError("No."))
    assert (board.state(), board.info().split(",")[:2]) == (
        {"total": 30, "completed": 14},
        ["1 of 5 done", " 2 failed"],
    )


def test_a_cluster_survives_a_worker_that_is_killed(cluster: LocalCluster, tmp_path: Path) -> None:
    a, b, c, d, e, f = (tmp_path / name for name in "abcdef")
    listed = [job(a, be_killed, times=1), job(b, wait_for, file=a / "manifest.json"), job(c, needs=[a]), job(d, refuse)]
    listed += [job(e, stumble), job(f, find_busy, times=1)]
    with executor_named(cluster.scheduler_address.replace("tcp", "dask")) as executor:
        assert named(executor) == "Dask"
        failures = {failure.job.folder.name: failure.reason for failure in do(listed, "Testing", executor, True)}
    assert finished(tmp_path) == {"a", "b", "c", "f"}
    assert failures == {
        "d": "d has no labels: label some.",
        "e": f"UnsendableError: no (the whole traceback is in {e / 'failure.txt'}).",
    }
    assert "in stumble" in (e / "failure.txt").read_text(encoding="utf-8")


def test_workers_of_a_cluster_have_the_threads_they_are_given(cluster: LocalCluster, tmp_path: Path) -> None:
    listed = [job(tmp_path / name, tell_threads) for name in "ab"]
    with Dask(cluster.scheduler_address, workers=1, threads=2) as executor:
        assert executor.slots() == 1
        do(listed, "Testing", executor)
    assert [read_json(one.folder / "manifest.json")["torch"] for one in listed] == [2, 2]


def test_a_cluster_that_cannot_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalCluster(n_workers=0, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster:
        address = cluster.scheduler_address
        with monkeypatch.context() as patch:
            patch.setattr(on_dask, "CONNECT_SECONDS", 3)
            with pytest.raises(GlocalError, match=r"has no workers: start some with `dask worker .* --nthreads 1`"):
                Dask(address)
        cluster.scale(1)
        with pytest.raises(GlocalError, match="dask worker --nthreads 1"):
            Dask(address)
        monkeypatch.setattr(Dask, "slots", lambda self: 1)  # the worker joins after the others were looked at
        with Dask(address) as executor:
            (failure,) = do([job(tmp_path / "a")], "Testing", executor, True)
        assert failure.reason == ONE_THREAD
    assert finished(tmp_path) == set()


def test_another_version_on_the_cluster_is_refused(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_dask, "__version__", "99")
    found = (
        rf"need glocal 99 as it is here, but they have: {__version__}, 99; install"  # the scheduler is in this process
    )
    with pytest.raises(GlocalError, match=found):
        Dask(cluster.scheduler_address)
    monkeypatch.setattr(on_dask, "_version", lambda: 1 / 0)
    with pytest.raises(GlocalError, match="they have: ZeroDivisionError: division by zero; install"):
        Dask(cluster.scheduler_address)


def test_a_cluster_that_is_lost_stops_all(cluster: LocalCluster, tmp_path: Path) -> None:
    with Dask(cluster.scheduler_address) as executor:
        executor._client.close()
        with pytest.raises(GlocalError, match="connection to the Dask scheduler was lost"):
            executor.slots()

    class Leaving(Here):
        def submit(self, work: Any, arguments: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    with pytest.raises(GlocalError, match="connection to the Dask scheduler was lost"):
        do([job(tmp_path / "a")], "Testing", Leaving(), True)


def test_where_nobody_answers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_dask, "CONNECT_SECONDS", 0.2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(GlocalError, match=rf"No Dask scheduler answers at tcp://127.0.0.1:{port}: start one there"):
        executor_named(f"dask://127.0.0.1:{port}")


def test_dask_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(GlocalError, match=r'pip install "glocal\[cluster\]"'):
        executor_named("dask://localhost:8786")


def test_any_executor_of_processes_will_do(tmp_path: Path) -> None:
    made = [job(tmp_path / name) for name in ("a", "b")]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with executor_named(pool, workers=1) as executor:
            assert isinstance(executor, Given)
            assert do(made, "", executor) == []
        assert pool.submit(int, "3").result() == 3  # it stays open
    with ThreadPoolExecutor(1) as pool, pytest.raises(GlocalError, match="processes, not threads"):
        executor_named(pool)


def test_an_executor_that_broke_is_said(tmp_path: Path) -> None:
    made, said = [job(tmp_path / "a", be_killed, times=9), job(tmp_path / "b")], "takes no more trainings: start again"
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, pytest.raises(GlocalError, match=said):
        do(made, "", executor_named(pool, workers=1), keep_going=True)


def test_executors_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(executor_named("local", 1)) == "Here"
    pool = executor_named("local", 3, "cpu", threads=2)
    assert isinstance(pool, Processes)
    assert (pool.slots(), pool.gpus, pool.threads) == (3, [], 2)
    monkeypatch.setattr(executors, "default_workers", lambda device: {"cuda:1": 1}[device])
    assert named(executor_named("local", device="cuda:1")) == "Here"
    for text in ("lokal", "dask", "dask://", "dask://host", "dask://host:port", "tcp://host:8786", ""):
        with pytest.raises(GlocalError, match=r"no executor '.*': write `local` .* or `dask://HOST:PORT`"):
            executor_named(text)
