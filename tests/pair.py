"""Two processes that train as one, for tests: started once, they take jobs from standard input until it closes.

As a program: `python pair.py` with the environment of torchrun. Each line is a job: the arguments of `train_in_double`.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glocal.data.sampling import Pool, Slices
from glocal.data.store import Store
from glocal.devices import joined
from glocal.engine import train
from glocal.networks.registry import build


class DoublePool(Pool):
    """Images in float64, so that equal means equal."""

    def images(self, slices: Slices) -> Tensor:
        return super().images(slices).double()


def train_in_double(kind: str, name: str, number: int, store: str, settings: dict[str, Any], folder: str) -> None:
    """Train stage `number` of a method (or a strategy) on all cases with a label, in float64; leave its checkpoint."""
    torch.set_num_threads(1)
    data = Store.open(Path(store))
    pool = DoublePool(data, [volume.case for volume in data.volumes if volume.labelled])
    torch.manual_seed(0)
    if kind == "method":
        from glocal.pretraining.registry import method_named, pretraining_options

        options: Any = pretraining_options(settings)
        method = method_named(name)
        make = method.stages(options)[number][1]
        learner: Any = make(build(options.network, 1, 3), pool, options, *[pool] * method.uses_labels)
    else:
        from glocal.finetuning.registry import finetuning_options, strategy_named

        options = finetuning_options(settings)
        entry = strategy_named(name)

        def begin(k: int) -> Any:
            torch.manual_seed(k)
            return build(entry.network(options, options.network), 1, 3)

        learner = entry.make(begin, pool, pool, options, Path(folder))
    joined("cpu")
    train(learner.double(), options, Path(folder), "test")


def assert_same_training(first: Path, second: Path) -> None:
    """The same weights, running statistics and losses, and the same momentum: the sum of all gradients so far."""
    one, two = (load_file(folder / "checkpoint.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    assert any(name.endswith("momentum_buffer") for name in one)
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for folder in (first, second)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert len(losses[0]) == 2


class Pair:
    """The two processes."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []

    def _start(self) -> None:
        """Start both and see that they found each other: a port that is free now may be taken when they look for it."""
        for attempt in range(3):
            self.close()
            self._begin()
            try:
                return self._do({})
            except (AssertionError, BrokenPipeError):
                if attempt == 2:
                    raise

    def _begin(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        together["TORCHELASTIC_RUN_ID"] = "pair"
        self._processes = [
            subprocess.Popen(
                [sys.executable, __file__],
                env={**os.environ, **together, "RANK": rank, "LOCAL_RANK": rank},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in ("0", "1")
        ]

    def do(self, job: dict[str, Any]) -> None:
        """Have both do the job, and wait; what goes wrong in either is an error here, and of this job alone."""
        if not self._processes or any(process.poll() is not None for process in self._processes):
            self._start()
        self._do(job)

    def _do(self, job: dict[str, Any]) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        for process in self._processes:
            assert process.stdout is not None
            answer = process.stdout.readline().strip()
            assert answer == "done", answer or "a process of the pair ended"

    def close(self) -> None:
        for process in self._processes:
            try:
                process.communicate(timeout=30)
            except (subprocess.TimeoutExpired, BrokenPipeError):
                process.kill()
                process.wait()


def main() -> None:
    for line in sys.stdin:
        try:
            if job := json.loads(line):
                train_in_double(**job)
            else:
                joined("cpu")
        except Exception as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)  # the other one would wait for this for ever
        print("done", flush=True)


if __name__ == "__main__":
    main()
