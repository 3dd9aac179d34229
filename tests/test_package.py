"""`import glocal` offers a function for every command, and costs nothing until one is used."""

import inspect
import subprocess
import sys

import pytest

import glocal
from glocal.data.preprocess import preprocess
from glocal.experiments.methods import methods
from glocal.experiments.recipe import recipe_names
from glocal.finetuning.registry import STRATEGIES
from glocal.inference import predict
from glocal.networks.registry import NETWORKS
from glocal.pretraining.registry import METHODS


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import glocal; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert [name for name in loaded if name.startswith("glocal")] == ["glocal"]
    assert not {"torch", "numpy", "typer", "yaml"} & set(loaded)


@pytest.mark.parametrize(
    ("module", "spared"),
    [
        ("glocal.cli", ["numpy", "pydantic", "yaml", "rich.progress"]),
        ("glocal.data.check", ["torch", "pydantic", "pandas", "scipy", "matplotlib", "monai"]),
        ("glocal.pretraining.pretrain", ["pandas", "scipy", "matplotlib", "monai", "mlflow", "tensorboard"]),
        ("glocal.finetuning.losses", ["monai"]),
    ],
)
def test_nothing_slow_is_imported_before_it_is_needed(module: str, spared: list[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(spared) & set(done.stdout.split())


@pytest.mark.parametrize("name", glocal.__all__)
def test_every_command_is_a_documented_function(name: str) -> None:
    function = getattr(glocal, name)
    assert inspect.isfunction(function)
    assert inspect.getdoc(function)
    assert name in dir(glocal)


def test_they_are_the_functions_of_the_rooms() -> None:
    assert glocal.predict is predict
    assert glocal.preprocess is preprocess
    assert glocal.recipes is recipe_names


def test_all_names_have_a_place_and_no_other_name_has() -> None:
    assert glocal._WHERE.keys() == set(glocal.__all__)
    with pytest.raises(AttributeError, match="module 'glocal' has no attribute 'segment'"):
        _ = glocal.segment


def test_modules_of_the_package_are_still_found() -> None:
    import glocal.evaluation.metrics

    assert inspect.ismodule(glocal.evaluation)
    assert inspect.isfunction(glocal.evaluate)
    assert glocal.__version__


def test_methods_gives_every_registered_name_with_its_paper() -> None:
    found = methods()
    registries = (METHODS, STRATEGIES, NETWORKS)
    assert [set(entries) for entries in found.values()] == [set(registry) for registry in registries]
    known = found["Pre-training methods"]
    assert known["rotation"] == (METHODS["rotation"].summary, METHODS["rotation"].paper)
    assert known["pcl"] == (f"{METHODS['pcl'].summary} (preset=adopted|paper)", METHODS["pcl"].paper)
    assert all(summary and paper for entries in found.values() for summary, paper in entries.values())
