"""Draw the pictures of docs/figures: `python -m figures [NAME ...]`, all of them without a name."""

import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from figures import answers, branches, cells, pixels, places, pretexts, siamese, slices, windows
from figures.sheet import Sheet
from figures.step import hearts
from glocal.data.store import Store

FOLDER = Path(__file__).parents[1] / "docs" / "figures"
PICTURES: dict[str, Callable[[Store], Sheet]] = {
    "byol": siamese.byol,
    "context-restoration": pretexts.context_restoration,
    "dino": answers.dino,
    "gcl-global": places.gcl_global,
    "gcl-local": places.gcl_local,
    "ideal": cells.ideal,
    "inpainting": pretexts.inpainting,
    "jcl": branches.jcl,
    "label-efficient": pixels.label_efficient,
    "moco": slices.moco,
    "pcl": places.pcl,
    "pgl": windows.pgl,
    "pixel-global": pixels.pixel_global,
    "rotation": pretexts.rotation,
    "simclr": slices.simclr,
    "simsiam": siamese.simsiam,
    "simtriplet": siamese.simtriplet,
    "swav": answers.swav,
}


def main(names: list[str]) -> None:
    """Draw some pictures, or all."""
    torch.set_num_threads(1)  # sums in one order, so that a picture is the same each time
    FOLDER.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder:
        store = hearts(Path(folder))
        for name in names or PICTURES:
            PICTURES[name](store).save(FOLDER / f"{name}.png")
            print(f"docs/figures/{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
