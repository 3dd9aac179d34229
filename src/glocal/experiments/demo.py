"""The demonstration: the whole road on the embedded phantom."""

from pathlib import Path

from glocal.data.phantom import phantom
from glocal.experiments.run import run


def demo(out: Path) -> Path:
    """Make the phantom, compare pre-training with random weights at two labelled volumes, and write the report.

    Returns:
        The report, `out/run/report.html`.

    Raises:
        GlocalError: the folder cannot be written, or holds something else.
    """
    data = out / "phantom"
    if not (data / "dataset.json").exists():
        phantom(data)
    return run("phantom-small", [f"data={data}", f"out={out / 'run'}"]) / "report.html"
