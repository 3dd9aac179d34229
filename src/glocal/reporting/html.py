"""One report, one HTML file: readable in any browser, without a network, on a phone and on paper."""

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal

from jinja2 import Environment, StrictUndefined

from glocal.files import write_text

_NUMBER = re.compile(r"\s*[-+−–±<≤>≥]?\s*(\d|$)")
_MIME = {"png": "image/png", "svg": "image/svg+xml"}


@dataclass(frozen=True)
class Cell:
    """Text that stands out or leads somewhere; `below` are lines of small print, those without text left out.

    `href` goes into the page as it is: a relative path must be quoted as a link.
    """

    text: str
    href: str = ""
    strong: bool = False
    underline: bool = False
    below: tuple[str, ...] = ()


@dataclass
class Table:
    """A table of ready-made text, where needed as `Cell`; the note below says how to read it."""

    caption: str
    header: list[str]
    rows: Sequence[Sequence[str | Cell]]
    note: str = ""
    anchor: str = ""  # the page's links to this table end with it

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows with plain text as cells, too."""
        return [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers, by their first sign (an empty cell fits); these are aligned to the right."""
        texts = [[cell.text for cell in row] for row in self.cells]
        columns = zip(*texts, strict=True) if texts else [()] * len(self.header)
        return [any(text.strip() for text in column) and all(map(_NUMBER.match, column)) for column in columns]


@dataclass
class Picture:
    """A figure as the bytes of its file; `wide` gives it the whole width instead of half."""

    caption: str
    data: bytes
    kind: Literal["png", "svg"]
    wide: bool = False

    @property
    def uri(self) -> str:
        """The picture itself as a link, so that the report stays one file."""
        return f"data:{_MIME[self.kind]};base64,{base64.b64encode(self.data).decode('ascii')}"


@dataclass
class Section:
    """A part of the report: paragraphs (parted by empty lines), then tables, then pictures; `collapsed` folds it."""

    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    collapsed: bool = False


def papers(found: Iterable[str]) -> list[Section]:
    """What to cite, each paper once; nothing if there is nothing."""
    named = dict.fromkeys(found)
    return [Section("Papers to cite", "\n\n".join(named))] if named else []


@dataclass
class Report:
    """All that a report says: what was done (`lead`), the figures that matter (label, value), what to beware of."""

    title: str
    lead: str
    key_figures: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    footer: str = ""


def render(report: Report) -> str:
    """The report as one self-contained HTML page; every text is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["paragraphs"] = lambda text: [
        part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()
    ]
    template = (files("glocal.reporting") / "report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(report=report)


def write_report(report: Report, path: Path) -> None:
    """Write the report as one HTML file, atomically.

    Raises:
        GlocalError: the disk is full, or the folder cannot be written.
    """
    write_text(path, render(report))
