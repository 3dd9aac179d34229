"""`glocal experiment`: a grid of trainings, its statistics, tables and page."""

from typing import Annotated

import typer


def experiment(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe (see `glocal recipes`) or a YAML file.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="data=DATASET, out=FOLDER (else `experiments`), any setting."),
    ] = None,
    executor: Annotated[
        str, typer.Option(help="`local`, or dask://HOST:PORT of a Dask scheduler whose workers see the same folders.")
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Trainings at the same time; default: one per core, or per GPU, or Dask worker."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Preprocess, measure a few steps, say how many trainings and how long.")
    ] = False,
) -> None:
    """Train everything that a recipe compares, and write tables, figures and a page; started again, it continues."""
    from glocal.experiments.experiment import experiment as whole

    page = whole(recipe, words or [], executor, workers, dry_run)
    if page is None:
        return
    for table in sorted(page.parent.glob("table-*.md")):
        typer.echo(table.read_text(encoding="utf-8"))
    typer.echo(f"Page: {page}")
