"""Several processes train as one; what every method must do is in `pretraining/method_checks.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glocal import distributed
from glocal.data.store import Store
from glocal.distributed import _BatchNorm, all_sum, share, whole, with_whole_statistics
from glocal.errors import GlocalError
from glocal.experiments.steps import pretrain_with
from glocal.runs import manifest_of
from pair import assert_same_training, train_in_double


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend to be process `rank` of `size`."""

    def be(rank: int, size: int) -> None:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: size)

    return be


@pytest.mark.parametrize("batch", [3, 4, 7, 30])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_distributed_shares_cover_the_batch_in_order(process: Any, batch: int, size: int) -> None:
    rows, lengths = [], []
    for rank in range(size):
        process(rank, size)
        own = list(range(batch))[share(batch)]
        rows += own
        lengths.append(len(own))
    assert rows == list(range(batch))
    assert max(lengths) - min(lengths) <= 1


def test_distributed_more_processes_than_slices_are_refused(process: Any) -> None:
    process(0, 3)
    with pytest.raises(GlocalError, match="3 processes cannot share a step of 2 slices: start fewer"):
        share(2)


def test_alone_everything_is_what_it_was() -> None:
    x, norm = torch.rand(6, 3), torch.nn.BatchNorm1d(3)
    assert whole(x, 3) is x
    assert all_sum(x) is x
    assert type(with_whole_statistics(norm, torch.device("cpu"))) is torch.nn.BatchNorm1d
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


def test_on_gpus_batch_norm_is_torch_s_own(process: Any) -> None:
    process(0, 2)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4, eps=1e-3, momentum=0.01))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    converted = with_whole_statistics(network, torch.device("cuda"))
    assert isinstance(converted[1], torch.nn.SyncBatchNorm)
    assert (converted[1].eps, converted[1].momentum) == (1e-3, 0.01)
    assert all(value.equal(before[name]) for name, value in converted.state_dict().items())


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 6, 5)])
@pytest.mark.parametrize("momentum", [0.01, None])
def test_the_batch_norm_is_torch_s(shape: tuple[int, ...], momentum: float | None) -> None:
    torch.manual_seed(0)
    kind = torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d
    theirs, ours = (kind(4, eps=1e-3, momentum=momentum).double() for _ in range(2))
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    ours.__class__ = _BatchNorm
    for _ in range(3):
        a = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        b = a.detach().clone().requires_grad_()
        for norm, x in ((theirs, a), (ours, b)):
            norm(x).sin().sum().backward()
        assert a.grad is not None
        torch.testing.assert_close(b.grad, a.grad)
    for (name, one), other in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(other, one, msg=name)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.eval()(a), theirs.eval()(a))


@pytest.mark.parametrize("loss", ["dice", "dice+ce"])
@pytest.mark.parametrize("batch", [4, 5])
def test_distributed_finetuning_is_the_same(
    store: Store, cheap: dict[str, Any], pair: Any, tmp_path: Path, loss: str, batch: int
) -> None:
    settings = {**cheap, "batch": batch, "loss": loss, "optimizer": "sgd", "max_iterations": 5, "learning_rate": 0.1}
    job = {"kind": "strategy", "name": "supervised", "number": 0, "store": str(store.path), "settings": settings}
    train_in_double(**job, folder=str(tmp_path / "one"))
    pair.do({**job, "folder": str(tmp_path / "two")})
    assert_same_training(tmp_path / "one", tmp_path / "two")


COMMANDS = """
import json, sys
from glocal.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""


def test_distributed_torchrun_trains_one_run(store: Store, tmp_path: Path) -> None:
    """Both stages, from the command line: one run folder, said once, the weights of a single process.

    One start for all, which takes long: the second pre-training is done already, the second fine-tuning is only
    measured, and the third pre-training is refused.
    """
    words = ["device=cpu", "max_iterations=4", "network.widths=[4,8,8]", "log=[]", "blocks=1", "precision=float32"]
    words += ["hidden=16", "outputs=8", "volumes=2", "local_batch=3", "optimizer=sgd"]
    pretrain = ["pretrain", str(store.path), str(tmp_path / "two"), "--method", "gcl", *words]
    finetune = ["finetune", str(store.path), str(tmp_path / "fine"), "--from", str(tmp_path / "two"), "--labels", "2"]
    finetune += ["device=cpu", "max_iterations=2", "batch=4", "log=[]", "precision=float32"]
    measure = [[*finetune, f"protocol.evaluate={subjects}"] for subjects in ("development", "test")]
    program = tmp_path / "commands.py"
    program.write_text(COMMANDS, encoding="utf-8")
    commands = json.dumps([pretrain, pretrain, *measure, [*pretrain, "seed=7"]])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(program), commands], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1  # torchrun's own
    assert "was begun with seed=0, now it is 7" in done.stderr
    assert "Connection" not in done.stderr  # nobody waits for one who has refused
    assert done.stdout.count("Weights:") == 2
    measured = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("Measured on")]
    assert measured == ["development", "development", "test"]  # the last command says both
    one = load_file(pretrain_with(store.path, tmp_path / "one", "gcl", words))
    two = load_file(tmp_path / "two" / "model.safetensors")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    lines = (tmp_path / "two" / "stage-2-local" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 4]
    assert manifest_of(tmp_path / "two")["kind"] == "pretrain"
    assert manifest_of(tmp_path / "fine")["evaluated"] == {"development": ["case4"], "test": ["case5"]}
