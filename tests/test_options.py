"""Words of people become typed settings; whatever does not fit is one sentence that names the key and the way out."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from glocal.data.plan import PreprocessOptions
from glocal.data.split import ProtocolOptions
from glocal.errors import GlocalError
from glocal.finetuning.registry import finetuning_options
from glocal.options import closest, merged, parse_words, presets, validated
from glocal.pretraining.registry import pretraining_options
from glocal.views.intensity import IntensityOptions
from glocal.views.view import ViewOptions


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 0.001),
        ("-2.5E4", -25000.0),
        (".5e1", 5.0),
        ("true", True),
        ("null", None),
        ("cpu", "cpu"),
        ("1e", "1e"),
        ("4chambers", "4chambers"),
        ("", ""),
        ("a=b", "a=b"),
        ("[0.7, 1.5]", [0.7, 1.5]),
        ("[1e-3, [2e-3]]", [0.001, [0.002]]),
        ("{a: 1e-3}", {"a": 0.001}),
        ("CASE_1,CASE_2", "CASE_1,CASE_2"),
    ],
)
def test_values_are_read_as_people_mean_them(text: str, value: Any) -> None:
    settings = parse_words([f"key={text}"])
    assert settings == {"key": value}
    assert type(settings["key"]) is type(value)


def test_dots_lead_to_keys_below_and_a_later_word_wins() -> None:
    words = ["seed=1", "views.spatial.rotation=15", "views.spatial.shift=0.1", "views.noise=0", "seed=2"]
    assert parse_words(words) == {"seed": 2, "views": {"spatial": {"rotation": 15, "shift": 0.1}, "noise": 0}}
    assert parse_words(["network={name: unet}", "network.widths=[8, 16]"]) == {
        "network": {"name": "unet", "widths": [8, 16]}
    }
    assert parse_words([]) == {}


@pytest.mark.parametrize("word", ["seed", "=3", "", "a..b=1", ".a=1", "a.=1", "--seed"])
def test_a_word_that_is_not_key_and_value_is_refused(word: str) -> None:
    with pytest.raises(GlocalError, match="key=value, for example seed=1"):
        parse_words([word])


@pytest.mark.parametrize(
    "words", [["a=1", "a.b=2"], ["a.b=2", "a=1"], ["a.b.c=2", "a.b=1"], ["a.b.c=1", "a={b: 2}"], ["a=[1]", "a.b=1"]]
)
def test_a_key_has_a_value_or_keys_below_it_but_not_both(words: list[str]) -> None:
    with pytest.raises(GlocalError, match=r"^a\S* cannot be set beside a\S*: give one of them\.$"):
        parse_words(words)


def test_a_value_that_is_not_yaml_is_refused_with_its_key() -> None:
    with pytest.raises(GlocalError, match=r"^The value of views\.scale \('\[1, 2'\) cannot be read: put quotation"):
        parse_words(["views.scale=[1, 2"])


def test_merging_goes_level_by_level_and_changes_neither() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": 3, "f": {"g": 4}}
    over = {"a": {"c": {"h": 5}, "b": 6}, "f": 7, "e": {"i": 8}}
    assert merged(base, over) == {"a": {"b": 6, "c": {"d": 2, "h": 5}}, "e": {"i": 8}, "f": 7}
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": 3, "f": {"g": 4}}


class Dessert(BaseModel):
    kind: str = "cake"
    size: int = 1


class Meal(BaseModel):
    preset: Literal["full", "light"] = Field("full", exclude=True)
    starter: str = "soup"
    main: dict[str, Any] = {"dish": "stew", "size": 2}
    dessert: Dessert = Dessert()

    _preset = presets(
        {"light": {"starter": "salad", "main": {"dish": "fish", "size": 1}, "dessert": Dessert(kind="fruit", size=3)}}
    )


def test_a_preset_lies_below_what_is_given() -> None:
    full = {"starter": "soup", "main": {"dish": "stew", "size": 2}, "dessert": {"kind": "cake", "size": 1}}
    light = {"starter": "salad", "main": {"dish": "fish", "size": 1}, "dessert": {"kind": "fruit", "size": 3}}
    assert Meal().model_dump() == Meal(preset="full").model_dump() == full
    assert Meal(preset="light").model_dump() == light
    assert Meal(preset="light", starter="soup").model_dump() == light | {"starter": "soup"}
    given = Meal.model_validate({"preset": "light", "main": {"size": 3}, "dessert": {"size": 2}})
    assert given.main == {"dish": "fish", "size": 3}  # level by level
    assert given.dessert == Dessert(size=2)  # as a whole, in the place of an object


def test_of_a_preset_what_it_has_set_is_kept() -> None:
    """So what was put back to the class's default by hand is not set again when the sparse form is read."""
    for meal in (Meal(preset="light"), Meal(preset="light", starter="soup"), Meal()):
        kept = meal.model_dump(exclude_defaults=True)
        assert "preset" not in kept
        assert Meal(**kept).model_dump() == meal.model_dump()


@pytest.mark.parametrize("wrong", ["heavy", ["light"], {"light": 1}])
def test_a_preset_that_there_is_not_is_one_plain_sentence(wrong: Any) -> None:
    with pytest.raises(GlocalError, match=r"meal\.preset.* does not fit: it must be 'full' or 'light'\.$"):
        validated(Meal, {"preset": wrong}, "meal")


def test_the_closest_name_is_suggested_else_all() -> None:
    assert closest("rotatoin", ["scale", "rotation"]) == "did you mean 'rotation'?"
    assert closest("xyz", (name for name in ["scale", "rotation"])) == "choose one of scale, rotation."


CHECKS: dict[str, Callable[[dict[str, Any]], BaseModel]] = {
    "finetune": finetuning_options,
    "pretrain": pretraining_options,
    "protocol": lambda settings: validated(ProtocolOptions, settings, "protocol"),
    "preprocess": lambda settings: validated(PreprocessOptions, settings, "preprocess"),
}


def test_what_a_group_does_not_say_stays_at_its_default() -> None:
    simclr = pretraining_options({"method": "simclr"}).augmentation
    turned = pretraining_options({"method": "simclr", **parse_words(["augmentation.spatial.rotation=10"])}).augmentation
    assert turned.spatial == simclr.spatial.model_copy(update={"rotation": 10.0})
    assert turned.intensity == simclr.intensity
    given = {"strategy": "fixmatch", "preset": "reference", **parse_words(["weak.spatial.rotation=5", "strong.blur=0"])}
    fixmatch, reference = finetuning_options(given), finetuning_options({"strategy": "fixmatch", "preset": "reference"})
    assert fixmatch.weak.spatial == reference.weak.spatial.model_copy(update={"rotation": 5.0})
    assert fixmatch.strong == reference.strong.model_copy(update={"blur": 0.0})
    assert finetuning_options(fixmatch.model_dump(mode="json")) == fixmatch.model_copy(update={"preset": "adopted"})


def test_none_switches_a_group_off() -> None:
    assert pretraining_options({"method": "simclr", "augmentation": "none"}).augmentation == ViewOptions()
    augmentation = pretraining_options(
        {"method": "simclr", **parse_words(["augmentation.intensity=none"])}
    ).augmentation
    assert augmentation.intensity == IntensityOptions()
    assert augmentation.spatial == pretraining_options({"method": "simclr"}).augmentation.spatial
    for word in ("augmentation=nothing", "augmentation.spatial=off"):
        assert sentence([word]).endswith("does not fit: it must be settings of its own (key: value) or none.")


def sentence(words: list[str], part: str = "finetune") -> str:
    settings = parse_words(words)
    with pytest.raises(GlocalError) as raised:
        CHECKS[part](settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("max_iteration=3", "finetune.max_iteration is not a setting: did you mean 'max_iterations'?"),
        ("augmentation.spacial=1", "finetune.augmentation.spacial is not a setting: did you mean 'spatial'?"),
        (
            "augmentation.spatial.rotatoin=1",
            "finetune.augmentation.spatial.rotatoin is not a setting: did you mean 'rotation'?",
        ),
        (
            "augmentation.intensity.gama=1",
            "finetune.augmentation.intensity.gama is not a setting: did you mean 'gamma'?",
        ),
        ("network.width=[8]", "finetune.network.width is not a setting: did you mean 'widths'?"),
        (
            "network={name: uctransnet, head: 2}",
            "finetune.network.head is not a setting: did you mean 'heads'?",
        ),
    ],
)
def test_an_unknown_key_suggests_the_right_one_at_every_level(word: str, expected: str) -> None:
    assert sentence([word]) == expected


def test_an_unknown_key_without_a_close_one_lists_what_there_is_at_its_level() -> None:
    found = sentence(["augmentation.intensity.zzz=1"])
    assert found.startswith("finetune.augmentation.intensity.zzz is not a setting: choose one of brightness, contrast,")
    assert "rotation" not in found


def test_a_misspelt_key_is_said_before_the_key_that_is_therefore_missing() -> None:
    assert sentence(["sise=[64, 64]"], "preprocess") == "preprocess.sise is not a setting: did you mean 'size'?"
    assert sentence(["n4=true"], "preprocess") == "preprocess.size is missing."


@pytest.mark.parametrize(
    ("word", "part", "expected"),
    [
        ("max_iterations=-1", "finetune", "finetune.max_iterations=-1 does not fit: it must be at least 1."),
        ("max_iterations=1.5", "finetune", "finetune.max_iterations=1.5 does not fit: it must be a whole number."),
        ("learning_rate=fast", "finetune", "finetune.learning_rate=fast does not fit: it must be a number."),
        ("learning_rate=0", "finetune", "finetune.learning_rate=0 does not fit: it must be above 0."),
        (
            "precision=half",
            "finetune",
            "finetune.precision=half does not fit: it must be 'auto', 'float32' or 'bfloat16'.",
        ),
        ("log=tensorboard", "finetune", "finetune.log=tensorboard does not fit: it must be a list in brackets."),
        (
            "network=unet",
            "finetune",
            "finetune.network=unet does not fit: it must be settings of its own (key: value).",
        ),
        (
            "network.widths=[16]",
            "finetune",
            "finetune.network.widths=[16] does not fit: it must be a list of 2 or more.",
        ),
        (
            "network={name: pcl-unet, widths: [16]}",
            "finetune",
            "finetune.network.widths=[16] does not fit: it must be a list of 2 or more.",
        ),
        (
            "network={name: bcdu-net, dropout: 1}",
            "finetune",
            "finetune.network.dropout=1 does not fit: it must be below 1.",
        ),
        ("network.name=unnet", "finetune", "finetune.network.name=unnet does not fit: did you mean 'unet'?"),
        ("test=x", "protocol", "protocol.test=x does not fit: it must be a whole number or 'auto'."),
        ("test=-1", "protocol", "protocol.test=-1 does not fit: it must be at least 0 or 'auto'."),
        ("transductive=maybe", "protocol", "protocol.transductive=maybe does not fit: it must be true or false."),
        ("size=[64]", "preprocess", "preprocess.size=[64] does not fit: it must be a list of 2 or more."),
        ("size=[1,2,3]", "preprocess", "preprocess.size=[1, 2, 3] does not fit: it must be a list of no more than 2."),
        (
            "size=[64,big]",
            "preprocess",
            "preprocess.size=[64, big] does not fit: it must be a list with a whole number in every place.",
        ),
        (
            "augmentation.spatial.scale=[2, 1]",
            "finetune",
            "finetune.augmentation.spatial.scale=[2, 1] does not fit: the first number must not be above the second, "
            "but 2.0 > 1.0.",
        ),
    ],
)
def test_a_value_that_does_not_fit_is_one_plain_sentence(word: str, part: str, expected: str) -> None:
    assert sentence([word], part) == expected


@pytest.mark.parametrize("word", ["labels=abc", "labels=[1, a]", "labels={a: 1}"])
def test_a_value_that_may_be_of_several_kinds_is_said_once_by_its_own_name(word: str) -> None:
    found = sentence([word])
    assert found.startswith("finetune.labels")
    assert found.count("finetune") == 1
    assert "does not fit: it must be a whole number or 'all' or a list" in found
    assert not any(name in found for name in ("tuple", "int", "str", "Input"))


def test_the_methods_own_options_are_checked_alike() -> None:
    assert sentence(["method=pcl", "treshold=0.1"], "pretrain") == (
        "pretrain.treshold is not a setting: did you mean 'threshold'?"
    )
    assert sentence(["method=pc"], "pretrain") == "There is no pre-training method 'pc': did you mean 'pcl'?"
    assert sentence(["strategy=supervise"]) == (
        "There is no fine-tuning strategy 'supervise': did you mean 'supervised'?"
    )
