"""What each process reads: its share of every step and of validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from accelerate import Accelerator

from distcls.cores import available_cores
from distcls.data.config import LoaderConfig
from distcls.data.dataset import Split
from distcls.data.loader import Loader
from distcls.data.order import DataOrder, Indices, share
from distcls.imaging import Preprocess


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """The samples of one of `world` processes."""

    rank: int
    world: int
    together: int
    """Neighbours in a step that one process has to get together (see `distcls.data.order`)."""

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


def make_loader(
    config: LoaderConfig, split: Split, preprocess: Preprocess, accelerator: Accelerator
) -> Loader:
    """A loader with this process's part of the cores, unless the config says how many threads."""
    local = max(1, available_cores() // accelerator.num_processes)
    return Loader(
        split,
        preprocess,
        workers=config.workers or local,
        ahead=config.ahead,
        timeout=config.timeout,
        pin=accelerator.device.type == "cuda",
    )
