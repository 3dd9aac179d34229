"""Local regions: positions, vectors, pairs of maps, and the local loss against a slow loop written from the paper."""

import pytest
import torch
from torch import Tensor

from glocal.contrast.regions import (
    NEIGHBOURS,
    Kernel,
    Negatives,
    Regions,
    local_loss,
    local_masks,
    pairs_local_d,
    pairs_local_random,
    region_names,
    region_positions,
    region_vectors,
)
from glocal.errors import GlocalError


def random_maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_positions_of_the_papers_map() -> None:
    found = {tuple(p) for p in region_positions(48, 48, 13, 3, "all").tolist()}
    assert found == {(y, x) for y in (0, 22, 44) for x in (0, 22, 44)} | {(y, x) for y in (11, 33) for x in (11, 33)}


def test_positions_use_both_sides_of_the_map() -> None:
    names = region_names(13, 1)
    places = dict(zip(names, region_positions(21, 9, 13, 1).tolist(), strict=True))
    assert places["TR"] == [0, 8]
    assert places["BL"] == [20, 0]
    assert places["C"] == [10, 4]
    assert places["SW"] == [15, 2]


def test_positions_on_an_odd_map_round_down() -> None:
    names = region_names(13, 3)
    places = dict(zip(names, region_positions(11, 12, 13, 3).tolist(), strict=True))  # free: 7, 8
    assert places["NE"] == [1, 6]
    assert places["SW"] == [5, 2]
    assert places["C"] == [3, 4]
    assert places["r"] == [3, 6]


@pytest.mark.parametrize("regions", [9, 13])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("negatives", ["neighbours", "all"])
def test_small_maps_are_refused_exactly_where_regions_would_coincide(
    regions: Regions, kernel: Kernel, negatives: Negatives
) -> None:
    lattice_only = regions == 9 and negatives == "all"
    smallest = {1: 3 if lattice_only else 5, 3: 6 if lattice_only else 8}[kernel]
    with pytest.raises(GlocalError, match=f"{smallest - 1} x 20.*at least {smallest} x {smallest}"):
        region_positions(smallest - 1, 20, regions, kernel, negatives)
    for side in range(smallest, smallest + 8):
        positions = region_positions(side, 20, regions, kernel, negatives)
        assert len(positions.unique(dim=0)) == len(positions) == len(region_names(regions, kernel, negatives))
        assert int(positions[:, 0].max()) + kernel <= side


def test_a_small_map_names_the_way_out() -> None:
    with pytest.raises(GlocalError, match=r"6 x 6.*at least 8 x 8.*regions of 1 x 1\.$"):
        region_positions(6, 6)
    with pytest.raises(GlocalError, match=r"4 x 40.*at least 5 x 5.*decoder blocks\.$"):
        region_positions(4, 40, 13, 1)


def test_vectors_are_windows_in_the_order_row_column_channel() -> None:
    maps = torch.arange(2 * 3 * 5 * 6).reshape(2, 3, 5, 6).float()
    vectors = region_vectors(maps, torch.tensor([[0, 0], [2, 3], [1, 2]]), 3)
    assert vectors.shape == (2, 3, 27)
    expected = [maps[1, k, 2 + y, 3 + x] for y in range(3) for x in range(3) for k in range(3)]
    assert vectors[1, 1].tolist() == [value.item() for value in expected]


@pytest.mark.parametrize("kernel", [1, 3])
def test_neighbours_are_five_each(kernel: Kernel) -> None:
    positive, negative = local_masks(13, kernel)
    count = len(region_names(13, kernel))
    assert positive.shape == negative.shape == (13, 2 * count)
    assert (negative.sum(1) == 10).all()
    assert (negative[:, :count] == negative[:, count:]).all()
    assert not (positive & negative).any()
    assert not negative[:, :13].diagonal().any()


def test_lattice_anchors_keep_their_neighbours() -> None:
    nine, thirteen = local_masks(9, 3), local_masks(13, 3)
    assert region_names(9, 3) == region_names(13, 3)
    assert (nine[1] == thirteen[1][:9]).all()


def slow_local(
    maps: Tensor, couples: list[tuple[int, int]], regions: Regions, kernel: Kernel, negatives: Negatives
) -> Tensor:
    margin = 4 if kernel == 3 else 1
    fy, fx = maps.shape[2] - margin, maps.shape[3] - margin
    y = {0: 0, 1: fy // 4, 2: fy // 2, 3: 3 * fy // 4, 4: fy}
    x = {0: 0, 1: fx // 4, 2: fx // 2, 3: 3 * fx // 4, 4: fx}
    at = {"TL": (0, 0), "T": (0, 2), "TR": (0, 4), "L": (2, 0), "C": (2, 2), "R": (2, 4), "BL": (4, 0), "B": (4, 2)}
    at |= {"BR": (4, 4), "NW": (1, 1), "NE": (1, 3), "SW": (3, 1), "SE": (3, 3)}
    anchors = list(at)[:regions]
    at |= {"t": (1, 2), "l": (2, 1), "r": (2, 3), "b": (3, 2)}
    table = {row.split(":")[0].strip(): row.split(":")[1:] for row in NEIGHBOURS.strip().splitlines()}

    def vector(b: int, name: str) -> Tensor:
        top, left = y[at[name][0]], x[at[name][1]]
        return maps[b, :, top : top + kernel, left : left + kernel].reshape(-1)

    def e(b: int, one: str, c: int, other: str) -> Tensor:
        u, v = vector(b, one), vector(c, other)
        return torch.exp(torch.dot(u, v) / (u.norm() * v.norm()) / 0.1)

    terms = []
    for u, v in couples:
        for name in anchors:
            listed = table[name][0 if kernel == 3 else 1].split()
            others = listed if negatives == "neighbours" else [other for other in anchors if other != name]
            attract = e(u, name, v, name)
            repel = sum(e(u, name, b, other) for b in (u, v) for other in others)
            terms.append(-torch.log(attract / (attract + repel)))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("regions", [9, 13])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("negatives", ["neighbours", "all"])
def test_slow_loop(regions: Regions, kernel: Kernel, negatives: Negatives) -> None:
    maps = random_maps(1, 3, 2, 9, 13).requires_grad_()
    couples = [(0, 1), (1, 0), (2, 0)]
    vectors = region_vectors(maps, region_positions(9, 13, regions, kernel, negatives), kernel)
    fast = local_loss(vectors, torch.tensor(couples), *local_masks(regions, kernel, negatives), 0.1)
    slow = slow_local(maps, couples, regions, kernel, negatives)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(torch.autograd.grad(fast, maps), torch.autograd.grad(slow, maps))


def as_set(found: Tensor) -> set[tuple[int, int]]:
    couples = {(int(u), int(v)) for u, v in found}
    assert len(couples) == len(found)
    return couples


def test_pairs_of_two_views() -> None:
    assert as_set(pairs_local_random(torch.tensor([5, 7, 9, 7, 5, 9]))) == {
        (0, 4),
        (4, 0),
        (1, 3),
        (3, 1),
        (2, 5),
        (5, 2),
    }


@pytest.mark.parametrize(("volumes", "partitions"), [(3, 4), (1, 3), (2, 1)])
def test_pairs_across_volumes(volumes: int, partitions: int) -> None:
    slices = [(v, s) for v in range(volumes) for s in range(partitions)] * 2  # first views, second views
    volume, partition = torch.tensor(slices).T
    found = as_set(pairs_local_d(volume * partitions + partition, volume, partition))
    expected = {
        (i, j)
        for i, (v, s) in enumerate(slices)
        for j, (w, p) in enumerate(slices)
        if i != j and s == p and (v != w or abs(i - j) == len(slices) // 2)
    }
    assert found == expected
    assert len(found) == partitions * 2 * volumes * (2 * volumes - 1)


def test_two_slices_of_one_volume_and_partition_are_no_pair() -> None:
    assert as_set(pairs_local_d(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), torch.zeros(3))) == {
        (0, 2),
        (2, 0),
        (1, 2),
        (2, 1),
    }


def test_no_pair_of_maps_is_zero_with_a_graph() -> None:
    maps = random_maps(2, 3, 2, 9, 9).requires_grad_()
    vectors = region_vectors(maps, region_positions(9, 9), 3)
    loss = local_loss(vectors, pairs_local_random(torch.arange(3)), *local_masks(), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert maps.grad is not None
    assert (maps.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_and_empty_maps_at_temperature_one_hundredth(dtype: torch.dtype) -> None:
    maps = random_maps(3, 1, 4, 12, 12).repeat(3, 1, 1, 1).to(dtype)
    maps[2] = 0
    maps.requires_grad_()
    vectors = region_vectors(maps, region_positions(12, 12), 3)
    loss = local_loss(vectors, torch.tensor([(0, 1), (0, 2), (2, 0)]), *local_masks(), 0.01)
    loss.backward()
    assert loss.isfinite()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()
