"""What varies in an experiment: axes, their options, every combination, and what is refused."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import yaml

from glocal.errors import GlocalError
from glocal.experiments.grid import (
    ExperimentOptions,
    Variant,
    baseline_of,
    chosen_options,
    experiment_options,
    nested,
    option_name,
    variants,
)
from glocal.experiments.recipe import make_recipe, recipe_names, recipe_text
from glocal.experiments.trainings import budgets_of

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": "data",
    "out": "out",
    "preprocess": {"size": [32, 32]},
    "network": {"widths": [4, 8]},
    "pretrain": {"pcl": {"method": "pcl"}, "gcl": {"method": "gcl"}},
    "finetune": {"labels": [1, 2], "batch": 5},
}


def options_of(text: str) -> ExperimentOptions:
    """The part `experiment` as a YAML file has it."""
    return experiment_options(yaml.safe_load(text) or {})


def found_in(text: str, **settings: Any) -> list[Variant]:
    return variants({**RECIPE, **settings}, options_of(text))


def axes_in(text: str, **settings: Any) -> dict[str, list[str]]:
    found = found_in(text, **settings)
    return {axis: list(dict.fromkeys(v.axes[axis] for v in found)) for axis in found[0].axes}


def one(found: Sequence[Variant], **axes: str) -> Variant:
    (variant,) = (v for v in found if {**v.axes, **axes} == dict(v.axes))
    return variant


def test_contenders_and_budgets_of_the_recipe_are_always_axes() -> None:
    found = found_in("")
    places = [(v.axes["contender"], v.axes["labels"]) for v in found]
    assert places == [(c, n) for c in ("random", "pcl", "gcl") for n in ("1", "2")]
    for variant in found:
        assert variant.contender == variant.axes["contender"]
        assert budgets_of(variant.recipe) == [int(variant.axes["labels"])]
        assert variant.recipe.finetune["batch"] == 5
    assert axes_in("", compare=["gcl"])["contender"] == ["random", "gcl"]
    assert axes_in("", finetune={"labels": ["case0", "case1"]})["labels"] == ["2"]  # one budget, of named cases


def test_axes_of_the_experiment_take_the_place_of_the_recipe_s() -> None:
    text = "vary: {labels: [3, all], strategy: [supervised], contender: [pcl, random]}"
    assert axes_in(text) == {"strategy": ["supervised"], "contender": ["pcl", "random"], "labels": ["3", "all"]}
    found = found_in(text)
    assert [tuple(v.axes.values()) for v in found] == [
        ("supervised", contender, labels) for contender in ("pcl", "random") for labels in ("3", "all")
    ]
    assert [budgets_of(v.recipe) for v in found[:2]] == [[3], ["all"]]
    assert found[0].recipe.finetune["strategy"] == "supervised"
    assert found[0].method == {"strategy": "supervised", "contender": "pcl"}


def test_any_key_of_the_recipe_may_vary() -> None:
    text = "vary: {finetune.learning_rate: [0.1, 0.01], pretrain.pcl.threshold: [0.2], network: [unet], seed: [3, 4]}"
    found = found_in(text)
    assert len(found) == 2 * 1 * 1 * 2 * 3 * 2
    variant = one(found, **{"finetune.learning_rate": "0.01", "seed": "4", "contender": "pcl", "labels": "1"})
    recipe = variant.recipe
    assert recipe.finetune == {"labels": 1, "batch": 5, "learning_rate": 0.01}
    assert (recipe.seed, recipe.pretrain["pcl"]["threshold"]) == (4, 0.2)
    assert recipe.network == {"name": "unet", "widths": [4, 8]}


def test_an_option_may_bring_settings() -> None:
    text = """
    vary:
      contender: {random: , pcl: {pretrain.pcl.threshold: 0.3, finetune: {learning_rate: 0.5}}}
      labels: {1: {max_iterations: 7}, all: {}}
      finetune.batch: {2: {finetune.weight_decay: 0.25}, 4: {}}
    """
    found = found_in(text)
    assert axes_in(text) == {"contender": ["random", "pcl"], "finetune.batch": ["2", "4"], "labels": ["1", "all"]}
    rich = one(found, contender="pcl", labels="1", **{"finetune.batch": "2"}).recipe
    assert rich.pretrain["pcl"] == {"method": "pcl", "threshold": 0.3}
    assert rich.finetune == {"labels": 1, "batch": 2, "learning_rate": 0.5, "weight_decay": 0.25}
    assert rich.max_iterations == 7
    plain = one(found, contender="random", labels="all", **{"finetune.batch": "4"}).recipe
    assert plain.finetune == {"labels": "all", "batch": 4}
    assert (plain.pretrain["pcl"], plain.max_iterations) == ({"method": "pcl"}, None)


def test_an_axis_of_its_own_name_replaces_the_contender() -> None:
    text = """
    vary:
      method:
        random: {contender: random}
        pcl slow: {contender: pcl, finetune.learning_rate: 0.0001}
        two: {contender: gcl@global, finetune: {strategy: supervised}}
    """
    found = found_in(text)
    assert axes_in(text) == {"method": ["random", "pcl slow", "two"], "labels": ["1", "2"]}
    assert [v.contender for v in found] == ["random", "random", "pcl", "pcl", "gcl@global", "gcl@global"]
    slow = one(found, method="pcl slow", labels="2").recipe
    assert (slow.finetune["learning_rate"], budgets_of(slow)) == (0.0001, [2])
    assert "learning_rate" not in one(found, method="two", labels="1").recipe.finetune


def test_an_axis_of_its_own_name_replaces_the_budgets() -> None:
    text = "vary: {cases: {mine: {labels: [case0, case1]}, theirs: {labels: [case2]}}}"
    assert axes_in(text) == {"cases": ["mine", "theirs"], "contender": ["random", "pcl", "gcl"], "labels": ["-"]}
    assert budgets_of(one(found_in(text), cases="mine", contender="pcl").recipe) == [("case0", "case1")]


def test_an_axis_may_be_called_like_a_part_of_the_recipe() -> None:
    text = "vary: {preprocess: {coarse: {preprocess.size: [16, 16]}, fine: {}}}"
    sizes = {v.axes["preprocess"]: v.recipe.preprocess.size for v in found_in(text)}
    assert sizes == {"coarse": (16, 16), "fine": (32, 32)}


def test_nested_and_dotted_settings_are_the_same() -> None:
    assert nested({"finetune.batch": 2, "finetune": {"validation": 1}}) == {"finetune": {"batch": 2, "validation": 1}}
    assert nested({"network": "unet"}) == {"network": {"name": "unet"}}
    assert nested({"network": {"widths": [4]}}) == {"network": {"widths": [4]}}
    assert nested({"contender": "pcl", "labels": 3}) == {"compare": ["pcl"], "finetune": {"labels": 3}}


def test_options_are_called_as_people_write_them() -> None:
    written = [(1, "1"), (0.0001, "0.0001"), (True, "true"), (False, "false"), ("all", "all"), (None, "None")]
    assert [option_name(value) for value, _ in written] == [text for _, text in written]
    assert option_name(["case1", "case2", "case3"]) == "3"
    assert option_name([1, 2]) == "[1, 2]"
    assert axes_in("vary: {finetune.learning_rate: [1e-3, 0.5]}")["finetune.learning_rate"] == ["1e-3", "0.5"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("vari: {}", r"experiment\.vari is not a setting: did you mean 'vary'"),
        ("tune: {trails: 2}", r"experiment\.tune\.trails is not a setting: did you mean 'trials'"),
        ("tables: {dice: {metrik: dice}}", r"metrik is not a setting: did you mean 'metric'"),
        ("vary: [labels]", r"experiment\.vary=\[labels\] does not fit"),
        ("vary: {labels: 1}", r"experiment\.vary\.labels does not fit: give a list of values"),
        ("vary: {finetune: {batch: [2, 3]}}", r"written in one, such as finetune\.batch: \[2, 4\]"),
        ("vary: {labels: []}", r"experiment\.vary\.labels names no option"),
        ("vary: {contender: {}}", r"experiment\.vary\.contender names no option"),
        ("vary: {contendor: [random, pcl]}", "contendor is no key of the recipe, .* did you mean 'contender'"),
        ("vary: {contendor: {random: {}, pcl: {}}}", "contendor is no key of the recipe, .* did you mean 'contender'"),
        ("vary: {stratgy: [supervised]}", "stratgy is no key of the recipe, .* did you mean 'strategy'"),
        ("vary: {finetune.batsh: [2, 3]}", r"finetune\.batsh is not a setting: did you mean 'batch'"),
        ("vary: {finetune.batsh: {2: {}, 3: {}}}", r"finetune\.batsh is not a setting: did you mean 'batch'"),
        ("vary: {finetne.batch: [2, 3]}", "finetne is not a setting: did you mean 'finetune'"),
        ("vary: {labels: {1: {finetune.batsh: 2}, 2: {}}}", "contender=random, labels=1 is not possible: .* 'batch'"),
        ("vary: {contender: [pcl, pcll]}", "contender=pcll, labels=1 is not possible: .* did you mean 'pcl'"),
        ("vary: {contender: [gcl@globl]}", "contender=gcl@globl, labels=1 is not possible: .* did you mean 'global'"),
        ("vary: {strategy: [supervized]}", "strategy=supervized, contender=random, labels=1 is not possible"),
        ("vary: {finetune.batch: [2, -1]}", r"finetune\.batch=-1, contender=random, labels=1 is not possible"),
        ("vary: {labels: [[1, 2]]}", r"labels=\[1, 2\] is not possible: it needs one value of labels, not 1 and 2"),
        ("vary: {way: {a: {contender: pcl}, b: {seed: 3}}}", "way=b, .* needs one value of contender, not none"),
        ("vary: {way: {a: {contender: [pcl, gcl]}}}", "way=a, .* needs one value of contender, not pcl and gcl"),
        ("vary: {labels: [[a, b], [c, d]]}", r"experiment\.vary\.labels has two options called 2"),
        ("vary: {contender: [pcl, pcl]}", "two options called pcl"),
        (
            "vary: {way: {a: {seed: 3}, b: {seed: 3}}}",
            r"options a and b of experiment\.vary\.way have the same settings",
        ),
        ("vary: {compare: [pcl]}", r"experiment\.vary\.compare has a shorter name: call this axis contender"),
        ("vary: {finetune.labels: [1]}", "call this axis labels"),
        ("vary: {split: {a: {seed: 3}, b: {seed: 4}}}", r"experiment\.vary\.split is called like a column"),
        (
            "vary: {seed: [1, 2], way: {a: {seed: 3}, b: {contender: pcl}}}",
            r"The axes seed and way of experiment\.vary both set seed: leave it to one",
        ),
        ("vary: {contender: [pcl], way: {a: {contender: gcl}, b: {}}}", "both set compare"),
    ],
)
def test_what_cannot_be_is_refused_by_name(text: str, sentence: str) -> None:
    with pytest.raises(GlocalError, match=sentence) as refused:
        found_in(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "baseline"),
    [
        ("", {"contender": "random"}),
        ("vary: {contender: [pcl, random, gcl]}", {"contender": "random"}),
        ("vary: {contender: [pcl, gcl]}", {"contender": "pcl"}),
        ("vary: {way: {slow: {contender: pcl}, fast: {contender: gcl}}}", {"way": "slow"}),
        ("baseline: {contender: pcl}", {"contender": "pcl"}),
        ("baseline: {labels: 1}", {"labels": "1"}),
        ("{vary: {finetune.batch: [2, 4]}, baseline: {finetune.batch: 4, contender: gcl}}", None),
        ("{vary: {protocol.transductive: [true, false]}, baseline: {protocol.transductive: true}}", None),
    ],
)
def test_the_baseline_is_as_said_or_the_first(text: str, baseline: Mapping[str, str] | None) -> None:
    expected = baseline or {axis: option_name(value) for axis, value in yaml.safe_load(text)["baseline"].items()}
    assert baseline_of(options_of(text), found_in(text)) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("baseline: {contendr: pcl}", "names the axis 'contendr': did you mean 'contender'"),
        ("baseline: {contender: gcll}", "names contender=gcll: did you mean 'gcl'"),
        ("baseline: {labels: 7}", "names labels=7: choose one of 1, 2"),
    ],
)
def test_an_unknown_baseline_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(GlocalError, match=sentence):
        baseline_of(options_of(text), found_in(text))


def test_a_list_chooses_among_options_with_their_settings() -> None:
    long: dict[str, Any] = {"finetune.max_iterations": 9}
    of_recipe = {"labels": {1: {}, 2: None, "all": long}, "way": {"a": {"seed": 3}, "b": {"seed": 4}}, "seed": [1, 2]}

    def after(**words: Any) -> Mapping[str, Any]:
        return chosen_options(of_recipe | words, of_recipe)

    assert after() == of_recipe
    assert list(after(labels=["all", 1])["labels"].items()) == [("all", long), (1, {})]
    assert after(labels=["1"])["labels"] == {"1": {}}
    assert after(labels=[4, "all"])["labels"] == {4: {}, "all": long}  # what the recipe does not have is new
    assert after(way=["b"])["way"] == {"b": {"seed": 4}}
    assert after(labels={"all": {}})["labels"] == {"all": {}}
    named: list[Any] = [["case0", "case1"], {"a": 1}]
    for untouched in ({"seed": [2]}, {"labels": ["all", "all"]}, {"labels": named}, {"cases": ["x"]}):
        assert after(**untouched) == of_recipe | untouched
    with pytest.raises(GlocalError, match=r"experiment\.vary\.way has no option 'c': choose one of a, b"):
        after(way=["b", "c"])


def test_names_are_given_to_options_that_yaml_reads_as_numbers_or_truth() -> None:
    assert options_of("names: {2: two, true: with, 0.5: half, pcl: PCL}").names == {
        "2": "two",
        "true": "with",
        "0.5": "half",
        "pcl": "PCL",
    }


def test_settings_of_a_variant_are_changed_by_dotted_keys() -> None:
    variant = found_in("")[0]
    other = variant.given({"finetune.batch": 9, "labels": 4})
    assert (other.recipe.finetune, dict(other.axes)) == ({"labels": 4, "batch": 9}, dict(variant.axes))
    assert variant.recipe.finetune["batch"] == 5


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_are_experiments(name: str) -> None:
    settings = yaml.safe_load(recipe_text(name))
    given = settings.pop("experiment", {})
    settings = {"name": name, **settings, "data": "data", "out": "out"}
    settings["preprocess"] = {"size": [32, 32], **{k: v for k, v in settings["preprocess"].items() if k != "auto"}}
    for part in ("network", "finetune", "pretrain"):
        settings.get(part, {}).pop("auto", None)
    options = experiment_options(given)
    found = variants(settings, options)
    baseline_of(options, found)
    assert {v.contender for v in found} >= {"random"}
    assert make_recipe(settings).name == name
