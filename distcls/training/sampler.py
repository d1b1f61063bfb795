"""What each process reads: its share of every step and of validation.

It knows nothing of workers and processes, so 1, 2 or N processes take the same global batches, and
a run resumed at a step goes on as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_WEYL = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOrder:
    """The order of `samples` images in global batches of at most `batch_size`.

    An epoch is cut into ceil(samples / batch_size) batches whose sizes differ by at most one. So
    every sample is seen exactly once an epoch, and no tiny last batch upsets batch normalisation.
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

    def permutation(self, epoch: int) -> Indices:
        """All sample indices in the order of `epoch` (counted from 0), [samples]."""
        stream = np.random.Philox(key=[self.seed, epoch])
        return np.random.Generator(stream).permutation(self.samples)

    def bounds(self, step: int) -> tuple[int, int]:
        """Where the batch of `step` begins and ends in the epoch's permutation."""
        return step * self.samples // self.steps, (step + 1) * self.samples // self.steps


def share(batch: Indices, rank: int, world_size: int, *, together: int = 1) -> Indices:
    """The part of a global batch that one process computes; the parts differ by at most `together`.

    So many samples in a row go to one process, as pairs have to that are mixed with each other.
    """
    groups = np.arange(len(batch)) // together
    return np.compress(groups % world_size == rank, batch)


def uniforms(seed: int, epoch: int, samples: Indices, draws: int) -> NDArray[np.float32]:
    """`draws` random numbers in [0, 1) for each sample, float32 [len(samples), draws].

    They belong to (seed, epoch, sample): the same image is augmented the same way whichever process
    or worker handles it. A counter-based generator: SplitMix64's finaliser (Steele, Lea, Flood:
    Fast splittable pseudorandom number generators, 2014) over a Weyl sequence.
    """
    root = _mix(np.array([seed], np.uint64) * _WEYL + np.uint64(epoch))
    keys = _mix(samples.astype(np.uint64) * _WEYL + root)
    counters = keys[:, None] + np.arange(1, draws + 1, dtype=np.uint64)[None, :] * _WEYL
    return ((_mix(counters) >> np.uint64(40)).astype(np.float32)) * np.float32(2**-24)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """The samples of one of `world` processes."""

    rank: int
    world: int
    together: int
    """Neighbours in a step that one process has to get together (see `share`)."""

    def training(
        self, samples: Indices, order: DataOrder, epoch: int, first: int, parts: int
    ) -> Iterator[Indices]:
        """The samples of each of this process's batches in `epoch`, from its step `first` on."""
        permutation = samples[order.permutation(epoch)]
        for step in range(first, order.steps):
            begin, end = order.bounds(step)
            # cut before it is shared: which images stand in a part, whose statistics batch norm
            # takes, does not depend on the number of processes
            for part in np.array_split(permutation[begin:end], parts):
                yield share(part, self.rank, self.world, together=self.together)

    def evaluation(self, samples: Indices, batch_size: int) -> Iterator[Indices]:
        """Every sample on one process, none twice, in batches of at most `batch_size`."""
        mine = share(samples, self.rank, self.world)
        parts = np.array_split(mine, max(1, -(-len(mine) // batch_size)))
        return (part for part in parts if len(part))

    def passes(self, samples: Indices, batch_size: int) -> int:
        """The most batches of `evaluation` that any process gets; some get one less."""
        return -(-len(share(samples, 0, self.world)) // batch_size)
