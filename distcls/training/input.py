"""What a run trains on: the dataset's splits and the preprocessing that suits them."""

from __future__ import annotations

import dataclasses
import statistics

import numpy as np

from distcls.data.config import LARGE_INPUT, SMALL_IMAGE, SMALLEST_INPUT, InputConfig
from distcls.data.dataset import Dataset, Split
from distcls.data.order import Indices
from distcls.errors import UsageError
from distcls.imaging import Preprocess
from distcls.targets import Targets
from distcls.training.config import TrainConfig
from distcls.training.kinds import require_possible

SIZES_READ = 16
"""Images looked at to learn the size of a dataset that is not packed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingInput:
    """Splits, the samples of them that are used, and class names."""

    classes: tuple[str, ...]
    train: Split
    val: Split
    train_samples: Indices
    val_samples: Indices

    @property
    def targets(self) -> Targets:
        """What the classes are answers to."""
        return self.train.targets


def open_input(config: TrainConfig) -> TrainingInput:
    """Open the dataset for training. Raises UsageError if it cannot be trained on so."""
    dataset = Dataset.open(config.data)
    require_possible(config, dataset.targets)
    counts = dataset.counts()
    for name in ("train", "val"):
        if name not in counts:
            raise UsageError(f"{config.data}: no {name} split; prepare it with --val-fraction")
    use_pack = {"auto": None, "on": True, "off": False}[config.loader.pack]
    train = dataset.split("train", use_pack=use_pack)
    _check_classes(dataset, train)
    val = dataset.split("val", use_pack=use_pack)
    return TrainingInput(
        classes=dataset.classes,
        train=train,
        val=val,
        train_samples=_some(len(train), config),
        val_samples=_some(len(val), config),
    )


def choose_preprocess(config: InputConfig, split: Split, weights: Preprocess | None) -> Preprocess:
    """The preprocessing of a run: what the config says, else the weights', else the images'."""
    base = weights or Preprocess(size=_own_size(split))
    return dataclasses.replace(
        base,
        size=config.size or base.size,
        resize=config.resize or base.resize,
        interpolation=config.interpolation or base.interpolation,
        crop_fraction=config.crop_fraction or base.crop_fraction,
    )


def _check_classes(dataset: Dataset, train: Split) -> None:
    if shortage := dataset.targets.shortage():
        raise UsageError(f"{dataset.folder}: {shortage}; a classifier needs two or more")
    if not dataset.targets.single:
        return  # of several answers not each can be in the training images
    counts = np.bincount(train.labels, minlength=len(dataset.classes))
    if (counts == 0).any():
        empty = dataset.classes[int(counts.argmin())]
        raise UsageError(f"{dataset.folder}: class {empty!r} has no training images")


def _some(count: int, config: TrainConfig) -> Indices:
    if config.limit is None or config.limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(config.seed).permutation(count)[: config.limit])


def _own_size(split: Split) -> tuple[int, int]:
    if split.uniform is not None:
        height, width = split.uniform.shape[1:3]
    else:
        shapes = [split.image(i).shape for i in range(min(SIZES_READ, len(split)))]
        height = int(statistics.median(shape[0] for shape in shapes))
        width = int(statistics.median(shape[1] for shape in shapes))
    if max(height, width) > SMALL_IMAGE:
        return (LARGE_INPUT, LARGE_INPUT)
    return (max(SMALLEST_INPUT, height), max(SMALLEST_INPUT, width))
