"""What a batch holds, on stores of a few numbers: partitions, passes, and what happens when there is too little."""

from collections import Counter
from collections.abc import Sequence
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glocal.data.sampling import Pool
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.randomness import generator


class Counts:
    """The numbering of a store whose volumes `0`, `1`, ... have these many slices."""

    def __init__(self, counts: Sequence[int]) -> None:
        numbers = torch.tensor(counts)
        self.first = numbers.cumsum(0) - numbers
        self.volume_of = torch.arange(len(counts)).repeat_interleave(numbers)
        self.slice_of = torch.cat([torch.arange(count) for count in counts])
        self.count_of = numbers[self.volume_of]

    def index_of(self, case: str) -> int:
        return int(case)


def pool_of(counts: Sequence[int], cases: Sequence[int] | None = None) -> Pool:
    chosen = range(len(counts)) if cases is None else cases
    return Pool(cast(Store, Counts(counts)), [str(case) for case in chosen])


def test_a_pool_holds_the_slices_of_its_cases_only() -> None:
    pool = pool_of([2, 3, 4], cases=[2, 0, 2])
    assert len(pool) == 6
    assert pool.slices.tolist() == [0, 1, 5, 6, 7, 8]
    assert pool.volumes.tolist() == [0, 2]
    seen = pool.uniform(200, generator(0))
    assert set(seen.volume.tolist()) == {0, 2}
    assert {(v, n) for v, n in zip(seen.volume.tolist(), seen.count.tolist(), strict=True)} == {(0, 2), (2, 4)}


def test_no_case_is_refused() -> None:
    with pytest.raises(GlocalError, match="no volume to train on"):
        pool_of([3], cases=[])


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 23), partitions=st.integers(1, 9))
def test_partitions_are_an_equal_split_that_leaves_no_slice_out(n: int, partitions: int) -> None:
    pool = pool_of([n])
    drawn = [pool.partitioned(1, partitions, generator(seed)) for seed in range(60)]
    nonempty = sorted({i * partitions // n for i in range(n)})
    for slices in drawn:
        assert [i * partitions // n for i in slices.number.tolist()] == nonempty
    widths = Counter(i * partitions // n for i in range(n))
    assert max(widths.values()) - min(widths.values()) <= 1
    if max(widths.values()) <= 3:  # else sixty draws may miss one
        assert {i for slices in drawn for i in slices.number.tolist()} == set(range(n))


def test_every_slice_of_a_partition_is_as_likely_as_the_others() -> None:
    draws, pool = 3000, pool_of([11])
    counts = Counter(i for seed in range(draws) for i in pool.partitioned(1, 4, generator(seed)).number.tolist())
    width = Counter(i * 4 // 11 for i in range(11))
    assert sorted(width.values()) == [2, 3, 3, 3]
    for i in range(11):
        p = 1 / width[i * 4 // 11]
        assert abs(counts[i] - draws * p) < 5 * (draws * p * (1 - p)) ** 0.5


def test_volumes_of_a_batch_are_distinct_and_come_one_after_the_other() -> None:
    pool = pool_of([8, 9, 10, 11, 12], cases=[0, 1, 3, 4])
    seen = set()
    for seed in range(30):
        slices = pool.partitioned(3, 4, generator(seed))
        volumes = slices.volume.tolist()
        assert len(slices) == 12
        assert volumes == [v for v in dict.fromkeys(volumes) for _ in range(4)]
        assert len(set(volumes)) == 3
        assert (slices.number * 4 // slices.count).tolist() == [0, 1, 2, 3] * 3
        assert torch.equal(pool.store.first[slices.volume] + slices.number, slices.index)
        seen.add(frozenset(volumes))
    assert seen == {frozenset(s) for s in ([0, 1, 3], [0, 1, 4], [0, 3, 4], [1, 3, 4])}


def test_fewer_slices_than_partitions_leave_partitions_empty() -> None:
    slices = pool_of([3]).partitioned(1, 4, generator(0))
    assert slices.number.tolist() == [0, 1, 2]
    assert (slices.number * 4 // 3).tolist() == [0, 1, 2]
    mixed = pool_of([2, 8, 1]).partitioned(3, 4, generator(1))
    assert Counter(mixed.volume.tolist()) == {0: 2, 1: 4, 2: 1}


def test_one_volume_and_fewer_than_asked_give_what_there_is() -> None:
    assert set(pool_of([8]).partitioned(5, 4, generator(0)).volume.tolist()) == {0}
    assert Counter(pool_of([8, 7]).partitioned(5, 3, generator(0)).volume.tolist()) == {0: 3, 1: 3}


@pytest.mark.parametrize(("slices", "batch"), [(12, 4), (10, 4), (7, 3), (5, 5), (9, 2)])
def test_a_pass_shows_a_slice_at_most_once_and_drops_the_incomplete_batch(slices: int, batch: int) -> None:
    pool = pool_of([slices - 3, 3])
    batches = slices // batch
    passes = []
    for number in range(40):
        steps = range(number * batches, (number + 1) * batches)
        order = [i for step in steps for i in pool.epoch(batch, 0, step).index.tolist()]
        assert len(order) == len(set(order)) == batches * batch
        passes.append(tuple(order))
    assert len(set(passes)) > 30
    assert {i for order in passes for i in order} == set(range(slices))


def test_a_pass_is_shuffled_once_whatever_was_asked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of([9, 10, 11], cases=[0, 2])
    expected = [
        pool.slices[torch.randperm(20, generator=generator(seed, "epoch", passes))][place : place + 5].tolist()
        for seed in (3, 4)
        for passes in (0, 1)
        for place in (0, 5, 10, 15)
    ]
    drawn, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: drawn.append(args) or randperm(*args, **kwargs))
    keys = [(seed, step) for seed in (3, 4) for step in range(8)]
    assert [pool.epoch(5, *key).index.tolist() for key in keys] == expected
    assert drawn == [(20,)] * 4
    assert [pool.epoch(5, *key).index.tolist() for key in reversed(keys)] == expected[::-1]


def test_slices_are_taken_by_range_by_number_and_by_mask() -> None:
    slices = pool_of([4, 5]).epoch(9, 0, 0)
    rows = torch.tensor([4, 0, 7])
    for taken, places in ((slices[2:8:3], [2, 5]), (slices[rows], [4, 0, 7]), (slices[slices.volume == 1], None)):
        expected = (slices.volume == 1).nonzero().squeeze(1).tolist() if places is None else places
        assert len(taken) == len(expected)
        for name in ("index", "volume", "number", "count"):
            assert getattr(taken, name).tolist() == [getattr(slices, name).tolist()[k] for k in expected]


def test_a_pool_smaller_than_the_batch_gives_all_its_slices_every_time() -> None:
    pool = pool_of([2, 3])
    assert [sorted(pool.epoch(20, 0, step).index.tolist()) for step in range(3)] == [[0, 1, 2, 3, 4]] * 3


def test_a_neighbour_is_the_slice_before_or_after_and_at_the_ends_the_only_one() -> None:
    counts, draws = [1, 2, 5, 3], 400
    pool = pool_of(counts, cases=[0, 1, 2])
    slices = pool.epoch(8, 0, 0)
    seen = [pool.neighbours(slices, generator(0, draw)) for draw in range(draws)]
    assert seen[7].index.tolist() == pool.neighbours(slices, generator(0, 7)).index.tolist()
    for k, (volume, number) in enumerate(zip(slices.volume.tolist(), slices.number.tolist(), strict=True)):
        beside = [i for i in (number - 1, number + 1) if 0 <= i < counts[volume]] or [number]
        found = Counter(int(one.number[k]) for one in seen)
        assert sorted(found) == beside
        assert all(abs(times - draws / len(beside)) < 5 * draws**0.5 / 2 for times in found.values())
        for one in seen:
            assert (int(one.volume[k]), int(one.count[k])) == (volume, counts[volume])
            assert int(one.index[k]) == sum(counts[:volume]) + int(one.number[k])
    sides = torch.stack([one.number - slices.number for one in seen])[:, (slices.volume == 2) & (slices.number % 4 > 0)]
    assert sides.unique(dim=0).shape == (8, 3)  # each slice of a batch has a side of its own


def test_what_is_drawn_hangs_on_seed_and_step_alone() -> None:
    pool = pool_of([9, 10, 11])
    steps = [pool.epoch(7, 3, step).index.tolist() for step in range(12)]
    assert pool.epoch(7, 3, 8).index.tolist() == steps[8]  # whatever came before
    assert pool.epoch(7, 4, 8).index.tolist() != steps[8]
    for draw in (lambda rng: pool.partitioned(2, 4, rng), lambda rng: pool.uniform(8, rng)):
        once, again, other = (draw(generator(*key)).index.tolist() for key in [(0, 1), (0, 1), (0, 2)])
        assert once == again != other


def test_uniform_draws_are_with_replacement_over_all_slices() -> None:
    pool = pool_of([1, 9])
    slices = pool.uniform(5000, generator(0))
    counts = Counter(slices.index.tolist())
    assert set(counts) == set(range(10))
    assert all(abs(count - 500) < 5 * (5000 * 0.1 * 0.9) ** 0.5 for count in counts.values())  # by slice, not volume
    assert slices.number[slices.volume == 0].unique().tolist() == [0]


def test_images_and_labels_are_those_of_the_store(store: Store) -> None:
    pool = Pool(store, ["case2", "case0"])
    slices = pool.uniform(6, generator(0))
    assert set(slices.volume.tolist()) <= {0, 2}
    assert torch.equal(pool.images(slices), store.images(slices.index))
    assert torch.equal(pool.labels(slices), store.labels_of(slices.index))
    case = [store.volumes[int(volume)].case for volume in slices.volume]
    assert torch.equal(pool.images(slices)[0], store.volume(case[0])[int(slices.number[0])])


def test_a_case_that_the_store_lacks_is_refused_by_name(store: Store) -> None:
    with pytest.raises(GlocalError, match="no case somebody"):
        Pool(store, ["case0", "somebody"])
