"""Where the time goes while training waits for data: measured in the loader, with what would help.

storage: reading files, or the pack. decode: from bytes to pixels. augment: crop and resize, and a
transform of the user's own. copy: images into one batch, and into pinned memory. What the device
augments is part of a step, not of the wait.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from distcls.imaging.reading import seconds_reading
from distcls.system import available_cores

if TYPE_CHECKING:
    from distcls.training.config import TrainConfig

STAGES = {"storage": "reading", "decode": "decoding", "augment": "cropping", "copy": "copying"}
"""The stages, and what the loader does in each."""
NOTED_WAIT = 0.1
"""Fraction of the time spent waiting for images from which it is shown."""
LEAST_WAIT = 2.0
"""Seconds that a run has waited before it says why."""
UNEVEN = 0.25
"""Fraction of its time that a loader stands still, its queue full, which shows that it is fast
enough on average."""
MOST_READERS = 64


class StageTimes:
    """Seconds that the loader has spent in each stage so far; any thread may measure.

    Those of a stage that the decoding threads share are divided by their number: all figures are
    by the clock, and comparable.
    """

    def __init__(self, workers: int, *, packed: bool) -> None:
        """`packed`: the images come from a pack."""
        self.workers, self.packed = workers, packed
        self.spent = dict.fromkeys(STAGES, 0.0)
        self.idle = 0.0
        """Seconds in which the queue was full and the loader waited for the consumer."""
        self.transform = 0.0
        """Seconds of `augment` that the user's transform took."""
        self.waited = 0.0
        """Seconds that the consumer has waited for data."""
        self.waited_first = 0.0
        """Those of them before the first batch of an epoch."""
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def measure(self, stage: str, *, alone: bool = False) -> Iterator[None]:
        """Add the time of a block to a stage; `alone`: the reading thread does it by itself."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._add(stage, time.perf_counter() - began, alone)

    @contextlib.contextmanager
    def reading(self, *, alone: bool = False) -> Iterator[None]:
        """Add the time of a block that reads images, and decodes them if they are files."""
        began, read = time.perf_counter(), seconds_reading()
        try:
            yield
        finally:
            seconds, read = time.perf_counter() - began, seconds_reading() - read
            self._add("storage", seconds if self.packed else read, alone)
            self._add("decode", 0.0 if self.packed else seconds - read, alone)

    def transformed(self, seconds: float) -> None:
        """Add the time of a call of the user's transform."""
        self._add("augment", seconds, alone=False)
        with self._lock:
            self.transform += seconds / self.workers

    def wait(self, seconds: float, *, first: bool) -> None:
        """Add a wait of the consumer for a batch; `first`: that of an epoch."""
        self.waited += seconds
        self.waited_first += seconds * first

    def shares(self) -> dict[str, float]:
        """The fraction of the loader's work that each stage took."""
        total = max(sum(self.spent.values()), 1e-9)
        return {stage: seconds / total for stage, seconds in self.spent.items()}

    @property
    def uneven(self) -> bool:
        """Whether the loader is fast enough on average, but not when it has to be."""
        busy = sum(self.spent.values())
        return self.idle > UNEVEN * (busy + self.idle) and self.waited_first < self.waited / 2

    def _add(self, stage: str, seconds: float, alone: bool) -> None:
        with self._lock:
            self.spent[stage] += seconds / (1 if alone else self.workers)


class StallAdvice:
    """Tells once, and again if another stage becomes the slow one, why training waits for data."""

    def __init__(self, times: StageTimes, config: TrainConfig) -> None:
        """`times` are those of the training loader of this process, and grow."""
        self._times, self._config = times, config
        self._seconds = 0.0
        self._said: set[str] = set()

    def count(self, seconds: float) -> None:
        """Count an epoch whose steps took `seconds`."""
        self._seconds += seconds

    def problems(self) -> list[str]:
        """What to say of the epochs so far; nothing that was said before."""
        times = self._times
        wait = times.waited / max(self._seconds, 1e-9)
        if wait < NOTED_WAIT or times.waited < LEAST_WAIT:
            return []
        shares = times.shares()
        slow = max(shares, key=lambda stage: shares[stage])
        key = "uneven" if times.uneven else slow
        if key in self._said:
            return []
        self._said.add(key)
        return [self._words(wait, shares, slow, key)]

    def _words(self, wait: float, shares: dict[str, float], slow: str, key: str) -> str:
        parts = ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items())
        return (
            f"training waits for data {min(1.0, wait):.0%} of the time; of loading, {parts} "
            f"({self._where(slow)}); {self._advice(key)}"
        )

    def _where(self, slow: str) -> str:
        if slow == "storage":
            return f"slow: reading {'the pack' if self._times.packed else 'files'}"
        if slow == "augment" and self._times.transform > self._times.spent["augment"] / 2:
            return f"slow: your augment.transform, {self._config.augment.transform}"
        words = {"decode": "decoding files", "augment": "cropping and resizing"}
        return f"slow: {words.get(slow, 'putting images together to batches')}"

    def _advice(self, key: str) -> str:
        if key == "uneven":
            prefetch = self._config.loader.prefetch
            return (
                "the loader stood still for "
                f"{self._times.idle:.0f} s with its queue full, so it is fast enough on average: "
                f"--loader.prefetch {4 * prefetch} (now {prefetch}) bridges more"
            )
        more = getattr(self, f"_for_{key}")()
        return " or ".join(filter(None, more))

    def _for_storage(self) -> list[str]:
        workers, data = self._times.workers, self._config.source or self._config.data
        near = f"copy {data} to a faster disk"
        if self._times.packed:
            return [near]
        readers = min(4 * workers, MOST_READERS)
        more = f"--loader.workers {readers} (now {workers}) reads more files at once,"
        return [more * (readers > workers), near]

    def _for_decode(self) -> list[str]:
        return [self._more_workers(), f"{self._pack()} decodes each image once, before training"]

    def _for_augment(self) -> list[str]:
        cheaper = "a smaller --input.size has less to do"
        if self._times.transform > self._times.spent["augment"] / 2:
            cheaper = (
                "make it cheaper: an object with `draws` is called with whole batches on the device"
            )
        return [self._more_workers(), cheaper]

    def _for_copy(self) -> list[str]:
        return ["a smaller --input.size has less to copy"]

    def _more_workers(self) -> str:
        """Advice for what takes the CPU: threads beyond the cores would not help."""
        cores, workers = available_cores(), self._times.workers
        return f"--loader.workers {cores} (now {workers}) uses all cores," * (workers < cores)

    def _pack(self) -> str:
        """How to get a pack."""
        if self._config.source is not None:
            return "--loader.pack on, in a new run,"
        if self._config.loader.pack == "off":
            return "--loader.pack auto"
        return "preparing the dataset with distcls prepare --pack on"
