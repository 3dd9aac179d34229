import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glocal import devices, engine
from glocal.checkpoints import seconds_spent, training_state
from glocal.data.store import Store
from glocal.devices import fabric_for
from glocal.engine import TrainingOptions, learning_rate_factor, train
from glocal.errors import GlocalError
from glocal.experiments.steps import pretrain_with
from glocal.loggers import make_logger
from glocal.randomness import generator
from glocal.runs import manifest_of

COUNT = 12


def options(**settings: Any) -> TrainingOptions:
    base = {"device": "cpu", "precision": "float32", "log": (), "max_iterations": COUNT, "warmup_iterations": 3}
    return TrainingOptions.model_validate({**base, "learning_rate": 0.01, **settings})


class Learner(nn.Module):
    """Convolution, batch norm, dropout: all that has a state or is random."""

    def __init__(self, stop_at: int | None = None, poison_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        )
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.stop_at, self.poison_at = stop_at, poison_at

    def forward(self, step: int) -> dict[str, Tensor]:
        if step == self.stop_at:
            raise KeyboardInterrupt
        maps: Tensor = self.layers(torch.rand(4, 3, 9, 9, generator=generator(1, step)))
        loss = (maps - 1).square().mean()
        return {"loss": loss * (torch.nan if step == self.poison_at else 1.0), "largest": maps.max()}

    def warning(self) -> str | None:
        return "odd"


@pytest.fixture
def _checkpoint_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CHECKPOINT_SECONDS", -1.0)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "checkpoint.safetensors")


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(value.equal(second[name]) for name, value in first.items())


def test_the_learning_rate_rises_and_falls() -> None:
    cosine = options(max_iterations=103, warmup_iterations=3)
    factors = [learning_rate_factor(cosine, step) for step in range(103)]
    assert factors[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert factors[53] == pytest.approx(0.5)
    assert factors[28] == pytest.approx((1 + cos(pi / 4)) / 2)
    assert 0 < factors[102] < 0.001
    assert factors[3:] == sorted(factors[3:], reverse=True)
    constant = options(schedule="constant", warmup_iterations=2)
    assert [learning_rate_factor(constant, step) for step in (0, 1, 2, 11)] == [0.5, 1, 1, 1]
    assert learning_rate_factor(options(warmup_iterations=0), 0) == 1
    short = options(max_iterations=2, warmup_iterations=30)
    assert learning_rate_factor(short, 1) == pytest.approx(2 / 30)


def test_the_poly_schedule_and_rounds() -> None:
    poly = options(schedule="poly", warmup_iterations=0, max_iterations=30)
    assert [learning_rate_factor(poly, step) for step in (0, 15, 29)] == pytest.approx([1, 0.5**0.9, (1 / 30) ** 0.9])
    cosine = options(warmup_iterations=2, max_iterations=30)
    alone = [
        learning_rate_factor(options(warmup_iterations=2, max_iterations=n), k) for n in (10, 20) for k in range(n)
    ]
    assert [learning_rate_factor(cosine, step, rounds=(0, 10)) for step in range(30)] == alone


def test_the_log_holds_losses_rate_and_figures(tmp_path: Path) -> None:
    learner = Learner()
    seen: list[nn.Module] = []

    def evaluate(module: nn.Module) -> dict[str, float]:
        seen.append(module)
        return {"score": 0.25}

    assert train(learner, options(), tmp_path, "test", evaluate, evaluate_every=5) == ["odd"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert [line["iteration"] for line in losses] == [1, 10, 12]
    assert losses[0].keys() == {"iteration", "loss", "largest", "learning_rate"}
    assert [line["learning_rate"] for line in losses] == [
        0.01 * learning_rate_factor(options(), step) for step in (0, 9, 11)
    ]
    assert [line["iteration"] for line in lines if "score" in line] == [5, 10, 12]
    assert seen == [learner] * 3
    assert losses[-1]["loss"] < losses[0]["loss"]
    state = training_state(tmp_path)
    assert 0 <= state.pop("seconds") < 100
    assert state == {"step": 12, "precision": "float32", "threads": 1, "warnings": ["odd"]}


@pytest.mark.usefixtures("_checkpoint_always")
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "lars"])
def test_a_stopped_training_ends_as_if_it_had_not_been(tmp_path: Path, optimizer: Any) -> None:
    whole, stopped, continued = Learner(), Learner(stop_at=7), Learner()
    train(whole, options(optimizer=optimizer), tmp_path / "whole", "test")
    with pytest.raises(KeyboardInterrupt):
        train(stopped, options(optimizer=optimizer), tmp_path / "parts", "test")
    assert training_state(tmp_path / "parts")["step"] == 7
    # What was written after the checkpoint, and a line that was cut short, do not stay.
    with open(tmp_path / "parts" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"iteration": 10, "loss": 0.5}\n{"iteration": 11, "lo')
    torch.manual_seed(99)
    continued.load_state_dict({name: value + 1 for name, value in continued.state_dict().items()})
    train(continued, options(optimizer=optimizer), tmp_path / "parts", "test")

    assert same(whole.state_dict(), continued.state_dict())
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "parts"))
    if optimizer.startswith("adam"):
        assert any("exp_avg_sq" in name for name in tensors(tmp_path / "whole"))
    logs = [(tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8") for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert not same(Learner().state_dict(), continued.state_dict())


@pytest.mark.usefixtures("_checkpoint_always")
def test_the_time_of_every_start_counts(tmp_path: Path, begun_long_ago: Callable[[Path], None]) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(Learner(stop_at=7), options(), tmp_path / "stage", "test")
    begun_long_ago(tmp_path / "stage")
    train(Learner(), options(), tmp_path / "stage", "test")
    (tmp_path / "other").mkdir()
    train(Learner(), options(), tmp_path / "other", "test")
    assert 1000 <= training_state(tmp_path / "stage")["seconds"] < 1100
    assert 1000 <= seconds_spent(tmp_path) < 1100
    assert seconds_spent(tmp_path / "other") < 100


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    train(Learner(), options(), tmp_path, "test")
    before = tensors(tmp_path)
    learner = Learner(stop_at=0)
    assert train(learner, options(), tmp_path, "test") == ["odd"]
    assert all(before[f"learner.{name}"].equal(value) for name, value in learner.state_dict().items())


def test_frozen_weights_stay(tmp_path: Path) -> None:
    learner, fresh = Learner(), Learner()
    train(learner, options(), tmp_path, "test")
    assert learner.frozen.weight.equal(fresh.frozen.weight)
    assert not learner.layers[0].weight.equal(fresh.layers[0].weight)


class Late(nn.Module):
    """Two weights with the same gradients; one of them stays idle at first."""

    def __init__(self, idle: int) -> None:
        super().__init__()
        self.weight, self.late = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
        self.until, self.seen = idle, list[Tensor]()

    def idle(self, step: int) -> list[nn.Parameter]:
        return [self.late] if step < self.until else []

    def forward(self, step: int) -> dict[str, Tensor]:
        self.seen.append(self.late.detach().clone())
        return {"loss": (3 * self.weight + 3 * self.late).sum()}


@pytest.mark.usefixtures("_checkpoint_always")
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "lars"])
def test_idle_weights_stay_and_begin_cold(tmp_path: Path, optimizer: Any) -> None:
    settings = {"optimizer": optimizer, "schedule": "constant", "warmup_iterations": 0, "weight_decay": 0.1}
    learner, alone = Late(idle=3), Late(idle=0)
    train(learner, options(**settings, max_iterations=2), tmp_path, "test")
    train(learner, options(**settings, max_iterations=7), tmp_path, "test")  # continued while a weight is idle
    train(alone, options(**settings, max_iterations=4), tmp_path / "alone", "test")
    assert [weight.equal(torch.ones(3, 2)) for weight in learner.seen] == [True] * 4 + [False] * 3
    assert learner.late.equal(alone.late)  # no moment was gathered before
    assert not learner.weight.allclose(learner.late)
    clipped = Late(idle=3)
    train(clipped, options(**settings, max_iterations=1, gradient_clip=1.0), tmp_path / "clipped", "test")
    if optimizer == "sgd":
        step = 0.01 * (1 / 6**0.5 + 0.1)  # the norm is that of the weights that move
        torch.testing.assert_close(clipped.weight, torch.full((3, 2), 1 - step))


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("step", [0, 4, 11])
def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path, step: int, clip: float) -> None:
    with pytest.raises(GlocalError, match=r"The loss became nan in iteration .* lower learning_rate"):
        train(Learner(poison_at=step), options(gradient_clip=clip), tmp_path, "test")


@pytest.mark.usefixtures("_checkpoint_always")
@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: bytes | None) -> None:
    train(Learner(), options(), tmp_path, "test")
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-10] if damage is None else damage)
    with pytest.raises(GlocalError, match=r"checkpoint.safetensors is damaged: delete it"):
        train(Learner(), options(), tmp_path, "test")


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    train(Learner(), options(), tmp_path, "test")
    other = Learner()
    other.layers[0] = nn.Conv2d(3, 8, 5)
    with pytest.raises(GlocalError, match="belongs to another network"):
        train(other, options(), tmp_path, "test")
    save_file({"x": torch.ones(1)}, tmp_path / "checkpoint.safetensors")
    with pytest.raises(GlocalError, match="is damaged"):
        train(Learner(), options(), tmp_path, "test")


def test_bfloat16_stays_finite_and_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Learner()
    train(learner, options(precision="bfloat16"), tmp_path, "test")
    assert training_state(tmp_path)["precision"] == "bfloat16"
    assert all(value.isfinite().all() for value in tensors(tmp_path).values())
    assert learner.layers[0].weight.dtype == torch.float32
    exact = Learner()
    train(exact, options(), tmp_path / "exact", "test")
    assert not same(exact.state_dict(), learner.state_dict())
    # A machine without such units continues with what the run was begun with.
    monkeypatch.setattr(devices, "_has_bfloat16_units", lambda device: False)
    train(Learner(), options(precision="auto"), tmp_path, "test")
    assert training_state(tmp_path)["precision"] == "bfloat16"
    assert "32" in str(fabric_for(torch.device("cpu"), "auto")._precision.precision)
    monkeypatch.setattr(devices, "_has_bfloat16_units", lambda device: True)
    assert "bf16" in str(fabric_for(torch.device("cpu"), "auto")._precision.precision)


def test_a_deterministic_training_gives_the_same_weights(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Watched(Learner):
        def forward(self, step: int) -> dict[str, Tensor]:
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().forward(step)

    learners = [Watched() for _ in range(3)]
    for learner, exactly in zip(learners, (True, True, False), strict=True):
        train(learner, options(deterministic=exactly), tmp_path / str(len(seen)), "test")
    assert seen == [True] * 2 * COUNT + [False] * COUNT
    assert same(learners[0].state_dict(), learners[1].state_dict())


def test_tensorboard_gets_the_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(Learner(), options(log=("tensorboard",)), tmp_path, "test", lambda module: {"score": 0.25}, 6)
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "largest", "score", "learning_rate"}
    assert [(event.step, event.value) for event in events.Scalars("score")] == [(6, 0.25), (12, 0.25)]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in written if "loss" in line]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return module


def test_mlflow_gets_the_figures_of_one_run(tmp_path: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CHECKPOINT_SECONDS", -1.0)
    folder = tmp_path / "out" / "pcl" / "stage-1"
    with pytest.raises(KeyboardInterrupt):
        train(Learner(stop_at=7), options(log=("mlflow",)), folder, "test")
    train(Learner(), options(log=("mlflow",)), folder, "test")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("glocal")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "out/pcl/stage-1"
    assert run.info.status == "FINISHED"
    assert [figure.step for figure in client.get_metric_history(run.info.run_id, "loss")] == [1, 10, 12]


def test_mlflow_that_fails_is_said(tmp_path: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    logger = make_logger("mlflow", folder)
    (folder / "mlflow_run").write_text("of another server")
    with pytest.raises(GlocalError, match=r"MLflow failed \(.*\): set MLFLOW_TRACKING_URI"):
        make_logger("mlflow", folder).log_metrics({"loss": 1.0}, 1)
    logger.log_metrics({"loss": 1.0}, 1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "unknown://somewhere")
    with pytest.raises(GlocalError, match=r"MLflow failed \(.*\): set MLFLOW_TRACKING_URI"):
        make_logger("mlflow", tmp_path / "other")


def test_mlflow_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(GlocalError, match="pip install mlflow-skinny"):
        make_logger("mlflow", tmp_path)


PRETRAIN = """
import sys
from glocal import devices, engine
from glocal.cli import main
engine.CHECKPOINT_SECONDS = -1.0
sys.argv = ["glocal", "pretrain", *sys.argv[1:]]
main()
"""


def test_a_killed_pretraining_ends_with_the_weights_it_would_have_had(store: Store, tmp_path: Path) -> None:
    words = ["device=cpu", "max_iterations=60", "network.widths=[4,8,8]", "log=[]", "blocks=1", "precision=float32"]
    words += ["hidden=16", "outputs=8", "volumes=2", "local_batch=3"]
    killed, second = tmp_path / "killed", tmp_path / "killed" / "stage-2-local"
    command = [sys.executable, "-c", PRETRAIN, str(store.path), str(killed), "--method", "gcl", *words]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    began = time.monotonic()
    while training_state(second).get("step", 0) < 5:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() - began < 200
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 5 <= training_state(second)["step"] < 60
    assert not (killed / "model.safetensors").exists()

    whole = pretrain_with(store.path, tmp_path / "whole", "gcl", words)
    assert same(load_file(whole), load_file(pretrain_with(store.path, killed, "gcl", words)))
    for part in ("stage-1-global", "stage-2-local"):
        assert same(tensors(whole.parent / part), tensors(killed / part))
        logs = [(folder / part / "metrics.jsonl").read_text(encoding="utf-8") for folder in (whole.parent, killed)]
        assert logs[0] == logs[1]
    assert manifest_of(killed)["kind"] == "pretrain"


class TwoWeights(nn.Module):
    """Loss 3 a + 4 b: gradients (3, 4) in every step."""

    steady = {"b": 0.2}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

    def forward(self, step: int) -> dict[str, Tensor]:
        return {"loss": 3 * self.a.weight.sum() + 4 * self.b.weight.sum()}


def moved(tmp_path: Path, **settings: Any) -> list[float]:
    """By how much SGD moved the two weights in the first step, momentum being 0 yet."""
    learner = TwoWeights()
    before = [learner.a.weight.item(), learner.b.weight.item()]
    train(learner, options(optimizer="sgd", weight_decay=0, max_iterations=1, **settings), tmp_path, "test")
    return [was - now.weight.item() for was, now in zip(before, (learner.a, learner.b), strict=True)]


def test_steady_modules_know_no_warm_up(tmp_path: Path) -> None:
    assert moved(tmp_path, learning_rate=0.1, warmup_iterations=10) == pytest.approx([0.03, 0.8], rel=1e-4)


def test_gradients_are_clipped_by_their_common_norm(tmp_path: Path) -> None:
    clipped = moved(tmp_path, learning_rate=0.1, warmup_iterations=0, gradient_clip=1.0)
    assert clipped == pytest.approx([0.06, 0.16], rel=1e-4)


def test_lars_moves_a_matrix_by_its_own_size(tmp_path: Path) -> None:
    """You et al. 2017: the step is rate x 0.001 x |w| / |g| x g, whatever the size of the gradient."""
    learner = TwoWeights()
    before = [learner.a.weight.item(), learner.b.weight.item()]
    settings = {"learning_rate": 0.1, "warmup_iterations": 0, "weight_decay": 0, "max_iterations": 1}
    train(learner, options(optimizer="lars", **settings), tmp_path, "test")
    for was, now, rate in zip(before, (learner.a, learner.b), (0.1, 0.2), strict=True):
        assert was - now.weight.item() == pytest.approx(rate * 0.001 * abs(was), rel=1e-2)
