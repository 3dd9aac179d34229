"""Bars are for people at a terminal: elsewhere nothing is written, and items pass as they are."""

import pytest

from glocal.progress import progress, track


def test_items_pass_in_order_and_one_by_one(capfd: pytest.CaptureFixture[str]) -> None:
    taken: list[int] = []
    passing = track((taken.append(k) or k for k in range(4)), "Counting", 4)  # type: ignore[func-returns-value]
    assert next(passing) == 0
    assert taken == [0]
    assert list(passing) == [1, 2, 3]
    assert capfd.readouterr() == ("", "")


def test_an_error_inside_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError), progress():
        _ = 1 / 0
