"""The probe tells learnt features from random ones, by other subjects alone, and touches nothing it may not."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glocal.data.preprocess import preprocess
from glocal.data.store import Store
from glocal.networks.registry import build, network_options
from glocal.pretraining import probe as module
from glocal.pretraining.pretrain import pretrain
from glocal.pretraining.probe import (
    BROKEN,
    FEW,
    _error_of_others,
    nearest,
    predicted,
    probe,
    sample_of,
    slice_features,
)

SEEN, HELD_OUT = ("case0", "case1", "case2"), ("case3", "case4")  # and case5 is for testing
SUBJECT = torch.arange(8).repeat_interleave(torch.tensor([5, 6, 7, 8, 5, 6, 9, 4]))
POSITION = torch.cat([(torch.arange(n) + 0.5) / n for n in SUBJECT.bincount()]).double()


def networks(widths: tuple[int, ...] = (4, 8)) -> dict[str, Any]:
    options = network_options({"name": "unet", "widths": list(widths)})
    made = {}
    for seed, name in enumerate(("pretrained", "random")):
        torch.manual_seed(seed)
        made[name] = build(options, 1, 3)
    return made


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "probe.json").read_text())
    return content


def test_positions_are_read_from_features_that_have_them() -> None:
    hidden = torch.stack([POSITION, 1 - POSITION**2], dim=1) @ noise(2, 90) + 1e-3 * noise(len(POSITION), 90, seed=1)
    fitted = SUBJECT < 6
    told = predicted(hidden[fitted], POSITION[fitted], SUBJECT[fitted], hidden[~fitted])
    assert (told - POSITION[~fitted]).abs().mean() < 0.01
    nothing = noise(len(POSITION), 90, seed=2)  # more features than slices, and no position in them
    told = predicted(nothing[fitted], POSITION[fitted], SUBJECT[fitted], nothing[~fitted])
    assert (told - POSITION[~fitted]).abs().mean() < 0.32  # guessing: 0.25; without a ridge far more


@pytest.mark.parametrize("channels", [7, 90])
def test_the_error_of_others_is_that_of_leaving_each_subject_out(channels: int) -> None:
    x = noise(len(POSITION), channels)
    x = x - x.mean(0)
    target = POSITION - POSITION.mean()
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    for ridge in (0.5, 20.0):
        off = []
        for number in range(8):
            rows = number == SUBJECT
            others, mean, level = x[~rows], x[~rows].mean(0), target[~rows].mean()
            gram = (others - mean).T @ (others - mean) + ridge * torch.eye(channels)
            weights = torch.linalg.solve(gram, (others - mean).T @ (target[~rows] - level))
            off += (target[rows] - level - (x[rows] - mean) @ weights).abs().tolist()
        assert _error_of_others(u, s**2 / (s**2 + ridge), target, SUBJECT) == pytest.approx(np.mean(off), rel=1e-9)


def test_features_that_are_all_equal_give_the_mean_position() -> None:
    for flat in (torch.zeros(len(SUBJECT), 4).double(), torch.full((len(SUBJECT), 4), 3.3).double()):
        told = predicted(flat, POSITION, SUBJECT, flat[:3])
        assert told.tolist() == pytest.approx([float(POSITION.mean())] * 3)
        assert nearest(flat, SUBJECT).shape == SUBJECT.shape


def test_a_channel_that_was_silent_tells_nothing_when_it_speaks() -> None:
    x, subject = noise(300, 60), torch.arange(300) % 10  # so many that rounding leaves no weight at 0
    position, fitted = noise(300, seed=1).sigmoid(), subject < 7
    expected = predicted(x[fitted], position[fitted], subject[fitted], x[~fitted])
    x = torch.cat([x, (~fitted).double()[:, None] * torch.linspace(0, 1, 20).double()], 1)
    told = predicted(x[fitted], position[fitted], subject[fitted], x[~fitted])
    torch.testing.assert_close(told, expected)


def test_neighbours_are_the_most_similar_slices_of_other_folds() -> None:
    x, fold = noise(len(SUBJECT), 5) + 3, SUBJECT % 3
    centred = (x - x.mean(0)).tolist()
    for row, found in enumerate(nearest(x, fold).tolist()):
        similarity = {
            other: np.dot(centred[row], centred[other]) / np.linalg.norm(centred[row]) / np.linalg.norm(centred[other])
            for other in range(len(x))
            if fold[other] != fold[row]
        }
        assert found == max(similarity, key=lambda other: similarity[other])


def test_subjects_are_parted_into_folds_unless_enough_were_held_out(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = sample_of(store, SEEN, HELD_OUT, 0)
    assert set(few.fold.tolist()) == {0, 1, 2}  # a subject each
    assert len({*zip(few.fold.tolist(), few.subject.tolist(), strict=True)}) == 3
    assert {store.volumes[k].case for k in store.volume_of[few.index]} == set(SEEN)
    assert few.position[:5].tolist() == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    monkeypatch.setattr(module, "HELD_OUT", 2)
    enough = sample_of(store, SEEN, HELD_OUT, 0)
    assert {store.volumes[k].case for k in store.volume_of[enough.index[enough.fold == 0]]} == set(HELD_OUT)
    assert {store.volumes[k].case for k in store.volume_of[enough.index[enough.fold == -1]]} == set(SEEN)


def test_of_very_many_slices_some_are_taken(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 9)
    some, other = (sample_of(store, SEEN, (), seed).index.tolist() for seed in (0, 1))
    assert len(some) == len(set(some)) == 9
    assert some == sorted(some) == sample_of(store, SEEN, (), 0).index.tolist() != other


@pytest.mark.parametrize("enough", [2, 5])
def test_no_label_and_no_test_image_is_looked_at(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enough: int
) -> None:
    seen: set[str] = set()
    images = Store.images

    def watched(self: Store, indices: Tensor) -> Tensor:
        seen.update(self.volumes[k].case for k in self.volume_of[indices])
        return images(self, indices)

    monkeypatch.setattr(Store, "images", watched)
    monkeypatch.setattr(Store, "labels_of", lambda *_: pytest.fail("labels were read"))
    monkeypatch.setattr(module, "HELD_OUT", enough)
    probe(networks(), store, SEEN, HELD_OUT, 0, tmp_path)
    assert seen == {*SEEN, *(HELD_OUT if enough == 2 else ())}
    found = written(tmp_path)
    assert found["held_out"] == (enough == 2)
    assert (found["subjects"], found["slices"]) == ((2, 13) if enough == 2 else (3, 18))


def test_features_are_those_of_the_frozen_encoder(store: Store) -> None:
    network, index = networks()["pretrained"], torch.arange(11)
    with torch.no_grad():
        for _ in range(3):
            network.encode(store.images(index))  # running statistics of some training
    before = deepcopy(network.state_dict())
    together = slice_features(network, store, index)
    alone = slice_features(network, store, index[4:5])
    assert torch.allclose(together[4], alone[0], rtol=1e-4, atol=1e-6)  # statistics of no batch
    with torch.no_grad():
        wanted = network.eval().encode(store.images(index))[-1].mean((2, 3))
    assert torch.allclose(together, wanted.double(), rtol=1e-4, atol=1e-5)
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())


def test_equal_networks_gain_nothing_and_the_picture_shows_other_subjects(store: Store, tmp_path: Path) -> None:
    network = networks()["random"]
    probe({"pretrained": network, "random": network}, store, SEEN, (), 0, tmp_path)
    found = written(tmp_path)
    assert found["gain"] == {"off": {"mean": 0, "error": 0}, "neighbour_off": {"mean": 0, "error": 0}}
    assert found["pretrained"] == found["random"]
    assert found["guess"]["r2"] == pytest.approx(0, abs=0.05)
    assert 0.2 < found["guess"]["off"] < 0.3
    with np.load(tmp_path / "probe.npz") as file:
        assert file["images"].shape == (3, 5, 32, 32)
        assert file["positions"][0].tolist() == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=0.1)
        assert (file["images"][1] == file["images"][2]).all()
        assert not (file["images"][0] == file["images"][1]).all((1, 2)).any()
        assert file["images"].std((2, 3)).min() > 10


def test_volumes_of_one_slice_and_too_few_subjects_are_said(
    tmp_path: Path, write_dataset: Any, preprocessing: Any, store: Store
) -> None:
    raw = write_dataset(tmp_path / "raw", {"odd1": 1, "odd2": 2, "odd3": 3, "odd7": 7}, [])
    odd = preprocess(raw, tmp_path / "store", preprocessing, workers=1)
    probe(networks(), odd, ("odd1", "odd2", "odd3", "odd7"), (), 0, tmp_path)
    assert (written(tmp_path)["single"], written(tmp_path)["slices"]) == (1, 12)
    probe(networks(), odd, ("odd1", "odd2", "odd3"), (), 0, tmp_path)
    assert written(tmp_path) == {"single": 1, "note": FEW}
    broken = networks()
    torch.nn.init.constant_(next(broken["pretrained"].encoder.parameters()), float("nan"))
    probe(broken, store, SEEN, (), 0, tmp_path)
    assert written(tmp_path) == {"single": 0, "note": BROKEN}


def test_a_run_that_was_killed_before_its_probe_makes_it_and_finishes(
    store: Store, cheap: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**cheap, "method": "pcl", "max_iterations": 1, "batch": 4, "outputs": 4}
    pretrain(store, tmp_path, settings)
    whole = {name: (tmp_path / name).read_bytes() for name in ("probe.json", "probe.npz", "model.safetensors")}
    for name in ("probe.json", "manifest.json"):
        (tmp_path / name).unlink()
    pretrain(store, tmp_path, settings)
    assert whole == {name: (tmp_path / name).read_bytes() for name in whole}
    assert (tmp_path / "manifest.json").exists()


def test_random_weights_are_those_that_the_run_began_with(
    store: Store, cheap: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a learning rate of almost nothing only the running statistics move."""
    met: list[Any] = []
    monkeypatch.setattr("glocal.pretraining.pretrain.probe", lambda networks, *rest: met.append(networks))
    settings = {**cheap, "method": "pcl", "max_iterations": 1, "batch": 4, "outputs": 4, "learning_rate": 1e-12}
    pretrain(store, tmp_path, settings)
    (pair,) = met
    begun, ended = (pair[name].encoder.state_dict() for name in ("random", "pretrained"))
    for name, value in begun.items():
        if "running" not in name and "tracked" not in name:
            assert torch.allclose(value, ended[name], atol=1e-6), name
    assert any(not value.equal(ended[name]) for name, value in begun.items() if "running" in name)
