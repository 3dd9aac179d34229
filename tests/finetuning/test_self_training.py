import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from strategy_checks import LABELLED, SPLIT, UNLABELLED, SemiSupervisedChecks
from torch import Tensor

from glocal.data.image import read_image, read_labels
from glocal.data.plan import PreprocessOptions
from glocal.data.preprocess import preprocess
from glocal.data.store import Store
from glocal.ensemble import Ensemble
from glocal.errors import GlocalError
from glocal.experiments import estimate
from glocal.experiments.report import report
from glocal.files import read_json, write_json
from glocal.finetuning.finetune import finetune
from glocal.finetuning.pseudo_labels import IGNORED, least_kept
from glocal.finetuning.registry import finetuning_options
from glocal.finetuning.self_training import begins_of
from glocal.inference import folded, slice_probabilities
from glocal.views.moves import moves
from glocal.views.spatial import SpatialOptions
from glocal.views.view import ViewOptions


@pytest.mark.parametrize(
    "options",
    [
        {"rounds": 2},
        {"rounds": 1, "retrain": "beginning", "confidence": 0.5, "class_balanced": 0.3, "ramp_up": 0.5},
    ],
    ids=["reached", "beginning"],
)
class TestSelfTraining(SemiSupervisedChecks):
    strategy = "self-training"
    steps = 5  # two on labels alone, and three in one or two rounds

    def test_it_learns_the_labelled_slices(self, settings: dict[str, Any], store: Store, tmp_path: Path) -> None:
        """With a small weight: as few steps leave running statistics, and with them pseudo-labels, of no use."""
        little = {"weight": 0.1, "first": 0.2}
        super().test_it_learns_the_labelled_slices({**settings, **little}, store, tmp_path)

    def test_a_step_depends_on_seed_and_step_alone(
        self, settings: dict[str, Any], store: Store, tmp_path: Path
    ) -> None:
        """And on the pseudo-labels of its round, so that steps are made in order."""

        def losses(seed: int, folder: str) -> list[float]:
            learner = self.make({**settings, "seed": seed}, store, tmp_path / folder)
            values = []
            for step in range(self.steps):
                torch.manual_seed(step)
                values.append(float(learner(step)["loss"].detach()))
            return values

        first = losses(3, "first")
        assert first == losses(3, "again")
        assert not set(first) & set(losses(4, "other"))


@pytest.fixture
def make(store: Store, cheap: dict[str, Any], tmp_path: Path) -> Any:
    """A learner on labels alone in iterations 0 and 1, in its first round from 2 to 5, in its second from 6 to 9."""
    short = {"strategy": "self-training", "labels": 1, "batch": 4, "unlabelled_batch": 6, "max_iterations": 10}

    def made(**settings: Any) -> Any:
        together = {**cheap, **short, "rounds": 2, "first": 0.2, **settings}
        learner = TestSelfTraining().make(together, store, tmp_path)
        for module in learner.network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        learner.network(store.volume("case2"))  # running statistics, without which all pixels are of one class
        return learner

    return made


@torch.no_grad()
def predicted(learner: Any, store: Store) -> tuple[Tensor, Tensor]:
    """Largest probabilities and classes of all unlabelled slices, volume by volume."""
    network = folded(learner.network)
    return torch.cat([network(store.volume(case)) for case in UNLABELLED]).softmax(1).max(1)


@pytest.mark.parametrize(
    ("options", "begins"),
    [
        ({"max_iterations": 1000}, (0, 400, 600, 800)),
        ({"max_iterations": 1000, "rounds": 1, "first": 0.25}, (0, 250)),
        ({"max_iterations": 100, "rounds": 7, "first": 0.01}, (0, 1, 15, 29, 43, 57, 71, 85)),
        ({"max_iterations": 10, "rounds": 2, "first": 0.99}, (0, 9)),
        ({"max_iterations": 2}, (0, 1)),
        ({"max_iterations": 1}, (0,)),
    ],
)
def test_rounds_share_what_the_labels_alone_leave(options: dict[str, Any], begins: tuple[int, ...]) -> None:
    assert begins_of(finetuning_options({"strategy": "self-training", **options})) == begins


def test_an_estimate_of_time_does_not_count_labelling_in_every_iteration() -> None:
    """A short training labels as often as a long one: what that takes is then added to the time of its iterations."""
    lengths = (estimate.ITERATIONS, 1000)
    rounds = [begins_of(finetuning_options({"strategy": "self-training", "max_iterations": n})) for n in lengths]
    assert [len(begins) for begins in rounds] == [4, 4]


def test_pseudo_labels_are_what_the_network_predicts_when_a_round_begins(make: Any, store: Store) -> None:
    learner = make()
    assert set(learner(0)) == set(learner(1)) == {"loss"}
    assert not learner.folder.exists() or not list(learner.folder.iterdir())
    _, classes = predicted(learner, store)
    assert len(classes.unique()) > 1
    learner(2)
    for step in (2, 3, 5):
        with torch.no_grad():
            learner.network.get_parameter("head.2.weight").mul_(-1)
        assert step == 2 or set(learner(step)) == {"loss", "supervised", "pseudo-labelled"}
        assert classes.equal(torch.from_numpy(learner.pseudo.read(1).astype(int)))
    _, classes = predicted(learner, store)
    learner(6)
    assert classes.equal(torch.from_numpy(learner.pseudo.read(2).astype(int)))
    assert not (learner.pseudo.read(1) == learner.pseudo.read(2)).all()
    assert {path.name for path in (learner.folder / "pseudo-labels").rglob("*")} == {"round-1", "round-2", "labels.npy"}


def test_they_are_made_in_the_precision_that_is_trained_in(make: Any, store: Store) -> None:
    learner = make(tta=True)
    with torch.autocast("cpu", torch.bfloat16):
        learner.label(1)
        network = Ensemble([folded(learner.network)], [moves(learner.options.augmentation.spatial, (32, 32))])
        images = torch.cat([store.volume(case) for case in UNLABELLED])
        classes = torch.cat([part.argmax(1) for part in slice_probabilities(network, images, torch.device("cpu"))])
    assert classes.equal(torch.from_numpy(learner.pseudo.read(1).astype(int)))
    learner.label(2)
    whole = torch.from_numpy(learner.pseudo.read(2).astype(int))
    assert 0 < (whole != classes).float().mean() < 0.1  # rounded differently, not another labelling


def test_they_may_be_the_mean_of_moved_views(make: Any, store: Store) -> None:
    learner = make(tta=True, augmentation=ViewOptions(spatial=SpatialOptions(flip=(0.5, 0.5))))
    network = folded(learner.network)
    views = [(), (2,), (3,), (2, 3)]
    with torch.no_grad():
        images = torch.cat([store.volume(case) for case in UNLABELLED])
        mean = torch.stack([network(images.flip(axes)).softmax(1).flip(axes) for axes in views]).mean(0)
    top = mean.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-4  # not decided by rounding
    height, width = clear.shape[1:]
    inner = torch.zeros_like(clear)  # towards the border a moved view counts less
    inner[:, height // 8 : -height // 8, width // 8 : -width // 8] = True
    learner(2)
    labels = torch.from_numpy(learner.pseudo.read(1).astype(int))
    assert labels[clear & inner].equal(mean.argmax(1)[clear & inner])
    assert clear[inner].float().mean() > 0.9
    assert not labels.equal(predicted(learner, store)[1])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tta": True, "augmentation": {"spatial": "none"}}, "tta=true, but slices are never turned"),
        ({"class_balanced": 0.5}, "confidence=0 leaves out none: give confidence, too"),
    ],
)
def test_what_would_change_nothing_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GlocalError, match=sentence):
        finetuning_options({"strategy": "self-training", **settings})


def test_uncertain_pixels_are_ignored(make: Any, store: Store) -> None:
    learner = make()
    probability, classes = predicted(learner, store)
    confidence = float(probability.median())
    learner = make(confidence=confidence)
    learner(2)
    labels = torch.from_numpy(learner.pseudo.read(1).astype(int))
    assert labels.equal(torch.where(probability >= torch.tensor(confidence), classes, IGNORED))
    assert (labels == IGNORED).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_of_each_class_some_pixels_are_kept(make: Any, store: Store) -> None:
    probability, classes = predicted(make(), store)
    learner = make(confidence=1.0, class_balanced=0.3)
    learner(2)
    labels = torch.from_numpy(learner.pseudo.read(1).astype(int))
    present = classes.unique().tolist()
    assert len(present) > 1
    for k in present:
        kept, left_out = probability[labels == k], probability[(classes == k) & (labels == IGNORED)]
        assert 0.3 * int((classes == k).sum()) <= len(kept) < 0.32 * int((classes == k).sum()) + 1
        assert left_out.max() <= kept.min()
    lenient = make(confidence=0.01, class_balanced=0.3)
    lenient(2)
    assert (lenient.pseudo.read(1) != IGNORED).all()


@pytest.mark.parametrize("kept", [0.0, 0.25, 0.5, 1.0])
def test_thresholds_are_quantiles_of_each_class(kept: float) -> None:
    counts = torch.randint(5, (4, 16), generator=torch.Generator().manual_seed(0))
    counts[1] = 0  # a class that is nowhere
    counts[2, :10] = 0
    for k, row in enumerate(counts.tolist()):
        enough = [b for b in range(16) if sum(row[b:]) >= kept * sum(row)]
        assert float(least_kept(counts, kept)[k]) == max(enough) / 16


def test_pseudo_labels_move_with_their_image(make: Any, store: Store) -> None:
    learner = make(augmentation=ViewOptions(spatial=SpatialOptions(flip=(1.0, 1.0))), confidence=0.45)
    learner(2)
    images, labels, batch = learner.pseudo_labelled_batch(3)
    assert (len(images), batch) == (6, 6)
    every = torch.cat([store.volume(case) for case in UNLABELLED]).flip(2, 3)
    for image, label in zip(images, labels, strict=True):
        number = int((every - image).abs().amax((1, 2, 3)).argmin())
        assert label.equal(torch.from_numpy(learner.pseudo.read(1)[number].astype(int)).flip(0, 1))
    assert (labels == IGNORED).any()


def test_ignored_pixels_stay_ignored_when_they_are_turned(make: Any) -> None:
    spatial = {"rotation": 40, "scale": [0.7, 1.4], "elastic": 2.0}
    learner = make(augmentation={"spatial": spatial}, confidence=0.45)
    learner(2)
    values = torch.cat([learner.pseudo_labelled_batch(step)[1] for step in (2, 3, 4)]).unique()
    assert IGNORED in values.tolist()
    assert set(values.tolist()) <= {0, 1, 2, IGNORED}


def test_the_loss_is_that_of_labels_and_of_pseudo_labels_that_are_not_ignored(make: Any) -> None:
    learner = make(confidence=0.45, weight=0.7)
    learner(2)
    seen: dict[str, Tensor] = {}
    hook = learner.network.register_forward_hook(lambda m, inputs, output: seen.update(x=inputs[0], logits=output))
    losses = learner(4)
    hook.remove()
    images, labels, _ = learner.labelled_batch(4)
    others, pseudo, _ = learner.pseudo_labelled_batch(4)
    assert seen["x"].equal(torch.cat([images, others]))  # one pass
    logits = seen["logits"].detach().requires_grad_()
    probabilities = logits.double().softmax(1)

    def expected(rows: slice, target: Tensor) -> Tensor:
        """Cross-entropy plus soft Dice of the foreground, pixel by pixel."""
        p, entropy, count = probabilities[rows], 0.0, 0
        inside, total = [0.0] * 3, [0.0] * 3
        for (image, y, x), k in np.ndenumerate(target.numpy()):
            if k != IGNORED:
                entropy, count = entropy - p[image, k, y, x].log(), count + 1
                for c in (1, 2):
                    inside[c] = inside[c] + p[image, c, y, x] * (k == c)
                    total[c] = total[c] + p[image, c, y, x] + float(k == c)
        return entropy / count + 1 - sum((2 * inside[c] + 1e-5) / (total[c] + 1e-5) for c in (1, 2)) / 2

    # The lower right quarter of the first two images of either kind is enough, and quick.
    small = (slice(0, 2), slice(24, 32), slice(24, 32))
    known = pseudo[small] != IGNORED
    assert known.any()
    assert not known.all()
    probabilities = probabilities[:, :, 24:, 24:]
    mine = learner.loss(logits[4:6, :, 24:, 24:], pseudo[small].where(known, 0), known.float())
    slow = expected(slice(4, 6), pseudo[small])
    assert mine.item() == pytest.approx(slow.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (mine, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)

    known = pseudo != IGNORED
    labelled = learner.loss(seen["logits"][:4], labels)
    learnt = learner.loss(seen["logits"][4:], pseudo.where(known, 0), known.float())
    assert losses["supervised"].item() == labelled.item()
    assert losses["pseudo-labelled"].item() == learnt.item()
    assert losses["loss"].item() == pytest.approx(labelled.item() + 0.7 * learnt.item())
    reached = torch.autograd.grad(losses["loss"], seen["logits"])[0]
    assert not reached[4:].abs().sum(1)[~known].any()
    assert reached[4:].abs().sum(1)[known].all()


def test_nothing_certain_leaves_the_labelled_loss(make: Any) -> None:
    learner = make(confidence=1.0, augmentation="none")  # what a view shows beyond the edge of a slice is background
    losses = learner(2)
    losses["loss"].backward()
    assert (learner.pseudo.read(1) == IGNORED).all()
    assert losses["loss"].item() == pytest.approx(losses["supervised"].item())
    assert losses["pseudo-labelled"].item() == 0
    assert all(p.grad.isfinite().all() for p in learner.network.parameters() if p.grad is not None)


@pytest.mark.parametrize("retrain", ["reached", "beginning"])
def test_a_round_begins_with_the_weights_that_were_asked_for(make: Any, retrain: str) -> None:
    learner, begun = make(retrain=retrain), make().network
    name = "head.2.weight"
    with torch.no_grad():
        learner.network.get_parameter(name).add_(1)
    reached = learner.network.get_parameter(name).clone()
    for step in (2, 6):
        learner(step)
        wanted = reached if retrain == "reached" else begun.get_parameter(name)
        assert learner.network.get_parameter(name).equal(wanted)
        if step == 2:
            learner(3)
            with torch.no_grad():
                reached = learner.network.get_parameter(name).add_(1).clone()
            learner(4)
            assert learner.network.get_parameter(name).equal(reached)  # only where a round begins


def test_the_weight_rises_in_each_round(make: Any) -> None:
    assert [make(weight=0.5).consistency_weight(step) for step in (2, 5, 6)] == [0.5] * 3
    rising = make(weight=0.5, ramp_up=0.5)
    expected = [0.5 * math.exp(-5 * (1 - done) ** 2) for done in (0, 0.5, 1, 1)]
    assert [rising.consistency_weight(step) for step in (2, 3, 4, 5)] == pytest.approx(expected)
    assert [rising.consistency_weight(step) for step in (6, 7, 8, 9)] == pytest.approx(expected)


@pytest.mark.parametrize("damage", ["gone", "cut", "empty", "rubbish", "another"])
def test_a_damaged_file_is_said_in_one_sentence(make: Any, damage: str) -> None:
    make()(2)
    continued = make()
    path, content = continued.pseudo.path(1), continued.pseudo.path(1).read_bytes()
    continued(3)
    if damage == "gone":
        path.unlink()
    elif damage == "another":
        np.save(path, np.zeros((2, 32, 32), np.uint8))
    else:
        path.write_bytes({"cut": content[:-1], "empty": b"", "rubbish": b"\0" * len(content)}[damage])
    with pytest.raises(GlocalError, match=r"round-1.*labels.npy is missing or damaged: delete checkpoint"):
        make()(3)
    make()(2)  # a round that begins makes its own
    assert path.read_bytes() == content


def test_a_run_leaves_masks_and_examples(store: Store, cheap: dict[str, Any], raw: Path, tmp_path: Path) -> None:
    settings = {"strategy": "self-training", "labels": list(LABELLED), "max_iterations": 4, "batch": 4, "rounds": 2}
    run = tmp_path / "run"
    finetune(store, run, {**cheap, **settings, "first": 0.5, "confidence": 0.4}, split=SPLIT)
    examples = np.load(run / "examples.npz")
    assert set(examples) == {f"Pseudo-labels of round {k}/{what}" for k in (1, 2) for what in ("images", "labels")}
    last = np.load(run / "pseudo-labels" / "round-2" / "labels.npy")
    assert examples["Pseudo-labels of round 2/labels"][0].tolist() == last[0].tolist()
    assert examples["Pseudo-labels of round 2/images"][0].tolist() == store.volume("case0")[0, 0].tolist()
    masks = sorted((run / "pseudo-labels").glob("*/*.nii.gz"))
    assert [path.name for path in masks] == [f"{case}.nii.gz" for case in UNLABELLED]
    for path, rows in zip(masks, np.split(last, [5, 12]), strict=True):  # native size is that of the network here
        mask = read_labels(path)
        assert mask.geometry == read_image([raw / "imagesTr" / path.name.replace(".nii", "_0000.nii")]).geometry
        assert mask.array[0].tolist() == rows.tolist()


def test_a_dataset_whose_images_are_two_files_each(
    raw: Path, preprocessing: PreprocessOptions, cheap: dict[str, Any], tmp_path: Path
) -> None:
    """A mask is one file: of `.mhd` images it is written as `.mha`."""
    for path in (*raw.glob("imagesTr/*"), *raw.glob("labelsTr/*")):
        target = tmp_path / "raw" / path.relative_to(raw)
        target.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(sitk.ReadImage(str(path)), str(target).replace(".nii.gz", ".mhd"))
    write_json(tmp_path / "raw" / "dataset.json", read_json(raw / "dataset.json") | {"file_ending": ".mhd"})
    write_json(tmp_path / "raw" / "split.json", read_json(raw / "split.json"))
    store = preprocess(tmp_path / "raw", tmp_path / "store", preprocessing, workers=1)
    settings = {"strategy": "self-training", "labels": 1, "max_iterations": 4, "batch": 2, "unlabelled_batch": 2}
    run = tmp_path / "run"
    finetune(store, run, {**cheap, **settings})
    for folder in ("predictions", "pseudo-labels/*"):
        assert {path.suffix for path in run.glob(f"{folder}/case*")} == {".mha"}
    assert "case5" in report(run).read_text(encoding="utf-8")


def test_masks_may_be_left_out_or_have_lost_their_images(make: Any, store: Store, tmp_path: Path) -> None:
    learner = make(masks=False)
    learner(2), learner(6)
    assert set(learner.examples()) == {"Pseudo-labels of round 1", "Pseudo-labels of round 2"}
    assert not list(learner.folder.rglob("*.nii.gz"))
    here = store.dataset
    try:
        store.dataset = tmp_path / "gone"
        make().examples()
    finally:
        store.dataset = here
    assert not list(learner.folder.rglob("*.nii.gz"))
    make(max_iterations=1).examples()
