"""A full pre-training step on a GPU beside the bare network: is the pipeline the bottleneck there?

python -m benchmarks.gpu
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.harness import Row, main
from benchmarks.step import against_bare, compiled, deterministic, make_store, precision


def rows() -> Iterator[Row]:
    """Both stages of GCL and PCL at 192², 40 and 256 images a step; then precision, compilation, determinism."""
    gpu = torch.device("cuda", 0)
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), 192, subjects=70).to(gpu)
        for images in (40, 256):
            yield from against_bare(store, images, gpu, 1.10)
        yield precision(store, gpu)
        yield deterministic(store, gpu)
        yield compiled(store, gpu)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("No GPU here: nothing to measure.")
    main(rows, threads=4)
