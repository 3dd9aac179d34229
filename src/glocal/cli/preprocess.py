"""`glocal preprocess`: volumes to slices."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

SHOWN = 10


def preprocess(
    dataset: Annotated[Path, typer.Argument(help="A raw dataset (see `glocal collect`, `glocal check`).")],
    store: Annotated[Path, typer.Argument(help="Folder for the slices; a begun one is continued.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings of preprocessing, for example size=[128,128]."),
    ] = None,
    recipe: Annotated[str, typer.Option(help="Recipe whose preprocessing is used.")] = "auto",
    workers: Annotated[int | None, typer.Option(min=1, help="Cases at the same time; default: one per core.")] = None,
) -> None:
    """Correct, normalise, resample and crop every volume: what training reads."""
    import yaml

    from glocal.experiments.steps import preprocess_with

    done = preprocess_with(dataset, store, recipe, words or [], workers)
    typer.echo(yaml.safe_dump({"preprocess": done.plan.options.model_dump(mode="json")}, sort_keys=False).rstrip())
    for warning in done.warnings[:SHOWN]:
        typer.secho(f"Warning: {warning}", fg=typer.colors.YELLOW, err=True)
    if len(done.warnings) > SHOWN:
        typer.secho(f"... and {len(done.warnings) - SHOWN} more (see the report of a run)", err=True)
    typer.echo(f"{len(done.volumes)} volumes in {store}. Next: glocal pretrain {quote(str(store))} RUN --method pcl")
