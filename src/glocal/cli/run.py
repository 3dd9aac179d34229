"""`glocal run`: all that a recipe says."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe (see `glocal recipes`) or a YAML file.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="data=DATASET out=RUN, and any setting of the recipe."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Trainings at the same time, which share the cores; default: one per core, or per GPU."
        ),
    ] = None,
) -> None:
    """Preprocess, pre-train, fine-tune, predict, evaluate and report as a recipe says; started again, it continues."""
    from glocal.experiments.run import run as whole_road

    out: Path = whole_road(recipe, words or [], workers)
    if (out / "table.md").exists():
        typer.echo((out / "table.md").read_text(encoding="utf-8"))
    typer.echo(f"Report: {out / 'report.html'}")
