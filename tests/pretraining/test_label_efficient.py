"""Labels in a pre-training: only those of the draw, and its weights only for that draw."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from method_checks import ALL, MethodChecks
from safetensors.torch import load_file
from torch import Tensor, nn

from glocal.data.sampling import Pool, Slices
from glocal.data.split import ProtocolOptions, Split
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.files import read_json
from glocal.finetuning.finetune import finetune
from glocal.model import read_header
from glocal.networks.registry import build
from glocal.pretraining import label_efficient
from glocal.pretraining.base import LabelOptions, Stage
from glocal.pretraining.label_efficient import Pixels, blocks_of, pixel_loss
from glocal.pretraining.pretrain import pretrain
from glocal.pretraining.registry import METHODS, method_named, pretraining_options
from glocal.randomness import generator
from glocal.views.view import draw_view

WIDTHS = {"batch": 8, "outputs": 8, "local_batch": 3, "hidden": 12}
LABELLED = ("case0", "case1", "case2")
OPTIONS: dict[str, dict[str, Any]] = {
    "stride": {},
    "block": {"pixels": "block", "block": 12},
    "moved": {"stride": 3, "local_augmentation": {"spatial": {"rotation": 30, "flip": [0.5, 0.5]}}},
}


@pytest.mark.parametrize("options", [{**WIDTHS, **options} for options in OPTIONS.values()], ids=OPTIONS.keys())
class TestLabelEfficient(MethodChecks):
    method = "label-efficient"

    def stages(self, settings: dict[str, Any], store: Store, cases: tuple[str, ...] = ALL) -> list[Stage]:
        options: Any = pretraining_options(settings)
        pool, labelled = Pool(store, cases), Pool(store, [case for case in cases if case in LABELLED])
        stages = []
        for _, make in method_named(self.method).stages(options):
            torch.manual_seed(options.seed)
            stages.append(make(build(options.network, 1, 3), pool, options, labelled).train())
        return stages

    def lowest(self, stage: Stage) -> float:
        """k equal positives and nothing else in the denominator give ln k."""
        if not isinstance(stage, Pixels):
            return 0.0
        parts = list(expected_parts(stage, 0))
        floors = []
        for labels in parts:
            counts = [sum(other == label for other in labels) - 1 for label in labels if label]
            floors += [sum(map(math.log, counts)) / len(counts)] if counts else []
        return sum(floors) / len(floors)

    def test_few_and_odd_volumes_are_learnt_from(self, settings: dict[str, Any], store: Store, odd: Store) -> None:
        """Nothing of `odd` is labelled, so that here a single volume must do."""
        for cases in (("case2",), ("case0", "case3")):
            for stage in self.stages(settings, store, cases):
                loss = stage.losses(0)["loss"]
                loss.backward()
                assert 0 < loss < torch.inf, cases
                assert any(p.grad is not None and p.grad.abs().max() > 0 for p in stage.network.parameters()), cases

    def test_the_loss_is_the_paper_s(self, settings: dict[str, Any], store: Store) -> None:
        _, stage = self.stages(settings, store)
        seen: list[Tensor] = []
        stage.head.register_forward_hook(lambda *call: seen.append(call[2]))
        loss = stage.losses(1)["loss"]
        o = stage.options
        maps = seen[0].detach().double()
        side = -(-32 // o.stride) if o.pixels == "stride" else 32
        assert maps.shape == (6, 8, side, side)
        parts = list(expected_parts(stage, 1))
        vectors = list(cut(o, maps.movedim(1, -1)))
        means = [slowly(vector.flatten(0, 2), labels, 0.1) for vector, labels in zip(vectors, parts, strict=True)]
        assert len(means) == (9 if o.pixels == "block" else 1)
        kept = [mean for mean in means if mean is not None]
        assert float(loss.detach()) == pytest.approx(sum(map(float, kept)) / len(kept), rel=1e-4)


def cut(o: Any, grids: Tensor) -> list[Tensor]:
    """Pieces of `(6, H, W, ...)` that are contrasted, by hand."""
    if o.pixels == "stride":
        return [grids]
    edges = [(0, 12), (12, 24), (24, 32)]
    return [grids[:, top:bottom, left:right] for top, bottom in edges for left, right in edges]


def expected_parts(stage: Stage, step: int) -> list[list[int]]:
    """The labels of the pixels of each piece."""
    o = stage.options
    slices = stage.labelled.uniform(o.local_batch, generator(o.seed, step, "slices"))
    labels = stage.labelled.labels(slices)
    views = []
    for role in range(2):
        draw = draw_view(o.local_augmentation, 3, (32, 32), generator(o.seed, step, "view", role))
        views.append(draw.labels(labels))
    grid = torch.cat(views)
    if o.pixels == "stride":
        grid = grid[:, :: o.stride, :: o.stride]
    return [part.flatten().tolist() for part in cut(o, grid)]


def slowly(vectors: Tensor, labels: list[int], temperature: float) -> Tensor | None:
    """The loss of Hu et al. anchor by anchor: pixels of structures against all pixels but themselves."""
    unit = nn.functional.normalize(vectors, dim=1)
    terms = []
    for i, label in enumerate(labels):
        if label == 0:
            continue
        scores = (unit @ unit[i] / temperature).exp()
        others = [j for j in range(len(labels)) if j != i]
        mine = [j for j in others if labels[j] == label]
        if mine:
            terms.append(-(scores[mine] / scores[others].sum()).log().mean())
    return torch.stack(terms).mean() if terms else None


def points(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = generator(seed, "points")
    vectors = torch.randn(count, 5, generator=rng, dtype=torch.float64)
    return vectors.requires_grad_(), torch.randint(0, 3, (count,), generator=rng)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.7])
def test_value_and_gradient_are_those_of_a_loop(temperature: float) -> None:
    vectors, labels = points(40)
    loss, expected = pixel_loss(vectors, labels, temperature), slowly(vectors, labels.tolist(), temperature)
    assert expected is not None
    torch.testing.assert_close(loss, expected)
    (ours,), (theirs,) = (torch.autograd.grad(value, vectors) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_pixels_in_another_order_and_structures_by_other_names_are_the_same() -> None:
    vectors, labels = points(40)
    order = torch.randperm(40, generator=generator(1))
    loss = pixel_loss(vectors, labels, 0.1)
    torch.testing.assert_close(pixel_loss(vectors[order], labels[order], 0.1), loss)
    torch.testing.assert_close(pixel_loss(vectors, torch.tensor([0, 7, 3])[labels], 0.1), loss)
    assert not torch.isclose(pixel_loss(vectors, torch.tensor([1, 0, 2])[labels], 0.1), loss)


def test_background_repels_but_is_no_anchor() -> None:
    vectors, labels = points(30)
    assert pixel_loss(vectors, labels, 0.1) > pixel_loss(vectors[labels > 0], labels[labels > 0], 0.1)
    # Which pixels of the background are alike does not matter.
    (gradient,) = torch.autograd.grad(pixel_loss(vectors, labels, 0.1), vectors)
    assert gradient[labels == 0].abs().min(1).values.max() > 0
    single = torch.zeros(30, dtype=torch.long)
    single[4] = 1
    assert pixel_loss(vectors, single, 0.1) == 0  # an anchor that nothing attracts
    assert pixel_loss(vectors, 0 * single, 0.1) == 0


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_it_stays_finite(precision: torch.dtype) -> None:
    vectors, labels = points(30)
    low = vectors.detach().to(precision).requires_grad_()
    loss = pixel_loss(low, labels, 0.01)
    loss.backward()
    assert loss.isfinite()
    assert low.grad is not None
    assert low.grad.isfinite().all()
    torch.testing.assert_close(loss.double(), pixel_loss(low.detach().double(), labels, 0.01), rtol=1e-4, atol=1e-4)


def test_blocks_cover_every_pixel_once() -> None:
    maps, labels = torch.arange(2 * 3 * 7 * 5).view(2, 3, 7, 5), torch.arange(2 * 7 * 5).view(2, 7, 5)
    found = list(blocks_of(maps, labels, 3))
    assert [tuple(part.shape[2:]) for part, _ in found] == [(3, 3), (3, 2), (3, 3), (3, 2), (1, 3), (1, 2)]
    assert sorted(torch.cat([part.flatten() for part, _ in found]).tolist()) == list(range(210))
    assert sorted(torch.cat([label.flatten() for _, label in found]).tolist()) == list(range(70))
    for part, label in found:
        assert part.shape[2:] == label.shape[1:]
        assert (part[:, 0].flatten() % 35).equal(label.flatten() % 35)


def run(store: Store, folder: Path, cheap: dict[str, Any], protocol: Any = None, **over: Any) -> Path:
    """Pre-train for an iteration on the labels of two volumes."""
    words = {k: over.pop(k) for k in ("split",) if k in over}
    settings = {**cheap, **WIDTHS, "method": "label-efficient", "max_iterations": 1, **over}
    pretrain(store, folder, settings, protocol, **words)
    return folder


SHORT = {"max_iterations": 1, "batch": 2}


def test_a_slice_without_structures_teaches_nothing(
    store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = pretraining_options({**cheap, **WIDTHS, "method": "label-efficient"})
    labelled = Pool(store, LABELLED)
    stage = Pixels(build(options.network, 1, 3), labelled, options, labelled)
    monkeypatch.setattr(labelled, "labels", lambda slices: torch.zeros(len(slices), 32, 32, dtype=torch.long))
    loss = stage.losses(0)["loss"]
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in stage.parameters() if p.requires_grad)


def test_only_the_labels_of_the_draw_are_read(
    store: Store, cheap: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[int] = set()
    labels = Pool.labels

    def watched(pool: Pool, slices: Slices) -> Tensor:
        read.update(slices.volume.tolist())
        return labels(pool, slices)

    monkeypatch.setattr(Pool, "labels", watched)
    for method in sorted(set(METHODS) & {"pcl", "simclr", "rotation"}):
        settings = {**cheap, "method": method, "batch": 4, "max_iterations": 3}
        pretrain(store, tmp_path / method, settings)
    assert not read
    run(store, tmp_path / "run", cheap, max_iterations=20)
    train = read_json(tmp_path / "run" / "split.json")["draw"]["train"]
    assert len(train) == 2
    assert read == {store.index_of(case) for case in train}
    for model in ("model.safetensors", "stage-1-encoder/model.safetensors", "stage-2-pixels/model.safetensors"):
        assert read_header(tmp_path / "run" / model).provenance["labelled"] == train
    assert "labelled" not in read_header(tmp_path / "rotation" / "model.safetensors").provenance
    assert "draw" not in read_json(tmp_path / "rotation" / "split.json")


@pytest.mark.parametrize(
    "labels",
    [{"labels": 2}, {"labels": 1, "draw": 1}, {"labels": "all", "validation": 1}, {"labels": ["case2", "case0"]}],
)
def test_the_draw_is_that_of_fine_tuning_and_its_weights_serve_it(
    labels: dict[str, Any], store: Store, cheap: dict[str, Any], tmp_path: Path
) -> None:
    before = run(store, tmp_path / "pre", cheap, **labels)
    finetune(store, tmp_path / "fine", {**cheap, **SHORT, **labels}, before)
    ours, theirs = (read_json(tmp_path / name / "split.json")["draw"] for name in ("pre", "fine"))
    assert ours == theirs
    provenance = read_header(tmp_path / "fine" / "model.safetensors").provenance
    assert provenance["labelled"] == provenance["pretraining"]["labelled"] == ours["train"]


def test_other_labels_are_refused(store: Store, cheap: dict[str, Any], tmp_path: Path) -> None:
    before = run(store, tmp_path / "pre", cheap, labels=2)
    train = read_json(before / "split.json")["draw"]["train"]
    (other,) = set(LABELLED) - set(train)
    stage = before / "stage-1-encoder"  # a stage of a method that uses labels, too
    for source in (before, before / "model.safetensors", stage):
        for labels in ({"labels": 1}, {"labels": "all"}, {"labels": [train[0], other]}, {"labels": [other]}):
            with pytest.raises(GlocalError, match=r"was pre-trained with the labels of case\d, case\d of Tiny, but"):
                finetune(store, tmp_path / "fine", {**cheap, **SHORT, **labels}, source)
    assert not (tmp_path / "fine").exists()
    # The same volumes however they were named.
    assert finetune(store, tmp_path / "fine", {**cheap, **SHORT, "labels": train[::-1]}, before).exists()


def test_labels_of_closed_subjects_are_refused(store: Store, cheap: dict[str, Any], tmp_path: Path) -> None:
    for case in ("case4", "case5"):
        for transductive in (False, True):
            with pytest.raises(GlocalError, match=f"{case} belongs to a test or development subject"):
                run(store, tmp_path / "pre", cheap, ProtocolOptions(transductive=transductive), labels=[case])
    with pytest.raises(GlocalError, match="only 3 may be trained on"):
        run(store, tmp_path / "pre", cheap, labels=4)
    with pytest.raises(GlocalError, match=r"labels=\[2, 3\] does not fit"):
        run(store, tmp_path / "pre", cheap, labels=[2, 3])
    with pytest.raises(GlocalError, match="case3 is not a labelled case"):
        run(store, tmp_path / "pre", cheap, labels=["case3"])
    # However a split is written by hand, and however open the protocol: a test subject's labels are not for training.
    split = Split(0, ("case0", "case1"), (), ("case1",))
    with pytest.raises(GlocalError, match="case1 would be tested on but would be pre-trained on with labels"):
        run(store, tmp_path / "pre", cheap, ProtocolOptions(transductive=True), labels="all", split=split)
    assert not (tmp_path / "pre").exists()


def test_the_budget_may_count_subjects_as_in_fine_tuning(
    write_dataset: Any, preprocessing: Any, cheap: dict[str, Any], tmp_path: Path
) -> None:
    from glocal.data.preprocess import preprocess

    raw = write_dataset(tmp_path / "raw", {"a1": 5, "a2": 5, "b1": 5, "b2": 5}, ["a1", "a2", "b1", "b2"])
    (raw / "subjects.tsv").write_text("case\tsubject\na1\ta\na2\ta\nb1\tb\nb2\tb\n", encoding="utf-8")
    store = preprocess(raw, tmp_path / "store", preprocessing, workers=1)
    protocol = ProtocolOptions(budget="subjects")
    before = run(store, tmp_path / "pre", cheap, protocol, labels=1)
    train = read_json(before / "split.json")["draw"]["train"]
    assert sorted(train) in (["a1", "a2"], ["b1", "b2"])
    assert finetune(store, tmp_path / "fine", {**cheap, **SHORT, "labels": 1}, before, protocol).exists()
    with pytest.raises(GlocalError, match="was pre-trained with the labels of"):
        finetune(store, tmp_path / "other", {**cheap, **SHORT, "labels": 1}, before)
    with pytest.raises(GlocalError, match="begun with budget=subjects, now it is volumes"):
        run(store, before, cheap, labels=1)


def test_stage_one_is_simclr_with_its_own_temperature(store: Store, cheap: dict[str, Any]) -> None:
    options: Any = pretraining_options({**cheap, **WIDTHS, "method": "label-efficient"})
    pool, labelled = Pool(store, ALL), Pool(store, LABELLED[:1])
    stages = [make(build(options.network, 1, 3), pool, options, labelled) for _, make in label_efficient._stages(0)]
    assert (stages[0].pool, stages[0].options.temperature, stages[0].options.batch) == (pool, 0.5, 8)
    assert (stages[1].labelled, stages[1].options.temperature) == (labelled, 0.1)
    assert stages[0].trained == ("encoder",)
    assert stages[1].trained == ("encoder", "decoder.0", "decoder.1")


def test_stage_two_begins_with_the_encoder_of_stage_one(store: Store, cheap: dict[str, Any], tmp_path: Path) -> None:
    run(store, tmp_path, cheap, learning_rate=1e-30, weight_decay=0)  # which changes nothing
    first, second = (load_file(tmp_path / f"stage-{name}" / "model.safetensors") for name in ("1-encoder", "2-pixels"))
    assert first
    assert {name.partition(".")[0] for name in second} == {"encoder", "decoder"}
    assert read_json(tmp_path / "stage-2-pixels" / "transfer.json")["transferred"] == sorted(first)
    assert all(second[name].equal(value) for name, value in first.items() if name.endswith("weight"))


def test_methods_that_use_labels_say_so() -> None:
    assert {name for name, method in METHODS.items() if method.uses_labels} == {
        name for name, method in METHODS.items() if issubclass(method.options, LabelOptions)
    }
