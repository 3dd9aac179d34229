from dataclasses import dataclass

import pytest

from glocal.data.split import Draw, Split
from glocal.finetuning.base import ramp_up
from glocal.finetuning.finetune import unlabelled_of


@dataclass(frozen=True)
class Case:
    case: str
    subject: str
    labelled: bool = True


MEMBERS = [Case("a1", "a"), Case("a2", "a"), Case("b1", "b"), Case("b2", "b"), Case("c", "c", False), Case("t", "t")]
SPLIT = Split(0, ("a1", "a2", "b1", "b2", "c"), (), ("t",))


def test_unlabelled_are_the_others_of_the_pool() -> None:
    assert unlabelled_of(MEMBERS, SPLIT, Draw(0, ("a1",), ())) == ("a2", "b1", "b2", "c")


def test_no_volume_of_a_validation_subject_is_unlabelled() -> None:
    assert unlabelled_of(MEMBERS, SPLIT, Draw(0, ("a1",), ("b1",))) == ("a2", "c")


def test_where_all_are_labelled_they_serve_without_their_labels() -> None:
    assert unlabelled_of(MEMBERS, SPLIT, Draw(0, ("a1", "a2", "b1", "b2", "c"), ())) == ("a1", "a2", "b1", "b2", "c")


def test_the_ramp_up_is_that_of_ssl4mis() -> None:
    """Consistency weight 0.1 exp(-5 (1 - e / 200)^2), e = floor(it / 150), at 0, 1500, 15,000 and 30,000 iterations."""
    weights = [0.1 * ramp_up(step, 30_000) for step in (0, 1500, 15_000, 30_000, 40_000)]
    assert weights == pytest.approx([6.738e-4, 1.0971e-3, 2.86505e-2, 0.1, 0.1], rel=1e-4)
    assert ramp_up(0, 0) == 1
