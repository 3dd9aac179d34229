"""Every method pre-trains every network: from which image size on, stands in a table of docs/methods.md."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from method_checks import ALL

from glocal.data.plan import PreprocessOptions
from glocal.data.preprocess import preprocess
from glocal.data.sampling import Pool
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.networks.registry import NETWORKS, build, network_options
from glocal.pretraining.registry import METHODS, method_named, pretraining_options

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"
LABELLED = ("case0", "case1", "case2")
LARGEST = 6  # pixels of the bottleneck along an axis

# Narrow, with the three decoder blocks or more that gcl trains.
NETWORK: dict[str, dict[str, Any]] = {
    "unet": {"widths": [2, 3, 4, 4]},
    "pcl-unet": {"widths": [2, 3, 4, 4]},
    "attention-unet": {"widths": [2, 3, 4, 4]},
    "uctransnet": {"widths": [2, 4, 6, 6], "depth": 1, "heads": 2, "positions": 3},
    "bcdu-net": {"widths": [2, 3, 4, 4], "dense": 2},
    "resnet50-unet": {"width": 2, "decoder_widths": [6, 5, 4, 3, 2]},
    "nnunet-plain": {"widths": [4, 6, 8, 8]},
    "nnunet-residual": {"widths": [4, 6, 8, 8], "depths": [1, 1, 1]},
}
# Few slices and narrow heads; what decides the size of the images is as by default, but for patches of 5 pixels.
NARROW = {"batch": 4, "hidden": 8, "outputs": 8}
METHOD: dict[str, dict[str, Any]] = {
    "byol": NARROW,
    "context-restoration": {"batch": 4, "patch": 3},
    "dino": {**NARROW, "bottleneck": 6},
    "gcl": {"volumes": 2, "hidden": 8, "outputs": 8, "local_batch": 4},
    "ideal": {"batch": 4, "outputs": 8},
    "inpainting": {"batch": 4},
    "jcl": {"batch": 4, "outputs": 8},
    "label-efficient": {**NARROW, "local_batch": 4},
    "moco": {"batch": 4, "outputs": 8, "queue": 8},
    "pcl": {"batch": 4, "outputs": 8},
    "pgl": {"batch": 4, "outputs": 8},
    "pixel-global": {"batch": 4, "outputs": 8, "pixel_outputs": 4, "passes": 2},
    "rotation": {"batch": 4},
    "simclr": {"batch": 4, "outputs": 8},
    "simsiam": NARROW,
    "simtriplet": NARROW,
    "swav": {**NARROW, "prototypes": 10},
}

Smallest = Callable[[str, str], str]


@pytest.fixture(scope="module")
def smallest(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Smallest:
    """What the table says of a method and a network, found by trying."""
    folder = tmp_path_factory.mktemp("sizes")

    @cache
    def store(side: int) -> Store:
        return preprocess(raw, folder / str(side), PreprocessOptions(size=(side, side)), workers=1)

    def works(method: str, network: str, side: int, refusals: list[str]) -> bool:
        try:
            return learns(method, network, store(side))
        except GlocalError as refusal:
            refusals.append(str(refusal))
            return False

    def found(method: str, network: str) -> str:
        multiple, refusals = build(network_options({"name": network, **NETWORK[network]}), 1, 3).multiple, list[str]()
        sizes = (size for size in range(1, LARGEST + 1) if works(method, network, size * multiple, refusals))
        smallest = str(next(sizes, ""))
        assert all(map(is_a_sentence, refusals)), refusals
        return smallest

    return found


def learns(method: str, network: str, store: Store) -> bool:
    """Whether one step of each stage gives each part that it trains a gradient; whatever it gives must be finite."""
    settings = {"method": method, "device": "cpu", "network": {"name": network, **NETWORK[network]}, **METHOD[method]}
    options: Any = pretraining_options(settings)
    entry = method_named(method)
    pools = [Pool(store, ALL), *([Pool(store, LABELLED)] if entry.uses_labels else [])]
    reached = []
    for _, make in entry.stages(options):
        torch.manual_seed(options.seed)
        stage = make(build(options.network, 1, 3), pools[0], options, *pools[1:]).train()
        loss = stage.losses(0)["loss"]
        loss.backward()
        assert loss.isfinite()
        for part in stage.trained:
            gradients = [weight.grad for weight in stage.network.get_submodule(part).parameters()]
            assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients), part
            reached.append(any(gradient.any() for gradient in gradients if gradient is not None))
    return all(reached)


def is_a_sentence(text: str) -> bool:
    return text[0].isupper() and text.endswith(".") and "\n" not in text and ": " in text


def documented() -> dict[str, dict[str, str]]:
    """The table in the docs: method, then network, then what its cell says."""
    section = DOCS.read_text(encoding="utf-8").split("\n## Methods and networks\n")[1].split("\n## ")[0]
    lines = [line.strip("|") for line in section.splitlines() if line[:1] == "|"]
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in lines]
    (_, *networks), _, *rows = rows
    return {method: dict(zip(networks, cells, strict=True)) for method, *cells in rows}


def test_the_table_has_every_method_and_every_network() -> None:
    table = documented()
    assert table.keys() == METHODS.keys() == METHOD.keys()
    assert all(row.keys() == NETWORKS.keys() == NETWORK.keys() for row in table.values())


@pytest.mark.parametrize("network", NETWORK)
@pytest.mark.parametrize("method", METHOD)
def test_a_step_reaches_all_that_is_trained_from_the_size_on_that_the_table_says(
    method: str, network: str, smallest: Smallest
) -> None:
    assert documented()[method][network] == smallest(method, network)
