"""What a run cannot do with its dataset's kind of answers: refused before anything is built."""

from __future__ import annotations

import dataclasses
import statistics

import numpy as np

from distcls.data.dataset import Dataset, Split
from distcls.errors import UsageError
from distcls.evaluation.metrics import EXACT
from distcls.imaging import Preprocess
from distcls.task import Task
from distcls.training.config import (
    LARGE_INPUT,
    SMALL_IMAGE,
    SMALLEST_INPUT,
    InputConfig,
    TrainConfig,
)
from distcls.training.sampler import Indices

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
    def task(self) -> Task:
        """What the classes are answers to."""
        return self.train.task


def open_input(config: TrainConfig) -> TrainingInput:
    """Open the dataset for training. Raises UsageError if it cannot be trained on so."""
    dataset = Dataset.open(config.data)
    require_possible(config, dataset.task)
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
    if shortage := dataset.task.shortage():
        raise UsageError(f"{dataset.folder}: {shortage}; a classifier needs two or more")
    if not dataset.task.single:
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


LABEL_LOSSES = ("bce", "focal")
"""Those that ask yes or no of each label (see `LabelsLoss`)."""
SAID = {
    "single_label": "has one class an image",
    "multi_head": "has several heads of one class each",
    "multi_label": "has any number of labels an image",
}
"""What is said of a dataset, by its kind."""


def require_possible(config: TrainConfig, task: Task) -> None:
    """Raise UsageError, naming the key and the reason, for options that contradict the dataset."""
    rules = {"single_label": _of_single, "multi_head": _of_heads, "multi_label": _of_labels}
    problem = rules[task.kind](config) or ("" if task.single else _of_several(config))
    if problem:
        key, _, reason = problem.partition(": ")
        raise UsageError(f"{key}: {config.data} {SAID[task.kind]}; {reason}")


def _of_single(config: TrainConfig) -> str:
    if config.monitor.metric == EXACT:
        return "monitor.metric: exact is of several answers, of one class it is top1"
    return ""


def _of_heads(config: TrainConfig) -> str:
    if config.loss.name == "bce":
        return "loss.name: bce asks yes or no of each class, choose cross_entropy or focal"
    if config.augment.cutmix > 0:
        return (
            "augment.cutmix: the pasted box hides what some heads have to read, and the shares of "
            "its area are not those of their answers; choose augment.mixup or none"
        )
    return ""


def _of_labels(config: TrainConfig) -> str:
    if config.loss.name not in LABEL_LOSSES:
        return f"loss.name: {config.loss.name} has one class win, choose bce or focal"
    if config.monitor.metric == "top5":
        return "monitor.metric: labels have no top5, choose exact, macro_f1 or loss"
    return ""


def _of_several(config: TrainConfig) -> str:
    if config.loss.class_weights is not None:
        return (
            "loss.class_weights: an image of several classes would have several weights; weigh "
            "images instead (loss.sample_weights)"
        )
    if config.distill.teacher is not None:
        return "distill.teacher: distillation is of one class an image alone"
    return ""
