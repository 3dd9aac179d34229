from typing import Any

import numpy as np
import pytest

from glocal.evaluation.cases import UNSURE, Measures, case_measures, cases_table, doubt

LABELS = {"background": 0, "wall": 1, "blood": 2, "clot": 3}


def heart() -> Any:
    """Two blocks of wall, one of blood that touches itself at a corner only, no clot."""
    mask = np.zeros((4, 12, 12), dtype=np.uint8)
    mask[0, 1:3, 1:3] = mask[2, 1:3, 1:3] = 1
    mask[1, 6, 6] = mask[2, 7, 7] = 2
    return mask


def measures(uncertainty: float | None = 0.1, **pieces: int) -> Measures:
    return {"volume": dict.fromkeys(pieces, 1.0), "pieces": dict(pieces), "uncertainty": uncertainty}


def test_volumes_are_in_millilitres_and_pieces_touch_at_corners_too() -> None:
    found = case_measures(heart(), None, LABELS, (2.0, 5.0, 10.0))
    assert found["volume"] == pytest.approx({"wall": 0.8, "blood": 0.2, "clot": 0.0})
    assert found["pieces"] == {"wall": 2, "blood": 1, "clot": 0}
    assert found["uncertainty"] is None
    assert set(case_measures(heart(), None, LABELS, None)["volume"].values()) == {None}


def test_uncertainty_is_that_of_the_structures_and_one_pixel_around_them_in_the_slice() -> None:
    mask = np.zeros((3, 9, 9), dtype=np.uint8)
    mask[1, 4, 4] = 2
    uncertainty = np.ones(mask.shape, dtype=np.float32)
    uncertainty[1, 3:6, 3:6] = 0.25
    uncertainty[1, 4, 4] = 0.5
    found = case_measures(mask, uncertainty, LABELS, None)["uncertainty"]
    assert found == pytest.approx((8 * 0.25 + 0.5) / 9)
    assert case_measures(0 * mask, uncertainty, LABELS, None)["uncertainty"] == pytest.approx(uncertainty.mean())


def test_flags_come_first_then_uncertainty() -> None:
    cases = {"a": measures(0.1, wall=1), "b": measures(0.3, wall=1), "c": measures(0.0, wall=0)}
    table = cases_table(cases | {"d": measures(0.2, wall=3)})
    assert list(table["case"]) == ["d", "c", "b", "a"]
    assert list(table["flags"]) == ["wall is in 3 pieces", "wall is empty", "", ""]
    assert list(table["wall ml"]) == [1.0] * 4
    assert list(table.columns) == ["case", "flags", "uncertainty", "wall ml", "wall pieces"]


def test_pieces_that_most_cases_have_are_no_flag() -> None:
    cases = {str(k): measures(kidneys=2) for k in range(5)}
    assert (cases_table(cases)["flags"] == "").all()
    table = cases_table({**cases, "odd": measures(kidneys=3)})
    assert list(table["flags"][:2]) == ["kidneys is in 3 pieces", ""]
    assert (cases_table({"0": cases["0"]})["flags"] == "kidneys is in 2 pieces").all()  # nothing to compare with


@pytest.mark.parametrize(("value", "flagged"), [(0.103, False), (0.113, False), (0.13, True), (0.49, True)])
def test_uncertain_is_relative_to_the_others(value: float, flagged: bool) -> None:
    others = {str(k): measures(0.098 + 0.001 * k, wall=1) for k in range(5)}
    table = cases_table({**others, "odd": measures(value, wall=1)})
    assert table["case"][0] == "odd"
    assert list(table["flags"]) == ["more uncertain than the others" * flagged, *[""] * 5]
    few = cases_table({"0": others["0"], "odd": measures(value, wall=1)})
    assert (few["flags"] == "").all()


def test_when_all_are_unsure_it_is_said_of_each_and_of_all() -> None:
    cases = {str(k): measures(0.95 + 0.005 * k, wall=1) for k in range(5)}
    table = cases_table(cases)
    assert (table["flags"] == UNSURE).all()
    assert "Most cases are unsure almost everywhere: the model may not know images of this kind" in str(doubt(table))
    sure = {str(k): measures(0.1, wall=1) for k in range(5, 11)}
    assert doubt(cases_table(cases | sure)) is None
    assert doubt(cases_table({"a": measures(None, wall=1)})) is None


@pytest.mark.parametrize(
    ("volume", "much"), [(0.1, "smaller"), (1.9, "smaller"), (2.1, ""), (49.0, ""), (51.0, "larger")]
)
def test_a_volume_that_no_other_case_has_is_flagged(volume: float, much: str) -> None:
    cases = {str(k): {**measures(wall=1), "volume": {"wall": 9.0 + k / 2}} for k in range(5)}
    odd: Any = {**measures(wall=1), "volume": {"wall": volume}}
    flags = cases_table({**cases, "odd": odd, "another": cases["2"]}).set_index("case")["flags"]  # type: ignore[dict-item]
    assert flags["odd"] == (f"wall is much {much} than usual ({volume:.1f} ml; median 10.0)" if much else "")
    assert (flags.drop("odd") == "").all()
    few = cases_table({"0": cases["0"], "odd": odd})  # type: ignore[dict-item]
    assert (few["flags"] == "").all()
    gone: Any = {**measures(wall=0), "volume": {"wall": 0.0}}
    mostly = cases_table({**{str(k): gone for k in range(5)}, "odd": odd, "another": {**odd}})
    assert (mostly.set_index("case")["flags"][["odd", "another"]] == "").all()  # usual where there is any
    unknown: Any = {**measures(wall=1), "volume": {"wall": None}}
    assert (cases_table({str(k): unknown for k in range(5)})["flags"] == "").all()


def test_without_uncertainty_there_is_none() -> None:
    table = cases_table({"b": measures(None, wall=1), "a": measures(None, wall=0)})
    assert table["uncertainty"].isna().all()
    assert list(table["case"]) == ["a", "b"]
