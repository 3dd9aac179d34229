"""A seed is a function of its keys, the same on every machine."""

import torch

from glocal.randomness import generator, seed_of


def test_seeds_are_fixed_for_ever() -> None:
    # SHA-256 of "0" begins 5feceb66 ffc86f38; every published split and draw hangs on this rule.
    assert seed_of(0) == 0x386FC8FF66EBEC5F >> 1
    assert seed_of(3, "views", 17) == seed_of(3, "views", 17)


def test_every_key_counts() -> None:
    seeds = [seed_of(*keys) for keys in [(0,), (1,), (0, 1), (0, "a"), (0, "a", 1), (0, 1, "a"), (0, "a1"), (0, 11)]]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_generator_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    first = torch.rand(3, generator=generator(5, "a", 1))
    assert torch.equal(first, torch.rand(3, generator=generator(5, "a", 1)))
    assert not torch.equal(first, torch.rand(3, generator=generator(5, "a", 2)))
    assert torch.equal(torch.get_rng_state(), state)
