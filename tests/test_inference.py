from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from glocal import inference
from glocal.data.dicom import same_locale
from glocal.data.image import Geometry, geometry_of, read_file, read_image, read_labels, write_volume
from glocal.data.orientation import Undo
from glocal.data.prepare import restore
from glocal.data.store import Store
from glocal.errors import Busy, GlocalError
from glocal.evaluation.metrics import dice
from glocal.inference import folded, list_inputs, predict, slice_probabilities
from glocal.model import load_network, read_header, save_model
from glocal.networks.registry import build
from glocal.networks.unet import UNet, UNetOptions
from glocal.overview import read_cases
from glocal.runs import held

Array = NDArray[Any]


@pytest.fixture(scope="session")
def image(store: Store) -> tuple[Array, Geometry]:
    """The image of the test case `(z, y, x)`."""
    volume = read_image([store.dataset / "imagesTr" / "case5_0000.nii.gz"])
    return volume.array[0], volume.geometry


@pytest.fixture(scope="session")
def expected(finetuned: Path) -> Array:
    """Its mask, as fine-tuning has predicted it."""
    return read_labels(finetuned / "predictions" / "case5.nii.gz").array[0]


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def names(folder: Path) -> list[str]:
    beside = (".lock", "predictions.json", "cases.csv")
    return sorted(path.name for path in folder.iterdir() if path.name not in beside)


@pytest.fixture
def network() -> nn.Module:
    """A U-Net in training mode whose batch norms are far from the identity."""
    generator = torch.Generator().manual_seed(0)
    network = UNet(2, 3, UNetOptions(widths=(4, 6, 8)))
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.data.normal_(generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            for mean in (module.running_mean, module.bias.data):
                mean.normal_(generator=generator)
            for scale in (module.running_var, module.weight.data):
                scale.uniform_(0.5, 2, generator=generator)
    return network.train()


def slices(count: int, side: int = 24) -> torch.Tensor:
    return torch.randn(count, 2, side, side, generator=torch.Generator().manual_seed(1))


def test_folding_changes_no_probability_and_not_the_network(network: nn.Module) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fast = folded(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        expected = network.eval()(slices(3)).softmax(1)
        assert torch.allclose(fast(slices(3)).softmax(1), expected, atol=1e-4)
    assert expected.amax(1).std() > 0.05  # or any network would pass


def test_folding_leaves_alone_what_it_does_not_know() -> None:
    other = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.ReLU(), nn.BatchNorm2d(3))
    assert [type(layer) for layer in folded(other)] == [nn.BatchNorm2d, nn.Conv2d, nn.ReLU, nn.BatchNorm2d]


@pytest.mark.parametrize("pixels", [1, 2 * 24 * 24, 10**9])
def test_how_many_slices_run_at_once_does_not_matter(
    network: nn.Module, pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = network.eval()(slices(5)).softmax(1)
    monkeypatch.setitem(inference._PIXELS_AT_ONCE, "cpu", pixels)
    parts = list(slice_probabilities(folded(network), slices(5), torch.device("cpu")))
    assert len(parts) == {1: 5, 2 * 24 * 24: 3, 10**9: 1}[pixels]
    assert torch.allclose(torch.cat(parts), expected, atol=1e-4)


def test_nothing_is_rounded_away_in_prediction(network: nn.Module) -> None:
    seen = []
    network.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    before = torch.backends.cudnn.allow_tf32
    list(slice_probabilities(network.eval(), slices(3), torch.device("cpu")))
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 == before


def test_the_mask_is_the_largest_restored_probability() -> None:
    """Slices along x, two axes reversed, native pixels of another size, a field that is cropped and padded."""
    undo = Undo((2, 0, 1), (True, False, True), (5, 17, 30), (20, 26), (24, 20), (16, 16))
    noise = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(2)).softmax(1)
    kept = np.empty((3, 17, 30, 5), np.float32)
    oriented = undo.oriented(kept)
    mask = restore(noise.split(2), undo, lambda place, part: oriented.__setitem__(place, part.numpy()))
    assert np.array_equal(mask, kept.argmax(0))
    assert np.array_equal(mask, restore([noise], undo))
    assert {0, 1, 2} == set(np.unique(mask))


@pytest.mark.parametrize(
    ("ending", "target"),
    [
        (".nii.gz", ".nii.gz"),
        (".nii", ".nii"),
        (".NII.GZ", ".nii.gz"),
        (".mha", ".mha"),
        (".nrrd", ".nrrd"),
        (".mhd", ".mha"),
        (".nhdr", ".nrrd"),
    ],
)
def test_masks_have_geometry_and_format_of_the_image(
    ending: str, target: str, image: tuple[Array, Geometry], expected: Array, finetuned: Path, tmp_path: Path
) -> None:
    array, geometry = image
    turned = Geometry(geometry.size, (1.5, 1.5, 8.0), (3.0, -7.5, 11.0), (0, 1, 0, 1, 0, 0, 0, 0, -1))
    (tmp_path / "images").mkdir()
    source = tmp_path / "images" / f"scan{ending}"
    if ending in (".mhd", ".nhdr", ".NII.GZ"):
        picture = sitk.GetImageFromArray(array)
        picture.SetSpacing(turned.spacing)
        picture.SetOrigin(turned.origin)
        picture.SetDirection(turned.direction)
        sitk.WriteImage(picture, str(source).lower() if ending == ".NII.GZ" else str(source))
        if ending == ".NII.GZ":
            (tmp_path / "images" / "scan.nii.gz").rename(source)
    else:
        write_volume(source, array, turned)
    (mask_path,) = predict(finetuned, tmp_path / "images", tmp_path / "out", device="cpu")
    assert mask_path == tmp_path / "out" / f"scan{target}"
    assert names(tmp_path / "out") == [f"scan{target}"]
    mask = read_file(mask_path)
    assert mask.GetPixelIDValue() == sitk.sitkUInt8
    assert geometry_of(mask) == geometry_of(read_file(source))
    assert {0, 1, 2} == set(np.unique(sitk.GetArrayFromImage(mask)))


def test_what_finetuning_measured_is_what_predict_gives(
    store: Store, image: tuple[Array, Geometry], expected: Array, finetuned: Path, tmp_path: Path
) -> None:
    write_volume(tmp_path / "case5_0000.nii.gz", *image)
    (path,) = predict(finetuned / "model.safetensors", tmp_path / "case5_0000.nii.gz", tmp_path / "out", device="cpu")
    assert path.name == "case5.nii.gz"
    mask = read_labels(path)
    # The store holds slices in half precision.
    assert (mask.array[0] != expected).mean() < 2e-3
    truth = read_labels(store.dataset / "labelsTr" / "case5.nii.gz").array
    assert min(dice(mask.array == k, truth == k) for k in (1, 2)) > 0.7


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1, 2), "xyz"])
def test_the_order_of_voxels_in_the_file_does_not_matter(
    axes: tuple[int, ...] | str, image: tuple[Array, Geometry], finetuned: Path, tmp_path: Path
) -> None:
    """Reversed axes, and axes in another order, with a header that says so: the same anatomy."""
    array, geometry = image
    directions, origin = np.eye(3), np.array(geometry.origin)
    if isinstance(axes, str):  # the file's axes x, y, z are the patient's z, x, y
        stored, size = array.transpose(1, 2, 0), (6, 32, 32)
        geometry_ = Geometry(size, (8.0, 1.5, 1.5), geometry.origin, tuple(directions[:, [2, 0, 1]].ravel()))
    else:
        stored = np.flip(array, axes)
        for axis in axes:
            k = 2 - axis
            origin[k] += (geometry.size[k] - 1) * geometry.spacing[k]
            directions[k, k] = -1
        geometry_ = Geometry(geometry.size, geometry.spacing, tuple(origin), tuple(directions.ravel()))
    write_volume(tmp_path / "in" / "plain.nii.gz", array, geometry)
    write_volume(tmp_path / "in" / "turned.nii.gz", np.ascontiguousarray(stored), geometry_)
    plain, turned = predict(finetuned, tmp_path / "in", tmp_path / "out", device="cpu")
    mask = read_labels(turned)
    assert mask.geometry.size == geometry_.size
    assert np.allclose(mask.geometry.direction, geometry_.direction)
    back = mask.array[0].transpose(2, 0, 1) if isinstance(axes, str) else np.flip(mask.array[0], axes)
    first = read_labels(plain).array[0]
    assert first.any()
    assert np.array_equal(back, first)


def test_probabilities_belong_to_the_mask(image: tuple[Array, Geometry], finetuned: Path, tmp_path: Path) -> None:
    write_volume(tmp_path / "in" / "a.nrrd", *image)
    predict(finetuned, tmp_path / "in", tmp_path / "out", probabilities=True, device="cpu")
    assert names(tmp_path / "out") == ["a.npz", "a.nrrd"]
    probabilities = np.load(tmp_path / "out" / "a.npz")["probabilities"]
    assert probabilities.shape == (3, *image[0].shape)
    assert probabilities.dtype == np.float16
    assert np.abs(probabilities.astype(np.float64).sum(0) - 1).max() < 2e-3
    mask = read_labels(tmp_path / "out" / "a.nrrd").array[0]
    clear = np.ptp(np.sort(probabilities, axis=0)[-2:], axis=0) > 0.01
    assert clear.mean() > 0.9
    assert np.array_equal(probabilities.argmax(0)[clear], mask[clear])


def test_a_volume_restored_slice_by_slice_gives_the_same_files(
    image: tuple[Array, Geometry], finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_volume(tmp_path / "in" / "a.nrrd", *image)
    found = []
    for name, pixels in (("at once", 10**9), ("one by one", 1)):
        monkeypatch.setitem(inference._PIXELS_AT_ONCE, "cpu", pixels)
        (mask,) = predict(finetuned, tmp_path / "in", tmp_path / name, probabilities=True, device="cpu")
        found.append((read_labels(mask).array, np.load(tmp_path / name / "a.npz")["probabilities"]))
    (first, first_kept), (second, second_kept) = found
    assert (first != second).mean() < 1e-4  # ties, within rounding
    assert np.allclose(first_kept.astype(np.float32), second_kept.astype(np.float32), atol=1e-3)


def test_files_are_grouped_into_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = touch(
        tmp_path / "two", "b_0000.nii.gz", "b_0001.nii.gz", "a_0001.mha", "a_0000.mha", "notes.txt", "._a.nii"
    )
    (folder / "masks").mkdir()
    inputs = list_inputs(folder, 2)
    assert "Not searched for images: masks." in capsys.readouterr().err
    assert [(case.name, [file.name for file in case.files], case.target) for case in inputs] == [
        ("a", ["a_0000.mha", "a_0001.mha"], "a.mha"),
        ("b", ["b_0000.nii.gz", "b_0001.nii.gz"], "b.nii.gz"),
    ]
    folder = touch(tmp_path / "one", "a_0000.nii.gz", "b.nii", "scan_0001.mha", "scan_0002.mha", "p_12.nrrd")
    assert [case.target for case in list_inputs(folder, 1)] == [
        "a.nii.gz",
        "b.nii",
        "p_12.nrrd",
        "scan_0001.mha",
        "scan_0002.mha",
    ]
    assert [case.target for case in list_inputs(folder / "scan_0002.mha", 1)] == ["scan_0002.mha"]


@pytest.mark.parametrize(
    ("files", "channels", "sentence"),
    [
        (["a_0000.nii.gz"], 2, r"needs 2 channel\(s\) of a \(a_0000, a_0001\), found 1"),
        (["a_0000.nii.gz", "a_0002.nii.gz"], 2, r"needs 2 channel\(s\) of a"),
        (["a_0000.nii.gz", "a_0001.nii.gz"], 1, r"needs 1 channel\(s\) of a \(a_0000\), found 2"),
        (["a.nii.gz", "a.mha"], 1, "would write one mask: rename one"),
        (["a.nii.gz", "a_0000.nii.gz"], 1, "would write one mask"),
        (["a_0001.nii.gz", "a_0001_0000.nii.gz"], 1, "would write one mask"),
        ([], 1, "holds no image"),
        (["a.png"], 1, "holds no image"),
    ],
)
def test_folders_that_make_no_sense_are_refused(
    tmp_path: Path, finetuned: Path, files: list[str], channels: int, sentence: str
) -> None:
    folder = touch(tmp_path / "images", *files)
    with pytest.raises(GlocalError, match=sentence):
        list_inputs(folder, channels)
    if channels == 1:
        with pytest.raises(GlocalError, match=sentence):
            predict(finetuned, folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_two_channels_reach_the_network_in_order(store: Store, finetuned: Path, tmp_path: Path) -> None:
    header = load_network(finetuned / "model.safetensors")[1]
    plan = store.plan.model_copy(update={"channels": 2})
    torch.manual_seed(1)
    network = build(header.network, 2, 3)
    save_model(
        tmp_path / "m.safetensors", network.state_dict(), header.model_copy(update={"channels": 2, "plan": plan})
    )
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 4, 32, 32)).astype(np.float32).cumsum(2)
    geometry = Geometry((32, 32, 4), (1.5, 1.5, 8.0))
    for name, pair in (("a", (first, second)), ("b", (second, first)), ("c", (first, second))):
        for channel, array in enumerate(pair):
            write_volume(tmp_path / "in" / f"{name}_{channel:04d}.nii.gz", array, geometry)
    masks = [read_labels(path).array for path in predict(tmp_path / "m.safetensors", tmp_path / "in", tmp_path / "out")]
    assert np.array_equal(masks[0], masks[2])
    assert not np.array_equal(masks[0], masks[1])


@same_locale()
def dicom(folder: Path, array: Array, geometry: Geometry, uid: str = "1.2.3") -> None:
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, slice_ in enumerate(array.astype(np.int16)):
        picture = sitk.GetImageFromArray(slice_[None])
        picture.SetSpacing(geometry.spacing)
        x, y, z = geometry.origin
        place = f"{x}\\{y}\\{z + number * geometry.spacing[2]}"
        tags = {"0008|0016": "1.2.840.10008.5.1.4.1.1.4", "0008|0018": f"{uid}.9.{number}"}  # MR image storage
        tags |= {"0020|000d": f"{uid}.1", "0020|000e": uid}
        tags |= {"0020|0032": place, "0020|0037": "1\\0\\0\\0\\1\\0", "0010|0020": "4711"}
        for tag, value in tags.items():
            picture.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{9 - number}.dcm"))
        writer.Execute(picture)


def test_dicom_series_get_nifti_masks(
    image: tuple[Array, Geometry], expected: Array, finetuned: Path, tmp_path: Path
) -> None:
    dicom(tmp_path / "in" / "first", *image)
    dicom(tmp_path / "in" / "second", *image, uid="1.2.4")
    (tmp_path / "in" / "no images").mkdir()
    masks = predict(finetuned, tmp_path / "in", tmp_path / "in" / "masks", device="cpu")
    assert names(tmp_path / "in" / "masks") == ["first.nii.gz", "second.nii.gz"]
    mask = read_labels(masks[0])
    assert np.allclose(mask.geometry.origin, image[1].origin, atol=1e-4)
    assert np.allclose(mask.geometry.spacing, image[1].spacing, atol=1e-4)
    assert (mask.array[0] != expected).mean() < 0.01  # whole numbers
    # The folder of one series is a case, too; and what lies in the folder of masks is no input.
    (alone,) = predict(finetuned, tmp_path / "in" / "first", tmp_path / "alone", device="cpu")
    assert alone.name == "first.nii.gz"
    assert alone.read_bytes() == masks[0].read_bytes()
    assert predict(finetuned, tmp_path / "in", tmp_path / "in" / "masks", device="cpu") == masks


def test_what_is_odd_about_an_image_is_a_flag(image: tuple[Array, Geometry], finetuned: Path, tmp_path: Path) -> None:
    array, geometry = image
    write_volume(tmp_path / "in" / "known.nii.gz", array, geometry)
    write_volume(tmp_path / "in" / "unknown.nii.gz", array, replace(geometry, direction_known=False))
    predict(finetuned, tmp_path / "in", tmp_path / "out", device="cpu")
    flags = read_cases(tmp_path / "out").set_index("case")["flags"]
    assert "states no direction: the volume is taken as it lies in the file, perhaps mirrored" in flags["unknown"]
    assert "direction" not in flags["known"]


def test_two_predictions_into_one_folder_are_refused(
    image: tuple[Array, Geometry], finetuned: Path, tmp_path: Path
) -> None:
    write_volume(tmp_path / "in" / "a.nii.gz", *image)
    with held(tmp_path / "out"), pytest.raises(Busy, match="Another process is working in"):
        predict(finetuned, tmp_path / "in", tmp_path / "out", device="cpu")
    assert names(tmp_path / "out") == []
    assert len(predict(finetuned, tmp_path / "in", tmp_path / "out", device="cpu")) == 1


def test_the_folder_of_the_images_is_not_written_to(
    image: tuple[Array, Geometry], finetuned: Path, tmp_path: Path
) -> None:
    write_volume(tmp_path / "in" / "a.nii.gz", *image)
    for images in (tmp_path / "in", tmp_path / "in" / "a.nii.gz", tmp_path / "in" / ".." / "in"):
        with pytest.raises(GlocalError, match="holds the images themselves: choose another folder"):
            predict(finetuned, images, tmp_path / "in")
    with pytest.raises(GlocalError, match="does not exist"):
        predict(finetuned, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(GlocalError, match="device=foo"):
        predict(finetuned, tmp_path / "in", tmp_path / "out", device="foo")
    assert names(tmp_path / "in") == ["a.nii.gz"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("cut", "cannot be read"),
        ("text", "cannot be read"),
        ("flat", "the same value everywhere"),
        ("nan", "NaN or infinite"),
        ("4-D", "not one three-dimensional volume"),
    ],
)
def test_a_bad_image_is_named_when_all_others_are_done(
    image: tuple[Array, Geometry], finetuned: Path, tmp_path: Path, damage: str, sentence: str
) -> None:
    array, geometry = image
    ending = ".mha" if damage == "nan" else ".nii.gz"  # ITK reads NaN in a NIfTI file as 0
    for name in "abc":
        write_volume(tmp_path / "in" / f"{name}{ending}", array, geometry)
    bad = tmp_path / "in" / f"b{ending}"
    if damage == "cut":
        bad.write_bytes(bad.read_bytes()[:3000])
    elif damage == "text":
        bad.write_text("no image")
    elif damage == "4-D":
        sitk.WriteImage(sitk.GetImageFromArray(np.stack([array, array])), str(bad))
    else:
        write_volume(bad, np.where(array > 500, np.nan, array) if damage == "nan" else 0 * array, geometry)
    with pytest.raises(GlocalError, match=sentence) as raised:
        predict(finetuned, tmp_path / "in", tmp_path / "out", device="cpu")
    assert bad.name in str(raised.value)
    assert f"All other masks are in {tmp_path / 'out'}." in str(raised.value)
    assert names(tmp_path / "out") == [f"a{ending}", f"c{ending}"]
    assert set(pd.read_csv(tmp_path / "out" / "cases.csv")["case"]) == {"a", "c"}
    write_volume(bad, array, geometry)
    before = (tmp_path / "out" / f"a{ending}").stat().st_mtime_ns
    assert len(predict(finetuned, tmp_path / "in", tmp_path / "out", device="cpu")) == 3
    assert names(tmp_path / "out") == [f"{name}{ending}" for name in "abc"]
    assert (tmp_path / "out" / f"a{ending}").stat().st_mtime_ns == before


def test_several_bad_images_are_named_and_none_need_be_good(finetuned: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / "in" / f"{name}.mha").write_text("no image")
    with pytest.raises(
        GlocalError, match=r"a\.mha cannot be read.* The same holds for b, c, each for a reason of its own"
    ):
        predict(finetuned, tmp_path / "in", tmp_path / "out", device="cpu")
    assert names(tmp_path / "out") == []


def test_masks_that_exist_are_kept_unless_asked(
    image: tuple[Array, Geometry], finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_volume(tmp_path / "in" / "a.nii.gz", *image)
    write_volume(tmp_path / "in" / "b.nii.gz", *image)
    predict(finetuned, tmp_path / "in" / "a.nii.gz", tmp_path / "out", device="cpu")
    mask = (tmp_path / "out" / "a.nii.gz").read_bytes()
    (tmp_path / "out" / "a.nii.gz").write_bytes(b"mine")
    seen = []
    work = inference._predict_case
    monkeypatch.setattr(inference, "_predict_case", lambda *words: seen.append(words[2].name) or work(*words))
    (tmp_path / "out" / "b.nii.gz").write_bytes(b"drawn by hand")
    with pytest.raises(GlocalError, match=r"b\.nii\.gz was not written by this prediction: choose another folder"):
        predict(finetuned, tmp_path / "in", tmp_path / "out", device="cpu")
    assert (tmp_path / "out" / "b.nii.gz").read_bytes() == b"drawn by hand"
    (tmp_path / "out" / "b.nii.gz").unlink()
    predict(finetuned, tmp_path / "in", tmp_path / "out", device="cpu")
    assert seen == ["b"]
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == b"mine"
    with pytest.raises(GlocalError, match=r"a\.nii\.gz was changed after it was predicted, and the maps"):
        predict(finetuned, tmp_path / "in", tmp_path / "out", probabilities=True, device="cpu")
    assert seen == ["b"]
    (tmp_path / "out" / "a.nii.gz").write_bytes(mask)
    predict(finetuned, tmp_path / "in", tmp_path / "out", probabilities=True, device="cpu")
    assert seen == ["b", "a", "b"]  # their probabilities were not there
    predict(finetuned, tmp_path / "in", tmp_path / "out", device="cpu", overwrite=True)
    assert seen == ["b", "a", "b", "a", "b"]
    assert read_labels(tmp_path / "out" / "a.nii.gz").array.any()


def test_masks_of_another_model_are_not_taken_for_those_of_this(
    image: tuple[Array, Geometry], finetuned: Path, tmp_path: Path
) -> None:
    write_volume(tmp_path / "in" / "a.nii.gz", *image)
    predict(finetuned, tmp_path / "in", tmp_path / "out", device="cpu")
    other = tmp_path / "other.safetensors"
    weights = {name: value * 0 for name, value in load_file(finetuned / "model.safetensors").items()}
    save_model(other, weights, read_header(finetuned / "model.safetensors"))
    with pytest.raises(GlocalError, match="--overwrite"):
        predict(other, tmp_path / "in", tmp_path / "out", device="cpu")
    predict(other, tmp_path / "in", tmp_path / "out", device="cpu", overwrite=True)
    with pytest.raises(GlocalError, match=str(other)):
        predict(finetuned, tmp_path / "in", tmp_path / "out", device="cpu")
    write_volume(tmp_path / "more" / "b.nii.gz", *image)
    for overwrite in (False, True):  # the mask of a would stay, and nothing would say by which model
        with pytest.raises(GlocalError, match=r"masks by .* that would not be replaced \(a\): choose another folder"):
            predict(finetuned, tmp_path / "more", tmp_path / "out", device="cpu", overwrite=overwrite)
    (tmp_path / "out" / "a.nii.gz").unlink()
    predict(finetuned, tmp_path / "more", tmp_path / "out", device="cpu")
    assert names(tmp_path / "out") == ["b.nii.gz"]
    (tmp_path / "out" / "predictions.json").write_text("[]")
    with pytest.raises(GlocalError, match="was not written by `glocal predict`"):
        predict(finetuned, tmp_path / "more", tmp_path / "out", device="cpu")


@pytest.mark.parametrize("ending", [".nii.gz", ".mhd"])
def test_a_mask_of_another_image_is_not_taken_for_that_of_this(
    image: tuple[Array, Geometry], finetuned: Path, tmp_path: Path, ending: str
) -> None:
    array, geometry = image
    for folder, voxels in (("A", array), ("B", array[..., ::-1].copy())):
        (tmp_path / folder).mkdir()
        volume = sitk.GetImageFromArray(voxels)
        volume.SetSpacing(geometry.spacing)
        sitk.WriteImage(volume, str(tmp_path / folder / f"scan{ending}"))
    (mask,) = predict(finetuned, tmp_path / "A", tmp_path / "out", device="cpu")
    before = mask.read_bytes()
    with pytest.raises(
        GlocalError, match=r"scan.* was predicted from another image \(.*A.scan.*\) than .*B.scan.* is now"
    ):
        predict(finetuned, tmp_path / "B", tmp_path / "out", device="cpu")
    assert mask.read_bytes() == before
    predict(finetuned, tmp_path / "B", tmp_path / "out", device="cpu", overwrite=True)
    assert mask.read_bytes() != before
