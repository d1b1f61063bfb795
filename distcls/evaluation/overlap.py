"""The dataset of a run, and images that a model is measured on and was trained on: its figures
are too good."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from distcls import log
from distcls.config.load import read_yaml
from distcls.data.dataset import IN_RUN, PACK, Dataset, Split, is_dataset
from distcls.data.image_dataset import split_of_files
from distcls.errors import BadImage, DistclsError, UsageError
from distcls.model_card import BEST_PTH

CONFIG = "config.yaml"
PIECE = 64
"""Bytes from the middle of a packed image that have to be equal before all of it is read."""


def dataset_of(run: Path) -> Path:
    """The dataset directory of a run directory, or of a model file: RUN/dataset, the `data` in its
    config.yaml, or what its checkpoint was trained on.

    Raises UsageError if it is at none of these places.
    """
    folder = run if run.is_dir() else run.parent
    found = _own_dataset(run, None)
    checkpoint = folder / BEST_PTH if run.is_dir() else run
    if found is None and checkpoint.suffix.lower() == ".pth" and checkpoint.is_file():
        with contextlib.suppress(ImportError, UsageError):  # without torch, or damaged
            from distcls.models.checkpoint import read_checkpoint

            found = _own_dataset(run, read_checkpoint(checkpoint)[0].training.get("dataset"))
    if found is None:
        given = _data_in_config(run, folder / CONFIG)
        said = f", and {given!r} in its config.yaml is not there" if given else ""
        raise UsageError(f"data: {run} has no dataset directory{said}; name one with --data")
    return found


def training_images(
    model: Path, data: Path, split: str, image_ids: Sequence[str], trained_on: object = None
) -> set[str]:
    """Those of `image_ids`, of a split of the dataset directory `data`, that a model was trained
    on.

    Its training images are those of RUN/dataset, of the `data` in its config.yaml, or of the
    dataset directory `trained_on` where it lies nowhere else; without any the answer is empty.
    Images of directories made of one source are matched by id, others by content.
    """
    own = _own_dataset(model, trained_on)
    if own is None or not image_ids:
        return set()
    data = data / IN_RUN if is_dataset(data / IN_RUN) else data
    if own.resolve() == data.resolve():
        return set(image_ids) if split == "train" else set()
    try:
        training = Dataset.open(own)
        if not is_dataset(data):
            measured = split_of_files(data, split)
            return _same_content(training.split("train", use_pack=False), measured, image_ids)
        other = Dataset.open(data)
        source = training.info.get("source")
        if source is not None and source == other.info.get("source"):
            return set(training.split("train").image_ids) & set(image_ids)
        both = training.packed and other.packed
        ours = training.split("train", use_pack=both)
        return _same_content(ours, other.split(split, use_pack=both), image_ids)
    except DistclsError as error:
        log.say(f"{model}: whether it was trained on these images is not known: {error}")
        return set()


def warn_of_training_images(model: str, found: int, count: int) -> None:
    """Say that `found` of `count` images were trained on; nothing if none was."""
    if found:
        log.warn(
            f"{model}: {log.counted(found, 'image')} of {count:,} were in its own training split, "
            "so it looks better here than it is; train what you compare on one dataset directory "
            "(distcls prepare once), or name other images with --data"
        )


def _own_dataset(model: Path, trained_on: object) -> Path | None:
    folder = model if model.is_dir() else model.parent
    choices = [folder / IN_RUN, _data_in_config(model, folder / CONFIG), trained_on]
    paths = [Path(each) for each in choices if each and isinstance(each, str | Path)]
    inside = (place for path in paths for place in (path, path / IN_RUN))
    return next((place for place in inside if is_dataset(place)), None)


def _data_in_config(model: Path, config: Path) -> object:
    """What the run was trained on, by its config.yaml; None without one that can be read."""
    if not config.is_file():
        return None
    try:
        given = read_yaml(config).get("data")
    except UsageError as error:
        log.say(f"{model}: {error}")
        return None
    return None if given is None else given.value


def _same_content(training: Split, measured: Split, image_ids: Iterable[str]) -> set[str]:
    """Those of measured images whose pixels, or whose files, are those of a training image."""
    ids, chosen = measured.image_ids, set(image_ids)
    wanted: dict[Hashable, list[int]] = {}
    for at, key in enumerate(_keys(measured)):
        if ids[at] in chosen:
            wanted.setdefault(key, []).append(at)
    near = [(at, key) for at, key in enumerate(_keys(training)) if key in wanted]
    known = {_digest(training, at) for at, _ in near} - {None}
    alike = sorted({at for _, key in near for at in wanted[key]})
    return {ids[at] for at in alike if _digest(measured, at) in known}


def _keys(split: Split) -> Iterator[Hashable]:
    """What equal images have in common, of each: a few pixels, or the size of the file."""
    if not split.packed:
        for path in split.table.column("path").to_pylist():
            file = split.root / path
            yield file.stat().st_size if file.is_file() else None
        return
    pack = np.memmap(split.folder / PACK, np.uint8, mode="r")
    columns = ("offset", "height", "width", "channels")
    rows = zip(*(split.table.column(name).to_pylist() for name in columns), strict=True)
    for offset, *shape in rows:
        middle, end = offset + math.prod(shape) // 2, offset + math.prod(shape)
        yield (*shape, pack[middle : min(middle + PIECE, end)].tobytes())


def _digest(split: Split, at: int) -> bytes | None:
    """Of the image at a place; None for one that cannot be read."""
    try:
        data = split.image(at).tobytes() if split.packed else split.read(at)
    except BadImage:
        return None
    return hashlib.sha256(data).digest()
