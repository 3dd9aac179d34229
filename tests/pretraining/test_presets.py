"""Presets of the pre-training methods: what they promise, that it can be trained, and what is kept of them."""

from typing import Any, get_args

import pytest
import torch

from glocal.data.sampling import Pool
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.experiments.grid import nested
from glocal.experiments.recipe import make_recipe
from glocal.experiments.trainings import pretraining_settings
from glocal.networks.registry import build
from glocal.pretraining.registry import METHODS, method_named, pretraining_options
from glocal.runs import flatten, identity

CASES = ("case0", "case1", "case2", "case3")
MOVED = {
    "rotation": 180.0,
    "scale": [0.7, 1.3],
    "shift": 0.1,
    "elastic": 0.0,
    "flip": [0.0, 0.0],
    "probability": 0.67,
}
JCL = {f"{group}.spatial.{key}": value for group in ("fixed", "variable") for key, value in MOVED.items()}
JCL |= {"view_groups": 1, "dominant_pixel_projector": True}
PCL = {"network.name": "pcl-unet", "learning_rate": 0.1, "warmup_iterations": 0, "threshold": 0.1, "scale": "none"}

# What the papers' texts say, key by key.
PROMISED: dict[tuple[str, str], dict[str, Any]] = {
    ("gcl", "paper"): {"hidden": 3200, "negatives": "all", "projection": False, "local_batch": 20},
    ("pcl", "paper"): PCL,
    ("jcl", "macl"): {},
    ("jcl", "jcl"): JCL,
    ("jcl", "paper"): JCL | PCL | {"batch": 32},
    ("ideal", "paper"): {"network.name": "resnet50-unet"},
    ("pixel-global", "paper"): {"network.name": "resnet50-unet", "paper_exact": True, "student_dropout": False},
    ("simclr", "paper"): {"batch": 256, "learning_rate": 0.3, "augmentation.spatial.crop": [0.28, 1.0]},
    ("moco", "paper"): {"batch": 256, "learning_rate": 0.03, "queue": 65536},
    ("byol", "paper"): {"batch": 256},
    ("simsiam", "paper"): {"batch": 256, "learning_rate": 0.05},
    ("swav", "paper"): {
        "batch": 256,
        "warmup_iterations": 0,
        "frozen": 50,
        "queue": 3840,
        "queue_from": 750,
        "local_views": 6,
    },
    ("dino", "paper"): {
        "batch": 1024,
        "learning_rate": 0.002,
        "warmup_iterations": 333,
        "frozen": 33,
        "outputs": 65536,
        "local_views": 10,
        "augmentation.spatial.crop": [0.63, 1.0],
    },
}
FOUND = [
    (name, preset)
    for name, method in METHODS.items()
    if "preset" in method.options.model_fields
    for preset in get_args(method.options.model_fields["preset"].annotation)
]

TINY: dict[str, dict[str, Any]] = {
    "unet": {"widths": [4, 8, 8]},
    "pcl-unet": {"widths": [4, 8, 8]},
    "resnet50-unet": {"width": 2, "decoder_widths": [8, 8, 8, 4, 4]},
}
# Narrower than the paper, where nothing of its reading hangs on it, and fewer decoder blocks for images of 32 pixels.
SMALL: dict[str, dict[str, Any]] = {
    "gcl": {"blocks": 1},
    "jcl": {"blocks": 1, "outputs": 8},
    "byol": {"hidden": 16, "outputs": 8},
    "simsiam": {"hidden": 8, "outputs": 16},
    "swav": {"hidden": 8, "outputs": 8},
    "dino": {"hidden": 8, "bottleneck": 8},
    "pixel-global": {"pixel_outputs": 4, "passes": 2},
}

each = pytest.mark.parametrize(("method", "preset"), FOUND)


def resolved(**settings: Any) -> dict[str, Any]:
    """All options that a training with these settings has, by their full name."""
    return flatten(pretraining_options(settings).model_dump(mode="json"))


def set_by(method: str, preset: str) -> set[str]:
    """The options in which a preset is not the default."""
    default, values = resolved(method=method), resolved(method=method, preset=preset)
    return {key for key in default | values if default.get(key) != values.get(key)}


@pytest.mark.parametrize(("method", "preset"), PROMISED)
def test_a_preset_sets_what_it_promises_and_nothing_else(method: str, preset: str) -> None:
    promised, values = PROMISED[method, preset], resolved(method=method, preset=preset)
    assert {key: values[key] for key in promised} == promised
    of_another_network = {key for key in set_by(method, preset) if key.startswith("network.")}
    assert set_by(method, preset) - of_another_network <= promised.keys()
    assert bool(of_another_network) == ("network.name" in promised)


@each
def test_the_first_of_the_presets_is_the_default(method: str, preset: str) -> None:
    field = METHODS[method].options.model_fields["preset"]
    assert (set_by(method, preset) == set()) == (preset == field.default == get_args(field.annotation)[0])


@each
@pytest.mark.parametrize("sparse", [False, True])
def test_what_is_kept_is_what_it_sets_and_not_its_name(method: str, preset: str, sparse: bool) -> None:
    options: Any = pretraining_options({"method": method, "preset": preset})
    kept = options.model_dump(mode="json", exclude_defaults=sparse)  # sparse: as an identity is made of it
    assert "preset" not in kept
    if not sparse:
        assert pretraining_options(kept).model_dump(mode="json") == options.model_dump(mode="json")
    default = pretraining_options({"method": method}).model_dump(mode="json", exclude_defaults=sparse)
    assert (identity(kept) == identity(default)) == (set_by(method, preset) == set())


@each
def test_what_is_given_wins(method: str, preset: str) -> None:
    default, values = resolved(method=method), resolved(method=method, preset=preset)
    networks = {key for key in default | values if key.startswith("network.")}
    for key in set_by(method, preset) - networks:
        now = resolved(method=method, preset=preset, **nested({key: default[key]}))
        assert now == values | {key: default[key]}, key
    now = resolved(method=method, preset=preset, network={"name": "unet"})
    assert {key: now[key] for key in now.keys() & networks} == {key: default[key] for key in default.keys() & networks}


def test_a_network_that_is_given_counts_as_a_whole() -> None:
    """A recipe's `network: {widths: ...}` is one for its fine-tuning, too: a U-Net, as where no preset is asked for."""
    values = resolved(method="pcl", preset="paper", network={"widths": [4, 8]})
    assert (values["network.name"], values["network.widths"]) == ("unet", [4, 8])


def test_in_a_recipe() -> None:
    contenders = {"adopted": {"method": "pcl"}, "paper": {"method": "pcl", "preset": "paper", "threshold": 0.35}}
    settings = {"name": "x", "data": "d", "out": "o", "preprocess": {"size": [32, 32]}, "pretrain": contenders}
    for network, expected in (({}, "pcl-unet"), ({"widths": [4, 8]}, "unet")):
        recipe = make_recipe({**settings, "network": network})
        values = resolved(**pretraining_settings(recipe, "paper"))
        assert (values["threshold"], values["learning_rate"], values["network.name"]) == (0.35, 0.1, expected)
        assert resolved(**pretraining_settings(recipe, "adopted"))["learning_rate"] == 0.01


@each
@pytest.mark.parametrize("wrong", ["code", ["paper"], {"paper": 1}, 3])
def test_an_unknown_preset_is_refused(method: str, preset: str, wrong: Any) -> None:
    with pytest.raises(GlocalError, match=rf"pretrain\.preset.* does not fit: it must be '.*{preset}'"):
        pretraining_options({"method": method, "preset": wrong})


def test_where_the_defaults_are_the_text_there_is_no_preset() -> None:
    with pytest.raises(GlocalError, match=r"pretrain\.preset is not a setting"):
        pretraining_options({"method": "rotation", "preset": "paper"})


@each
def test_a_step_is_finite(method: str, preset: str, store: Store, cheap: dict[str, Any]) -> None:
    entry, network = method_named(method), resolved(method=method, preset=preset)["network.name"]
    settings = {**cheap, "method": method, "preset": preset, **SMALL.get(method, {})}
    options: Any = pretraining_options({**settings, "network": {"name": network, **TINY[network]}})
    for _, make in entry.stages(options):
        torch.manual_seed(0)
        stage = make(build(options.network, 1, 3), Pool(store, CASES), options).train()
        loss = stage.losses(0)["loss"]
        loss.backward()
        assert loss.isfinite()
        gradients = [p.grad for p in stage.network.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients)
