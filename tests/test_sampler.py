"""The samplers: every sample once an epoch, the same order for any number of processes."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distcls.errors import UsageError
from distcls.training.sampler import (
    EpochSampler,
    Indices,
    MicroBatching,
    ShardedSampler,
    shard,
    uniforms,
)

WEYL = 0x9E3779B97F4A7C15
MASK = 2**64 - 1


def epoch_batches(sampler: EpochSampler, epoch: int) -> list[Indices]:
    permutation = sampler.permutation(epoch)
    return [permutation[slice(*sampler.bounds(step))] for step in range(sampler.steps)]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 400), st.integers(1, 130), st.integers(0, 2**63 - 1), st.integers(0, 50))
def test_each_sample_once_in_batches_of_nearly_one_size(
    samples: int, batch_size: int, seed: int, epoch: int
) -> None:
    sampler = EpochSampler(samples=samples, batch_size=batch_size, seed=seed)
    batches = epoch_batches(sampler, epoch)
    sizes = [len(batch) for batch in batches]
    assert sorted(np.concatenate(batches).tolist()) == list(range(samples))
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) == sampler.smallest_batch
    assert len(batches) == -(-samples // batch_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_the_shards_partition_the_batch(world_size: int) -> None:
    sampler = EpochSampler(samples=103, batch_size=20, seed=3)
    for batch in epoch_batches(sampler, 1):
        shards = [shard(batch, rank, world_size) for rank in range(world_size)]
        assert sorted(np.concatenate(shards).tolist()) == sorted(batch.tolist())
        sizes = [len(own) for own in shards]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [10, 11, 20, 23])
def test_pairs_stay_together(world_size: int, size: int) -> None:
    batch = np.random.default_rng(0).permutation(50)[:size]
    shards = [shard(batch, rank, world_size, group_size=2) for rank in range(world_size)]
    assert sorted(np.concatenate(shards).tolist()) == sorted(batch.tolist())
    pairs = {tuple(batch[start : start + 2]) for start in range(0, size, 2)}
    found = {tuple(own[start : start + 2]) for own in shards for start in range(0, len(own), 2)}
    assert found == pairs
    sizes = [len(own) for own in shards]
    assert max(sizes) - min(sizes) <= 2
    assert min(sizes) >= 2


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 400), st.integers(1, 130), st.integers(1, 5), st.integers(1, 5))
def test_the_micro_batch_is_the_largest_that_any_process_takes(
    samples: int, batch_size: int, world_size: int, accumulate: int
) -> None:
    sampler = EpochSampler(samples=samples, batch_size=batch_size, seed=0)
    batching = MicroBatching(sampler=sampler, world_size=world_size, accumulate=accumulate)
    sizes = [
        len(own)
        for rank in range(world_size)
        for own in ShardedSampler(rank=rank, world_size=world_size, group_size=1).training(
            np.arange(samples), sampler, 0, 0, accumulate
        )
    ]
    assert sum(sizes) == samples
    assert max(sizes) == batching.size
    too_small = pytest.raises(UsageError, match="needs two images in every micro-batch")
    with too_small if min(sizes) < 2 else contextlib.nullcontext():
        batching.require_possible()
    possible = sampler.smallest_batch >= 4 * accumulate * world_size
    assert batching.doubled == (2 * accumulate if possible else None)


def test_a_pure_function_of_seed_and_epoch() -> None:
    sampler = EpochSampler(samples=50, batch_size=8, seed=7)
    np.random.seed(0)
    first = sampler.permutation(2)
    np.random.seed(1)
    sampler.permutation(9)
    again = EpochSampler(samples=50, batch_size=13, seed=7)
    assert np.array_equal(again.permutation(2), first)
    assert not np.array_equal(sampler.permutation(3), first)
    assert not np.array_equal(EpochSampler(samples=50, batch_size=8, seed=8).permutation(2), first)


def test_permutations_are_even() -> None:
    sampler = EpochSampler(samples=5, batch_size=5, seed=0)
    counts = np.zeros((5, 5))
    for epoch in range(2000):
        counts[np.arange(5), sampler.permutation(epoch)] += 1
    # each count is binomial(2000, 1/5): standard deviation 17.9
    assert np.abs(counts - 400).max() < 5 * 17.9


def finaliser(z: int) -> int:
    """SplitMix64's finaliser on Python's own integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_reference_is_splitmix64() -> None:
    # first outputs for seed 1234567, as published with the algorithm (Rosetta Code, SplitMix64)
    state, outputs = 1234567, []
    for _ in range(5):
        state = (state + WEYL) & MASK
        outputs.append(finaliser(state))
    assert outputs == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_uniforms_equal_plain_python() -> None:
    samples = [0, 1, 5, 59_999, 2**40]
    for seed, epoch in ((0, 0), (1, 3), (2**63 - 1, 1000)):
        root = finaliser((seed * WEYL + epoch) & MASK)
        expected = [
            [
                (finaliser((finaliser((sample * WEYL + root) & MASK) + draw * WEYL) & MASK) >> 40)
                / 2**24
                for draw in range(1, 7)
            ]
            for sample in samples
        ]
        found = uniforms(seed, epoch, np.array(samples), 6)
        assert found.dtype == np.float32
        assert found.tolist() == expected


def test_uniforms_belong_to_the_sample_and_not_to_its_batch() -> None:
    whole = uniforms(3, 4, np.arange(100), 14)
    some = np.array([70, 3, 99, 3])
    assert np.array_equal(uniforms(3, 4, some, 14), whole[some])
    assert np.array_equal(uniforms(3, 4, np.array([5]), 2)[0], whole[5, :2])
    assert uniforms(3, 4, np.array([], np.int64), 14).shape == (0, 14)


def test_uniforms_are_uniform_and_independent() -> None:
    draws = uniforms(0, 0, np.arange(20_000), 6).astype(np.float64)
    assert draws.min() >= 0
    assert draws.max() < 1
    # standard deviations of these estimates: 0.002, 0.0005, 0.007
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(draws.var(axis=0) - 1 / 12).max() < 0.003
    assert np.abs(np.corrcoef(draws.T) - np.eye(6)).max() < 0.035
    histogram = np.histogram(draws, bins=16, range=(0, 1))[0] / draws.size
    assert np.abs(histogram - 1 / 16).max() < 0.004
    columns = {
        "next sample": (draws[:-1, 0], draws[1:, 0]),
        "next epoch": (draws[:, 0], uniforms(0, 1, np.arange(20_000), 1)[:, 0]),
        "next seed": (draws[:, 0], uniforms(1, 0, np.arange(20_000), 1)[:, 0]),
    }
    for name, (one, other) in columns.items():
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.035, name
