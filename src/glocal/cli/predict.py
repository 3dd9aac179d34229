"""`glocal predict`: masks for new images."""

from pathlib import Path
from typing import Annotated

import typer


def predict(
    model: Annotated[Path, typer.Argument(help="A model.safetensors file, or the folder of a fine-tuning run.")],
    images: Annotated[Path, typer.Argument(help="Folder of images (or DICOM series), or one image file.")],
    out: Annotated[Path, typer.Argument(help="Folder for the masks.")],
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write CASE.npz with the class probabilities (K, z, y, x).")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Predict masks that exist again.")] = False,
) -> None:
    """Segment images: one mask each, in the geometry and format of the image."""
    from glocal.inference import predict as segment

    masks = segment(model, images, out, probabilities, device, overwrite)
    typer.echo(f"{len(masks)} masks in {out}.")
