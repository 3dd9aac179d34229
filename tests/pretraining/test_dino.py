import math
from pathlib import Path
from typing import Any

import pytest
import torch
from method_checks import ALL, MethodChecks, Trainer
from torch import Tensor, nn

from glocal.data.sampling import Pool
from glocal.data.split import Split
from glocal.data.store import Store
from glocal.networks.registry import build
from glocal.pretraining.base import COLLAPSED, Stage
from glocal.pretraining.dino import SAME, Encoder, Head
from glocal.pretraining.pretrain import pretrain
from glocal.pretraining.registry import pretraining_options
from glocal.runs import manifest_of

SMALL = {"hidden": 32, "bottleneck": 8, "outputs": 24, "batch": 8}
OPTIONS = {
    "two views, frozen at first": {"frozen": 1, "teacher_warmup": 0},
    "local views": {"frozen": 0, "local_views": 2, "batch": 2, "momentum": 0.9},
    "batch norm": {"frozen": 2, "head_norm": True},
    "no centring": {"centring": 1.0, "teacher_warmup": 4},
}


@pytest.mark.parametrize("options", [{**SMALL, **options} for options in OPTIONS.values()], ids=OPTIONS.keys())
class TestDINO(MethodChecks):
    method = "dino"

    def lowest(self, stage: Stage) -> float:
        """Cross-entropy cannot fall below the entropy of the targets."""
        return stage.losses(0)["entropy"].item()

    def test_it_learns_one_batch(self, settings: dict[str, Any], store: Store) -> None:
        """Once the centre has settled: while it moves from 0, so do the targets."""
        (stage,) = self.stages(settings, store)
        for _ in range(60):
            stage.losses(0)
        self.stages = lambda *_: [stage]
        super().test_it_learns_one_batch(settings, store)

    def test_the_loss_is_the_paper_s(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages({**settings, "max_iterations": 6}, store)
        o, student, teacher = stage.options, list[Tensor](), list[Tensor]()
        stage.head.register_forward_hook(lambda *call: student.append(unit(call[2])))
        stage.teacher[1].register_forward_hook(lambda *call: teacher.append(unit(call[2])))
        optimizer = torch.optim.SGD([p for p in stage.parameters() if p.requires_grad], lr=0.1)
        centre = [0.0] * 24
        for step in range(6):
            loss = stage.losses(step)["loss"]
            views = (student[-1] @ unit(stage.last.weight).T).view(-1, o.batch, 24).tolist()
            said = (teacher[-1] @ unit(stage.teacher[2].weight).T).view(2, o.batch, 24).tolist()
            warm = min(1, step / o.teacher_warmup) if o.teacher_warmup else 1
            tau = 0.04 + warm * 0.03
            terms = []
            for target in range(2):
                for view in range(len(views)):
                    if view != target:
                        for slice in range(o.batch):
                            p = softmax([(s - c) / tau for s, c in zip(said[target][slice], centre, strict=True)])
                            q = softmax([s / 0.1 for s in views[view][slice]])
                            terms.append(-sum(a * math.log(b) for a, b in zip(p, q, strict=True)))
            assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)
            assert len(terms) == 2 * (len(views) - 1) * o.batch
            rows = said[0] + said[1]
            means = [sum(row[k] for row in rows) / len(rows) for k in range(24)]
            centre = [o.centring * c + (1 - o.centring) * m for c, m in zip(centre, means, strict=True)]
            assert stage.centre.tolist() == pytest.approx(centre, abs=1e-5)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(views) == 2 + o.local_views
        assert any(abs(c) > 0.01 for c in centre) == (o.centring < 1)


def unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x.detach().double(), dim=-1)


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def stage_of(
    store: Store, cheap: dict[str, Any], cases: tuple[str, ...] = ALL, weights: int = 0, **options: Any
) -> Stage:
    settings: Any = pretraining_options({**cheap, **SMALL, "method": "dino", "max_iterations": 10, **options})
    torch.manual_seed(weights)
    return Encoder(build(settings.network, 1, 3), Pool(store, cases), settings).train()


def test_the_teacher_follows_at_the_beginning_of_a_step(store: Store, cheap: dict[str, Any]) -> None:
    stage = stage_of(store, cheap, momentum=0.6, frozen=0)
    trainer, (network, head, last) = Trainer(stage), stage.teacher
    pairs = [(network.encoder[0][0].conv, stage.network.encoder[0][0].conv), (head[1], stage.head[1])]
    for step in range(4):
        before = [mine.weight.clone() for mine, _ in [*pairs, (last, stage.last)]]
        students = [theirs.weight.detach().clone() for _, theirs in [*pairs, (last, stage.last)]]
        trainer(step, step + 1)
        momentum = 1 - 0.4 * (math.cos(math.pi * (step - 1) / 10) + 1) / 2 if step else 1.0
        for (mine, theirs), was, student in zip([*pairs, (last, stage.last)], before, students, strict=True):
            torch.testing.assert_close(mine.weight, momentum * was + (1 - momentum) * student)
            assert mine.weight.grad is None
            assert not theirs.weight.allclose(student)


@pytest.mark.parametrize("frozen", [0, 2])
def test_the_last_layer_is_frozen_at_first(store: Store, cheap: dict[str, Any], frozen: int) -> None:
    stage = stage_of(store, cheap, frozen=frozen, momentum=0.0)
    used = [stage.last.weight.detach().clone()]
    stage.network.encoder.register_forward_hook(lambda *_: used.append(stage.last.weight.detach().clone()))
    stage.teacher[0].encoder.register_forward_hook(lambda *_: used.append(stage.teacher[2].weight.clone()))
    Trainer(stage)(0, 5)
    for weight in used[1 : 3 + 2 * frozen]:  # student and teacher, up to the step that no trained step came before
        assert weight.equal(used[0])
    assert not used[3 + 2 * frozen].allclose(used[0])


def test_a_run_that_was_stopped_continues_exactly(store: Store, cheap: dict[str, Any]) -> None:
    for cut in (1, 3):
        options = {"frozen": 2, "local_views": 1, "momentum": 0.5}
        whole, first = (stage_of(store, cheap, **options) for _ in range(2))
        second = stage_of(store, cheap, weights=1, **options)  # it must not matter what it began with
        trainers = [Trainer(stage) for stage in (whole, first, second)]
        trainers[0](0, 5)
        trainers[1](0, cut)
        second.load_state_dict(first.state_dict())
        trainers[2].optimizer.load_state_dict(trainers[1].optimizer.state_dict())
        trainers[2](cut, 5)
        assert all(value.equal(second.state_dict()[name]) for name, value in whole.state_dict().items())


def test_the_teacher_s_temperature_rises(store: Store, cheap: dict[str, Any]) -> None:
    stage = stage_of(store, cheap, teacher_warmup=6)
    values = [stage._teacher_temperature(step) for step in range(9)]
    assert values == pytest.approx([0.04, 0.045, 0.05, 0.055, 0.06, 0.065, 0.07, 0.07, 0.07])
    sharp = stage_of(store, cheap, teacher_warmup=6, teacher_temperature_start=0.001).losses(0)["entropy"]
    flat = stage_of(store, cheap, teacher_warmup=0, teacher_temperature=100.0).losses(0)["entropy"]
    assert sharp < 0.5 * math.log(24)
    assert flat.item() == pytest.approx(math.log(24), rel=1e-3)


def test_the_centre_takes_what_all_slices_have_in_common(store: Store, cheap: dict[str, Any]) -> None:
    stage = stage_of(store, cheap, centring=0.0)
    alone = stage.losses(0)["entropy"]  # the centre is still 0
    assert not stage.centre.equal(torch.zeros(24))
    assert stage.losses(0)["entropy"] > alone  # random weights say nearly the same of every slice
    assert stage.centre.requires_grad is False


def test_the_length_of_the_last_layer_does_not_matter(store: Store, cheap: dict[str, Any]) -> None:
    stage, scaled = (stage_of(store, cheap, frozen=0, momentum=1.0) for _ in range(2))
    with torch.no_grad():
        scaled.last.weight.mul_(torch.linspace(0.1, 9, 24)[:, None])
        scaled.teacher[2].weight.mul_(3)
    torch.testing.assert_close(scaled.losses(0)["loss"], stage.losses(0)["loss"])


def test_local_views_are_small_and_the_student_s_alone(store: Store, cheap: dict[str, Any]) -> None:
    stage, student, teacher = stage_of(store, cheap, local_views=3), list[Any](), list[Any]()
    stage.network.encoder.register_forward_hook(lambda _, inputs, __: student.append(inputs[0]))
    stage.teacher[0].encoder.register_forward_hook(lambda _, inputs, __: teacher.append(inputs[0]))
    stage.losses(0)
    assert [x.shape for x in student] == [(16, 1, 32, 32), (24, 1, 12, 12)]
    assert len(teacher) == 1
    assert teacher[0].equal(student[0])
    assert not student[1][:8].allclose(student[1][8:16])


@pytest.mark.parametrize("norm", [False, True])
def test_the_head_is_the_paper_s(norm: bool) -> None:
    head = Head(5, 7, 3, norm)
    layers = [layer for layer in head if not isinstance(layer, nn.Identity | nn.Flatten | nn.BatchNorm1d)]
    assert [type(layer) for layer in layers] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert [layer.weight.shape for layer in layers[::2]] == [(7, 5), (7, 7), (3, 7)]
    assert [isinstance(head[place], nn.BatchNorm1d) for place in (2, 5)] == [norm, norm]
    assert head(torch.rand(4, 5, 1, 1)).shape == (4, 3)
    for layer in [layer for layer in Head(60, 60, 60, norm) if isinstance(layer, nn.Linear)]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not layer.bias.any()


def test_it_computes_in_full_precision_where_it_matters(store: Store, cheap: dict[str, Any]) -> None:
    exact = stage_of(store, cheap).losses(0)["loss"]
    stage = stage_of(store, cheap)
    with torch.autocast("cpu", torch.bfloat16):
        loss = stage.losses(0)["loss"]
    assert loss.dtype == stage.centre.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.1)


def warnings_of(store: Store, folder: Path, cheap: dict[str, Any], **options: Any) -> list[str]:
    settings = {**cheap, **SMALL, "method": "dino", "max_iterations": 4, "frozen": 3, **options}
    pretrain(store, folder, settings, split=Split(0, ALL, (), ()))
    warnings: list[str] = manifest_of(folder)["warnings"]
    return warnings


def test_options_that_make_no_sense_are_named(store: Store, tmp_path: Path, cheap: dict[str, Any]) -> None:
    assert warnings_of(store, tmp_path / "none", cheap) == []
    (frozen,) = warnings_of(store, tmp_path / "frozen", cheap, frozen=4)
    assert "frozen=4" in frozen
    for number, hot in enumerate(({"teacher_temperature": 0.1}, {"teacher_temperature_start": 0.2})):
        (flat,) = warnings_of(store, tmp_path / str(number), cheap, **hot)
        assert "not sharper than the student" in flat


def test_collapse_is_said(store: Store, cheap: dict[str, Any]) -> None:
    stage = stage_of(store, cheap, frozen=0)
    stage.losses(0)
    assert stage.warning() is None
    with torch.no_grad():
        stage.head[-1].weight.zero_()
        stage.head[-1].bias.fill_(1.0)
    stage.losses(0)
    assert stage.warning() == COLLAPSED


def test_one_answer_for_all_is_said_at_the_end(store: Store, cheap: dict[str, Any]) -> None:
    stage = stage_of(store, cheap, frozen=0, momentum=1.0)
    with torch.no_grad():
        last = stage.teacher[2]
        last.weight.copy_(last.weight[:1].expand(24, -1))  # the student's embeddings have not collapsed
    for step, said in ((8, None), (9, SAME)):
        stage.losses(step)
        assert stage.warning() == said


def test_the_preset_of_the_paper() -> None:
    adopted, paper = (pretraining_options({"method": "dino", "preset": name}) for name in ("adopted", "paper"))
    promised = {"batch", "learning_rate", "warmup_iterations", "frozen", "outputs", "local_views", "augmentation"}
    assert {name for name, value in adopted if value != getattr(paper, name)} == promised | {"preset"}
    assert paper.learning_rate == 5e-4 * paper.batch / 256
    assert paper.augmentation.spatial.crop == (0.63, 1.0)
    assert paper.augmentation.intensity == adopted.augmentation.intensity
