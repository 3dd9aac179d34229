import base64
from html.parser import HTMLParser
from pathlib import Path

from glocal.reporting.html import Cell, Picture, Report, Section, Table, render, write_report

HOSTILE = '<script>alert("x")</script> & "quotes"'
VOID = {"meta", "img", "link", "br", "hr"}


class Page(HTMLParser):
    """Reads a page: its tags in order, its text, and whether every tag that opens also closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def report() -> Report:
    table = Table(
        "Dice", ["Method", "Mean", "p"], [["PCL", "0.71 ± 0.02", "< 0.01"], ["Random", "−0.1", ""]], "read so"
    )
    svg = Picture("a curve", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg")
    png = Picture("a slice", b"\x89PNG\x00\xff", "png", wide=True)
    return Report(
        title="Title & more",
        lead="First.\n\nSecond.",
        key_figures=[("Mean Dice", "0.71")],
        warnings=["Mind the gap"],
        sections=[
            Section("Results", "One.\n\nTwo.", [table], [svg, png]),
            Section("Details", collapsed=True, tables=[table]),
            Section("More"),
        ],
        footer="The end",
    )


def test_everything_is_there() -> None:
    page = Page(render(report()))
    text = " ".join(page.words)
    for word in ("Title & more", "First.", "Mean Dice", "0.71", "Mind the gap", "One.", "PCL", "read so", "The end"):
        assert word in text
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("title")) == len(page.all("h1")) == 1
    assert [len(page.all(tag)) for tag in ("table", "details", "section", "figure")] == [2, 1, 2, 4]
    assert sum(attributes == {"class": "lead"} for attributes in page.all("p")) == 2


def test_one_file_without_a_network() -> None:
    text = render(report())
    page = Page(text)
    assert not page.all("script")
    assert not page.all("link")
    assert "@import" not in text
    assert "url(" not in text
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert [attributes["href"] for attributes in page.all("a")] == [f"#section-{number}" for number in (1, 2, 3)]
    assert targets == {"section-1", "section-2", "section-3"}
    for attributes in page.all("img"):
        assert str(attributes["src"]).startswith("data:image/")


def test_pictures_survive_with_their_captions() -> None:
    images = Page(render(report())).all("img")
    assert [image["alt"] for image in images] == ["a curve", "a slice"]
    kinds, data = zip(*(str(image["src"]).split(";base64,") for image in images), strict=True)
    assert kinds == ("data:image/svg+xml", "data:image/png")
    assert [base64.b64decode(part) for part in data] == [p.data for p in report().sections[0].pictures]


def test_all_text_is_escaped() -> None:
    table = Table(HOSTILE, [HOSTILE], [[HOSTILE]], HOSTILE)
    section = Section(HOSTILE, HOSTILE, [table], [Picture(HOSTILE, b"", "png")])
    hostile = Report(HOSTILE, HOSTILE, [(HOSTILE, HOSTILE)], [HOSTILE], [section] * 3, HOSTILE)
    page = Page(render(hostile))
    assert not page.all("script")
    # The title twice, lead, figure, value, warning, footer; per section: link, title, text, table's four, caption.
    assert sum(word.strip() == HOSTILE for word in page.words) == 7 + 3 * 8
    assert page.all("img")[0]["alt"] == HOSTILE


def test_columns_of_numbers_are_told() -> None:
    rows = [["a", "0.1 ± 0.2", "< 0.001", "", "1 case"], ["3", "−0.1", "", "", "n/a"]]
    assert Table("", list("vwxyz"), rows).numeric == [False, True, True, False, False]
    assert Table("", ["a", "b"], []).numeric == [False, False]


def test_cells_stand_out_and_lead_somewhere() -> None:
    link = Cell("0.7", "runs/pcl%231/report.html", strong=True, underline=True, below=("", HOSTILE))
    page = Page(render(Report("", "", sections=[Section("", tables=[Table("", ["a", "b"], [["x", link]])])])))
    row = [tag for tag, _ in page.tags][[tag for tag, _ in page.tags].index("tbody") :]
    assert row == ["tbody", "tr", "td", "td", "a", "strong", "u", "small"]
    assert page.all("a") == [{"href": "runs/pcl%231/report.html"}]
    assert page.all("td")[1] == {"class": "number"}
    assert HOSTILE in page.words
    hostile = Page(render(Report("", "", sections=[Section("", tables=[Table("", ["a"], [[Cell("", HOSTILE)]])])])))
    assert hostile.all("a") == [{"href": HOSTILE}]


def test_little_content_leaves_no_empty_boxes() -> None:
    page = Page(render(Report("Title", "Lead")))
    assert not [tag for tag, _ in page.tags if tag in {"nav", "dl", "aside", "footer", "section", "figure"}]


def test_written_whole_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "report.html"
    write_report(Report("Old", ""), path)
    write_report(report(), path)
    assert path.read_text(encoding="utf-8") == render(report())
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
