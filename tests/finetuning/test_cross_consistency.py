from pathlib import Path
from typing import Any

import pytest
import torch
from strategy_checks import SPLIT, SemiSupervisedChecks
from torch import Tensor

from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.files import read_json
from glocal.finetuning.cps import cross_pseudo_supervision
from glocal.finetuning.finetune import finetune
from glocal.finetuning.losses import segmentation_loss
from glocal.finetuning.registry import finetuning_options
from glocal.model import load_network
from glocal.pretraining.pretrain import pretrain

BASE: dict[str, Any] = {"strategy": "cross-consistency"}
LOCAL: dict[str, Any] = {"method": "gcl", "volumes": 2, "hidden": 16, "outputs": 8, "local_batch": 3, "blocks": 1}


@pytest.mark.parametrize("options", [{}])
class TestCrossConsistency(SemiSupervisedChecks):
    strategy = "cross-consistency"

    def test_the_loss_is_the_paper_s(self, settings: dict[str, Any], store: Store, tmp_path: Path) -> None:
        """CE(p1, m) + CE(p2, m) + CE(p1, y2) + CE(p2, y1), all with the same weight from the beginning."""
        learner: Any = self.make({**settings, "loss": "ce"}, store, tmp_path)
        both = learner.both_batches(0)
        first, second = (logits.double().log_softmax(1) for logits in learner.network.each(both.images))

        def ce(log_p: Tensor, labels: Tensor) -> Tensor:
            return -log_p.gather(1, labels[:, None]).mean()

        y1, y2 = first[4:].argmax(1), second[4:].argmax(1)
        supervised = ce(first[:4], both.labels) + ce(second[:4], both.labels)
        expected = supervised + ce(first[4:], y2) + ce(second[4:], y1)
        losses = learner(0)
        assert float(losses["loss"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        expected.backward()
        gradients = [p.grad.clone() for p in learner.parameters()]
        learner.zero_grad()
        losses["loss"].backward()
        for mine, theirs in zip(learner.parameters(), gradients, strict=True):
            torch.testing.assert_close(mine.grad, theirs, rtol=1e-3, atol=1e-6)

    def test_labelled_and_unlabelled_slices_pass_the_encoder_once(
        self, settings: dict[str, Any], store: Store, tmp_path: Path
    ) -> None:
        learner: Any = self.make(settings, store, tmp_path)
        passes: list[int] = []
        learner.network.encoder.register_forward_hook(lambda module, inputs, _: passes.append(len(inputs[0])))
        learner(0)
        assert passes == [8]

    def test_the_threshold_reaches_the_loss(self, settings: dict[str, Any], store: Store, tmp_path: Path) -> None:
        learner: Any = self.make({**settings, "threshold": 0.6}, store, tmp_path)
        unlabelled = [logits[4:] for logits in learner.network.each(learner.both_batches(0).images)]
        expected = float(cross_pseudo_supervision(unlabelled, 0.6).detach())
        assert float(learner(0)["consistency"].detach()) == pytest.approx(expected, rel=1e-5)
        assert expected < 0.9 * float(cross_pseudo_supervision(unlabelled).detach())

    def test_the_weight_rises_if_asked(self, settings: dict[str, Any], store: Store, tmp_path: Path) -> None:
        assert self.make({**settings, "max_iterations": 100}, store, tmp_path).consistency_weight(0) == 1
        learner = self.make({**settings, "max_iterations": 100, "ramp_up": 0.5, "weight": 2.0}, store, tmp_path)
        weights = [learner.consistency_weight(step) for step in (0, 25, 50, 99)]
        assert weights == pytest.approx([2 * 6.737947e-3, 2 * 0.2865048, 2, 2], rel=1e-6)


@pytest.mark.parametrize(
    ("asked", "lost"),
    [({}, False), ({"decoders": ["nearest", "bilinear"]}, False), ({"decoders": ["transposed", "transposed"]}, True)],
)
def test_a_pre_trained_decoder_is_taken_over_and_the_report_says_what_was_not(
    asked: dict[str, Any], lost: bool, store: Store, cheap: dict[str, Any], tmp_path: Path
) -> None:
    before = tmp_path / "before"
    pretrain(store, before, {**cheap, **LOCAL, "max_iterations": 2}, split=SPLIT)
    small = {key: value for key, value in cheap.items() if key != "network"} | {"labels": 1, "max_iterations": 1}
    batches = {"batch": 2, "unlabelled_batch": 2}
    file = finetune(store, tmp_path / "after", {**small, **batches, **BASE, **asked}, before, split=SPLIT)
    report = read_json(tmp_path / "after" / "transfer.json")
    assert any(name.startswith("decoder.0.join.") for name in report["transferred"])
    assert any(name.startswith("decoder.0.up.") for name in report["unused"]) == lost
    assert any(name.startswith("decoder.0.up.") for name in report["fresh"]) == lost
    assert any(name.startswith("others.0.decoder.0.") for name in report["fresh"])
    network: Any = load_network(file)[0]
    assert len(network.branches) == 2


def test_one_decoder_may_predict(store: Store, cheap: dict[str, Any], tmp_path: Path) -> None:
    settings = {**cheap, **BASE, "labels": 1, "max_iterations": 1, "batch": 2, "unlabelled_batch": 2}
    network: Any = load_network(finetune(store, tmp_path, {**settings, "predict": "transposed"}, split=SPLIT))[0]
    x = store.volume("case5")
    with torch.no_grad():
        assert torch.equal(network(x), network.each(x)[1])
        assert isinstance(network.branches[1][0][0].up, torch.nn.ConvTranspose2d)


def test_what_cannot_be_is_refused_before_anything_runs() -> None:
    with pytest.raises(GlocalError, match=r"uctransnet cannot have decoders .*: choose one of unet, pcl-unet"):
        finetuning_options({**BASE, "network": {"name": "uctransnet"}})
    with pytest.raises(GlocalError, match="predict=nearest is none of the decoders"):
        finetuning_options({**BASE, "predict": "nearest"})
    with pytest.raises(GlocalError, match=r"decoders=\['?bilinear'?\] does not fit: it must be a list of 2 or more"):
        finetuning_options({**BASE, "decoders": ["bilinear"]})


def test_a_pre_trained_network_that_cannot_is_refused(store: Store, cheap: dict[str, Any], tmp_path: Path) -> None:
    network = {"name": "nnunet-plain", "widths": [4, 6, 8]}
    settings = {**cheap, "network": network, "method": "pcl", "max_iterations": 1, "batch": 4, "outputs": 8}
    pretrain(store, tmp_path / "before", settings, split=SPLIT)
    small = {key: value for key, value in cheap.items() if key != "network"}
    with pytest.raises(GlocalError, match="nnunet-plain cannot have decoders"):
        finetune(store, tmp_path / "after", {**small, **BASE, "labels": 1}, tmp_path / "before", split=SPLIT)


def test_the_paper_s_preset_sets_what_it_states_below_what_is_given() -> None:
    options: Any = finetuning_options({**BASE, "preset": "paper", "learning_rate": 1e-4})
    assert (options.optimizer, options.learning_rate, options.schedule) == ("adam", 1e-4, "constant")
    assert (options.loss, options.weight_decay, options.warmup_iterations) == ("ce", 0, 0)
    assert finetuning_options(BASE).loss == "dice+ce"
    assert finetuning_options(options.model_dump(mode="json")) == options.model_copy(update={"preset": "adopted"})


def test_cross_entropy_alone_is_a_loss_too() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5, generator=rng), torch.randint(3, (2, 4, 5), generator=rng)
    weight = torch.rand(2, 4, 5, generator=rng)
    terms = -logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0]
    loss = segmentation_loss("ce")
    assert float(loss(logits, labels)) == pytest.approx(float(terms.mean()), rel=1e-5)
    expected = float((terms * weight).sum() / weight.sum())
    assert float(loss(logits, labels, weight)) == pytest.approx(expected, rel=1e-5)
