"""The loader: prefetches, crops and preprocesses batches in background threads.

Threads, not processes: OpenCV releases the GIL while it decodes and resizes, so
threads scale with the cores, start at once and hand arrays over without copying them between
processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from distcls.data.dataset import PACK, Split
from distcls.data.source import to_rgb
from distcls.errors import DistclsError
from distcls.imaging.preprocess import Box, Image, Preprocess
from distcls.system import available_cores
from distcls.training.config import SMALL_IMAGE, AugmentConfig, LoaderConfig, chosen
from distcls.training.hooks import ImageTransform
from distcls.training.inputs import SIZES_READ
from distcls.training.sampler import Indices, seeds, uniforms
from distcls.training.stall import StageTimes

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


TRIES = 10
ASPECT = math.log(4 / 3)
CROP_DRAWS = 2 * TRIES + 2
FIRST_CROP_DRAW = 1 << 16
"""Crops take the random numbers of an image from this one on: those that the augmentation on the
device takes, however many a policy needs, are the same with and without them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """Random regions of images (Szegedy et al.: Going deeper with convolutions, 2014, section 6).

    As torchvision's RandomResizedCrop: a fraction of the area and an aspect ratio of 3/4 to 4/3,
    uniform in its logarithm, are drawn until the region fits, up to ten times; else the largest
    central region within that range. The ratio counts relative to the network's input, which is the
    same where that is square. A pure function of (seed, epoch, image).
    """

    area: tuple[float, float]
    """Smallest and largest fraction of the image's area."""
    size: tuple[int, int]
    """Height and width of the network's input."""
    seed: int

    def draws(self, epoch: int, indices: Indices) -> NDArray[np.float32]:
        """The random numbers of images in an epoch, in [0, 1), [B, CROP_DRAWS]."""
        return uniforms(self.seed, epoch, indices, CROP_DRAWS, first=FIRST_CROP_DRAW)

    def box(self, draws: Sequence[float], height: int, width: int) -> Box:
        """The region of an image of this size, by its `draws`."""
        low, high = self.area
        *tries, down, right = draws
        for fraction, place in zip(tries[::2], tries[1::2], strict=True):
            area = (low + fraction * (high - low)) * height * width
            ratio = self._aspect * math.exp((2 * place - 1) * ASPECT)
            tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < tall <= height and 0 < wide <= width:
                top, left = down * (height - tall + 1), right * (width - wide + 1)
                return Box(int(top), int(left), tall, wide)
        return self._central(height, width)

    def _central(self, height: int, width: int) -> Box:
        """The largest region of an aspect ratio within the range, in the centre."""
        narrowest, widest = (self._aspect * math.exp(sign * ASPECT) for sign in (-1, 1))
        tall = min(height, max(1, round(width / narrowest)))
        wide = min(width, max(1, round(height * widest)))
        return Box((height - tall) // 2, (width - wide) // 2, tall, wide)

    def read(
        self,
        split: Split,
        index: int,
        draws: Sequence[float],
        preprocess: Preprocess,
        stages: StageTimes,
    ) -> Image:
        """An image's region at the network's size, uint8 RGB [*size, 3].

        A JPEG file is decoded at a half, a quarter or an eighth of its size where the region keeps
        at least the network's. Raises BadImage as `Split.image` does.
        """
        asked: list[tuple[int, int]] = []

        def downscale(height: int, width: int) -> float:
            asked.append((height, width))
            box = self.box(draws, height, width)
            return min(box.height / self.size[0], box.width / self.size[1])

        with stages.reading():
            image = split.image(index, downscale)
        full = _full_size(image.shape[:2], asked)
        box = _rescaled(self.box(draws, *full), full, image.shape[:2])
        with stages.measure("augment"):
            return preprocess.region(image, box)

    @property
    def _aspect(self) -> float:
        return self.size[1] / self.size[0]


def _full_size(found: tuple[int, ...], asked: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Height and width of an image in its file, upright, which was decoded to `found`.

    `asked` is empty, or has the file's both sides in either order: which of them is the height is
    known only after the EXIF orientation.
    """
    height, width = found
    if not asked or found in asked:
        return height, width
    return next((each for each in asked if (each[0] >= each[1]) == (height >= width)), asked[0])


def _rescaled(box: Box, full: tuple[int, int], found: tuple[int, ...]) -> Box:
    """A region of an image of size `full` in one that was decoded to the size `found`."""
    if full == found:
        return box
    down, right = full[0] / found[0], full[1] / found[1]
    height, width = max(1, round(box.height / down)), max(1, round(box.width / right))
    top, left = round(box.top / down), round(box.left / right)
    return Box(min(top, found[0] - height), min(left, found[1] - width), height, width)


def make_crops(
    config: AugmentConfig, split: Split, size: tuple[int, int], seed: int
) -> RandomResizedCrop | None:
    """The random resized crops that are cut out of the original pixels while they are read.

    None where there are none, and where the images are small: crops of images that are no larger
    than the network's input have to be enlarged in any case, and are cut on the device for a whole
    batch at once (see `Augment`). Raises BadImage if one of the first images cannot be read.
    """
    area = chosen(config.without_auto().resized_crop)
    if area is None or _small(split, size):
        return None
    return RandomResizedCrop(area=area, size=size, seed=seed)


def _small(split: Split, size: tuple[int, int]) -> bool:
    """Whether the input is small and none of the first images is larger: the same in a pack as in
    files."""
    if max(size) > SMALL_IMAGE:
        return False
    if split.uniform is not None:
        shapes = [split.uniform.shape[1:3]]
    else:
        shapes = [split.image(index).shape for index in range(min(SIZES_READ, len(split)))]
    return all(shape[0] <= size[0] and shape[1] <= size[1] for shape in shapes)


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
        crops: RandomResizedCrop | None = None,
        transform: ImageTransform | None = None,
        seed: int = 0,
    ) -> None:
        """`crops` are cut out of the images in place of their whole, and a `transform` of the
        user's is seeded by `seed`, the epoch and the image (training only)."""
        self._split = split = split.on_background(preprocess.background)
        self._timeout = timeout
        self._gave_up = False
        self._reading: dict[int, int] = {}
        self._pack = split.folder / PACK if split.packed else None
        self._preprocess, self._crops = preprocess, crops
        self._transform, self._seed = transform, seed
        if transform is not None:
            transform.try_on(preprocess(split.image(0)))
        self._prefetch = prefetch
        self._pin = pin
        self._workers = workers
        self.stages = StageTimes(workers, packed=split.packed)

    @property
    def waited(self) -> float:
        """Seconds that the consumer has waited for data so far."""
        return self.stages.waited

    def batches(self, index_batches: Iterable[Indices], epoch: int = 0) -> Generator[Batch]:
        """Yield a batch for each array of indices, int64 [B]. Crops depend on the `epoch`.

        Raises the exception of reading (BadImage names the file) when its batch's turn comes, and
        DistclsError, naming the files that are being read, after `timeout` seconds without a batch
        and as soon as the reading threads are found dead.
        """
        ready: queue.Queue[Item] = queue.Queue(self._prefetch)
        stopping = threading.Event()
        reader = threading.Thread(
            target=self._read,
            args=(index_batches, epoch, ready, stopping),
            name="distcls-loader",
            daemon=True,
        )
        reader.start()
        first = True
        try:
            while True:
                start = time.perf_counter()
                item = self._next(ready, reader)
                self.stages.wait(time.perf_counter() - start, first=first)
                first = False
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, BaseException):  # raised here, SystemExit would end in code 0
                    raise DistclsError(f"a reader thread ended early: {item!r}") from item
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
                    raise DistclsError(f"the reader thread of {self._place} has died") from None
                if left > 0:
                    continue
            self._gave_up = True
            waiting = [self._split.image_ids[index] for index in list(self._reading.values())]
            names = ", ".join(waiting[:NAMED]) or self._place
            raise DistclsError(
                f"no batch arrived for {self._timeout:.0f} s; still reading: {names} "
                "(loader.timeout sets the limit)"
            )

    @property
    def _place(self) -> str:
        """The file or folder that is read."""
        return str(self._pack or self._split.root)

    def load(self, indices: Indices, epoch: int, pool: ThreadPoolExecutor) -> Batch:
        """Read, crop, preprocess and transform the images at `indices`."""
        pixels = self._pixels(indices, epoch, pool)
        if self._transform is not None:
            each = seeds(self._seed, epoch, indices).tolist()
            pixels = self._stacked(pool.map(self._transformed, indices.tolist(), pixels, each))
        with self.stages.measure("copy", alone=True):
            images = torch.from_numpy(pixels)
            labels = torch.from_numpy(self._split.labels[indices])
            if self._pin:
                images, labels = images.pin_memory(), labels.pin_memory()
        return Batch(images, labels, indices)

    def _pixels(self, indices: Indices, epoch: int, pool: ThreadPoolExecutor) -> np.ndarray:
        if self._crops is not None:
            draws = self._crops.draws(epoch, indices).tolist()
            return self._stacked(pool.map(self._one, indices.tolist(), draws))
        uniform = self._split.uniform
        if uniform is not None and self._preprocess.keeps(uniform.shape[1:3]):
            with self.stages.reading(alone=True):
                rows = self._split.rows(indices)
            with self.stages.measure("copy", alone=True):
                return to_rgb(rows)
        return self._stacked(pool.map(self._one, indices.tolist()))

    def _stacked(self, images: Iterator[Image]) -> np.ndarray:
        """The images of the threads as one array."""
        found = list(images)
        with self.stages.measure("copy", alone=True):
            return np.stack(found)

    def _one(self, index: int, draws: Sequence[float] = ()) -> np.ndarray:
        with self._at_work(index, "reading"):
            if self._crops is not None:
                return self._crops.read(self._split, index, draws, self._preprocess, self.stages)
            with self.stages.reading():
                image = self._split.image(index)
            with self.stages.measure("augment"):
                return self._preprocess(image)

    def _transformed(self, index: int, image: Image, seed: int) -> np.ndarray:
        assert self._transform is not None
        with self._at_work(index, "transforming"):
            began = time.perf_counter()
            found = self._transform(image, seed)
            self.stages.transformed(time.perf_counter() - began)
            return found

    @contextlib.contextmanager
    def _at_work(self, index: int, doing: str) -> Iterator[None]:
        """Name the image in an error, and while it takes long."""
        thread = threading.get_ident()
        self._reading[thread] = index
        try:
            yield
        except Exception as error:
            error.add_note(f"while {doing} {self._split.image_ids[index]!r}")
            raise
        finally:
            del self._reading[thread]

    def _read(
        self,
        index_batches: Iterable[Indices],
        epoch: int,
        ready: queue.Queue[Item],
        stopping: threading.Event,
    ) -> None:
        with ThreadPoolExecutor(self._workers, thread_name_prefix="distcls-decode") as pool:
            try:
                for indices in index_batches:
                    batch, began = self.load(indices, epoch, pool), time.perf_counter()
                    if not _put(ready, batch, stopping):
                        return
                    self.stages.idle += time.perf_counter() - began
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
    config: LoaderConfig,
    split: Split,
    preprocess: Preprocess,
    accelerator: Accelerator,
    *,
    crops: RandomResizedCrop | None = None,
    transform: ImageTransform | None = None,
    seed: int = 0,
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
        crops=crops,
        transform=transform,
        seed=seed,
    )
