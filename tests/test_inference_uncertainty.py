"""Predicting with views, several models, uncertainty maps, the table of cases and the page."""

import re
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from typer.testing import CliRunner

from glocal import inference
from glocal.cli import app
from glocal.data.image import Geometry, geometry_of, read_file, read_image, read_labels, write_volume
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.files import read_json
from glocal.finetuning.measure import calibrate
from glocal.inference import folded, predict
from glocal.model import add_provenance, load_network, read_header, save_model
from glocal.overview import chosen_slices, write_cases, write_page
from glocal.pretraining.registry import METHODS


@pytest.fixture(scope="module")
def images(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cases; the second is of finer pixels, lies in other axes, and is a `.mha`."""
    folder = tmp_path_factory.mktemp("images")
    volume = read_image([store.dataset / "imagesTr" / "case5_0000.nii.gz"])
    write_volume(folder / "a.nii.gz", volume.array[0], volume.geometry)
    fine = volume.array[0].repeat(2, axis=1).repeat(2, axis=2)[:, ::-1]
    geometry = Geometry((64, 64, 6), (0.75, 0.75, 8.0), (3.0, 2.0, 1.0), (1, 0, 0, 0, -1, 0, 0, 0, 1))
    write_volume(folder / "b.mha", np.ascontiguousarray(fine), geometry)
    return folder


@pytest.fixture(scope="module")
def second(finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with slightly other weights, and another temperature."""
    file = tmp_path_factory.mktemp("second") / "model.safetensors"
    network, header = load_network(finetuned / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: value + 0.02 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    weights = {name: value.abs() if "var" in name else value for name, value in weights.items()}
    save_model(file, weights, header)
    return file


@pytest.fixture(scope="module")
def everything(images: Path, finetuned: Path, second: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("everything") / "out"
    words: dict[str, Any] = {"others": [second], "tta": True, "uncertainty": True, "probabilities": True}
    predict(finetuned, images, out, device="cpu", **words)
    return out


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all else."""
    monkeypatch.setattr("glocal.overview.montage", lambda *words: b"")


def array_of(path: Path) -> Any:
    return sitk.GetArrayFromImage(read_file(path))


def test_uncertainty_is_the_entropy_of_the_probabilities_in_the_image_s_geometry(
    everything: Path, images: Path
) -> None:
    for name, ending in (("a", ".nii.gz"), ("b", ".mha")):
        path = everything / f"{name}_uncertainty{ending}"
        image = read_file(path)
        assert image.GetPixelIDValue() == sitk.sitkFloat32
        assert geometry_of(image) == geometry_of(read_file(images / f"{name}{ending}"))
        found, p = array_of(path), np.load(everything / f"{name}.npz")["probabilities"].astype(np.float64)
        expected = -(p * np.log(p, where=p > 0, out=np.zeros_like(p))).sum(0) / np.log(3)
        assert np.abs(found - expected).max() < 0.01
        assert 0 <= found.min() < 0.05
        assert 0.4 < found.max() <= 1
        mask = read_labels(everything / f"{name}{ending}").array[0]
        clear = np.ptp(np.sort(p, axis=0)[-2:], axis=0) > 0.01
        assert np.array_equal(p.argmax(0)[clear], mask[clear])


@pytest.mark.usefixtures("no_pictures")
def test_the_temperature_changes_uncertainty_and_no_mask(finetuned: Path, images: Path, tmp_path: Path) -> None:
    network, header = load_network(finetuned / "model.safetensors")
    found = {}
    for temperature in (0.5, 2.0, None):
        file = tmp_path / f"{temperature}.safetensors"
        kept = {**header.provenance, "temperature": temperature}
        save_model(file, network.state_dict(), header.model_copy(update={"provenance": kept}))
        out = tmp_path / f"out-{temperature}"
        predict(file, images, out, device="cpu", uncertainty=True)
        found[temperature] = [read_labels(out / "b.mha").array, array_of(out / "b_uncertainty.mha")]
    predict(finetuned, images, tmp_path / "plain", device="cpu")
    plain = read_labels(tmp_path / "plain" / "b.mha").array
    assert all(np.array_equal(mask, plain) for mask, _ in found.values())
    cold, hot, none = (found[t][1].mean() for t in (0.5, 2.0, None))
    assert cold < 0.8 * none
    assert none < 0.8 * hot
    assert "uncalibrated" in read_json(tmp_path / "out-None" / "predictions.json")["calibration"]
    assert set(pd.read_csv(tmp_path / "out-None" / "cases.csv")["calibrated"]) == {"uncalibrated"}
    assert "uncalibrated" in (tmp_path / "out-None" / "predictions.html").read_text(encoding="utf-8")
    assert set(pd.read_csv(tmp_path / "out-2.0" / "cases.csv")["calibrated"]) == {"calibrated"}


def test_two_models_predict_the_mean(finetuned: Path, second: Path, images: Path, tmp_path: Path) -> None:
    files = [finetuned / "model.safetensors", second]
    for file in files:
        assert read_header(file).provenance["temperature"]
    alone, together = [], tmp_path / "together"
    for number, file in enumerate(files):
        bare, (network, header) = tmp_path / f"{number}.safetensors", load_network(file)
        provenance = {key: value for key, value in header.provenance.items() if key != "temperature"}
        save_model(bare, network.state_dict(), header.model_copy(update={"provenance": provenance}))
        predict(bare, images / "a.nii.gz", tmp_path / str(number), True, device="cpu")
        alone.append(np.load(tmp_path / str(number) / "a.npz")["probabilities"].astype(np.float64))
    predict(
        tmp_path / "0.safetensors",
        images / "a.nii.gz",
        together,
        True,
        device="cpu",
        others=[tmp_path / "1.safetensors"],
    )
    found = np.load(together / "a.npz")["probabilities"].astype(np.float64)
    assert np.abs(alone[0] - alone[1]).max() > 0.05
    assert np.abs(found - (alone[0] + alone[1]) / 2).max() < 2e-3


def test_cases_are_listed_and_measured(everything: Path) -> None:
    table = pd.read_csv(everything / "cases.csv", keep_default_na=False)
    assert sorted(table["case"]) == ["a", "b"]
    for _, row in table.iterrows():
        ending = ".nii.gz" if row["case"] == "a" else ".mha"
        mask = read_labels(everything / f"{row['case']}{ending}")
        for value, name in ((1, "wall"), (2, "blood")):
            ml = (mask.array == value).sum() * np.prod(mask.geometry.spacing) / 1000
            assert row[f"{name} ml"] == pytest.approx(ml)
        assert 0 < row["uncertainty"] < 1
    record = read_json(everything / "predictions.json")
    assert len(record["models"]) == 2
    assert METHODS["pcl"].paper in record["papers"]
    assert record["options"] == {"tta": True, "passes": 0}
    assert "2 models × 5 moved views" in record["summary"]


def test_the_page_shows_every_case_the_most_urgent_first(everything: Path) -> None:
    page = (everything / "predictions.html").read_text(encoding="utf-8")
    order = list(pd.read_csv(everything / "cases.csv")["case"])
    captions = re.findall(r"<figcaption>([ab]); uncertainty 0\.\d+ \(calibrated\)", page)
    assert captions == order
    assert page.count("data:image/png") == 2
    assert len(page) < 3_000_000
    assert "2 models × 5 moved views" in page
    assert "Papers to cite" in page
    assert "Before you use these results" not in page  # nothing to warn of


def test_the_page_does_without_pictures_of_what_is_gone(everything: Path, tmp_path: Path) -> None:
    out, record = tmp_path / "out", read_json(everything / "predictions.json")
    copytree(everything, out)
    record["cases"]["a"]["image"] = str(tmp_path / "moved.nii.gz")
    write_page(out / "page.html", record, write_cases(out, record), {"wall": 1, "blood": 2})
    page = (out / "page.html").read_text(encoding="utf-8")
    assert re.findall(r"<figcaption>([ab]);", page) == ["b"]
    assert "Of the 2 cases 1 are shown" in page


@pytest.mark.parametrize("change", [{"tta": False}, {"others": []}, {"others": "swapped"}])
def test_masks_made_in_another_way_are_not_taken_for_these(
    change: dict[str, Any], everything: Path, finetuned: Path, second: Path, images: Path
) -> None:
    words: dict[str, Any] = {"others": [second], "tta": True, **change}
    if change.get("others") == "swapped":
        words["others"] = [finetuned / "best.safetensors"]
    before = {path.name: path.read_bytes() for path in everything.iterdir()}
    with pytest.raises(GlocalError, match=r"holds masks.* by .*model.safetensors and .* with tta.*--overwrite"):
        predict(finetuned, images, everything, device="cpu", **words)
    assert {path.name: path.read_bytes() for path in everything.iterdir()} == before


@pytest.mark.usefixtures("no_pictures")
def test_a_stopped_prediction_is_continued_by_the_same(
    finetuned: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, work = [], inference._predict_case

    def stopped(*words: Any) -> Any:
        seen.append(words[2].name)
        done = work(*words)
        if seen == ["a", "b"]:
            raise KeyboardInterrupt  # its mask is there already
        return done

    monkeypatch.setattr(inference, "_predict_case", stopped)
    words: dict[str, Any] = {"device": "cpu", "tta": True}
    with pytest.raises(KeyboardInterrupt):
        predict(finetuned, images, tmp_path / "out", **words)
    predict(finetuned, images, tmp_path / "out", **words)
    assert seen == ["a", "b", "b"]
    predict(finetuned, images, tmp_path / "out", **words, uncertainty=True)
    assert seen == ["a", "b", "b", "a", "b"]  # their maps were not there
    predict(finetuned, images, tmp_path / "out", **words, uncertainty=True)
    assert len(seen) == 5
    assert set(pd.read_csv(tmp_path / "out" / "cases.csv")["case"]) == {"a", "b"}
    # A map of before is not one of the masks that came later.
    assert (tmp_path / "out" / "predictions.html").exists()
    predict(finetuned, images, tmp_path / "out", device="cpu", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").glob("[abp]*")) == ["a.nii.gz", "b.mha", "predictions.json"]
    predict(finetuned, images, tmp_path / "out", device="cpu", uncertainty=True)
    assert len(seen) == 9


@pytest.mark.usefixtures("no_pictures")
def test_without_options_masks_are_those_of_the_network_alone(
    finetuned: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = []
    work = inference._predict_case
    monkeypatch.setattr(inference, "_predict_case", lambda *words: networks.append(words[0]) or work(*words))
    predict(finetuned, images, tmp_path / "plain", device="cpu")
    assert type(networks[0]) is type(folded(load_network(finetuned / "model.safetensors")[0]))
    assert not (tmp_path / "plain" / "predictions.html").exists()
    predict(finetuned, images, tmp_path / "unsure", device="cpu", uncertainty=True)
    for name in ("a.nii.gz", "b.mha"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "unsure" / name).read_bytes()
    assert "a single one" in read_json(tmp_path / "unsure" / "predictions.json")["summary"]


def test_finetuning_fits_a_temperature_to_its_validation_volumes(finetuned: Path, store: Store) -> None:
    split = read_json(finetuned / "split.json")
    for name in ("model", "best"):
        provenance = read_header(finetuned / f"{name}.safetensors").provenance
        found = provenance["calibration"]
        assert 0.1 < provenance["temperature"] < 10
        assert found["volumes"] == len(split["draw"]["validation"]) == 1
        assert found["nll"][1] <= found["nll"][0]
    assert "validation_dice" in read_header(finetuned / "best.safetensors").provenance


def test_calibrating_looks_at_its_cases_alone_and_changes_no_weight(
    finetuned: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((finetuned / "model.safetensors").read_bytes())
    expected = read_header(file).provenance["temperature"]
    add_provenance(file, temperature=None)
    read, fetch = set(), store.labels_of
    monkeypatch.setattr(store, "labels_of", lambda rows: read.update(store.volume_of[rows].tolist()) or fetch(rows))
    cases = tuple(read_json(finetuned / "split.json")["draw"]["validation"])
    calibrate(store, tmp_path, cases, torch.device("cpu"))
    assert read == {store.index_of(case) for case in cases}
    assert read_header(file).provenance["temperature"] == pytest.approx(expected)
    before, after = (load_network(f)[0].state_dict() for f in (finetuned / "model.safetensors", file))
    assert all(torch.equal(before[name], after[name]) for name in before)
    calibrate(store, tmp_path, ("case0",), torch.device("cpu"))
    assert read_header(file).provenance["temperature"] != pytest.approx(expected)


def test_slices_are_spread_and_the_most_uncertain_one_is_shown() -> None:
    mask, unsure = np.zeros((20, 4, 4), int), np.zeros((20, 4, 4))
    mask[3:16, 1, 1] = 1
    unsure[7] = 1
    picks = chosen_slices(mask, unsure, 5)
    assert len(picks) == 5
    assert {3, 7, 15} <= set(picks)
    assert picks == sorted(picks)
    assert chosen_slices(mask[:2], unsure[:2], 5) == [0, 1]  # nothing was found


@pytest.mark.usefixtures("no_pictures")
def test_the_command_prints_the_cases(
    finetuned: Path, second: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    words = ["predict", str(finetuned), str(images), str(tmp_path / "out"), "--with", str(second), "--tta"]
    done = CliRunner().invoke(app, [*words, "--uncertainty", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    for text in ("2 cases", "wall ml", "Uncertainty", "2 models × 5 moved views", "predictions.html"):
        assert text in done.output
