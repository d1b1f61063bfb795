"""Samplers: the global batches of an epoch, and their sharding by rank.

`EpochSampler` draws the global batches, a pure function of (seed, epoch), independent of
processes and workers, so 1, 2 or N processes take the same global batches, and a run resumed at a
step continues as if it had never stopped. `MicroBatching` holds the number of images that a process
takes at a time, `ShardedSampler` selects them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from distcls.errors import UsageError
from distcls.log import counted

Indices = NDArray[np.int64]

EVALUATION_BATCH = 256

_WEYL = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochSampler:
    """Draws the global batches of each epoch: `samples` images, at most `batch_size` per batch.

    An epoch is cut into ceil(samples / batch_size) batches whose sizes differ by at most one. So
    every sample is seen exactly once per epoch, and no tiny last batch upsets batch normalisation.
    """

    samples: int
    batch_size: int
    seed: int

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(self.samples / self.batch_size)

    @property
    def smallest_batch(self) -> int:
        """Size of the smallest global batch."""
        return self.samples // self.steps

    @property
    def largest_batch(self) -> int:
        """Size of the largest global batch."""
        return -(-self.samples // self.steps)

    def permutation(self, epoch: int) -> Indices:
        """All sample indices in the order of `epoch` (counted from 0), [samples]."""
        stream = np.random.Philox(key=[self.seed, epoch])
        return np.random.Generator(stream).permutation(self.samples)

    def bounds(self, step: int) -> tuple[int, int]:
        """Start and end of the batch of `step` (in its epoch) in the epoch's permutation."""
        return step * self.samples // self.steps, (step + 1) * self.samples // self.steps


def shard(batch: Indices, rank: int, world_size: int, *, group_size: int = 1) -> Indices:
    """The samples of a global batch that one process computes, [about len(batch) / world_size].

    The processes' shards partition the batch, and their sizes differ by at most `group_size`: that
    many consecutive samples go to one process, as the pairs that mixup mixes have to.
    """
    groups = np.arange(len(batch)) // group_size
    return np.compress(groups % world_size == rank, batch)


def uniforms(
    seed: int, epoch: int, samples: Indices, draws: int, *, first: int = 0
) -> NDArray[np.float32]:
    """`draws` random numbers in [0, 1) for each sample, float32 [len(samples), draws].

    They are those from number `first` on of a sample's own sequence.

    They are a function of (seed, epoch, sample): an image is augmented the same way on any process
    or worker. A counter-based generator: SplitMix64's finaliser (Steele, Lea, Flood: Fast
    splittable pseudorandom number generators, 2014) over a Weyl sequence.
    """
    keys = _keys(seed, epoch, samples)
    numbers = np.arange(first + 1, first + draws + 1, dtype=np.uint64)
    counters = keys[:, None] + numbers[None, :] * _WEYL
    return ((_mix(counters) >> np.uint64(40)).astype(np.float32)) * np.float32(2**-24)


SEED_NUMBER = 1 << 32
"""The number in an image's sequence that its seed is, beyond all that `uniforms` is asked for."""


def seeds(seed: int, epoch: int, samples: Indices) -> NDArray[np.uint32]:
    """A seed for other generators for each sample, a function of (seed, epoch, sample) as well."""
    number = np.array([SEED_NUMBER], np.uint64)
    counters = _keys(seed, epoch, samples) + number * _WEYL
    return (_mix(counters) >> np.uint64(32)).astype(np.uint32)


def _keys(seed: int, epoch: int, samples: Indices) -> NDArray[np.uint64]:
    """Where each sample's own sequence begins."""
    root = _mix(np.array([seed], np.uint64) * _WEYL + np.uint64(epoch))
    return _mix(samples.astype(np.uint64) * _WEYL + root)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclasses.dataclass(kw_only=True)
class MicroBatching:
    """The number of images that a process takes at a time.

    The global batch is always the config's; micro-batches may be smaller where memory requires it.
    """

    sampler: EpochSampler
    world_size: int
    accumulate: int
    """Micro-batches of a step, over whose gradients the optimiser steps."""
    evaluation_batch: int = EVALUATION_BATCH
    """Images evaluated at a time."""

    @property
    def size(self) -> int:
        """Images of the largest micro-batch of the largest step."""
        return -(-self.sampler.largest_batch // (self.world_size * self.accumulate))

    def require_possible(self) -> None:
        """Raise UsageError if batch norm would get a micro-batch of fewer than two images."""
        if not self._possible(self.accumulate):
            processes = counted(self.world_size, "process", "processes")
            batches = counted(self.accumulate, "micro-batch", "micro-batches")
            raise UsageError(
                f"batch_size: {self.sampler.batch_size} is too small for {processes} with "
                f"{batches} each: batch normalisation needs two images in every micro-batch"
            )

    @property
    def doubled(self) -> int | None:
        """Twice `accumulate`, or None where batch norm would get fewer than two images."""
        return 2 * self.accumulate if self._possible(2 * self.accumulate) else None

    def _possible(self, accumulate: int) -> bool:
        return self.sampler.smallest_batch >= 2 * accumulate * self.world_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardedSampler:
    """The samples that the process of one rank reads."""

    rank: int
    world_size: int
    group_size: int
    """Group size: neighbours in a batch that have to go to the same process (see `shard`)."""

    def training(
        self, samples: Indices, sampler: EpochSampler, epoch: int, first: int, accumulate: int
    ) -> Iterator[Indices]:
        """This process's micro-batches of `epoch`, `accumulate` per step, from step `first` on."""
        permutation = samples[sampler.permutation(epoch)]
        for step in range(first, sampler.steps):
            begin, end = sampler.bounds(step)
            # cut before it is sharded: which images are in a micro-batch, whose statistics batch
            # norm takes, does not depend on the number of processes
            for micro_batch in np.array_split(permutation[begin:end], accumulate):
                yield shard(micro_batch, self.rank, self.world_size, group_size=self.group_size)

    def evaluation(self, samples: Indices, batch_size: int) -> Iterator[Indices]:
        """Every sample on one process, none twice, in batches of at most `batch_size`."""
        own = shard(samples, self.rank, self.world_size)
        batches = np.array_split(own, max(1, -(-len(own) // batch_size)))
        return (batch for batch in batches if len(batch))

    def evaluation_passes(self, samples: Indices, batch_size: int) -> int:
        """The largest number of batches of `evaluation` on any process; some get one less."""
        return -(-len(shard(samples, 0, self.world_size)) // batch_size)
