import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from method_checks import ALL, MethodChecks
from safetensors.torch import load_file
from torch import Tensor, nn

from glocal.contrast.pairs import on_lattice
from glocal.data.sampling import Slices
from glocal.data.split import Split
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.pretraining import pcl
from glocal.pretraining.base import COLLAPSED, Stage
from glocal.pretraining.pcl import borderline
from glocal.pretraining.pretrain import pretrain
from glocal.runs import manifest_of

WIDTHS = {"hidden": 32, "outputs": 16, "batch": 16}
OPTIONS = {
    "position, pooled": {},
    "position, flat": {"head": "flat", "position": "centre", "threshold": 0.06},
    "partition, pooled": {"labels": "partition"},
    "partition, flat": {"labels": "partition", "head": "flat", "scale": "none"},
}


@pytest.mark.parametrize("options", [{**WIDTHS, **options} for options in OPTIONS.values()], ids=OPTIONS.keys())
class TestPCL(MethodChecks):
    method = "pcl"

    def lowest(self, stage: Stage) -> float:
        """Positives stand in the denominator too: k equal ones and nothing else give ln k."""
        positive = attracting(stage.options, stage.pool.epoch(stage.options.batch, stage.options.seed, 0))
        scale = stage.options.temperature / 0.07 if stage.options.scale == "supcon" else 1.0
        return float(positive.sum(1).log().mean()) * scale

    def test_the_loss_is_the_paper_s(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages(settings, store)
        seen: list[Tensor] = []
        stage.head.register_forward_hook(lambda *call: seen.append(call[2]))
        loss = stage.losses(2)["loss"]
        slices = stage.pool.epoch(16, settings["seed"], 2)
        assert len(set(slices.index.tolist())) == len(slices) == 16
        for key, other in (
            ("labels", "partition"),
            ("labels", "position"),
            ("position", "pcl"),
            ("position", "centre"),
        ):
            if getattr(stage.options, key) != other and (key, stage.options.labels) != ("position", "partition"):
                changed = SimpleNamespace(**{**dict(stage.options), key: other})
                assert not attracting(changed, slices).equal(attracting(stage.options, slices)), (key, other)
        unit = nn.functional.normalize(seen[0].detach().double(), dim=1)
        similarity, positive = unit @ unit.T / 0.1, attracting(stage.options, slices)
        terms = []
        for i in range(32):
            others = [k for k in range(32) if k != i]
            denominator = similarity[i, others].exp().sum()
            mine = [j for j in others if positive[i, j]]
            terms.append(-sum((similarity[i, j].exp() / denominator).log() for j in mine) / len(mine))
        scale = 0.1 / 0.07 if settings.get("scale", "supcon") == "supcon" else 1.0
        torch.testing.assert_close(loss.double(), scale * sum(terms) / 32, rtol=1e-5, atol=1e-5)


def attracting(o: Any, slices: Slices) -> Tensor:
    """Who attracts whom among the two views of the slices, pair by pair, from Zeng et al. and their code."""
    n = len(slices)
    number, count = slices.number.tolist() * 2, slices.count.tolist() * 2

    def same(i: int, j: int) -> bool:
        if o.labels == "partition":
            first, second = (min(number[k] // max(1, int(count[k] / 4 + 0.5)), 3) for k in (i, j))
            return first == second
        offset = 1.0 if o.position == "pcl" else 0.5
        first, second = ((number[k] + offset) / count[k] for k in (i, j))
        return i % n == j % n or abs(first - second) < o.threshold

    return torch.tensor([[i != j and same(i, j) for j in range(2 * n)] for i in range(2 * n)])


def run(store: Store, folder: Path, cheap: dict[str, Any], cases: tuple[str, ...] = ALL, **options: Any) -> list[str]:
    """Pre-train for one iteration; the warnings."""
    settings = {**cheap, **WIDTHS, "method": "pcl", "max_iterations": 1, **options}
    pretrain(store, folder, settings, split=Split(0, cases, (), ()))
    warnings: list[str] = manifest_of(folder)["warnings"]
    return warnings


def test_a_threshold_that_hangs_on_rounding_is_named(store: Store, tmp_path: Path, cheap: dict[str, Any]) -> None:
    assert run(store, tmp_path / "off", cheap) == []
    (warning,) = run(store, tmp_path / "on", cheap, threshold=0.2)  # volumes of five slices
    assert "threshold=0.2" in warning
    assert "5 slices" in warning
    assert run(store, tmp_path / "partition", cheap, threshold=0.2, labels="partition") == []


@pytest.mark.parametrize(
    ("threshold", "counts", "better"),
    [(0.1, [10], ("0.09", "0.11")), (0.1, [10, 100], ("0.0897", "0.1097")), (0.95, [20, 1000], ("0.8547", "0.9997"))],
)
def test_what_is_recommended_hangs_on_no_rounding(threshold: float, counts: list[int], better: tuple[str, str]) -> None:
    numbers = torch.tensor(counts)
    pool: Any = SimpleNamespace(store=SimpleNamespace(count_of=numbers), slices=torch.arange(len(counts)))
    assert str(borderline(threshold, pool)).endswith(f"; take {better[0]} or {better[1]}.")
    assert not any(on_lattice(float(t), numbers).any() for t in better)


class Constant(nn.Module):
    """A head that has collapsed: one vector for every image."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.vector.expand(len(x), -1)


def test_collapse_is_said_and_kept(
    store: Store, tmp_path: Path, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pcl, "PooledHead", Constant)
    assert run(store, tmp_path / "run", cheap) == [COLLAPSED]
    assert run(store, tmp_path / "both", cheap, threshold=0.2) == [COLLAPSED]


def test_volumes_of_one_slice_have_no_positions(odd: Store, tmp_path: Path, cheap: dict[str, Any]) -> None:
    with pytest.raises(GlocalError, match=r"every volume here is a single slice.*gcl"):
        run(odd, tmp_path / "run", cheap, ("odd1",))
    assert not (tmp_path / "run").exists()


def test_a_network_is_compiled_where_that_is_asked_for(
    store: Store, cheap: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *_, **__: made.append(self))
    settings = {**cheap, **WIDTHS, "method": "pcl", "max_iterations": 1}
    for number, choice in enumerate((False, True)):
        pretrain(store, tmp_path / str(number), {**settings, "compile": choice})
        assert bool(made) == choice


def test_a_compiled_network_learns_the_same(store: Store, cheap: dict[str, Any], tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    settings = {**cheap, **WIDTHS, "method": "pcl", "max_iterations": 3, "optimizer": "sgd"}
    plain, compiled = (
        load_file(pretrain(store, tmp_path / str(choice), {**settings, "compile": choice})) for choice in (False, True)
    )
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)
