"""The loader: prefetches and preprocesses batches in background threads.

Threads, not processes: OpenCV releases the GIL while it decodes and resizes, so
threads scale with the cores, start at once and hand arrays over without copying them between
processes.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from distcls.data.dataset import PACK, Split
from distcls.data.source import to_rgb
from distcls.errors import DistclsError
from distcls.imaging import Preprocess
from distcls.system import available_cores
from distcls.training.config import LoaderConfig
from distcls.training.sampler import Indices

NAMED = 4
"""Files that an error about a stall names at most."""
CHECK_EVERY = 1.0
"""Seconds between two checks of whether the reading thread still lives."""
LEAVE_AFTER = 5.0
"""Seconds that a loader waits at its end for a read under way; one that hangs is left behind."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images uint8 [B, H, W, 3], labels int64 [B], and where they come from in the split."""

    images: Tensor
    labels: Tensor
    indices: Indices


Item = Batch | BaseException | None
"""An item of the reading thread's queue: a batch, an exception, or the end."""


class Loader:
    """Reads batches of a split in a given order and prefetches `prefetch` of them."""

    def __init__(
        self,
        split: Split,
        preprocess: Preprocess,
        *,
        workers: int,
        prefetch: int,
        timeout: float = 300.0,
        pin: bool = False,
    ) -> None:
        self._split = split
        self._timeout = timeout
        self._gave_up = False
        self._reading: dict[int, int] = {}
        self._pack = split.folder / PACK if split.packed else None
        self._pack_bytes = 0 if self._pack is None else self._pack.stat().st_size
        self._preprocess = preprocess
        self._prefetch = prefetch
        self._pin = pin
        self._workers = workers
        self.waited = 0.0
        """Seconds that the consumer has waited for data so far."""

    def batches(self, index_batches: Iterable[Indices]) -> Generator[Batch]:
        """Yield a batch for each array of indices, int64 [B].

        Raises the exception of reading (BadImage names the file) when its batch's turn comes, and
        DistclsError, naming the files that are being read, after `timeout` seconds without a batch
        and as soon as the reading threads are found dead.
        """
        ready: queue.Queue[Item] = queue.Queue(self._prefetch)
        stopping = threading.Event()
        reader = threading.Thread(
            target=self._read,
            args=(index_batches, ready, stopping),
            name="distcls-loader",
            daemon=True,
        )
        reader.start()
        try:
            while True:
                start = time.perf_counter()
                item = self._next(ready, reader)
                self.waited += time.perf_counter() - start
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, BaseException):  # raised here, SystemExit would end in code 0
                    raise DistclsError(f"a reading thread ended early: {item!r}") from item
                yield item
        finally:
            stopping.set()
            while not ready.empty():
                ready.get_nowait()
            if not self._gave_up:  # a thread that hangs in a read can only be left behind
                reader.join(LEAVE_AFTER)

    def _next(self, ready: queue.Queue[Item], reader: threading.Thread) -> Item:
        deadline = time.monotonic() + self._timeout
        while True:
            left = deadline - time.monotonic()
            try:
                return ready.get(timeout=max(0.0, min(left, CHECK_EVERY)))
            except queue.Empty:
                if not reader.is_alive() and ready.empty():
                    raise DistclsError(f"the thread that reads {self._place} has died") from None
                if left > 0:
                    continue
            self._gave_up = True
            waiting = [self._split.image_ids[index] for index in list(self._reading.values())]
            names = ", ".join(waiting[:NAMED]) or self._place
            raise DistclsError(
                f"no batch came for {self._timeout:.0f} s; still reading: {names} "
                "(loader.timeout sets the limit)"
            )

    @property
    def _place(self) -> str:
        """The file or folder that is read."""
        return str(self._pack or self._split.root)

    def load(self, indices: Indices, pool: ThreadPoolExecutor) -> Batch:
        """Read and preprocess the images at `indices`."""
        images = torch.from_numpy(self._pixels(indices, pool))
        labels = torch.from_numpy(self._split.labels[indices])
        if self._pin:
            images, labels = images.pin_memory(), labels.pin_memory()
        return Batch(images, labels, indices)

    def _pixels(self, indices: Indices, pool: ThreadPoolExecutor) -> np.ndarray:
        self._check_pack()
        uniform = self._split.uniform
        if uniform is not None and self._preprocess.keeps(uniform.shape[1:3]):
            return to_rgb(uniform[indices])
        return np.stack(list(pool.map(self._one, indices.tolist())))

    def _one(self, index: int) -> np.ndarray:
        thread = threading.get_ident()
        self._reading[thread] = index
        try:
            return self._preprocess(self._split.image(index))
        except Exception as error:
            error.add_note(f"while reading {self._split.image_ids[index]!r}")
            raise
        finally:
            del self._reading[thread]

    def _check_pack(self) -> None:
        """Raise DistclsError if the pack was cut short: reading on would be killed by SIGBUS."""
        if self._pack is None:
            return
        try:
            size = self._pack.stat().st_size
        except OSError:  # a mapped file stays readable when its name is gone
            return
        if size < self._pack_bytes:
            raise DistclsError(
                f"{self._pack} was cut from {self._pack_bytes} to {size} bytes while it was read; "
                "prepare it again"
            )

    def _read(
        self,
        index_batches: Iterable[Indices],
        ready: queue.Queue[Item],
        stopping: threading.Event,
    ) -> None:
        with ThreadPoolExecutor(self._workers, thread_name_prefix="distcls-decode") as pool:
            try:
                for indices in index_batches:
                    if not _put(ready, self.load(indices, pool), stopping):
                        return
            except BaseException as error:
                # handed over before the pool is left, which waits for a read that may hang
                _put(ready, error, stopping)
            else:
                _put(ready, None, stopping)


def _put(
    ready: queue.Queue[Item],
    item: Item,
    stopping: threading.Event,
) -> bool:
    """Wait for room in the queue, unless the consumer has left."""
    while not stopping.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def make_loader(
    config: LoaderConfig, split: Split, preprocess: Preprocess, accelerator: Accelerator
) -> Loader:
    """A loader with this process's fraction of the cores, unless the config sets the threads."""
    local = max(1, available_cores() // accelerator.num_processes)
    return Loader(
        split,
        preprocess,
        workers=config.workers or local,
        prefetch=config.prefetch,
        timeout=config.timeout,
        pin=accelerator.device.type == "cuda",
    )
