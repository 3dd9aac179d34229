"""Every strategy against the sets of pairs of its paper, written out as loops; positions and partitions."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from glocal.contrast import pairs
from glocal.contrast.losses import contrastive_loss


@dataclass(frozen=True)
class Input:
    """One image that goes through the network."""

    volume: int
    slice: int
    role: int  # 0 original, 1 first view, 2 second view
    partition: int
    position: float

    @property
    def image(self) -> int:
        return 100 * self.volume + self.slice


def batch(seed: int, volumes: int, partitions: int, roles: tuple[int, ...], per_partition: int = 1) -> list[Input]:
    """Slices drawn from each partition of each volume, in shuffled order."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for volume in range(volumes):
        count = partitions * per_partition + int(torch.randint(0, 5, (), generator=g))
        for partition in range(partitions):
            members = [i for i in range(count) if i * partitions // count == partition]
            chosen = torch.randperm(len(members), generator=g)[:per_partition].tolist()
            found += [
                Input(volume, members[c], role, partition, (members[c] + 1) / count) for c in chosen for role in roles
            ]
    return [found[i] for i in torch.randperm(len(found), generator=g)]


def columns(inputs: list[Input], *names: str) -> list[Tensor]:
    return [torch.tensor([getattr(x, name) for x in inputs]) for name in names]


def embed(inputs: list[Input], seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(len(inputs), 6, generator=g, dtype=torch.float64).requires_grad_()


def similarities(z: Tensor, temperature: float) -> list[list[Tensor]]:
    return [[torch.dot(u, v) / (u.norm() * v.norm() * temperature) for v in z] for u in z]


def slow_one(z: Tensor, couples: set[tuple[int, int]], negatives: list[list[int]], temperature: float) -> Tensor:
    """GLCL Eq. 1: both directions of every unordered couple, mean."""
    s = similarities(z, temperature)
    terms = [
        -torch.log(s[u][v].exp() / (s[u][v].exp() + sum(s[u][k].exp() for k in negatives[u])))
        for i, j in couples
        for u, v in ((i, j), (j, i))
    ]
    return torch.stack(terms).mean()


def slow_all(z: Tensor, positives: list[list[int]], temperature: float) -> Tensor:
    """PCL: everything but the anchor in the denominator; anchors without positives have no term."""
    s = similarities(z, temperature)
    terms = []
    for i, own in enumerate(positives):
        if own:
            below = torch.log(sum(s[i][k].exp() for k in range(len(z)) if k != i))
            terms.append(-sum(s[i][j] - below for j in own) / len(own))
    return torch.stack(terms).mean()


def assert_same(fast: Tensor, slow: Tensor, z: Tensor) -> None:
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(torch.autograd.grad(fast, z), torch.autograd.grad(slow, z))


def find(inputs: list[Input], image: int, role: int) -> int:
    return next(k for k, x in enumerate(inputs) if x.image == image and x.role == role)


def other_partitions(inputs: list[Input]) -> list[list[int]]:
    return [[k for k, y in enumerate(inputs) if y.partition != x.partition] for x in inputs]


def couples_within(inputs: list[Input]) -> set[tuple[int, int]]:
    """(x, x~), (x, x^), (x~, x^) of every original."""
    return {
        (find(inputs, image, a), find(inputs, image, b))
        for image in {x.image for x in inputs}
        for a, b in ((0, 1), (0, 2), (1, 2))
    }


CONFIGURATIONS = [(3, 4), (2, 3), (1, 4), (3, 1), (2, 1), (5, 2)]  # volumes, partitions


@pytest.mark.parametrize(("volumes", "partitions"), CONFIGURATIONS)
def test_g_d_minus(volumes: int, partitions: int) -> None:
    inputs = batch(1, volumes, partitions, (0, 1, 2))
    z = embed(inputs, 2)
    fast = contrastive_loss(z, *pairs.g_d_minus(*columns(inputs, "image", "partition")), 0.1, denominator="one")
    assert_same(fast, slow_one(z, couples_within(inputs), other_partitions(inputs), 0.1), z)


@pytest.mark.parametrize(("volumes", "partitions"), CONFIGURATIONS)
def test_g_d(volumes: int, partitions: int) -> None:
    inputs = batch(3, volumes, partitions, (0, 1, 2))
    z = embed(inputs, 4)
    couples = couples_within(inputs)
    originals = [x for x in inputs if x.role == 0]
    for x in originals:
        for y in originals:
            if x.volume < y.volume and x.partition == y.partition:
                couples.add((find(inputs, x.image, 0), find(inputs, y.image, 0)))  # (x^i, x^j)
                for a, b in ((1, 1), (1, 2), (2, 1), (2, 2)):  # every view of i with every view of j
                    couples.add((find(inputs, x.image, a), find(inputs, y.image, b)))
    image, volume, partition, role = columns(inputs, "image", "volume", "partition", "role")
    masks = pairs.g_d(image, volume, partition, role == 0)
    assert int(masks[0].sum()) == 2 * len(couples)
    fast = contrastive_loss(z, *masks, 0.1, denominator="one")
    assert_same(fast, slow_one(z, couples, other_partitions(inputs), 0.1), z)


@pytest.mark.parametrize("slices", [2, 3, 7])
def test_g_random(slices: int) -> None:
    inputs = batch(5, 1, slices, (1, 2))
    z = embed(inputs, 6)
    images = {x.image for x in inputs}
    couples = {(find(inputs, image, 1), find(inputs, image, 2)) for image in images}
    negatives = [[k for k, y in enumerate(inputs) if y.image != x.image] for x in inputs]
    fast = contrastive_loss(z, *pairs.g_random(*columns(inputs, "image")), 0.1, denominator="one")
    assert_same(fast, slow_one(z, couples, negatives, 0.1), z)


@pytest.mark.parametrize(
    ("roles", "volumes", "threshold"),
    [
        *[((1, 2), 3, 0.1), ((1, 2), 3, 0.35), ((1, 2), 1, 0.2), ((1, 2), 2, 2.0), ((1, 2), 2, 0.0)],
        *[((1,), 3, 0.03), ((1,), 3, 0.35), ((1,), 2, 2.0)],  # one view: some anchors have no positive
    ],
)
def test_positional(roles: tuple[int, ...], volumes: int, threshold: float) -> None:
    inputs = batch(7, volumes, 3, roles, per_partition=2)
    z = embed(inputs, 8)
    positives = [
        [j for j, y in enumerate(inputs) if i != j and (abs(x.position - y.position) < threshold or x.image == y.image)]
        for i, x in enumerate(inputs)
    ]
    image, position = columns(inputs, "image")[0], torch.tensor([x.position for x in inputs], dtype=torch.float64)
    fast = contrastive_loss(z, *pairs.positional(image, position, threshold), 0.1, denominator="all")
    assert_same(fast, slow_all(z, positives, 0.1), z)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2], [0, 1, 0, 2, 3, 3, 0], [4, 4, 4]])
def test_same_label_with_labels_met_once(labels: list[int]) -> None:
    z = torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64).requires_grad_()
    positives = [[j for j, b in enumerate(labels) if i != j and a == b] for i, a in enumerate(labels)]
    fast = contrastive_loss(z, *pairs.same_label(torch.tensor(labels)), 0.1, denominator="all")
    assert_same(fast, slow_all(z, positives, 0.1), z)


def test_masks_are_symmetric_disjoint_and_never_hold_the_anchor() -> None:
    inputs = batch(10, 3, 4, (0, 1, 2))
    image, volume, partition, role = columns(inputs, "image", "volume", "partition", "role")
    position = torch.tensor([x.position for x in inputs], dtype=torch.float64)
    for positive, negative in (
        pairs.g_random(image),
        pairs.g_d_minus(image, partition),
        pairs.g_d(image, volume, partition, role == 0),
        pairs.positional(image, position, 0.2),
        pairs.same_label(partition),
    ):
        assert positive.dtype == negative.dtype == torch.bool
        assert positive.any()
        assert negative.any()
        assert not (positive & negative).any()
        assert not positive.diagonal().any()
        assert not negative.diagonal().any()
        assert (positive == positive.T).all()
        assert (negative == negative.T).all()


def test_the_threshold_is_strict_in_float64() -> None:
    # 0.3 - 0.2 is a little less than 0.1 in float64, 0.2 - 0.1 is exactly 0.1: one is near, the other is not.
    position = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    positive, _ = pairs.positional(torch.arange(3), position, 0.1)
    assert positive.int().tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_position_conventions() -> None:
    count = torch.tensor([4, 4, 10])
    index = torch.tensor([0, 3, 9])
    assert pairs.position_of(index, count).tolist() == [0.25, 1.0, 1.0]
    assert pairs.position_of(index, count, "centre").tolist() == [0.125, 0.875, 0.95]
    assert pairs.position_of(index, 10).dtype == torch.float64


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 10, 13, 101])
def test_partitions_cover_all_slices_in_order_and_are_equal(count: int) -> None:
    partition = pairs.partition_of(torch.arange(count), count, 4)
    sizes = torch.bincount(partition, minlength=4)
    assert (partition.diff() >= 0).all()
    assert len(sizes) == 4
    assert int(sizes.max() - sizes.min()) <= 1


def test_partitions_of_several_volumes_at_once() -> None:
    index, count = torch.tensor([0, 9, 9, 0]), torch.tensor([10, 10, 20, 1])
    assert pairs.partition_of(index, count, 4).tolist() == [0, 3, 1, 0]
    assert pairs.pcl_partition(index, count).tolist() == [0, 3, 1, 0]


def test_pcl_partition_of_volumes_thinner_than_the_partitions() -> None:
    assert [pairs.pcl_partition(torch.arange(n), n).tolist() for n in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]


def test_a_threshold_on_the_lattice_of_a_volume() -> None:
    counts = torch.tensor([10, 20, 9, 11])
    assert pairs.on_lattice(0.1, counts).tolist() == [True, True, False, False]
    assert pairs.on_lattice(0.35, counts).tolist() == [False, True, False, False]
