import re
from dataclasses import replace
from io import StringIO

import pandas as pd

from glocal.reporting.html import Report, Section, render
from glocal.reporting.typeset import Cell, Layout, csv, html_table, latex, markdown

HOSTILE = r"a|b & 50% $x_1 #2 {c} \d ~e ^ <b> *f* [g] τ λ Γ ≤ − é"


def layout(first: str = "PCL") -> Layout:
    cells = [
        (Cell("0.7 ± 0.1", ("", "p < 0.001"), best=True, significant=True), Cell("–")),
        (Cell("0.6", ("[0.5, 0.7]", ""), second=True), Cell("0.1", ("", ""), significant=True, worse=True)),
    ]
    figures = pd.DataFrame({"contender": ["pcl"], "labels": ["2"], "trainings": [6.0], "mean": [2 / 3]})
    header = [("2 labels", "ours"), ("2 labels", "paper")]
    return Layout("T", "Said so.", "A note", ("contender",), header, [(first,), ("gcl",)], cells, figures)


def test_markdown() -> None:
    assert markdown(layout()) == (
        "**T**\n\n"
        "| contender | 2 labels · ours | 2 labels · paper |\n"
        "| --- | --- | --- |\n"
        "| PCL | **0.7 ± 0.1**\\*; p < 0.001 | – |\n"
        "| gcl | <u>0.6</u>; [0.5, 0.7] | 0.1† |\n\n"
        "Said so.\n\nA note\n"
    )
    assert markdown(replace(layout(), caption="", note="")).endswith("0.1† |\n")
    assert r"| a\|b & 50% $x_1 #2 {c} \\d ~e ^ \<b> \*f\* [g]" in markdown(layout(HOSTILE))


def test_latex() -> None:
    assert latex(layout("G^D−")).splitlines()[7:] == [
        r" & \multicolumn{2}{c}{2 labels} \\",
        r"\cmidrule(lr){2-3}",
        r"contender & ours & paper \\",
        r"\midrule",
        r"G\textsuperscript{D$-$} & \textbf{0.7 $\pm$ 0.1}$^{*}$ & -- \\",
        r" & \scriptsize p $<$ 0.001 &  \\",
        r"gcl & \underline{0.6} & 0.1$^{\dagger}$ \\",
        r" & \scriptsize [0.5, 0.7] &  \\",
        r"\bottomrule",
        r"\end{tabular}",
        "",
        r"\smallskip",
        r"\parbox{\linewidth}{\footnotesize A note}",
        r"\end{table}",
    ]


def test_latex_of_any_names_has_even_rows_and_closed_braces() -> None:
    text = latex(replace(layout(HOSTILE), title=HOSTILE, note=HOSTILE, stub=(HOSTILE,)))
    bare = re.sub(r"\\[&%$#_{}]", "", text.partition("\n")[2])  # without what is escaped, and the first line, a remark
    rows = [line for line in bare.splitlines() if line.endswith(r"\\")]
    widths = [line.count("&") + sum(int(n) - 1 for n in re.findall(r"\\multicolumn{(\d)}", line)) for line in rows]
    assert widths == [2] * 6
    assert not re.search(r"[%#|~]", bare.replace("$|$", ""))
    for line in bare.splitlines():
        assert line.count("{") == line.count("}")
        assert line.count("$") % 2 == 0
    assert re.findall(r"\\(begin|end){(\w+)}", text) == [
        *(("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table"))
    ]
    assert r"$\tau$ $\lambda$ $\Gamma$ $\leq$ $-$ é" in text
    assert r"\textbackslash{}d \textasciitilde{}e \textasciicircum{} $<$b$>$" in text


def test_latex_raises_what_follows_a_caret() -> None:
    for name, expected in (
        ("G^D", r"G\textsuperscript{D}"),
        ("G^D-", r"G\textsuperscript{D-}"),
        ("G^D-PCL", r"G\textsuperscript{D}-PCL"),
        ("G^R_2 + L^D", r"G\textsuperscript{R}\_2 + L\textsuperscript{D}"),
    ):
        assert f"\n{expected} & " in latex(layout(name))
    assert "\n{}[a] & " in latex(layout("[a]"))  # or the line end above would take it for a length


def test_csv_has_the_figures() -> None:
    assert csv(layout()) == "contender,labels,trainings,mean\npcl,2,6,0.666667\n"
    assert pd.read_csv(StringIO(csv(layout()))).shape == (1, 4)


def test_the_table_of_the_page() -> None:
    table = html_table(layout())
    assert table.header == ["contender", "2 labels · ours", "2 labels · paper"]
    assert table.numeric == [False, True, True]
    text = render(Report("", "", sections=[Section("", tables=[table])]))
    assert '<td class="number"><strong>0.7 ± 0.1*</strong><small>p &lt; 0.001</small></td>' in text
    assert '<td class="number"><u>0.6</u><small>[0.5, 0.7]</small></td><td class="number">0.1†</td>' in text
    assert '<p class="note">Said so. A note</p>' in text
