"""A dataset so small that every test may train on it."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from glocal.checkpoints import checkpoint_in, training_state
from glocal.data.image import Geometry, write_volume
from glocal.data.plan import PreprocessOptions
from glocal.data.preprocess import preprocess
from glocal.data.store import Store
from glocal.files import write_json
from glocal.finetuning.finetune import finetune
from glocal.pretraining.pretrain import pretrain

sys.path.append(str(Path(__file__).parent))  # for `pair`

SLICES = {"case0": 5, "case1": 6, "case2": 7, "case3": 8, "case4": 5, "case5": 6}
SPLIT = {"pretrain": ["case0", "case1", "case2", "case3"], "development": ["case4"], "test": ["case5"]}
LABELS = {"background": 0, "wall": 1, "blood": 2}
SIDE = 32

Array = NDArray[Any]
WriteDataset = Callable[..., Path]


def heart(slices: int, seed: int) -> tuple[Array, Array]:
    """Image and labels `(z, y, x)`: a bright disc in a dark ring, tapering towards the last slice, off the centre."""
    rng = np.random.default_rng(seed)
    z, y, x = np.mgrid[:slices, :SIDE, :SIDE]
    row, column = 14 + rng.uniform(0, 3, 2)
    distance = np.hypot(y - row, 1.2 * (x - column)) + 4 * z / slices
    labels = (distance < 11).astype(np.uint8) + (distance < 7)
    image = np.array([400.0, 150.0, 900.0])[labels] + 4 * x + 60 * rng.normal(size=labels.shape)
    return image.astype(np.float32), labels


def geometry(slices: int) -> Geometry:
    return Geometry((SIDE, SIDE, slices), (1.5, 1.5, 8.0), (-20.0, 10.0, 30.0))


@pytest.fixture(scope="session")
def write_dataset() -> WriteDataset:
    """Write a raw dataset: `write_dataset(root, {case: slices}, labelled cases, split)`."""

    def write(
        root: Path, slices: Mapping[str, int], labelled: Sequence[str], split: Mapping[str, Sequence[str]] | None = None
    ) -> Path:
        for seed, (case, count) in enumerate(slices.items()):
            image, labels = heart(count, seed)
            write_volume(root / "imagesTr" / f"{case}_0000.nii.gz", image, geometry(count))
            if case in labelled:
                write_volume(root / "labelsTr" / f"{case}.nii.gz", labels, geometry(count))
        description = {"name": "Tiny", "channel_names": {"0": "MRI"}, "labels": LABELS, "file_ending": ".nii.gz"}
        write_json(root / "dataset.json", {**description, "numTraining": len(labelled)})
        if split is not None:
            write_json(root / "split.json", split)
        return root

    return write


@pytest.fixture(scope="session")
def preprocessing() -> PreprocessOptions:
    return PreprocessOptions(size=(SIDE, SIDE))


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory, write_dataset: WriteDataset) -> Path:
    """Six subjects: four to train on (case3 without labels), one for development, one for testing."""
    labelled = [case for case in SLICES if case != "case3"]
    return write_dataset(tmp_path_factory.mktemp("raw") / "tiny", SLICES, labelled, SPLIT)


@pytest.fixture(scope="session")
def store(raw: Path, preprocessing: PreprocessOptions) -> Store:
    return preprocess(raw, raw.parent / "store", preprocessing, workers=1)


@pytest.fixture(scope="session")
def cheap() -> dict[str, Any]:
    """Settings of every training here: a network of a few thousand weights, on the CPU, without loggers."""
    network = {"name": "unet", "widths": [4, 8, 8]}
    return {"network": network, "device": "cpu", "precision": "float32", "log": [], "seed": 3}


@pytest.fixture(scope="session")
def pretrained(store: Store, cheap: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a pre-training of the encoder."""
    run = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain(store, run, {**cheap, "method": "pcl", "max_iterations": 12, "batch": 8, "outputs": 16})
    return run


@pytest.fixture(scope="session")
def finetuned(store: Store, pretrained: Path, cheap: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a fine-tuning on two volumes, with one for validation: it has learnt its simple task."""
    run = tmp_path_factory.mktemp("finetuned") / "run"
    settings = {"labels": 2, "validation": 1, "max_iterations": 150, "batch": 6, "learning_rate": 0.01}
    finetune(store, run, {**cheap, **settings, "evaluate_every": 25}, pretrained)
    return run


@pytest.fixture(scope="session")
def pair() -> Iterator[Any]:
    """Two processes that train as one."""
    from pair import Pair

    two = Pair()
    yield two
    two.close()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test begins alike whatever ran before it: on several cores their order changes."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # more are slower with tensors this small


@pytest.fixture
def begun_long_ago() -> Callable[[Path], None]:
    """Make the checkpoint in a folder one of a training that has taken 1000 seconds."""

    def age(folder: Path) -> None:
        facts = training_state(folder) | {"seconds": 1000.0}
        path = checkpoint_in(folder)
        save_file(load_file(path), path, metadata={"glocal": json.dumps(facts)})

    return age
