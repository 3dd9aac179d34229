"""`glocal check`: what is wrong with a dataset, before anything is computed from it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from glocal.data.findings import CheckReport


def check(
    dataset: Annotated[Path, typer.Argument(help="Folder of the dataset (nnU-Net v2 layout, with dataset.json).")],
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    """Read every file of a dataset and say what is wrong with it and what to do about it.

    The exit code is 0 without errors (warnings and notes are allowed) and 2 with errors.
    """
    from json import dumps

    from rich.console import Console

    from glocal.data.check import check as run

    report = run(dataset)
    if json:
        typer.echo(dumps(report.as_dict(), indent=1, ensure_ascii=False))
    else:
        _show(report, Console())
    raise typer.Exit(0 if report.ok else 2)


def _show(report: "CheckReport", console: "Console") -> None:
    from rich.markup import escape
    from rich.table import Table

    summary = report.summary
    console.print(f"{summary['cases']} cases ({summary['labelled']} labelled) of {summary['subjects']} subjects")
    for severity, colour in (("error", "red"), ("warning", "yellow"), ("note", "cyan")):
        found = [finding for finding in report.findings if finding.severity == severity]
        if not found:
            continue
        table = Table(title=f"[{colour}]{len(found)} {severity}(s)[/]", title_justify="left", expand=True)
        table.add_column("Case", max_width=console.width // 3, overflow="fold")
        table.add_column("Problem", ratio=5, overflow="fold")
        table.add_column("What to do", ratio=4, overflow="fold")
        for finding in found:
            table.add_row(*map(escape, (finding.case or "(all)", finding.message, finding.remedy)))
        console.print(table)
    path = escape(str(report.root))
    if report.ok:
        console.print(f"No errors: {path} is ready to be preprocessed.")
    else:
        console.print(f"Correct the errors, then run: glocal check {path}", soft_wrap=True)
