"""A run folder knows the settings it was begun with, continues with these and no others, and says when it is done."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from glocal import __version__, runs
from glocal.errors import GlocalError
from glocal.runs import held

SETTINGS: dict[str, Any] = {
    "seed": 0,
    "device": "auto",
    "log": ["tensorboard"],
    "network": {"widths": (8, 16)},
    "learning_rate": 1e-5,
}


def test_a_run_continues_with_the_settings_it_was_begun_with(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    runs.begin(folder, "finetune", SETTINGS)
    before = (folder / "recipe.yaml").read_bytes()
    runs.begin(folder, "finetune", SETTINGS)
    assert (folder / "recipe.yaml").read_bytes() == before
    assert runs.settings_of(folder) == {**SETTINGS, "kind": "finetune", "network": {"widths": [8, 16]}}


class Options(BaseModel):
    """What a later version knows of the settings above: `clip` has come."""

    seed: int = 0
    learning_rate: float = 1e-3
    clip: float = 0.0


def test_an_option_that_came_later_does_not_keep_a_run_from_continuing(tmp_path: Path) -> None:
    runs.begin(tmp_path / "run", "finetune", SETTINGS)
    runs.begin(tmp_path / "run", "finetune", SETTINGS | {"clip": 0.0}, Options)
    with pytest.raises(GlocalError, match=r"begun with clip=0\.0, now it is 1\.0"):
        runs.begin(tmp_path / "run", "finetune", SETTINGS | {"clip": 1.0}, Options)
    with pytest.raises(GlocalError, match=r"begun with clip=None, now it is 0\.0"):
        runs.begin(tmp_path / "run", "finetune", SETTINGS | {"clip": 0.0})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed=0, now it is 1"),
        ({"network": {"widths": [8, 32]}}, r"network\.widths=\[8, 16\], now it is \[8, 32\]"),
        ({"network": {"widths": [8, 16], "name": "unet"}}, r"network\.name=None, now it is unet"),
        ({"learning_rate": 1e-4}, "learning_rate=1e-05, now it is 0.0001"),
    ],
)
def test_other_settings_are_refused_by_the_key_that_differs(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    runs.begin(tmp_path, "finetune", SETTINGS)
    with pytest.raises(GlocalError, match=rf"was begun with {words}: choose another run folder"):
        runs.begin(tmp_path, "finetune", {**SETTINGS, **changes})
    assert runs.settings_of(tmp_path)["seed"] == 0


def test_a_setting_that_is_gone_and_another_kind_of_run_are_refused(tmp_path: Path) -> None:
    runs.begin(tmp_path, "finetune", SETTINGS)
    with pytest.raises(GlocalError, match="holds a run of `glocal finetune`: choose another run folder"):
        runs.begin(tmp_path, "pretrain", SETTINGS)
    method = {"method": "pcl", "augmentation": {"noise": 0}}
    runs.begin(tmp_path / "pcl", "pretrain", method)
    with pytest.raises(GlocalError, match="was begun with method=pcl, now it is gcl"):  # the rest follows from it
        runs.begin(tmp_path / "pcl", "pretrain", {"method": "gcl", "augmentation": {"noise": 1}})
    with pytest.raises(GlocalError, match="seed=0, now it is None"):
        runs.begin(tmp_path, "finetune", {key: value for key, value in SETTINGS.items() if key != "seed"})


def test_a_run_may_continue_on_another_device_and_with_other_logs(tmp_path: Path) -> None:
    runs.begin(tmp_path, "run", {**SETTINGS, "pretrain": {"pcl": {"device": "cuda:1", "batch": 3}}})
    now = {**SETTINGS, "device": "cpu", "log": [], "pretrain": {"pcl": {"device": "cpu", "batch": 3}}}
    runs.begin(tmp_path, "run", now)
    assert runs.settings_of(tmp_path)["device"] == "auto"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("thesis.txt", b"chapter 1"),
        ("recipe.yaml", b"flour: 500 g"),
        ("recipe.yaml", b"- flour"),
        ("recipe.yaml", b"a: [1"),
        ("recipe.yaml", b"\xff\xfe"),
    ],
)
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GlocalError, match=r"holds no run.*: .*choose another folder\.$"):
        runs.begin(tmp_path, "run", SETTINGS)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [content]


def test_an_empty_folder_is_taken_and_a_file_is_not(tmp_path: Path) -> None:
    runs.begin(tmp_path / "a", "run", SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises(GlocalError, match="file is a file: choose a folder"):
        runs.begin(tmp_path / "file", "run", SETTINGS)
    with pytest.raises(GlocalError, match="Cannot write"):
        runs.begin(tmp_path / "file" / "run", "run", SETTINGS)


def test_a_run_is_finished_when_its_manifest_says_so(tmp_path: Path) -> None:
    runs.begin(tmp_path, "run", SETTINGS)
    assert not runs.finished(tmp_path)
    with pytest.raises(GlocalError, match="is not finished: start its command again"):
        runs.manifest_of(tmp_path)
    runs.finish(tmp_path, time.time() - 60, kind="run", warnings=["look"])
    manifest = runs.manifest_of(tmp_path)
    assert runs.finished(tmp_path)
    assert (manifest["kind"], manifest["warnings"], manifest["glocal"]) == ("run", ["look"], __version__)
    assert 60 <= manifest["seconds"] < 100
    assert manifest["peak_memory_mib"] > 10
    assert {"torch", "monai", "simpleitk"} <= manifest["packages"].keys()


def test_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(GlocalError, match="holds no run of glocal"):
        runs.settings_of(tmp_path / "absent")


def test_nested_settings_become_one_level() -> None:
    nested = {"a": {"b": {"c": 1}, "d": [2, {"e": 3}]}, "f": {}, "g": None}
    assert runs.flatten(nested) == {"a.b.c": 1, "a.d": [2, {"e": 3}], "g": None}


def test_equal_settings_have_one_identity_whatever_their_order_and_kind_of_list() -> None:
    first = runs.identity(SETTINGS)
    assert first == runs.identity({**dict(reversed(SETTINGS.items())), "network": {"widths": [8, 16]}})
    assert re.fullmatch("[0-9a-f]{12}", first)


def test_where_and_how_fast_a_run_computes_is_no_part_of_its_identity() -> None:
    nested = {**SETTINGS, "options": {"batch": 3}}
    free = {"device": "cuda:1", "log": []}
    assert runs.identity(nested) == runs.identity({**nested, **free, "options": {"batch": 3, **free}})


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"seed": "0"},
        {"learning_rate": 1.0000001e-5},
        {"network": {"widths": [16, 8]}},
        {"network": {}},
        {"network": None},
        {"more": {}},  # settings of which all are at their defaults, where a whole part is not
        {"more": None},
        {"logs": []},
    ],
)
def test_every_other_difference_is_another_identity(changes: dict[str, Any]) -> None:
    assert runs.identity({**SETTINGS, **changes}) != runs.identity(SETTINGS)


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from glocal.runs import held\n"
        "with held(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(GlocalError, match="Another process is working in"), held(tmp_path / "run"):
        pass
    other.kill()  # as it may happen: nothing is left that would hold the folder
    other.wait()
    with held(tmp_path / "run"):
        pass


def test_a_disk_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Any, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(GlocalError, match="knows no locks"), runs.held(tmp_path):
        pytest.fail("it is not held")


def test_a_child_that_lives_on_holds_no_folder(tmp_path: Path) -> None:
    with runs.held(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        with runs.held(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_memory_of_every_gpu_counts_from_a_run_s_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {0: 3 * 2**20, 1: 5 * 2**20}
    assert "peak_gpu_memory_mib" not in runs.environment()
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", peaks.__getitem__)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda number: peaks.update({number: 2**20}))
    assert runs.environment()["peak_gpu_memory_mib"] == 5
    runs.begin(tmp_path / "run", "pretrain", {})
    assert runs.environment()["peak_gpu_memory_mib"] == 1
