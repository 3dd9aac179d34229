"""`glocal collect`: a dataset from any folder of volumes."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer


def collect(
    images: Annotated[Path, typer.Argument(help="Folder with NIfTI, MHA or NRRD files or DICOM series; only read.")],
    dataset: Annotated[Path, typer.Argument(help="Folder of the dataset to make; new or empty.")],
    labels: Annotated[
        Path | None,
        typer.Option(help="Folder with label maps named like the images, with or without _gt, _seg, _label, _mask."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the dataset; the folder's name if not given.")] = None,
    subject: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="How the subject (person) is found in a volume's path: 'patient[0-9]+', or '^([^/]+)/' for the name "
            "of the first folder. DICOM patients are known without.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave out what lies at such a path: '*_4d*'; may be repeated."),
    ] = None,
) -> None:
    """Make a dataset (nnU-Net v2 layout) of a folder of volumes, with label maps for some or all of them."""
    from rich.console import Console
    from rich.markup import escape

    from glocal.data.collect import collect as run

    made = run(images, dataset, labels, name, subject, exclude or ())
    console = Console(soft_wrap=True)
    console.print(
        f"[bold]{escape(made.name)}[/]: {made.cases} cases ({made.labelled} labelled) of {made.subjects} subjects, "
        f"{made.channels} channel(s), labels: {', '.join(made.labels) or 'none'}"
    )
    for note in made.notes:
        console.print(f"[yellow]look[/] {escape(note)}")
    console.print(f"Next: name the labels and channels in {escape(str(dataset / 'dataset.json'))}, then run")
    console.print(f"  glocal check {escape(quote(str(dataset)))}")
