"""Splits and draws: by subject, from a seed, and never a subject on two sides."""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glocal.data.split import (
    Draw,
    ProtocolOptions,
    Split,
    draw_labels,
    make_split,
    read_split,
    refuse_leakage,
    shuffled,
    split_count,
    write_split,
)
from glocal.errors import GlocalError


@dataclass(frozen=True)
class Person:
    case: str
    subject: str
    labelled: bool = True


def people(count: int, cases: int = 2, unlabelled: int = 0) -> list[Person]:
    """Subjects `s00`, `s01`, ... with cases `s00a`, `s00b`; the last ones have no labels."""
    return [
        Person(f"s{k:02}{'abc'[c]}", f"s{k:02}", k < count - unlabelled) for k in range(count) for c in range(cases)
    ]


def subjects(members: Iterable[Person], cases: Iterable[str]) -> set[str]:
    found = {member.case: member.subject for member in members}
    return {found[case] for case in cases}


def given_split(members: list[Person], development: int, test: int) -> dict[str, list[str]]:
    order = sorted({member.subject for member in members})
    parts = {
        "development": order[:development],
        "test": order[development : development + test],
        "pretrain": order[development + test :],
    }
    return {name: [m.case for m in members if m.subject in part] for name, part in parts.items()}


OPTIONS = ProtocolOptions()


def test_shuffling_hangs_on_seed_and_keys_and_not_on_the_order_given() -> None:
    names = [f"s{k}" for k in range(20)]
    assert shuffled(names, 0, "a") == shuffled([*reversed(names), "s3"], 0, "a")
    assert sorted(shuffled(names, 0, "a")) == sorted(names)
    assert len({tuple(shuffled(names, *keys)) for keys in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1)]}) == 4


def test_the_datasets_own_split_is_number_0() -> None:
    members = people(9)
    given_ = given_split(members, development=2, test=3)
    split = make_split(members, given_, OPTIONS, seed=5)
    assert split.index == 0
    assert list(split.test) == sorted(given_["test"])
    assert list(split.development) == sorted(given_["development"])
    assert list(split.pretrain) == sorted(given_["pretrain"])
    assert make_split(members, given_, OPTIONS, seed=6) == split


def test_a_subject_goes_to_one_side_with_all_its_cases_whatever_the_lists_say() -> None:
    members = [Person("a1", "a"), Person("a2", "a"), Person("b1", "b"), Person("c1", "c"), Person("c2", "c")]
    lists = {"pretrain": ["a2", "b1"], "development": ["c1"], "test": ["a1", "c2"]}
    assert make_split(members, lists, OPTIONS, 0) == Split(0, ("b1",), (), ("a1", "a2", "c1", "c2"))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_cases_that_the_dataset_leaves_out_are_used_in_no_split(index: int) -> None:
    members = people(12)
    lists = given_split(members, development=1, test=3)
    lists["pretrain"] = lists["pretrain"][:-4]
    split = make_split(members, lists, OPTIONS, 0, index)
    used = {*split.pretrain, *split.development, *split.test}
    assert used == {case for cases in lists.values() for case in cases}


@settings(max_examples=30, deadline=None)
@given(count=st.integers(10, 30), test=st.integers(1, 4), development=st.integers(0, 2), seed=st.integers(0, 2**40))
def test_further_splits_have_the_same_sizes_and_never_test_on_what_was_chosen_on(
    count: int, test: int, development: int, seed: int
) -> None:
    members = people(count, unlabelled=1)
    lists = given_split(members, development, test)
    splits = [make_split(members, lists, OPTIONS, seed, index) for index in range(4)]
    first = splits[0]
    for split in splits:
        parts = [subjects(members, part) for part in (split.pretrain, split.development, split.test)]
        assert [len(part) for part in parts] == [count - test - development, development, test]
        assert len(set.union(*parts)) == count
    for split in splits[1:]:
        assert not subjects(members, split.test) & subjects(members, first.development)
        assert not subjects(members, split.development) & subjects(members, first.test)
        assert all(member.labelled for member in members if member.case in split.test + split.development)
    assert len({split.test for split in splits}) == len(splits)
    assert splits == [make_split(members[::-1], lists, OPTIONS, seed, index) for index in range(4)]


def test_a_dataset_that_only_has_development_subjects_has_further_splits_too() -> None:
    members = people(8)
    lists = given_split(members, development=2, test=0)
    first, second = (make_split(members, lists, OPTIONS, 0, index) for index in (0, 1))
    assert first.test == second.test == ()
    assert len(second.development) == len(first.development)
    assert second.development != first.development


def test_another_split_than_the_only_one_there_is_is_refused() -> None:
    members = people(4)  # 1 to choose on, 3 to test on: no other three
    with pytest.raises(GlocalError, match=r"too few labelled subjects for so many splits: .*protocol\.splits"):
        make_split(members, given_split(members, development=1, test=3), OPTIONS, 0, index=1)
    pair = people(3, unlabelled=1)  # labelled subjects to test on, but none to choose on
    with pytest.raises(GlocalError, match="too few labelled subjects"):
        make_split(pair, given_split(pair, development=1, test=1), OPTIONS, 0, index=1)
    with pytest.raises(GlocalError, match="too few labelled subjects"):
        make_split(people(5), None, OPTIONS, 0, index=1)  # no test subject, so that all splits are one


@pytest.mark.parametrize(("labelled", "tested"), [(0, 0), (2, 0), (9, 0), (10, 2), (13, 3), (40, 8)])
def test_a_fifth_of_ten_or_more_labelled_subjects_is_tested(labelled: int, tested: int) -> None:
    members = people(labelled + 3, unlabelled=3)
    split = make_split(members, None, OPTIONS, 1)
    assert len(subjects(members, split.test)) == tested
    assert all(member.labelled for member in members if member.case in split.test)
    assert split.development == ()
    assert len(split.pretrain) + len(split.test) == len(members)


def test_the_number_of_test_subjects_can_be_said() -> None:
    members = people(6, unlabelled=2)
    split = make_split(members, None, ProtocolOptions(test=3), 0)
    assert len(subjects(members, split.test)) == 3
    assert make_split(members, None, ProtocolOptions(test=0), 0).test == ()
    with pytest.raises(GlocalError, match=r"protocol\.test=4 leaves none of the 4 labelled subjects"):
        make_split(members, None, ProtocolOptions(test=4), 0)


def test_seeds_and_indices_draw_other_test_subjects() -> None:
    members = people(30)
    assert len({make_split(members, None, OPTIONS, seed).test for seed in range(5)}) == 5
    assert len({make_split(members, None, OPTIONS, 0, index).test for index in range(5)}) == 5


def test_leaving_one_out_tests_on_each_labelled_subject_once() -> None:
    members = people(5, unlabelled=2)
    options = ProtocolOptions(leave_one_out=True)
    splits = [make_split(members, given_split(members, 1, 1), options, 0, index) for index in range(3)]
    assert [split.test for split in splits] == [("s00a", "s00b"), ("s01a", "s01b"), ("s02a", "s02b")]
    assert all(len(split.pretrain) == 8 and split.development == () for split in splits)
    with pytest.raises(GlocalError, match="leave_one_out needs two labelled subjects or more, there are 1"):
        make_split(people(5, unlabelled=4), None, options, 0)


@st.composite
def groups(draw: st.DrawFn, smallest: int = 3) -> list[Person]:
    """Subjects with one to three cases, each with or without labels."""
    labelled = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=3), min_size=smallest, max_size=14))
    return [
        Person(f"s{k:02}{'abc'[c]}", f"s{k:02}", has) for k, cases in enumerate(labelled) for c, has in enumerate(cases)
    ]


def with_labels(members: list[Person]) -> set[str]:
    return {member.subject for member in members if member.labelled}


@settings(max_examples=60, deadline=None)
@given(members=groups(), folds=st.integers(2, 5), seed=st.integers(0, 2**40), data=st.data())
def test_each_labelled_subject_is_tested_in_one_fold(
    members: list[Person], folds: int, seed: int, data: st.DataObject
) -> None:
    # What split.json tests on is in a fold like all others; whom it chooses on is in none.
    lists = given_split(members, data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2)))
    kept = subjects(members, lists["development"])
    candidates, options = with_labels(members) - kept, ProtocolOptions(folds=folds)
    assert split_count(members, options) == folds
    if len(candidates) < folds:
        with pytest.raises(GlocalError, match=rf"protocol\.folds={folds} asks for more folds than the"):
            make_split(members, lists, options, seed)
        return
    splits = [make_split(members, lists, options, seed, index) for index in range(folds)]
    tested = [subjects(members, split.test) for split in splits]
    assert set.union(*tested) == candidates
    assert sum(map(len, tested)) == len(candidates)  # so that no two folds meet
    assert max(map(len, tested)) - min(map(len, tested)) <= 1
    for index, split in enumerate(splits):
        parts = [subjects(members, part) for part in (split.pretrain, split.development, split.test)]
        assert split.index == index
        assert parts[1] == kept
        assert not any(one & other for one, other in combinations(parts, 2))
        assert sorted(split.pretrain + split.development + split.test) == sorted(m.case for m in members)
    assert splits == [make_split(members[::-1], lists, options, seed, index) for index in range(folds)]


def test_folds_without_split_json_and_by_seed() -> None:
    members, options = people(12, unlabelled=2), ProtocolOptions(folds=5)
    splits = [make_split(members, None, options, 0, index) for index in range(5)]
    assert [len(subjects(members, split.test)) for split in splits] == [2] * 5
    assert all(split.development == () for split in splits)
    assert make_split(members, None, options, 1).test != splits[0].test
    lists = given_split(members, development=1, test=2)
    lists["pretrain"] = lists["pretrain"][:-8]  # two unlabelled and two labelled subjects that split.json leaves out
    assert sum(len(make_split(members, lists, options, 0, index).test) for index in range(5)) == 2 * 7


def test_too_many_folds_are_refused_with_the_number_of_subjects() -> None:
    members = people(6, unlabelled=1)
    with pytest.raises(GlocalError) as raised:
        make_split(members, given_split(members, development=1, test=0), ProtocolOptions(folds=5), 0)
    assert str(raised.value) == (
        "protocol.folds=5 asks for more folds than the 4 labelled subjects that are not for development: lower it."
    )


def test_there_are_as_many_splits_as_are_asked_for() -> None:
    members = people(5, unlabelled=2)
    assert split_count(members, OPTIONS) == 1
    assert split_count(members, ProtocolOptions(splits=4)) == 4
    assert split_count(members, ProtocolOptions(folds=3)) == 3
    assert split_count(members, ProtocolOptions(leave_one_out=True)) == 3
    assert split_count(people(2, unlabelled=2), ProtocolOptions(leave_one_out=True)) == 1


@pytest.mark.parametrize(
    ("settings_", "names"),
    [
        ({"splits": 2, "folds": 3}, "protocol.splits and protocol.folds"),
        ({"folds": 3, "leave_one_out": True}, "protocol.folds and protocol.leave_one_out"),
        ({"splits": 2, "leave_one_out": True}, "protocol.splits and protocol.leave_one_out"),
    ],
)
def test_subjects_are_split_in_one_way(settings_: dict[str, Any], names: str) -> None:
    with pytest.raises(GlocalError) as raised:
        ProtocolOptions(**settings_)
    assert str(raised.value) == f"{names} each say how subjects are split: choose one of them."
    assert ProtocolOptions(splits=1, folds=2).folds == 2


MEMBERS = people(12, unlabelled=2)
SPLIT = make_split(MEMBERS, given_split(MEMBERS, development=1, test=2), OPTIONS, 0)  # 7 labelled subjects, 14 cases


def test_smaller_budgets_are_parts_of_larger_ones_and_validation_is_the_same_for_all() -> None:
    draws = [draw_labels(MEMBERS, SPLIT, labels, 3, seed=0) for labels in range(1, 11)]
    for smaller, larger in pairwise(draws):
        assert larger.train[: len(smaller.train)] == smaller.train
    assert [len(draw.train) for draw in draws] == list(range(1, 11))
    assert len({draw.validation for draw in draws}) == 1
    assert len(draws[0].validation) == 3


@pytest.mark.parametrize("labels", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("validation", [0, 1, 2, 4])
def test_training_and_validation_share_no_subject_and_nothing_is_held_out_or_unlabelled(
    labels: int, validation: int
) -> None:
    draw = draw_labels(MEMBERS, SPLIT, labels, validation, seed=3)
    assert (len(set(draw.train)), len(set(draw.validation))) == (labels, validation)
    assert not subjects(MEMBERS, draw.train) & subjects(MEMBERS, draw.validation)
    assert set(draw.train + draw.validation) <= set(SPLIT.pretrain)
    assert all(member.labelled for member in MEMBERS if member.case in draw.train + draw.validation)


def test_a_draw_hangs_on_seed_split_and_number_alone() -> None:
    first = draw_labels(MEMBERS, SPLIT, 2, 1, seed=0, index=1)
    assert first == draw_labels(MEMBERS[::-1], SPLIT, 2, 1, seed=0, index=1)
    assert first.index == 1
    chosen = {draw_labels(MEMBERS, SPLIT, 6, 0, seed, index).train for seed in (0, 1) for index in (0, 1, 2)}
    assert len(chosen) == 6


def test_too_many_labels_are_refused_with_the_number_there_is() -> None:
    assert len(draw_labels(MEMBERS, SPLIT, 14, 0, seed=0).train) == 14
    with pytest.raises(GlocalError, match=r"15 labelled volumes for training and 0 for validation .* only 14 may be"):
        draw_labels(MEMBERS, SPLIT, 15, 0, seed=0)
    with pytest.raises(GlocalError, match="13 labelled volumes for training and 1 for validation"):
        draw_labels(MEMBERS, SPLIT, 13, 1, seed=0)  # the fourteenth is of a subject that is trained on
    for labels in (0, -1):
        with pytest.raises(GlocalError, match=f"labels={labels} leaves nothing to train on"):
            draw_labels(MEMBERS, SPLIT, labels, 0, seed=0)


Unit = Literal["volumes", "subjects"]


@settings(max_examples=60, deadline=None)
@given(members=groups(1), validation=st.integers(0, 3), unit=st.sampled_from(["volumes", "subjects"]), data=st.data())
def test_draws_of_subjects_with_one_to_three_cases(
    members: list[Person], validation: int, unit: Unit, data: st.DataObject
) -> None:
    """Of every budget that can be had, `all` included: nested, apart by subject, validated on the same volumes."""
    split = make_split(members, given_split(members, data.draw(st.integers(0, 2)), 1), OPTIONS, 0)
    open_ = {member.case for member in members if member.labelled} & set(split.pretrain)
    budgets: list[Any] = [*range(1, len(open_) + 1), "all"]
    draws: dict[Any, Draw] = {}
    for labels in budgets:
        with suppress(GlocalError):
            draws[labels] = draw_labels(members, split, labels, validation, 0, 1, unit)
    # The last subjects of the order are for validation, as few as suffice; what is before them can be trained on.
    order = shuffled(with_labels([m for m in members if m.case in open_]), 0, "draw", 0, 1)
    cases = [sum(m.subject == subject and m.case in open_ for m in members) for subject in order]
    sizes = cases if unit == "volumes" else [1] * len(order)
    starts = [k for k in range(len(sizes) + 1) if sum(sizes[k:]) >= validation]
    possible = sum(sizes[: max(starts)]) if starts else 0
    assert [labels for labels in draws if labels != "all"] == list(range(1, possible + 1))
    assert ("all" in draws) == (possible > 0)

    for labels, draw in draws.items():
        assert set(draw.train + draw.validation) <= open_
        assert len(set(draw.train + draw.validation)) == len(draw.train) + len(draw.validation)
        assert not subjects(members, draw.train) & subjects(members, draw.validation)
        if unit == "subjects":
            whole = {m.case for m in members if m.subject in subjects(members, draw.train)} & open_
            assert set(draw.train) == whole
            assert len(subjects(members, draw.validation)) == validation
        else:
            assert len(draw.validation) == validation
        if labels != "all":
            assert len(draw.train if unit == "volumes" else subjects(members, draw.train)) == labels
    for smaller, larger in pairwise(draws.values()):
        assert larger.train[: len(smaller.train)] == smaller.train
    assert len({draw.validation for draw in draws.values()}) <= 1
    if "all" in draws:
        closed = subjects(members, draws["all"].validation)
        assert set(draws["all"].train) == {m.case for m in members if m.case in open_ and m.subject not in closed}


def test_draws_of_subjects_and_of_all_hang_on_seed_split_and_number_alone() -> None:
    for labels, unit in ((3, "subjects"), ("all", "volumes"), ("all", "subjects")):
        first = draw_labels(MEMBERS, SPLIT, labels, 2, 0, 1, unit)
        assert first == draw_labels(MEMBERS[::-1], SPLIT, labels, 2, 0, 1, unit)
        others = [draw_labels(MEMBERS, SPLIT, labels, 2, *key, unit) for key in ((1, 1), (0, 2), (0, 3))]
        assert len({draw.validation for draw in (first, *others)}) > 1
    everyone = [draw_labels(MEMBERS, SPLIT, "all", 0, 0, index) for index in range(3)]
    assert len({frozenset(draw.train) for draw in everyone}) == 1


@pytest.mark.parametrize(
    ("labels", "validation", "unit", "sentence"),
    [
        (6, 2, "subjects", "6 labelled subjects for training and 2 for validation were asked for, but only 7 may be"),
        ("all", 15, "volumes", "All other labelled volumes for training and 15 for validation were asked for, but"),
        ("all", 14, "volumes", "All other labelled volumes for training and 14 for validation were asked for, but"),
        ("all", 7, "subjects", "All other labelled subjects for training and 7 for validation were asked for, but"),
        (["s03a", "s04a"], 6, "subjects", "2 labelled volumes for training and 6 for validation were asked for, but"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_the_unit_of_the_budget(
    labels: Any, validation: int, unit: Unit, sentence: str
) -> None:
    with pytest.raises(GlocalError) as raised:
        draw_labels(MEMBERS, SPLIT, labels, validation, 0, unit=unit)
    assert str(raised.value).startswith(sentence)
    assert str(raised.value).endswith("(no subject in both): lower labels or validation, or label more.")


def test_named_cases_are_volumes_even_where_budgets_are_subjects() -> None:
    names = [f"s{k:02}{c}" for k in range(3, 8) for c in "ab"]  # ten cases, more than there are subjects
    draw = draw_labels(MEMBERS, SPLIT, names, 2, 0, unit="subjects")
    assert draw.train == tuple(names)
    assert subjects(MEMBERS, draw.validation) == {"s08", "s09"}


def test_labelled_cases_can_be_named() -> None:
    draw = draw_labels(MEMBERS, SPLIT, ["s05b", "s03a"], 2, seed=0)
    assert draw.train == ("s05b", "s03a")
    assert len(draw.validation) == 2
    assert not subjects(MEMBERS, draw.validation) & {"s05", "s03"}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["s03a", "s01a"], "s01a belongs to a test or development subject"),
        (["s00b"], "s00b belongs to a test or development subject"),
        (["s11a"], r"s11a is not a labelled case .*: choose among s03a, s03b, s04a, s04b, s05a \.\.\."),
        (["nobody"], "nobody is not a labelled case"),
        (["s03a", "s03a"], "each only once"),
        ([], "at least one"),
    ],
)
def test_named_cases_that_may_not_be_trained_on_are_refused(names: list[str], words: str) -> None:
    with pytest.raises(GlocalError, match=words):
        draw_labels(MEMBERS, SPLIT, names, 0, seed=0)


def test_a_held_out_subject_that_training_sees_is_refused_by_name() -> None:
    clean = subjects(MEMBERS, SPLIT.pretrain)
    refuse_leakage(MEMBERS, SPLIT, clean, "was seen in pre-training", transductive=False)
    with pytest.raises(GlocalError, match=r"^Subject s01 would be tested on but was seen in pre-training: "):
        refuse_leakage(MEMBERS, SPLIT, {*clean, "s01"}, "was seen in pre-training", transductive=False)
    with pytest.raises(GlocalError, match="Subject s00 and 2 others"):
        refuse_leakage(MEMBERS, SPLIT, {"s00", "s01", "s02"}, "would be pre-trained on", transductive=False)


def test_images_of_test_subjects_may_be_seen_where_the_recipe_says_so() -> None:
    refuse_leakage(MEMBERS, SPLIT, {"s01"}, "would be pre-trained on", transductive=True)
    with pytest.raises(GlocalError, match="Subject s00"):  # development subjects are no test subjects
        refuse_leakage(MEMBERS, SPLIT, {"s00", "s01"}, "would be pre-trained on", transductive=True)


def test_another_case_of_a_held_out_subject_is_leakage_too() -> None:
    split = Split(0, ("s03b",), (), ("s03a",))
    with pytest.raises(GlocalError, match="Subject s03"):
        refuse_leakage(MEMBERS, split, subjects(MEMBERS, split.pretrain), "would be pre-trained on", False)


def test_a_split_comes_back_from_its_file(tmp_path: Path) -> None:
    draw = Draw(2, ("s03a",), ("s05a", "s05b"))
    write_split(tmp_path, SPLIT, draw)
    assert read_split(tmp_path) == SPLIT
    assert json.loads((tmp_path / "split.json").read_text(encoding="utf-8"))["draw"]["validation"] == ["s05a", "s05b"]


@pytest.mark.parametrize("content", ['{"splits": []}', "[]", '{"split": {"index": 0}}', '{"split": null}'])
def test_a_file_that_is_not_the_split_of_a_training_is_said(tmp_path: Path, content: str) -> None:
    with pytest.raises(GlocalError, match="does not exist"):
        read_split(tmp_path)
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(GlocalError, match=r"split\.json is not the split of one training"):
        read_split(tmp_path)
