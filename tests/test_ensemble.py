from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from glocal.ensemble import Ensemble, Models, softened
from glocal.errors import GlocalError
from glocal.inference import folded, slice_probabilities
from glocal.model import add_provenance, load_network, read_header, save_model
from glocal.networks.bcdu_net import BCDUNetOptions
from glocal.networks.registry import NETWORKS, build
from glocal.networks.several_decoders import SeveralDecodersOptions, with_decoders
from glocal.networks.unet import UNetOptions
from glocal.views.moves import Move, moves
from glocal.views.spatial import SpatialOptions

CPU = torch.device("cpu")
STILL = (Move.by(torch.eye(3)),)
TRAINED = SpatialOptions(rotation=30, scale=(0.8, 1.3), shift=0.15, flip=(0.5, 0.5))


def pixelwise(seed: int = 0) -> nn.Module:
    """Two channels to three classes, each pixel for itself."""
    layer = nn.Conv2d(2, 3, kernel_size=1)
    layer.weight.data = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(seed))
    return layer.eval()


def smooth(count: int, side: int = 64) -> Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    waves = [torch.sin((2 + k) * x + k) + torch.cos((3 - k) * y - x) for k in range(2 * count)]
    return torch.stack(waves).view(count, 2, side, side)


def predicted(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat(list(slice_probabilities(network, images, CPU)))


def test_what_depends_on_the_pixel_alone_is_the_same_in_all_views() -> None:
    network, images = pixelwise(), smooth(3)
    plain = predicted(network, images)
    views = moves(TRAINED, (64, 64))
    found = predicted(Ensemble([network], [views]), images)
    assert len(views) == 8
    assert torch.allclose(found.sum(1), torch.ones(3, 64, 64), atol=1e-5)
    assert float((found - plain)[..., 8:-8, 8:-8].abs().max()) < 0.01
    assert not torch.equal(found, plain)
    # Not brought back, the views would lie elsewhere.
    unmoved = [Move(move.there, STILL[0].back) for move in views]
    assert float((predicted(Ensemble([network], [unmoved]), images) - plain).abs().mean()) > 0.05


class Framed(nn.Module):
    """Sees class 1 along the border of whatever it is shown, class 0 elsewhere."""

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 2, *images.shape[2:])
        logits[:, 0] = 20
        for edge in (logits[..., :1, :], logits[..., -1:, :], logits[..., :1], logits[..., -1:]):
            edge[:, 1] = 40
        return logits


def test_what_a_network_sees_at_the_border_of_a_view_is_not_drawn_into_the_slice() -> None:
    found = predicted(Ensemble([Framed()], [moves(TRAINED, (64, 64))]), smooth(1))
    assert found[0, 1, 0].min() > 0.4
    inner = found[0, 1, 6:-6, 6:-6]
    assert 0 < float(inner.max()) < 0.03  # an eighth, if all of a view counted the same


def test_views_matter_to_a_network_that_looks_around() -> None:
    torch.manual_seed(0)
    network = folded(build(UNetOptions(widths=(4, 8)), 2, 3))
    images = smooth(2)
    found = predicted(Ensemble([network], [moves(TRAINED, (64, 64))]), images)
    assert float((found - predicted(network, images)).abs().mean()) > 1e-4
    assert torch.equal(found, predicted(Ensemble([network], [moves(TRAINED, (64, 64))]), images))


def test_the_mean_is_that_of_probabilities_and_every_network_counts_the_same() -> None:
    first, second, images = pixelwise(0), pixelwise(1), smooth(2)
    found = predicted(Ensemble([first, second], [STILL, STILL]), images)
    expected = (predicted(first, images) + predicted(second, images)) / 2
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, ((first(images) + second(images)) / 2).softmax(1), atol=1e-2)
    mirrored = moves(SpatialOptions(flip=(0.5, 0.5)), (64, 64))
    assert torch.allclose(predicted(Ensemble([first, second], [mirrored, STILL]), images), expected, atol=1e-4)


def test_passes_are_random_but_the_same_again_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(0)
    network = folded(build(BCDUNetOptions(widths=(4, 8)), 2, 3))
    images = smooth(2, 16)
    plain = predicted(network, images)
    state = torch.get_rng_state()
    found = [predicted(Ensemble([folded(network)], [STILL], passes), images) for passes in (1, 2, 3, 3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[2], found[3])
    assert not torch.allclose(found[0], plain, atol=1e-4)
    second, third = 2 * found[1] - found[0], 3 * found[2] - 2 * found[1]  # the single passes
    assert not torch.allclose(second, found[0], atol=1e-4)
    assert not torch.allclose(third, second, atol=1e-4)
    assert torch.equal(predicted(Ensemble([network], [STILL], 0), images).argmax(1), plain.argmax(1))


def test_a_temperature_softens_as_if_logits_were_divided_and_keeps_the_order() -> None:
    logits = 3 * torch.randn(4, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    for temperature in (0.3, 1.0, 2.5):
        found = softened(logits.softmax(1), temperature)
        assert torch.allclose(found, (logits / temperature).softmax(1), atol=1e-5)
        assert torch.equal(found.argmax(1), logits.argmax(1))
    certain = torch.tensor([[1.0, 0.0]])
    assert torch.equal(softened(certain, 7.0), certain)


@pytest.fixture(scope="module")
def model(finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make a model file: the fine-tuned one with other weights, another header or another network."""
    folder = tmp_path_factory.mktemp("models")

    def make(name: str, provenance: dict[str, Any] | None = None, **changes: Any) -> Path:
        header = read_header(finetuned / "model.safetensors")
        if provenance is not None:
            changes["provenance"] = {**header.provenance, **provenance}
        header = header.model_copy(update=changes)
        torch.manual_seed(len(name))
        weights = build(header.network, header.channels, len(header.labels)).state_dict()
        save_model(folder / f"{name}.safetensors", weights, header)
        return folder / f"{name}.safetensors"

    return make


def test_models_that_differ_where_they_must_not_are_refused(model: Any, finetuned: Path) -> None:
    first, header = finetuned / "model.safetensors", read_header(finetuned / "model.safetensors")
    options = header.plan.options
    other_size = header.plan.model_copy(update={"options": options.model_copy(update={"size": (48, 48)})})
    warned = header.plan.model_copy(update={"warnings": ("other words",)})
    cases = [
        (model("channels", channels=2), r"differ in their channels \(1 and 2\)"),
        (model("labels", labels={"background": 0, "wall": 1, "liver": 2}), "differ in their structures .*liver"),
        (
            model("size", plan=other_size),
            r"differ in how they prepare images \(options.size: \[32, 32\] and \[48, 48\]",
        ),
        (first, "the same model"),
    ]
    for other, words in cases:
        with pytest.raises(GlocalError, match=words):
            Models.load([first, other])
    assert len(Models.load([first, model("warned", plan=warned)]).networks) == 2


def test_nothing_to_vary_is_refused(model: Any, finetuned: Path) -> None:
    models = Models.load([finetuned / "model.safetensors"])
    with pytest.raises(GlocalError, match=r"model.safetensors \(unet\) has no dropout.*leave --passes out"):
        models.variation(tta=False, passes=3, every_decoder=False)
    with pytest.raises(GlocalError, match="--passes=-1"):
        models.variation(tta=False, passes=-1, every_decoder=False)
    unmoved = model("unmoved", provenance={"finetuning": {"augmentation": {"spatial": {}}}})
    with pytest.raises(GlocalError, match=r"unmoved.safetensors was trained on slices that were never.*leave --tta"):
        Models.load([unmoved]).variation(tta=True, passes=0, every_decoder=False)
    none = model("none", network=BCDUNetOptions(widths=(4, 8), dropout=0.0))
    with pytest.raises(GlocalError, match="has no dropout"):
        Models.load([none]).variation(tta=False, passes=3, every_decoder=False)


def test_mirrored_only_if_training_mirrored(model: Any, finetuned: Path) -> None:
    augmentation = read_header(finetuned / "model.safetensors").provenance["finetuning"]["augmentation"]
    assert augmentation["spatial"]["flip"] == [0.0, 0.0]
    spatial = {**augmentation["spatial"], "flip": [0.0, 0.5]}
    mirrored = model("mirrored", provenance={"finetuning": {"augmentation": {"spatial": spatial}}})
    views = Models.load([finetuned / "model.safetensors", mirrored]).variation(True, 0, False).views
    assert [len(of_model) for of_model in views] == [5, 6]
    turned = [torch.linalg.det(move.there.matrix[0, :, :2].double()) for move in views[0]]
    assert min(turned) > 0


def test_what_varies_is_said(model: Any, finetuned: Path) -> None:
    (both := [finetuned / "model.safetensors", model("second")])
    one = Models.load(both[:1])
    words = one.variation(False, 0, True).sentence(True)
    assert "a single one" in words
    assert "--tta, --with or --passes" in words
    assert "uncertainty" not in one.variation(False, 0, False).sentence(False)
    words = Models.load(both).variation(True, 0, True).sentence(True)
    assert "mean of 2 models × 5 moved views of each slice." in words
    assert "contradict" in words
    dropping = Models.load([model("dropping", network=BCDUNetOptions(widths=(4, 8)))])
    assert "mean of 4 passes with random dropout." in dropping.variation(False, 4, True).sentence(True)


@pytest.mark.parametrize(("predict", "every"), [("mean", False), ("bilinear", True), ("bilinear", False)])
def test_decoders_are_averaged_for_uncertainty(model: Any, predict: Any, every: bool) -> None:
    options = with_decoders(UNetOptions(widths=(4, 8)), ("bilinear", "transposed"), predict)
    assert isinstance(options, SeveralDecodersOptions)
    models = Models.load([model(f"decoders-{predict}", network=options)])
    vary = models.variation(False, 0, every_decoder=every)
    images = smooth(1, 32)[:, :1]
    with torch.no_grad():
        found = models.networks[0](images).softmax(1)
        each = torch.stack([logits.softmax(1) for logits in models.networks[0].each(images)])
    assert models.papers[0] == NETWORKS["unet"].paper
    averaged = predict == "mean" or every
    assert torch.allclose(found, each.mean(0) if averaged else each[0], atol=1e-5)
    assert ("2 decoders" in vary.sentence(True)) == averaged
    # Masks differ from those of one decoder, so this is an option of the folder.
    assert ("decoders" in vary.options) == (predict != "mean" and every)


def test_calibration_of_several_models(model: Any, finetuned: Path) -> None:
    first = finetuned / "model.safetensors"
    found = read_header(first).provenance["temperature"]
    assert Models.load([first]).temperature == pytest.approx(found)
    assert "fitted on 1 validation volume." in Models.load([first]).sentence(several=False)
    second = model("hot")
    add_provenance(second, temperature=4 * found, calibration={"volumes": 3})
    both = Models.load([first, second])
    assert log(both.temperature or 0) == pytest.approx(log(2 * found))
    assert "1 and 3 validation volumes" in both.sentence(several=False)
    none = model("cold", provenance={"temperature": None, "calibration": None})
    for files in ([none], [first, none]):
        assert Models.load(files).temperature is None
        assert "uncalibrated" in Models.load(files).sentence(several=False)


def test_facts_are_added_and_weights_stay(model: Any) -> None:
    file = model("plain")
    before, header = load_file(file), load_network(file)[1]
    add_provenance(file, temperature=1.5)
    assert all(torch.equal(value, before[name]) for name, value in load_file(file).items())
    assert read_header(file) == header.model_copy(update={"provenance": {**header.provenance, "temperature": 1.5}})
