"""`glocal predict`: masks for new images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

_SHOWN = 10


def predict(
    model: Annotated[Path, typer.Argument(help="A model.safetensors file, or the folder of a fine-tuning run.")],
    images: Annotated[Path, typer.Argument(help="Folder of images (or DICOM series), or one image file.")],
    out: Annotated[Path, typer.Argument(help="Folder for the masks.")],
    others: Annotated[
        list[Path] | None,
        typer.Option(
            "--with", metavar="MODEL", help="A further model to average with, of the same dataset; may be repeated."
        ),
    ] = None,
    tta: Annotated[
        bool,
        typer.Option(
            "--tta",
            help="Look at every slice five times, turned, zoomed and shifted a third as far as in training (mirrored "
            "only if that did), and average: often a little better, five times as long.",
        ),
    ] = False,
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty",
            help="Also write where the prediction is unsure (CASE_uncertainty, 0 to 1), and a page with the most "
            "uncertain cases first. Says more together with --tta, --with or --passes.",
        ),
    ] = False,
    passes: Annotated[
        int,
        typer.Option(
            help="Average over so many passes with random dropout, for networks that have it: bcdu-net, uctransnet."
        ),
    ] = 0,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write CASE.npz with the class probabilities (K, z, y, x).")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Predict masks that exist again.")] = False,
) -> None:
    """Segment images: one mask each, in the geometry and format of the image.

    OUT/cases.csv lists the volumes of all structures, and first the cases that need a human's eye.
    """
    from rich.console import Console

    from glocal.evaluation.cases import doubt
    from glocal.files import read_json
    from glocal.inference import predict as segment
    from glocal.overview import read_cases
    from glocal.predictions import CASES, PAGE, RECORD

    masks = segment(model, images, out, probabilities, device, overwrite, others or [], tta, uncertainty, passes)
    record = read_json(out / RECORD)
    table = read_cases(out)
    Console().print(cases_table(table))
    if warning := doubt(table):
        typer.secho(f"Warning: {warning}", fg="yellow")
    typer.echo(f"{record['summary']} {record['calibration']}")
    typer.echo(f"{len(masks)} masks in {out}, all cases in {out / CASES}.")
    if uncertainty:
        typer.echo(f"The page to look at: {out / PAGE}")


def cases_table(frame: "pd.DataFrame") -> "Table":
    """The first cases of `cases.csv`, as people see them."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    volumes = [str(column) for column in frame if str(column).endswith(" ml") and (frame[column] != "").all()]
    unsure = frame["uncertainty"].notna().any()
    table = Table(
        title=f"{len(frame)} cases" + (f", the first {_SHOWN} to look at" if len(frame) > _SHOWN else ""),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("Case")
    for heading in (*(["Uncertainty"] if unsure else []), *volumes):
        table.add_column(escape(heading), justify="right")
    table.add_column("Flags")
    for _, row in frame.head(_SHOWN).iterrows():
        numbers = ([f"{row['uncertainty']:.3f}"] if unsure else []) + [f"{float(row[name]):.1f}" for name in volumes]
        table.add_row(escape(str(row["case"])), *numbers, escape(str(row["flags"])))
    return table
