"""A recipe is validated as a whole before anything runs: every part, every contender, every name."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from glocal.errors import GlocalError
from glocal.experiments.derive import derived
from glocal.experiments.design import axes_of
from glocal.experiments.grid import baseline_of, experiment_options, variants
from glocal.experiments.layout import check_layout
from glocal.experiments.recipe import Recipe, make_recipe, read_recipe, recipe_names, recipe_text
from glocal.finetuning.registry import finetuning_options
from glocal.pretraining.registry import METHODS, method_named, pretraining_options

DOCUMENTED = Path(__file__).parents[2] / "docs" / "results"
SETTINGS: dict[str, Any] = {
    "name": "mine",
    "data": "hearts",
    "out": "run",
    "seed": 3,
    "device": "cpu",
    "network": {"name": "unet", "widths": [4, 8]},
    "preprocess": {"size": [32, 32]},
    "pretrain": {
        "pcl": {"method": "pcl", "max_iterations": 7},
        "gcl": {"method": "gcl", "seed": 5, "network": {"widths": [8, 8]}},
    },
    "finetune": {"labels": [1, 2], "max_iterations": 9},
}


def changed(**changes: Any) -> Recipe:
    return make_recipe({**SETTINGS, **changes})


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_is_valid_and_says_what_it_is_for(name: str, raw: Path) -> None:
    settings = read_recipe(name, [f"data={raw}", "out=run", "device=cpu"])
    options = experiment_options(settings.pop("experiment", {}))
    recipe = make_recipe(derived(settings))
    assert variants(settings, options) if options.vary else True
    assert recipe.name == name
    assert recipe.summary
    assert recipe.contenders()[0] == "random"
    assert len(recipe.contenders()) > 1
    assert finetuning_options(recipe.part(recipe.finetune)).labels


@pytest.mark.parametrize("path", sorted(DOCUMENTED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_beside_its_results_still_reads(path: Path) -> None:
    settings = read_recipe(str(path), ["data=hearts", "out=run", "device=cpu"])
    options = experiment_options(settings.pop("experiment"))
    found = variants(settings, options)
    for variant in found:
        finetuning_options(variant.recipe.part(variant.recipe.finetune))
    for table in options.tables.values():
        check_layout(table, axes_of(found))
    assert baseline_of(options, found)
    assert settings["summary"]


def test_there_is_a_recipe_for_the_demonstration_and_for_ones_own_data() -> None:
    assert {"auto", "phantom-small", "acdc-small"} <= set(recipe_names())


def test_a_recipe_tries_every_method_on_the_data_of_the_demonstration() -> None:
    settings, demonstration = read_recipe("phantom-methods"), read_recipe("phantom-small")
    pretrain = settings["pretrain"]
    assert {name: part["method"] for name, part in pretrain.items()} == {name: name for name in METHODS}
    assert all(settings[part] == demonstration[part] for part in ("preprocess", "network", "finetune", "protocol"))
    both = [pretraining_options(recipe["pretrain"]["pcl"]) for recipe in (settings, demonstration)]
    assert both[0] == both[1]
    shared = ("max_iterations", "optimizer", "learning_rate", "weight_decay", "schedule", "warmup_iterations")
    options = [pretraining_options(part) for part in pretrain.values()]
    assert len({tuple(getattr(one, name) for name in shared) for one in options}) == 1
    chosen = make_recipe({**settings, "data": "hearts", "out": "run", "compare": ["random", "byol"]})
    assert chosen.contenders() == ("random", "byol")


def test_what_is_said_once_reaches_every_part_unless_the_part_says_otherwise() -> None:
    recipe = changed(precision="float32")
    pcl, gcl = (pretraining_options(recipe.part(recipe.pretrain[name])) for name in ("pcl", "gcl"))
    finetune = finetuning_options(recipe.part(recipe.finetune))
    assert (pcl.seed, gcl.seed, finetune.seed) == (3, 5, 3)
    assert {options.device for options in (pcl, gcl, finetune)} == {"cpu"}
    assert {options.precision for options in (pcl, gcl, finetune)} == {"float32"}
    widths = [options.model_dump()["network"]["widths"] for options in (pcl, gcl, finetune)]
    assert widths == [(4, 8), (8, 8), (4, 8)]


def test_one_word_makes_every_training_short() -> None:
    recipe = changed(max_iterations=2)
    parts = [recipe.part(part) for part in (*recipe.pretrain.values(), recipe.finetune)]
    assert [part["max_iterations"] for part in parts] == [2, 2, 2]
    assert changed().part(SETTINGS["finetune"])["max_iterations"] == 9


def test_random_is_compared_first_and_each_contender_once() -> None:
    assert changed().contenders() == ("random", "pcl", "gcl")
    assert changed(compare=["gcl@global", "random", "gcl", "gcl"]).contenders() == ("random", "gcl@global", "gcl")
    assert changed(compare=["random"]).contenders() == ("random",)
    assert changed(pretrain={}).contenders() == ("random",)


def test_random_is_left_out_where_nothing_can_be_compared_unless_it_is_asked_for() -> None:
    assert changed().contenders(measured=False) == ("pcl", "gcl")
    assert changed(compare=["random", "pcl"]).contenders(measured=False) == ("random", "pcl")
    assert changed(pretrain={}).contenders(measured=False) == ("random",)


def test_the_stages_that_can_be_compared_are_those_of_the_method() -> None:
    options = pretraining_options(SETTINGS["pretrain"]["gcl"])
    for stage, _ in method_named("gcl").stages(options):
        assert changed(compare=[f"gcl@{stage}"]).contenders()[-1] == f"gcl@{stage}"
    without_second = {"gcl": {**SETTINGS["pretrain"]["gcl"], "local": "none"}}
    with pytest.raises(GlocalError, match=r"compare names 'gcl@local': did you mean 'global'"):
        changed(pretrain=without_second, compare=["gcl@local"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"compare": ["pcll"]}, "compare names 'pcll': did you mean 'pcl'?"),
        ({"compare": ["supervised"]}, "compare names 'supervised': choose one of random, pcl, gcl."),
        ({"compare": ["gcl@globl"]}, "compare names 'gcl@globl': did you mean 'global'?"),
        ({"compare": ["random@global"]}, "compare names 'random@global': did you mean 'random'?"),
        ({"compare": "pcl"}, "compare=pcl does not fit: it must be a list in brackets."),
        ({"finetun": {}}, "finetun is not a setting: did you mean 'finetune'?"),
        ({"finetune": {"label": 2}}, "finetune.label is not a setting: did you mean 'labels'?"),
        ({"network": {"widhts": [8]}}, "network.widhts is not a setting: did you mean 'widths'?"),
        ({"network": {"name": "vnet"}}, "There is no network 'vnet': did you mean 'unet'?"),
        ({"network": {"name": "uctransnet", "head": 2}}, "network.head is not a setting: did you mean 'heads'?"),
        ({"precision": "half"}, "precision=half does not fit: it must be 'auto', 'float32' or 'bfloat16'."),
        (
            {"protocol": {"tta": True}, "finetune": {"augmentation": {"spatial": "none"}}},
            "protocol.tta=true, but slices are never turned, zoomed, shifted or mirrored in this fine-tuning (windows, "
            "stretching and elastic changes do not count), so its network will know no moved views: leave it out, or "
            "move slices by augmentation.spatial.",
        ),
        ({"max_iterations": -1}, "max_iterations=-1 does not fit: it must be at least 1."),
        ({"protocol": {"draw": 3}}, "protocol.draw is not a setting: did you mean 'draws'?"),
        (
            {"preprocess": {"size": [32, 32], "spacin": 1}},
            "preprocess.spacin is not a setting: did you mean 'spacing'?",
        ),
        ({"pretrain": {"a": 3}}, "pretrain.a=3 does not fit: it must be settings of its own (key: value)."),
        (
            {"pretrain": {"a": {}}},
            f"pretrain.a: A pre-training needs the key method: choose one of {', '.join(METHODS)}.",
        ),
        (
            {"pretrain": {"a": {"method": "pcd"}}},
            "pretrain.a: There is no pre-training method 'pcd': did you mean 'pcl'?",
        ),
        (
            {"pretrain": {"a": {"method": "pcl", "augmentation": {"spatial": {"rotatio": 3}}}}},
            "pretrain.a.augmentation.spatial.rotatio is not a setting: did you mean 'rotation'?",
        ),
    ],
)
def test_what_is_wrong_is_said_by_its_place_in_the_recipe(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GlocalError) as raised:
        changed(**changes)
    assert str(raised.value) == sentence


@pytest.mark.parametrize("name", ["random", "a/b", "a@b", "../a", ""])
def test_a_contender_has_a_name_that_can_be_a_folder(name: str) -> None:
    with pytest.raises(GlocalError, match=r"^pretrain\..*: choose another name"):
        changed(pretrain={name: {"method": "pcl"}})


def test_a_file_is_a_recipe_too_and_words_go_over_it(tmp_path: Path) -> None:
    path = tmp_path / "heart.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in SETTINGS.items() if key != "name"}))
    settings = read_recipe(str(path), ["seed=9", "pretrain.pcl.threshold=2e-1", "out=there"])
    assert settings["name"] == "heart"
    assert (settings["seed"], settings["pretrain"]["pcl"]["threshold"]) == (9, 0.2)
    assert settings["pretrain"]["gcl"] == SETTINGS["pretrain"]["gcl"]
    assert make_recipe(settings).out == Path("there")


def test_a_packaged_recipe_can_be_shown_and_saved_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "copy.yaml").write_text(recipe_text("acdc-small"))
    copy = read_recipe(str(tmp_path / "copy.yaml"))
    assert {**copy, "name": "acdc-small"} == read_recipe("acdc-small")


def test_an_unknown_recipe_suggests_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(GlocalError, match=r"no recipe 'acdc_small' .*: did you mean 'acdc-small'\?"):
        read_recipe("acdc_small")
    with pytest.raises(GlocalError, match=r"absent\.yaml"):
        read_recipe(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: 1\nb: [1, 2\nc: 3\n", r"is not valid YAML \(line 3\)"),
        (b"a: \x07", "is not valid YAML"),
        (b"- a\n- b\n", "is not a list of `key: value` settings"),
        (b"", "is not a list of `key: value` settings"),
        (b"\xff\xfe\x00", r"save it as plain text \(UTF-8\)"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_sentence(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(GlocalError, match=words) as raised:
        read_recipe(str(path))
    assert "broken.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)
