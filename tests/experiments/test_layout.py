import re
from typing import Any

import pandas as pd
import pytest

from glocal.errors import GlocalError
from glocal.experiments.layout import TableOptions, check_layout, lay_out
from glocal.options import validated
from glocal.reporting.typeset import Cell, Layout, latex, markdown

NAN = float("nan")
COMPARED = ("difference", "difference_sd", "difference_low", "difference_high", "pairs", "better", "p", "p_holm")
AXES = {"contender": ["random", "pcl", "gcl"], "labels": ["2", "8"], "split": [0, 1], "draw": [0, 1, 2]}


def row(contender: str, labels: str, mean: float, **more: Any) -> dict[str, Any]:
    """One row of a summary, compared with nothing unless `more` says so."""
    facts = {
        "contender": contender,
        "labels": labels,
        "trainings": 6,
        "splits": 2,
        "draws": 3,
        "mean": mean,
        "sd": 0.02,
    }
    bounds = ("low", "high", "subjects_low", "subjects_high", "draws_low", "draws_high")
    if "difference" in more:  # by default its interval is narrow
        more = {"difference_low": more["difference"] - 0.01, "difference_high": more["difference"] + 0.01} | more
    return facts | dict.fromkeys((*bounds, *COMPARED), NAN) | more


def means(**of_contender: float) -> pd.DataFrame:
    return pd.DataFrame([row(name, "2", mean) for name, mean in of_contender.items()])


def summary() -> pd.DataFrame:
    better, worse = {"difference": 0.05, "p_holm": 0.01}, {"difference": -0.1, "p_holm": 0.04}
    return pd.DataFrame(
        [
            row("random", "8", 0.7, sd=NAN),
            row("random", "2", 0.6),
            row("pcl", "2", 0.65, **better),
            row("gcl", "2", 0.5, **worse),
            row("gcl", "8", 0.72, difference=0.02, p_holm=0.05),
        ]
    )


def lay(frame: pd.DataFrame, names: dict[str, str] | None = None, axes: Any = None, **options: Any) -> Layout:
    return lay_out(frame, TableOptions(**options), names or {}, "", axes)


def marks(layout: Layout) -> list[str]:
    """The marks of the first column, row by row."""
    return ["best" * cells[0].best + "second" * cells[0].second for cells in layout.cells]


def test_a_whole_table_in_markdown() -> None:
    layout = lay_out(summary(), TableOptions(title="Main"), {"pcl": "PCL", "contender": "Pre-training"}, "Said so.")
    assert markdown(layout) == (
        "**Main**\n\n"
        "| Pre-training | 2 labels | 8 labels |\n"
        "| --- | --- | --- |\n"
        "| random | <u>0.600 ± 0.020</u> | <u>0.700</u> |\n"
        "| PCL | **0.650 ± 0.020**\\* | – |\n"
        "| gcl | 0.500 ± 0.020† | **0.720 ± 0.020** |\n\n"
        "Said so.\n\n"
        "Dice, mean over classes, last checkpoint: mean ± standard deviation over trainings. Bold: best of its column, "
        "underlined: second best. \\* better, † worse than the baseline: Holm-corrected p < 0.05, 0 outside the "
        "interval of the difference, and more than one draw (or at least 6 splits). Not complete, "
        "because a training failed, is not finished or cannot be measured: PCL at 8 labels.\n"
    )


def test_a_whole_nested_table_in_latex() -> None:
    frame = pd.concat([means(random=0.6, pcl=0.7).assign(strategy=s) for s in ("plain", "mixup")], ignore_index=True)
    layout = lay(
        frame,
        {"pcl": "G^D", "plain": "none"},
        columns=("strategy", "labels"),
        paper={"pcl": {"mixup / 2": 0.85}},
        paper_source="A & B",
        digits=2,
        show=(),
    )
    assert latex(layout).splitlines() == [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        r"\caption{Dice, mean over classes, last checkpoint.}",
        r"\smallskip",
        r"\begin{tabular}{lccc}",
        r"\toprule",
        r" & \multicolumn{1}{c}{none} & \multicolumn{2}{c}{mixup} \\",
        r"\cmidrule(lr){2-2} \cmidrule(lr){3-4}",
        r" & \multicolumn{1}{c}{2 labels} & \multicolumn{2}{c}{2 labels} \\",
        r"\cmidrule(lr){2-2} \cmidrule(lr){3-4}",
        r"contender & ours & ours & paper \\",
        r"\midrule",
        r"random & \underline{0.60} & \underline{0.60} &  \\",
        r"G\textsuperscript{D} & \textbf{0.70} & \textbf{0.70} & 0.85 \\",
        r"\bottomrule",
        r"\end{tabular}",
        "",
        r"\smallskip",
        r"\parbox{\linewidth}{\footnotesize Dice, mean over classes, last checkpoint: mean over trainings. Bold: best "
        r"of its column, underlined: second best. Paper: as reported by A \& B.}",
        r"\end{table}",
    ]


def test_budgets_are_in_ascending_order_and_other_axes_as_they_come() -> None:
    frame = pd.DataFrame([row(name, labels, 0.5) for labels in ("10", "2", "1") for name in ("b", "a")])
    layout = lay(frame)
    assert layout.header == [("1 label",), ("2 labels",), ("10 labels",)]
    assert layout.names == [("b",), ("a",)]
    assert lay(frame, axes={"labels": [10, 1, 2]}).header == [("10 labels",), ("1 label",), ("2 labels",)]


def test_headings_say_what_a_bare_value_is() -> None:
    frame = pd.concat([means(a=0.5).assign(tau=tau, mix=mix) for tau in ("0.1", "1.0") for mix in ("true", "false")])
    layout = lay(frame, {"tau": "τ", "1.0": "hot"}, columns=("labels", "tau", "mix"))
    assert layout.header[0] == ("2 labels", "τ 0.1", "mix true")
    assert layout.header[3] == ("2 labels", "hot", "mix false")
    turned = lay(frame, {"tau": "τ"}, rows=("tau", "labels"), columns=("mix", "contender"))
    assert turned.stub == ("τ", "labels")
    assert turned.names == [("0.1", "2"), ("1.0", "2")]


@pytest.mark.parametrize(
    ("values", "metric", "expected"),
    [
        ((0.6, 0.8, 0.7), "dice", ["", "best", "second"]),
        ((6.0, 8.0, 7.0), "hd95", ["best", "", "second"]),
        ((0.8, 0.8, 0.7), "dice", ["best", "best", "second"]),
        ((0.7004, 0.6996, 0.6994), "dice", ["best", "best", "second"]),  # 0.700, 0.700, 0.699
        ((0.8, 0.7, 0.7), "nsd", ["best", "second", "second"]),
        ((0.8, NAN, NAN), "dice", ["", "", ""]),
        ((NAN, 0.8, 0.7), "dice", ["", "best", "second"]),
    ],
)
def test_best_and_second_best(values: tuple[float, ...], metric: str, expected: list[str]) -> None:
    assert marks(lay(means(**dict(zip("abc", values, strict=True))), metric=metric)) == expected


def test_best_is_judged_by_column() -> None:
    frame = pd.DataFrame([row("a", "2", 0.5), row("b", "2", 0.4), row("a", "8", 0.8), row("b", "8", 0.9)])
    assert [[cell.best for cell in cells] for cells in lay(frame).cells] == [[True, False], [False, True]]


@pytest.mark.parametrize(
    ("metric", "difference", "p", "mark"),
    [
        ("dice", 0.1, 0.049, "*"),
        ("dice", -0.1, 0.049, "†"),
        ("assd", -0.1, 0.049, "*"),
        ("assd", 0.1, 0.049, "†"),
        ("dice", 0.1, 0.05, ""),
        ("dice", -0.1, NAN, ""),
    ],
)
def test_significance_knows_the_direction(metric: str, difference: float, p: float, mark: str) -> None:
    cell = lay(pd.DataFrame([row("a", "2", 0.5, difference=difference, p_holm=p)]), metric=metric).cells[0][0]
    assert cell.mark == mark
    assert cell.significant == bool(mark)


@pytest.mark.parametrize(
    ("more", "mark"),
    [
        ({}, "*"),
        ({"difference_low": -0.01}, ""),  # 0 is inside its interval
        ({"draws": 1}, ""),  # no other draw was looked at
        ({"draws": 1, "splits": 6}, "*"),  # but six splits were
        ({"difference_low": NAN, "difference_high": NAN}, ""),
    ],
)
def test_a_small_p_alone_is_not_enough(more: dict[str, Any], mark: str) -> None:
    cell = lay(pd.DataFrame([row("a", "2", 0.5, difference=0.1, p_holm=0.001, **more)])).cells[0][0]
    assert cell.mark == mark


def test_what_stands_beside_a_mean() -> None:
    bounds = {"low": 0.1, "high": 0.2, "subjects_low": 0.3, "subjects_high": 0.4, "draws_low": 0.5, "draws_high": 0.6}
    compared = {"difference": -0.0123, "difference_low": -0.05, "difference_high": 0.0004, "pairs": 6.0, "better": 5.0}
    frame = pd.DataFrame([row("a", "2", 0.5), row("b", "2", 0.5, **bounds, **compared, p_holm=0.0004)])
    show = ("interval", "subjects", "sd", "draws", "difference", "p", "better")
    layout = lay(frame, show=show)
    assert layout.cells[0][0] == Cell("0.500 ± 0.020", ("",) * 6, best=True)
    assert layout.cells[1][0].text == "0.500 ± 0.020"
    assert layout.cells[1][0].beside == (
        "[0.100, 0.200]",
        "subjects [0.300, 0.400]",
        "draws [0.500, 0.600]",
        "Δ −0.012 [−0.050, 0.000]",
        "p < 0.001",
        "5 of 6",
    )
    words = ("± standard", "[low, high]", "subjects [low, high]", "draws [low, high]", "Δ against", "p:", "N of M:")
    assert all(word in layout.note for word in words)
    assert not any(word in lay(frame[:1], show=show).note for word in words[1:])  # no cell has them
    assert "Δ against PCL: paired" in lay_out(frame, TableOptions(show=show), {}, "", baseline="PCL").note
    assert lay_out(frame, TableOptions(show=["difference", "p"]), {}, "", baseline="PCL").title == "Difference to PCL"
    assert lay(frame, show=("difference",), digits=1).cells[1][0] == Cell("0.5", ("Δ 0.0 [−0.1, 0.0]",), best=True)
    alone = frame.assign(difference_low=NAN, difference_high=NAN, p_holm=0.0312)
    assert lay(alone, show=("difference", "p")).cells[1][0].beside == ("Δ −0.012", "p = 0.031")


def test_what_was_asked_for_and_has_no_result_is_said_to_be_missing() -> None:
    axes = AXES | {"contender": ["random", "jcl", "pcl", "gcl"]}
    layout = lay(summary(), axes=axes)
    assert layout.names == [("random",), ("jcl",), ("pcl",), ("gcl",)]
    assert [[cell.text == "–" for cell in cells] for cells in layout.cells] == [
        *([False, False], [True, True], [False, True], [False, False])
    ]
    assert layout.note.endswith(": jcl at 2 labels and 8 labels; pcl at 8 labels.")
    nothing = lay(summary().iloc[:0], axes=axes)
    assert {cell for cells in nothing.cells for cell in cells} == {Cell("–")}
    assert "Not complete" not in lay(summary()[:2]).note


def test_a_cell_of_fewer_trainings_than_its_column_is_said() -> None:
    frame = means(a=0.5, b=0.6, c=NAN).assign(trainings=[6, 4, 9])
    assert lay(frame).note.endswith(": b at 2 labels (4 of 6 trainings); c at 2 labels.")


def test_numbers_of_a_paper_stand_beside_ours() -> None:
    options = validated(TableOptions, {"paper": {"pcl": {2: 0.7, 8: 0.85}, "gcl": {8: 0.9}}, "paper_source": "X"}, "")
    layout = lay_out(summary(), options, {}, "")
    assert layout.header == [
        *(("2 labels", "ours"), ("2 labels", "paper"), ("8 labels", "ours"), ("8 labels", "paper"))
    ]
    texts = [(cells[1].text, cells[3].text) for cells in layout.cells]
    assert texts == [("", ""), ("0.7", "0.85"), ("", "0.90")]  # the digits the paper gave: YAML forgets a last zero
    assert not any(cell.best for cells in layout.cells for cell in (cells[1], cells[3]))
    assert layout.note.count("Paper: as reported by X.") == 1
    few = lay(summary(), paper={"pcl": {"8": 0.85}}, paper_source="X")
    assert few.header == [("2 labels", "ours"), ("8 labels", "ours"), ("8 labels", "paper")]


def test_names_of_a_paper_must_be_in_the_table() -> None:
    source = {"paper_source": "X", "title": "Main"}
    for paper, words in (
        ({"plc": {"2": 0.5}}, r"The table 'Main' has numbers of a paper for the row 'plc': did you mean 'pcl'?"),
        ({"pcl": {"4": 0.5}}, r"for the column '4': choose one of 2, 8."),
    ):
        with pytest.raises(GlocalError, match=re.escape(words)):
            check_layout(TableOptions(paper=paper, **source), AXES)
        with pytest.raises(GlocalError, match=re.escape(words)):
            lay(summary(), paper=paper, **source)
    with pytest.raises(GlocalError, match="numbers of a paper need paper_source"):
        validated(TableOptions, {"paper": {"pcl": {"2": 0.5}}}, "tables")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": ("contendr",)}, "A table has 'contendr' in its rows or columns, no axis: did you mean 'contender'?"),
        ({"title": "T", "columns": ("draw",)}, "The table 'T' has 'draw' in its rows or columns, but its cells are"),
        ({"columns": ("labels", "contender")}, "has the axis 'contender' twice"),
        ({"rows": ("labels",), "columns": ("strategy",)}, "would mix random, pcl, gcl in one cell: add contender to"),
    ],
)
def test_axes_must_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(GlocalError, match=re.escape(words)):
        check_layout(TableOptions(**options), AXES | {"strategy": ["plain"]})


def test_axes_that_fit_or_do_not_vary_are_let_through() -> None:
    check_layout(TableOptions(), AXES | {"strategy": ["plain"]})
    check_layout(TableOptions(rows=("contender", "strategy")), AXES | {"strategy": ["plain", "mixup"]})
    with pytest.raises(GlocalError, match="add strategy to its rows or columns"):
        lay(pd.concat([means(a=0.5).assign(strategy=strategy) for strategy in ("plain", "mixup")]))


def test_validation_volumes_are_counted_in_every_table() -> None:
    frame = summary().assign(validation=[2, 0, 0, 0, 2])
    assert lay(frame).header == [("2 labels",), ("8 + 2 for validation",)]
    assert lay(frame, {"8": "8 volumes"}).header[1] == ("8 volumes + 2 for validation",)
    as_text = frame.assign(validation=frame["validation"].astype(str))
    assert lay(as_text).header == lay(frame).header
    assert lay(frame, rows=("labels",), columns=("contender",)).names == [("2",), ("8 + 2 for validation",)]
    one = means(a=0.5).assign(validation=1, strategy="plain")
    assert "Labelled volumes: 2 + 1 for validation." in lay(one, columns=("strategy",)).note
    parted = pd.concat([means(a=0.5).assign(validation=n) for n in ("0", "2")])
    assert lay(parted, columns=("labels", "validation")).header == [("2 labels", f"validation {n}") for n in (0, 2)]
    with pytest.raises(GlocalError, match="two results for a, 2"):
        lay(parted)


def test_nothing_measured_is_said() -> None:
    with pytest.raises(GlocalError, match="nothing to put into a table yet"):
        lay(summary().iloc[:0])


def test_structure_and_checkpoint_are_named() -> None:
    layout = lay(means(a=5.0, b=4.0), {"LV": "left ventricle"}, metric="hd95", structure="LV", checkpoint="best")
    assert layout.title == "HD95 in mm, left ventricle, best checkpoint"
    assert "second best, lower is better." in layout.note


def test_figures_are_unrounded_and_in_the_order_of_the_table() -> None:
    figures = lay(summary().assign(mean=[0.123456789, 0.2, 0.3, 0.4, 0.5])).figures
    assert list(zip(figures["contender"], figures["labels"], strict=True))[:2] == [("random", "2"), ("random", "8")]
    assert figures["mean"].tolist()[:3] == [0.2, 0.123456789, 0.3]
    assert pd.isna(figures["mean"][3])
    assert len(figures) == 6
