"""The values that the authors' released loss code gives for closed-form inputs, in float64."""

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from glocal.contrast import pairs
from glocal.contrast.losses import contrastive_loss
from glocal.contrast.regions import (
    NEIGHBOURS,
    Kernel,
    local_loss,
    local_masks,
    pairs_local_random,
    region_names,
    region_positions,
    region_vectors,
)

SUPCON = 0.1 / 0.07  # the factor PCL's code applies to its loss


def counted(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


def embeddings(n: int, width: int) -> Tensor:
    i, j = counted(n)[:, None], counted(width)
    return torch.sin(0.37 * i * j + 0.11 * i)


def maps(batch: int, side: int, channels: int) -> Tensor:
    """(B, C, h, w)."""
    b, k = counted(batch)[:, None, None, None], counted(channels)[:, None, None]
    y, x = counted(side)[:, None], counted(side)
    return torch.sin(0.7 * b + 0.31 * y * k + 0.17 * x * (k + 1))


def is_golden(loss: Tensor, value: float) -> None:
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(value, rel=1e-9)


def test_g_d_minus() -> None:
    slices = torch.arange(12).repeat(3)  # originals, first views, second views
    loss = contrastive_loss(embeddings(36, 8), *pairs.g_d_minus(slices, slices % 4), 0.1, denominator="one")
    is_golden(2 * loss, 10.09614209444148)


def test_g_d_ring_of_the_released_code() -> None:
    # Groups of four partitions, O0 A0 O1 A1 ... O5 A5. Only neighbouring slots of a ring of six attract across volumes,
    # and (O, A) is met twice: the mean of the two kinds of pairs, each of its mean.
    z, index = embeddings(48, 8), torch.arange(48)
    partition, group = index % 4, index // 4
    slot, kind = group // 2, group % 2
    own, negative = pairs.g_d_minus(slot * 4 + partition, partition)
    step = (slot[:, None] - slot) % 6
    ring = (partition[:, None] == partition) & (kind[:, None] == kind) & ((step == 1) | (step == 5))
    first, second = (contrastive_loss(z, positive, negative, 0.1, denominator="one") for positive in (own, ring))
    assert own.sum() * 2 == ring.sum() == 96
    is_golden(4 * (first + second) / 2, 31.61211490937998)


IMAGE = torch.arange(6).repeat(2)
POSITION = torch.tensor([0.1, 0.2, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64).repeat(2)


@pytest.mark.parametrize(
    ("masks", "value"),
    [
        (lambda: pairs.positional(IMAGE, POSITION, 0.35), 6.952343264395182),
        (lambda: pairs.positional(IMAGE, POSITION, 0.1), 7.100229007280739),
        (lambda: pairs.positional(IMAGE, POSITION, 0.0), 7.863704791029516),
        (lambda: pairs.same_label(torch.tensor([1, 1, 2, 2, 3, 4]).repeat(2)), 7.5986400365276445),
        (lambda: pairs.g_random(IMAGE), 7.863704791029516),
    ],
    ids=["PCL .35", "PCL .1", "PCL 0 is SimCLR", "GCL", "SimCLR"],
)
def test_pcl_family(masks: Callable[[], pairs.Masks], value: float) -> None:
    loss = contrastive_loss(embeddings(12, 8), *masks(), 0.1, denominator="all")
    is_golden(SUPCON * loss, value)


@pytest.mark.parametrize("denominator", ["one", "all"])
def test_g_random(denominator: Literal["one", "all"]) -> None:
    loss = contrastive_loss(embeddings(12, 8), *pairs.g_random(IMAGE), 0.1, denominator=denominator)
    is_golden(loss, 5.504593353720661)


def test_jcl_dense() -> None:
    a = maps(4, 4, 8)
    b = 0.5 * a + 0.5 * a.flip(0)
    position = torch.tensor([0.1, 0.15, 0.6, 0.9], dtype=torch.float64).repeat(2)
    masks = pairs.positional(torch.arange(4).repeat(2), position, 0.1)
    locations = torch.cat([a, b]).flatten(2).permute(2, 0, 1)  # (h w, 2N, C)
    is_golden(SUPCON * contrastive_loss(locations, *masks, 0.1, denominator="all"), 4.269831829258608)


@pytest.mark.parametrize(
    ("kernel", "projected", "value"),
    [(1, False, 1.329827216673658), (3, False, 0.2830088424152683), (3, True, 0.2953322493014149)],
)
def test_local_random(kernel: Kernel, projected: bool, value: float) -> None:
    vectors = region_vectors(maps(4, 48, 4), region_positions(48, 48, kernel=kernel), kernel)
    if projected:
        vectors = vectors @ torch.cos(0.13 * counted(36)[:, None] * counted(128))
    image = torch.tensor([0, 0, 1, 1])
    is_golden(local_loss(vectors, pairs_local_random(image), *local_masks(kernel=kernel), 0.1), value)


@pytest.mark.parametrize(("kernel", "value"), [(1, 17.959420257205192), (3, 14.65772517284465)])
def test_local_d_of_the_released_code(kernel: Kernel, value: float) -> None:
    # One direction, anchors in the first view of each of 12 slices: against its second view and the first views of
    # the other two volumes; of each list of neighbours only the first four.
    names = region_names(kernel=kernel)
    lists = [row.split(":")[1 if kernel == 3 else 2].split()[:4] for row in NEIGHBOURS.strip().splitlines()]
    four = torch.tensor([[name in neighbours for name in names] for neighbours in lists])
    order = [row.split(":")[0].strip() for row in NEIGHBOURS.strip().splitlines()]
    negative = four[[order.index(name) for name in names[:13]]].repeat(1, 2)
    chosen = torch.tensor([(i, j) for i in range(12) for j in (i + 12, (i + 4) % 12, (i + 8) % 12)])
    vectors = region_vectors(maps(24, 48, 4), region_positions(48, 48, kernel=kernel), kernel)
    is_golden(1.5 * local_loss(vectors, chosen, local_masks(kernel=kernel)[0], negative, 0.1), value)


def test_collapse() -> None:
    image = torch.arange(25).repeat(2)
    same = torch.ones(50, 8, dtype=torch.float64)
    loss = contrastive_loss(same, *pairs.positional(image, image / 25, 0.1), 0.1, denominator="all")
    assert loss.item() == pytest.approx(math.log(49), rel=1e-9)
    assert loss.item() * SUPCON == pytest.approx(5.559743, abs=5e-7)


@pytest.mark.parametrize(("count", "labels"), [(10, "1112223334"), (5, "12344"), (7, "1122334")])
def test_pcl_partitions(count: int, labels: str) -> None:
    found = pairs.pcl_partition(torch.arange(count), count) + 1
    assert "".join(map(str, found.tolist())) == labels


@pytest.mark.parametrize("bounds", [[0, 2, 4, 6, 8], [0, 3, 6, 9, 12]], ids=["10 slices", "13 slices"])
def test_partitions_of_the_released_glcl_code(bounds: list[int]) -> None:
    # The code never draws the last slices, 8 and 9 of 10, 12 of 13; on a volume without such a tail ours is the same.
    partition = pairs.partition_of(torch.arange(bounds[-1]), bounds[-1], 4)
    assert [int((partition < s).sum()) for s in range(5)] == bounds
