"""What every pre-training method must do: its test inherits these checks and says with which options."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glocal.data.sampling import Pool
from glocal.data.split import Split
from glocal.data.store import Store
from glocal.devices import fabric_for
from glocal.engine import TrainingOptions, iterate, set_up
from glocal.model import read_header
from glocal.networks.registry import build
from glocal.pretraining.base import Stage
from glocal.pretraining.pretrain import pretrain
from glocal.pretraining.registry import method_named, pretraining_options
from pair import assert_same_training, train_in_double

ALL = ("case0", "case1", "case2", "case3")
ODD = ("odd1", "odd2", "odd3", "odd7")


class Trainer:
    """The engine's iterations of a stage, as many at a time as a test wants."""

    def __init__(self, stage: Stage) -> None:
        settings = {"schedule": "constant", "warmup_iterations": 0, "optimizer": "adam", "learning_rate": 0.01}
        self.options = TrainingOptions.model_validate({**settings, "weight_decay": 0.1})
        self.fabric = fabric_for(torch.device("cpu"), "float32")
        self.module, self.optimizer = set_up(self.fabric, stage, self.options)

    def __call__(self, first: int, last: int) -> None:
        for step in range(first, last):
            iterate(self.fabric, self.module, self.optimizer, self.options, step)


class MethodChecks:
    """Inherit, set `method`, and parametrise the class with `options`: settings for networks of three levels."""

    method: str

    @pytest.fixture
    def settings(self, cheap: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        return {**cheap, "method": self.method, "max_iterations": 2, **options}

    def stages(self, settings: dict[str, Any], store: Store, cases: tuple[str, ...] = ALL) -> list[Stage]:
        options: Any = pretraining_options(settings)
        stages = []
        for _, make in method_named(self.method).stages(options):
            torch.manual_seed(options.seed)
            stages.append(make(build(options.network, 1, 3), Pool(store, cases), options).train())
        return stages

    def test_it_learns_one_batch(self, settings: dict[str, Any], store: Store) -> None:
        for stage in self.stages(settings, store):
            optimizer = torch.optim.Adam([p for p in stage.parameters() if p.requires_grad], lr=0.01)
            losses = []
            for _ in range(40):
                loss = stage.losses(0)["loss"]
                losses.append(float(loss.detach()))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            floor = self.lowest(stage)
            first, last = (sum(part) / len(part) - floor for part in (losses[:2], losses[-2:]))
            assert last < 0.7 * first, f"{type(stage).__name__}: {first} -> {last} above {floor}"

    def lowest(self, stage: Stage) -> float:
        """What the loss cannot fall below."""
        return 0.0

    def test_exactly_the_trained_parts_change(self, settings: dict[str, Any], store: Store) -> None:
        for stage in self.stages(settings, store):
            before = {name: value.clone() for name, value in stage.network.state_dict().items()}
            optimizer = torch.optim.SGD([p for p in stage.parameters() if p.requires_grad], lr=0.1)
            for step in range(2):
                stage.losses(step)["loss"].backward()
                optimizer.step()
            changed = {name for name, value in stage.network.state_dict().items() if not value.equal(before[name])}
            may_change = {name for name in before if name.startswith(tuple(f"{part}." for part in stage.trained))}
            must_change = {name for name in may_change if before[name].ndim == 4 or "running" in name}
            assert must_change
            assert must_change <= changed <= may_change | self.also_changing(stage)

    def also_changing(self, stage: Stage) -> set[str]:
        """Names in the network's state that move although their part is not trained."""
        return set()

    def test_the_gradient_reaches_all_trained_weights(self, settings: dict[str, Any], store: Store) -> None:
        for stage in self.stages(settings, store):
            stage.losses(0)["loss"].backward()
            for name, parameter in stage.named_parameters():
                assert (parameter.grad is None) != parameter.requires_grad, name
                if parameter.grad is not None and parameter.ndim > 1:  # a bias before batch norm has none
                    assert parameter.grad.abs().max() > 0, name

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_it_stays_finite_at_a_low_temperature(self, settings: dict[str, Any], store: Store, precision: str) -> None:
        for stage in self.stages({**settings, "temperature": 0.01}, store):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                loss = stage.losses(0)["loss"]
            loss.backward()
            assert loss.isfinite()
            assert all(p.grad.isfinite().all() for p in stage.parameters() if p.grad is not None)

    def test_distributed_it_learns_the_same(
        self, settings: dict[str, Any], store: Store, pair: Any, tmp_path: Path
    ) -> None:
        """Two processes with half the batch each: the loss, the gradients and the weights of one with all of it."""
        momentum = {"optimizer": "sgd", "weight_decay": 0.0, "warmup_iterations": 0, "learning_rate": 0.1}
        for number in range(len(self.stages(settings, store))):
            job: dict[str, Any] = {"kind": "method", "name": self.method, "number": number, "store": str(store.path)}
            job["settings"] = {**settings, **momentum, "max_iterations": 5}
            one, two = (tmp_path / f"{number}-{name}" for name in ("one", "two"))
            train_in_double(**job, folder=str(one))
            pair.do({**job, "folder": str(two)})
            assert_same_training(one, two)

    def test_few_and_odd_volumes_are_learnt_from(self, settings: dict[str, Any], store: Store, odd: Store) -> None:
        for data, cases in ((store, ("case2",)), (odd, ("odd7",)), (odd, ODD), (odd, ("odd2", "odd3"))):
            for stage in self.stages(settings, data, cases):
                loss = stage.losses(0)["loss"]
                loss.backward()
                assert 0 < loss < torch.inf, cases
                assert any(p.grad is not None and p.grad.abs().max() > 0 for p in stage.network.parameters()), cases

    def test_the_file_holds_what_was_trained_and_depends_on_the_seed_alone(
        self, settings: dict[str, Any], store: Store, tmp_path: Path
    ) -> None:
        split = Split(0, ALL, ("case4",), ("case5",))
        files = [pretrain(store, tmp_path / name, settings, split=split) for name in ("first", "second")]
        weights = load_file(files[0])
        stages = self.stages(settings, store)
        trained = tuple(f"{part}." for stage in stages for part in stage.trained)
        network = stages[0].network.state_dict()
        assert weights.keys() == {name for name in network if name.startswith(trained)}
        assert all(value.equal(load_file(files[1])[name]) for name, value in weights.items())
        assert (read_header(files[0]).kind, read_header(files[0]).provenance["subjects"]) == ("pretrained", list(ALL))
        other = load_file(pretrain(store, tmp_path / "other", {**settings, "seed": 4}, split=split))
        assert not any(value.equal(weights[name]) for name, value in other.items() if value.ndim == 4)

        # What a stage leaves alone it has from the stage before it.
        saved = [load_file(path) for path in sorted((tmp_path / "first").glob("stage-*/model.safetensors"))]
        assert len(saved) == len(stages)
        for before, after, stage in zip(saved, saved[1:], stages[1:], strict=False):
            kept = {n for n in before if not n.startswith(tuple(f"{part}." for part in stage.trained))}
            assert kept or "encoder" in stage.trained  # a later stage may train again what is there
            for name in kept - self.also_changing(stage):
                assert before[name].equal(after[name]), name
