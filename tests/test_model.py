import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.model import Header, digest_of_weights, find_model, load_network, read_header, save_model, transfer
from glocal.networks.registry import build
from glocal.networks.unet import UNetOptions

OPTIONS = UNetOptions(widths=(4, 8, 8))


def network(classes: int = 3, widths: tuple[int, ...] = (4, 8, 8), seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build(UNetOptions(widths=widths), 1, classes)


@pytest.fixture
def header(store: Store) -> Header:
    provenance = {"subjects": ["case0", "case1"], "nested": {"value": [1, 2.5, None]}, "words": "Häm µm"}
    labels = {"background": 0, "wall": 1, "blood": 2}
    return Header(
        kind="segmentation", network=OPTIONS, channels=1, labels=labels, plan=store.plan, provenance=provenance
    )


def test_weights_and_header_come_back_as_they_were(header: Header, tmp_path: Path) -> None:
    one = network().eval()
    path = tmp_path / "deep" / "model.safetensors"
    save_model(path, one.to(memory_format=torch.channels_last).state_dict(), header)  # type: ignore[call-overload]
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]
    assert read_header(path) == header
    loaded, found = load_network(path)
    assert found == header
    assert not loaded.training
    images = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(loaded(images), one(images))  # another order in memory rounds otherwise
    assert all(value.equal(one.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_digest_is_of_weights_alone(header: Header, tmp_path: Path) -> None:
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones((), dtype=torch.bfloat16)}
    later = header.model_copy(update={"provenance": {"finished": "later"}})
    reordered = {"b": weights["b"], "a": weights["a"]}
    others = (
        {"a": weights["a"].view(3, 2), "b": weights["b"]},
        {"c": weights["a"], "b": weights["b"]},
        {**weights, "b": 2 * weights["b"]},
    )
    for number, (tensors, of) in enumerate(
        [(weights, header), (reordered, later), *((other, header) for other in others)]
    ):
        save_model(tmp_path / str(number), tensors, of)
    first, again, *rest = (digest_of_weights(tmp_path / str(number)) for number in range(5))
    assert first == again
    assert len({first, *rest}) == 4


def test_transfer_copies_what_fits_and_tells_of_every_weight(header: Header, tmp_path: Path) -> None:
    source, target = network(seed=1), network(classes=5, seed=2)
    for name, value in source.state_dict().items():
        if "running" in name:
            value += 3  # statistics are weights too
    weights = {name: v for name, v in source.state_dict().items() if name.startswith(("encoder.", "head."))}
    weights["encoder.9.weight"] = torch.zeros(1)
    save_model(tmp_path / "m.safetensors", weights, header)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    report = transfer(target, tmp_path / "m.safetensors")

    after = target.state_dict()
    assert report.unused == ("encoder.9.weight",)
    assert len(report.mismatched) == 1  # the logits
    assert before[report.mismatched[0]].shape[0] == 5
    assert set(report.fresh) == {name for name in after if name.startswith("decoder.")}
    assert set(report.transferred) == set(weights) - {"encoder.9.weight", *report.mismatched}
    assert any("running_mean" in name for name in report.transferred)
    for name, value in after.items():
        assert value.equal(weights[name] if name in report.transferred else before[name]), name
    assert report.as_dict().keys() == {"transferred", "fresh", "unused", "mismatched"}
    assert sum(map(len, report.as_dict().values())) == len(after) + 1
    sentence = report.sentence()
    assert f"{len(report.transferred)} weights were transferred, {len(report.fresh)} start at random" in sentence
    assert "1 do not fit" in sentence
    assert "1 of the file are not used (encoder.9.weight" in sentence


def test_pretrained_parts_are_no_segmentation_model(pretrained: Path) -> None:
    with pytest.raises(GlocalError, match="without segmentation head: fine-tune it first"):
        load_network(pretrained / "model.safetensors")


def test_damaged_and_foreign_files_are_refused(header: Header, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_model(good, network().state_dict(), header)
    content = good.read_bytes()
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.ones(1)}, foreign)
    damaged: dict[str, bytes] = {
        "empty": b"",
        "text": b"no model at all, just text",
        "short": content[:-100],
        "cut": content[:40],
        "foreign": foreign.read_bytes(),
        "other": content.replace(b"segmentation", b"segmentatioX"),
    }
    for name, bytes_ in damaged.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(bytes_)
        with pytest.raises(GlocalError, match=f"{name}.safetensors is not a model file of glocal, or it is damaged"):
            load_network(path)


@pytest.mark.parametrize("missing", [True, False])
def test_weights_that_do_not_fit_their_header_are_refused(header: Header, tmp_path: Path, missing: bool) -> None:
    weights = network(classes=4).state_dict()
    if missing:
        weights = dict(list(network().state_dict().items())[:-1])
    save_model(tmp_path / "m.safetensors", weights, header)
    with pytest.raises(GlocalError, match="does not hold the weights its header promises"):
        load_network(tmp_path / "m.safetensors")


def test_models_are_found_in_run_folders(tmp_path: Path) -> None:
    with pytest.raises(GlocalError, match="does not exist"):
        find_model(tmp_path / "nowhere")
    run = tmp_path / "run"
    one, two = (run / "finetune" / "split-0" / name / "labels-2-draw-0" for name in ("random", "pcl"))
    one.mkdir(parents=True)
    with pytest.raises(GlocalError, match=r"holds no model\.safetensors: is the run finished"):
        find_model(run)
    (one / "model.safetensors").write_bytes(b"x")
    (one / "best.safetensors").write_bytes(b"x")
    assert find_model(run) == find_model(one) == find_model(one / "model.safetensors") == one / "model.safetensors"
    assert find_model(one / "best.safetensors") == one / "best.safetensors"
    shutil.copytree(one, two)
    with pytest.raises(GlocalError, match=r"holds 2 models: name one of them, for example .*pcl.*random"):
        find_model(run)
    assert find_model(two) == two / "model.safetensors"


def test_a_model_says_where_it_comes_from(finetuned: Path, store: Store) -> None:
    header: Any = read_header(finetuned / "model.safetensors")
    assert (header.kind, header.channels, header.labels) == ("segmentation", 1, store.labels)
    assert header.plan == store.plan
    assert header.network.widths == (4, 8, 8)
    assert header.provenance["dataset"] == "Tiny"
    assert len(header.provenance["labelled"]) == 2
    assert header.provenance["pretraining"]["pretraining"]["method"] == "pcl"
    assert all(name in paper for name, paper in zip(("NeurIPS", "MICCAI"), header.provenance["papers"], strict=True))
    # Nothing but tensors is in the file.
    assert load_file(finetuned / "model.safetensors").keys() == network().state_dict().keys()
