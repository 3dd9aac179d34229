"""A laid-out table of results, written as Markdown, LaTeX, CSV, or a table of the HTML page."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, zip_longest
from unicodedata import name

import pandas as pd

from glocal.reporting import html

_TEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "—": "---"},
    **{"±": r"$\pm$", "−": "$-$", "<": "$<$", ">": "$>$", "≤": r"$\leq$", "≥": r"$\geq$", "×": r"$\times$"},
    **{"·": r"$\cdot$", "→": r"$\rightarrow$", "*": "$^{*}$", "†": r"$^{\dagger}$", "∞": r"$\infty$", "|": r"$|$"},
    **{letter: f"$\\{name(letter).split()[-1].lower()}$" for letter in "αβγδεζηθικμνξπρστυφχψω"},
    **{letter: f"$\\{name(letter).split()[-1].title()}$" for letter in "ΓΔΘΞΠΣΦΨΩ"},
    **{"λ": r"$\lambda$", "Λ": r"$\Lambda$"},  # Unicode spells them LAMDA
}
# A raised word such as the D of G^D, with a sign that belongs to it as in G^D−; or else any single character.
_TEX_TOKEN = re.compile(r"\^([^\W_]+(?:[-−+](?!\w))?)|.", re.DOTALL)
_MARKDOWN_SIGN = re.compile(r"[\\|*`]|<(?=[\w/!])")


@dataclass(frozen=True)
class Cell:
    """The mean (± sd) as text, what stands below it (one text per kind, empty where there is none), and its marks."""

    text: str
    beside: tuple[str, ...] = ()
    best: bool = False
    second: bool = False
    significant: bool = False
    worse: bool = False

    @property
    def mark(self) -> str:
        """`*` where significantly better than the baseline, `†` where significantly worse."""
        return ("†" if self.worse else "*") if self.significant else ""


@dataclass(frozen=True)
class Layout:
    """A table ready to be written.

    `stub` names the axes of the rows, `names` holds their values, one tuple per row. `header` has one path of names per
    column, the outermost first; equal beginnings side by side are one heading. `figures` are the unrounded figures, one
    row per cell.
    """

    title: str
    caption: str
    note: str
    stub: tuple[str, ...]
    header: list[tuple[str, ...]]
    names: list[tuple[str, ...]]
    cells: list[tuple[Cell, ...]]
    figures: pd.DataFrame

    @property
    def headings(self) -> list[str]:
        """The whole first row where there is but one: the stub, then the paths of the columns."""
        return [*self.stub, *map(" · ".join, self.header)]


def csv(layout: Layout) -> str:
    """One line per cell with its axes and all figures, six digits: for machines."""
    return layout.figures.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def html_table(layout: Layout) -> html.Table:
    """The table for the page: best bold, second best underlined, the rest of a cell below it in small print."""
    rows: list[list[str | html.Cell]] = []
    for names, cells in zip(layout.names, layout.cells, strict=True):
        marked = (html.Cell(c.text + c.mark, "", c.best, c.second, c.beside) for c in cells)
        rows.append([*names, *marked])
    return html.Table(layout.title, layout.headings, rows, f"{layout.caption} {layout.note}".strip())


def markdown(layout: Layout) -> str:
    """The table in Markdown, between its title and how to read it: best bold, second best underlined."""
    rows = [
        [*map(_markdown, names), *map(_markdown_cell, cells)]
        for names, cells in zip(layout.names, layout.cells, strict=True)
    ]
    lines = [[_markdown(heading) for heading in layout.headings], ["---"] * len(layout.headings), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    texts = [f"**{_markdown(layout.title)}**", table, _markdown(layout.caption), _markdown(layout.note)]
    return "\n\n".join(filter(None, texts)) + "\n"


def _markdown(text: str) -> str:
    return _MARKDOWN_SIGN.sub(r"\\\g<0>", text)


def _markdown_cell(cell: Cell) -> str:
    text = _markdown(cell.text)
    text = f"**{text}**" if cell.best else f"<u>{text}</u>" if cell.second else text
    return "; ".join(filter(None, [text + _markdown(cell.mark), *map(_markdown, cell.beside)]))


def latex(layout: Layout) -> str:
    """The table in LaTeX with booktabs: what stands beside a mean in a small line below it."""
    stub, last = len(layout.stub), len(layout.header[0]) - 1
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_tex(f'{layout.title}. {layout.caption}'.strip())}}}",
        r"\smallskip",  # most classes leave no room below a caption
        rf"\begin{{tabular}}{{{'l' * stub}{'c' * len(layout.header)}}}",
        r"\toprule",
    ]
    for level in range(last):
        spans = _spans(layout.header, level)
        lines.append(_tex_row([*[""] * stub, *(rf"\multicolumn{{{n}}}{{c}}{{{_tex(name)}}}" for name, _, n in spans)]))
        lines.append(" ".join(rf"\cmidrule(lr){{{stub + at + 1}-{stub + at + n}}}" for _, at, n in spans))
    lines += [_tex_row(map(_tex, [*layout.stub, *(path[last] for path in layout.header)])), r"\midrule"]
    for names, cells in zip(layout.names, layout.cells, strict=True):
        lines.append(_tex_row([*map(_tex, names), *map(_tex_cell, cells)]))
        for texts in zip_longest(*(cell.beside for cell in cells), fillvalue=""):
            if any(texts):
                lines.append(
                    _tex_row([*[""] * stub, *(rf"\scriptsize {_tex(text)}" if text else "" for text in texts)])
                )
    lines += [r"\bottomrule", r"\end{tabular}"]
    if layout.note:
        lines += ["", r"\smallskip", rf"\parbox{{\linewidth}}{{\footnotesize {_tex(layout.note)}}}"]
    return "\n".join([*lines, r"\end{table}", ""])


def _spans(header: list[tuple[str, ...]], level: int) -> list[tuple[str, int, int]]:
    """The headings of one level: name, first column, number of columns."""
    groups = [list(group) for _, group in groupby(range(len(header)), key=lambda at: header[at][: level + 1])]
    return [(header[group[0]][level], group[0], len(group)) for group in groups]


def _tex_row(cells: Iterable[str]) -> str:
    row = " & ".join(cells)
    return ("{}" if row.startswith("[") else "") + row + r" \\"  # after a line end, [ would be a length


def _tex_cell(cell: Cell) -> str:
    text = _tex(cell.text)
    text = rf"\textbf{{{text}}}" if cell.best else rf"\underline{{{text}}}" if cell.second else text
    return text + _tex(cell.mark)


def _tex(text: str) -> str:
    """Text with LaTeX's own signs escaped; `G^D` gets its D raised."""
    return _TEX_TOKEN.sub(
        lambda found: rf"\textsuperscript{{{_tex(found[1])}}}" if found[1] else _TEX.get(found[0], found[0]), text
    )
