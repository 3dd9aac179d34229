import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glocal.devices import computing, device_named, fabric_for
from glocal.errors import GlocalError


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that there are so many."""

    def there_are(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return there_are


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("foo", "device=foo is not known"),
        ("mps", "device=mps is not supported"),
        ("cuda:x", "device=cuda:x is not known"),
        ("cuda:99", "device=cuda:99 was asked for, but this machine has 2 GPUs"),
        ("", "device= is not known"),
        ("autocpu", "device=autocpu is not known"),
        ("cpu0", "device=cpu0 is not known"),
    ],
)
def test_an_unknown_device_is_refused(gpus: Any, name: str, words: str) -> None:
    gpus(2)
    with pytest.raises(GlocalError, match=words):
        device_named(name)


def test_devices_by_name(gpus: Any) -> None:
    gpus(0)
    assert device_named("cpu") == device_named("auto") == torch.device("cpu")
    with pytest.raises(GlocalError, match="device=cuda was asked for, but this machine has 0 GPUs"):
        device_named("cuda")
    gpus(2)
    assert device_named("auto") == torch.device("cuda")
    assert device_named("cuda:1") == torch.device("cuda:1")
    with pytest.raises(GlocalError, match="has 2 GPUs"):
        device_named("cuda:2")


@pytest.mark.parametrize(
    ("launcher", "place"), [("WORLD_SIZE", "LOCAL_RANK"), ("SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")]
)
def test_each_of_several_processes_has_its_gpu(
    gpus: Any, monkeypatch: pytest.MonkeyPatch, launcher: str, place: str
) -> None:
    gpus(2)
    monkeypatch.setenv(launcher, "4")
    monkeypatch.setenv(place, "1")
    assert device_named("auto") == device_named("cuda") == torch.device("cuda:1")
    assert device_named("cpu") == torch.device("cpu")
    with pytest.raises(GlocalError, match="device=cuda:0 is one GPU for 4 processes: use device=auto"):
        device_named("cuda:0")
    monkeypatch.setenv(place, "2")
    with pytest.raises(GlocalError, match=r"Process 3 of this machine sees 2 GPU.* --gpu-bind=none"):
        device_named("auto")


def test_deterministic_algorithms_are_taken_when_asked_for() -> None:
    flags = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    with computing(2, deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        with computing(1, deterministic=False):
            assert not torch.are_deterministic_algorithms_enabled()
            assert torch.backends.cudnn.benchmark
            assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled()
    assert flags == (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
    )


def test_precision_as_fabric_wants_it() -> None:
    assert "32" in str(fabric_for(torch.device("cpu"), "float32")._precision.precision)
    assert "bf16" in str(fabric_for(torch.device("cpu"), "bfloat16")._precision.precision)


def test_distributed_slurm_brings_processes_together(tmp_path: Path) -> None:
    """As srun starts them on one machine: two tasks with SLURM's variables and nothing else."""
    code = (
        "import torch\n"
        "from glocal.devices import joined\n"
        "from glocal.distributed import all_sum, rank, world_size\n"
        "assert joined('auto').type == 'cpu'\n"
        "print(rank(), world_size(), float(all_sum(torch.tensor(1.0 + rank()))))\n"
    )
    slurm = {
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    slurm |= {"SLURM_NNODES": "1"}
    slurm |= {"SLURM_NODELIST": "localhost", "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "glocal"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        slurm["MASTER_PORT"] = str(free.getsockname()[1])
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **slurm, "SLURM_NODEID": "0", "SLURM_PROCID": task, "SLURM_LOCALID": task}
            | {"CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in ("0", "1")
    ]
    try:
        said = [task.communicate(timeout=300)[0].split() for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert said == [["0", "2", "3.0"], ["1", "2", "3.0"]]
