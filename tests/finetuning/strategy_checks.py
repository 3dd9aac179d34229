"""What every fine-tuning strategy must do: its test inherits these checks and says with which options."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glocal import engine
from glocal.data.sampling import Pool, Slices
from glocal.data.split import Split
from glocal.data.store import Store
from glocal.engine import train
from glocal.finetuning.base import Strategy
from glocal.finetuning.finetune import finetune
from glocal.finetuning.registry import finetuning_options, strategy_named
from glocal.model import load_network
from glocal.networks.registry import build
from pair import assert_same_training, train_in_double

LABELLED, UNLABELLED = ("case1",), ("case0", "case2", "case3")
SPLIT = Split(0, ("case0", "case1", "case2", "case3"), ("case4",), ("case5",))


class Sealed(Pool):
    """Slices whose labels must not be read."""

    def labels(self, slices: Slices) -> Tensor:
        raise AssertionError("The labels of unlabelled slices were read.")


class StrategyChecks:
    """Inherit, set `strategy`, and parametrise the class with `options`: settings for networks of three levels."""

    strategy: str
    steps = 4  # of a training that is stopped or shared

    @pytest.fixture
    def settings(self, cheap: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        small = {"labels": 1, "batch": 4, "max_iterations": self.steps, "learning_rate": 0.01}
        kind = strategy_named(self.strategy).options
        if "unlabelled_batch" in kind.model_fields:
            small["unlabelled_batch"] = 4
        return {**cheap, **small, "strategy": self.strategy, **options}

    def make(
        self, settings: dict[str, Any], store: Store, folder: Path, unlabelled: tuple[str, ...] = UNLABELLED
    ) -> Strategy:
        options, entry = finetuning_options(settings), strategy_named(self.strategy)

        def begin(k: int) -> Any:
            torch.manual_seed(options.seed + k)
            return build(entry.network(options, options.network), 1, 3)

        learner = entry.make(begin, Pool(store, LABELLED), Sealed(store, unlabelled), options, folder)
        learner.train()
        return learner

    def test_it_learns_the_labelled_slices(self, settings: dict[str, Any], store: Store, tmp_path: Path) -> None:
        steps = 60
        learner = self.make({**settings, "batch": 12, "max_iterations": steps, "augmentation": "none"}, store, tmp_path)
        options = finetuning_options({**settings, "optimizer": "adam", "learning_rate": 0.02})
        optimizer = engine._optimizer(learner, options)
        for group in optimizer.param_groups:
            group["lr"] = group["steady"] or options.learning_rate
        for step in range(steps):
            learner(step)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        images, truth = store.volume("case1"), store.labels_of(store.first[1] + torch.arange(6))
        with torch.no_grad():  # in training mode: the running statistics of batch norm need hundreds of steps
            mask = learner.predictor.train()(images).argmax(1)
        dice = [2 * ((mask == k) & (truth == k)).sum() / ((mask == k).sum() + (truth == k).sum()) for k in (1, 2)]
        assert min(dice) > self.enough, dice

    enough = 0.85

    @pytest.mark.parametrize("mixed", [False, True])  # autocast must not keep weights of a pass without gradient
    def test_the_gradient_reaches_all_trained_weights(
        self, settings: dict[str, Any], store: Store, tmp_path: Path, mixed: bool
    ) -> None:
        learner = self.make(settings, store, tmp_path)
        reached = {name: 0.0 for name, p in learner.named_parameters() if p.requires_grad and p.ndim > 1}
        for step in range(self.steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = learner(step)["loss"]
            loss.backward()
            for name, parameter in learner.named_parameters():
                assert parameter.requires_grad or parameter.grad is None, name
                if name in reached and parameter.grad is not None:
                    reached[name] += float(parameter.grad.abs().max())
        assert all(reached.values()), [name for name, value in reached.items() if not value]
        assert {f"network.{name}" for name, _ in learner.network.named_parameters()} <= {
            name for name, p in learner.named_parameters() if p.requires_grad
        }

    def test_it_stays_finite_in_bfloat16(self, settings: dict[str, Any], store: Store, tmp_path: Path) -> None:
        learner = self.make(settings, store, tmp_path)
        for step in range(self.steps):
            with torch.autocast("cpu", torch.bfloat16):
                losses = learner(step)
            losses["loss"].backward()
            assert all(value.isfinite() and value.ndim == 0 for value in losses.values())
            assert all(p.grad.isfinite().all() for p in learner.parameters() if p.grad is not None)

    def test_a_step_depends_on_seed_and_step_alone(
        self, settings: dict[str, Any], store: Store, tmp_path: Path
    ) -> None:
        def losses(seed: int) -> list[float]:
            values = []
            for step in range(self.steps):
                learner = self.make({**settings, "seed": seed}, store, tmp_path / str(len(list(tmp_path.iterdir()))))
                torch.manual_seed(step)  # as the engine does
                values.append(float(learner(step)["loss"].detach()))
            return values

        first = losses(3)
        assert first == losses(3)
        assert not set(first) & set(losses(4))

    def test_stopped_it_ends_as_if_it_had_not_been(
        self, settings: dict[str, Any], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine, "CHECKPOINT_SECONDS", -1.0)
        options = finetuning_options(settings)
        train(self.make(settings, store, tmp_path / "whole"), options, tmp_path / "whole", "test")
        for stop in range(1, self.steps):
            stopped = self.make(settings, store, tmp_path / "stopped")
            real = stopped.losses

            def losses(step: int, real: Any = real, stop: int = stop) -> dict[str, Tensor]:
                if step == stop:
                    raise KeyboardInterrupt
                return dict(real(step))

            monkeypatch.setattr(stopped, "losses", losses)
            with pytest.raises(KeyboardInterrupt):
                train(stopped, options, tmp_path / "stopped", "test")
        train(self.make(settings, store, tmp_path / "stopped"), options, tmp_path / "stopped", "test")
        whole, continued = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "stopped"))
        assert whole.keys() == continued.keys()
        assert all(value.equal(continued[name]) for name, value in whole.items())

    def test_distributed_it_learns_the_same(
        self, settings: dict[str, Any], store: Store, pair: Any, tmp_path: Path
    ) -> None:
        """Two processes with half the batch each: the loss, the gradients and the weights of one with all of it."""
        momentum = {"optimizer": "sgd", "weight_decay": 0.0, "warmup_iterations": 0, "learning_rate": 0.1}
        job: dict[str, Any] = {"kind": "strategy", "name": self.strategy, "number": 0, "store": str(store.path)}
        job["settings"] = {**settings, **momentum, "max_iterations": max(5, self.steps)}
        one, two = tmp_path / "one", tmp_path / "two"
        train_in_double(**job, folder=str(one))
        pair.do({**job, "folder": str(two)})
        assert_same_training(one, two)

    @pytest.mark.parametrize("before", [False, True], ids=["random", "pre-trained"])
    def test_a_run_leaves_a_model_that_predicts(
        self, settings: dict[str, Any], store: Store, pretrained: Path, tmp_path: Path, before: bool
    ) -> None:
        asked = {key: value for key, value in settings.items() if not (before and key == "network")}
        model = finetune(store, tmp_path, {**asked, "validation": 1}, pretrained if before else None, split=SPLIT)
        network, header = load_network(model)
        assert network(store.volume("case5")).shape == (6, 3, 32, 32)
        assert header.provenance["finetuning"]["strategy"] == self.strategy
        assert (tmp_path / "best.safetensors").exists()
        assert (tmp_path / "evaluation-test.csv").exists()


class SemiSupervisedChecks(StrategyChecks):
    """As well, for strategies that learn from unlabelled slices."""

    def test_unlabelled_slices_are_learnt_from(self, settings: dict[str, Any], store: Store, tmp_path: Path) -> None:
        gradients = []
        for number, weight in enumerate((1.0, 1.0, 0.0)):
            learner = self.make({**settings, "ramp_up": 0.0, "weight": weight}, store, tmp_path / str(number))
            for step in range(self.steps):
                torch.manual_seed(step)
                learner(step)["loss"].backward()
            gradients.append(torch.cat([p.grad.flatten() for p in learner.network.parameters() if p.grad is not None]))
        assert gradients[0].equal(gradients[1])
        assert not gradients[0].equal(
            gradients[2]
        )  # the same slices, which batch norm has seen, too: only the loss differs
