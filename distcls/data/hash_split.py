"""Splits that stay when images are added: decided by a hash of what an image shows."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from distcls import log
from distcls.data.source import ImageRecord, ImageSource
from distcls.errors import BadImage, MachineError
from distcls.imaging.reading import in_order
from distcls.system import available_cores

TASK = 64
"""Images that a thread reads at a time."""


def content_of(source: ImageSource, records: Sequence[ImageRecord]) -> list[bytes]:
    """A digest of each image's file, of its pixels where it is none; 16 bytes.

    An image that cannot be read has that of its name. Images that the source has in a split already
    are not read: theirs is empty. Raises MachineError where the machine cannot read.
    """
    starts = range(0, len(records), TASK)
    workers = min(available_cores(), 16)
    found: list[bytes] = []

    def digests(start: int) -> list[bytes]:
        return [_digest(source, record) for record in records[start : start + TASK]]

    with log.Progress("reading for the split", len(records)) as progress:
        for part in in_order(digests, starts, workers):
            found += part
            progress.update(len(part))
    return found


def _digest(source: ImageSource, record: ImageRecord) -> bytes:
    if record.split not in (None, "train"):
        return b""
    total = hashlib.blake2b(digest_size=16)
    try:
        if source.encoded:
            total.update(source.read(record.index))
        else:
            pixels = source.image(record.index)
            total.update(repr(pixels.shape).encode())
            total.update(np.ascontiguousarray(pixels).data)
    except BadImage:
        total.update(record.image_id.encode("utf-8", "surrogateescape"))
    except MachineError as error:
        raise MachineError(f"{record.image_id}: {error}") from error
    return total.digest()


def cut_by_hash(
    records: Sequence[ImageRecord],
    training: Sequence[int],
    fractions: Mapping[str, float],
    *,
    seed: int,
    content: Sequence[bytes],
) -> dict[int, str]:
    """The split of those of the images `training` (positions) that leave it.

    A number from 0 to 1, a hash of the image's content, or of its group's name, decides: the lowest
    numbers are for testing, the next ones validate. So an image stays in its split whatever others
    join or leave, copies are in one split, and a larger `test_fraction` only adds to the test
    images; the sizes of splits are near their fractions, not equal to them.

    A class that would have no image in a split, or none to train on, gets one by the order of the
    numbers (see `_Divided.fill`); only such images may change their split later.
    """
    divided = _Divided(records, training, content, seed)
    upper = 0.0
    for split, fraction in fractions.items():
        lower, upper = upper, upper + fraction
        divided.give([key for key in divided.order if lower <= divided.places[key] < upper], split)
    for label in sorted(divided.by_class):
        divided.fill(label, [split for split in ("val", "test") if split in fractions])
    return {index: split for key, split in divided.homes.items() for index in divided.units[key]}


class _Divided:
    """Units of images, those of a group or of one content, and where each of them is."""

    def __init__(
        self,
        records: Sequence[ImageRecord],
        training: Sequence[int],
        content: Sequence[bytes],
        seed: int,
    ) -> None:
        self.units: dict[bytes, list[int]] = defaultdict(list)
        for index in training:
            group = records[index].group
            key = content[index] if group is None else b"group:" + group.encode()
            self.units[key].append(index)
        self.places = {key: _number(key, seed) for key in self.units}
        self.order = sorted(self.units, key=lambda key: (self.places[key], key))
        self.homes: dict[bytes, str] = {}
        """The split of each unit that is not for training."""
        self.classes = {
            key: {records[index].label for index in members} for key, members in self.units.items()
        }
        self.by_class: dict[int, list[bytes]] = defaultdict(list)
        for key in self.order:
            for label in self.classes[key]:
                self.by_class[label].append(key)

    def give(self, keys: Iterable[bytes], split: str) -> None:
        """Move units into a split."""
        self.homes.update(dict.fromkeys(keys, split))

    def fill(self, label: int, splits: Sequence[str]) -> None:
        """See that a class has images to train on, and then some in each of these splits.

        Without a training image it gets the unit with the largest number back. A split without one
        gets the training unit with the smallest number if that can be spared, else one of another
        split; validation comes first, even before testing: without it the best epoch would be
        chosen without the class.
        """
        own = self.by_class[label]
        if all(key in self.homes for key in own):
            del self.homes[own[-1]]
        for split in splits:
            if any(self.homes.get(key) == split for key in own):
                continue
            held = [key for key in own if key in self.homes]
            enough = split == "val" or len(held) > 1
            spare = [*itertools.islice(self._spare(own), 1), *(held[-1:] if enough else ())]
            self.give(spare[:1], split)

    def _spare(self, keys: Iterable[bytes]) -> Iterator[bytes]:
        """The training units without which each of their classes still has another."""
        for key in keys:
            if key not in self.homes and all(
                sum(each not in self.homes for each in self.by_class[label]) > 1
                for label in self.classes[key]
            ):
                yield key


def _number(key: bytes, seed: int) -> float:
    """From 0 to 1, by the key and the seed alone."""
    digest = hashlib.blake2b(key, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64
