"""The input of a run: dataset and preprocessing, and whether the config can be used with it."""

from __future__ import annotations

import dataclasses
import os
import statistics

import numpy as np
from accelerate.utils import gather_object

from distcls.data.dataset import Dataset, Split
from distcls.errors import DistclsError, UsageError
from distcls.evaluation.metrics import EXACT
from distcls.imaging import Preprocess
from distcls.log import say, warn, world_size
from distcls.models.config import AUTO, SMALLEST_PRETRAINED
from distcls.models.pretrained import Weights, find_weights
from distcls.task import Task
from distcls.training.config import (
    LARGE_INPUT,
    SMALL_IMAGE,
    SMALLEST_INPUT,
    InputConfig,
    TrainConfig,
)
from distcls.training.sampler import Indices

SCRATCH = (
    "model.pretrained: {reason}: training from scratch, which takes far more images and epochs "
    "(1,700 icons of 10 classes: test top-1 0.25, with ImageNet weights 0.63); "
    "--model.pretrained FILE gives weights, --model.pretrained none chooses to do without"
)
"""Said where `auto` finds no weights."""
SIZES_READ = 16
"""Images read to find the size of a dataset that is not packed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingInput:
    """The splits of a run, and the samples of them that it uses."""

    classes: tuple[str, ...]
    train: Split
    val: Split
    train_samples: Indices
    val_samples: Indices

    @property
    def task(self) -> Task:
        """The task of the model."""
        return self.train.task


def open_input(config: TrainConfig) -> TrainingInput:
    """Open the dataset for training. Raises UsageError if the config cannot train on it."""
    dataset = Dataset.open(config.data)
    check_compatibility(config, dataset.task)
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
        train_samples=_subset(len(train), config),
        val_samples=_subset(len(val), config),
    )


def choose_preprocess(config: InputConfig, split: Split, weights: Preprocess | None) -> Preprocess:
    """The preprocessing of a run: from the config, else from the weights, else from the images."""
    base = weights or Preprocess(size=_own_size(split))
    return dataclasses.replace(
        base,
        size=config.size or base.size,
        resize=config.resize or base.resize,
        interpolation=config.interpolation or base.interpolation,
        crop_fraction=config.crop_fraction or base.crop_fraction,
    )


def choose_weights(config: TrainConfig, split: Split, *, download: bool = True) -> Weights | None:
    """The weights that a run starts from, the same on every process; None: from scratch.

    The first process of each machine downloads what is missing, the others read it from the cache.
    Under `model.pretrained: auto` all start from scratch if one of them cannot have the weights;
    small inputs always do. `download`: see `find_weights`. Raises UsageError or DistclsError.
    """
    model = config.model
    if model.pretrained == AUTO:
        size = choose_preprocess(config.input, split, None).size
        if min(size) < SMALLEST_PRETRAINED or model.init != "library":
            return None
    found: Weights | None = None
    problem: DistclsError | None = None
    for downloads in (True, False):  # each turn ends once all processes have had theirs
        if downloads == (os.environ.get("LOCAL_RANK", "0") == "0"):
            try:
                found = find_weights(model, download=download)
            except DistclsError as error:
                problem = error
        problems = _gathered(str(problem) if problem else "")
    reason = next(filter(None, problems), "")
    if not reason:
        if len(set(_gathered(found.sha256 if found else None))) > 1:
            raise DistclsError(f"model.pretrained: {model.pretrained} differs between processes")
        return found
    if model.pretrained != AUTO or model.pretrained_sha256 is not None:
        raise problem or DistclsError(f"{reason} (on another process)")
    reason = reason.removeprefix("model.pretrained: ").partition("; ")[0]
    (say if isinstance(problem, UsageError) else warn)(SCRATCH.format(reason=reason))
    return None


def _gathered(value: str | None) -> list[str | None]:
    """The value of each process. All processes have to call this."""
    return [value] if world_size() == 1 else list(gather_object([value]))


def _check_classes(dataset: Dataset, train: Split) -> None:
    if shortage := dataset.task.shortage():
        raise UsageError(f"{dataset.folder}: {shortage}; a classifier needs two or more")
    if not dataset.task.single:
        return  # a label or a class of a head may have no training image
    counts = np.bincount(train.labels, minlength=len(dataset.classes))
    if (counts == 0).any():
        empty = dataset.classes[int(counts.argmin())]
        raise UsageError(f"{dataset.folder}: class {empty!r} has no training images")


def _subset(count: int, config: TrainConfig) -> Indices:
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
"""Losses that are binary in each label (see `LabelsLoss`)."""
DESCRIPTIONS = {
    "single_label": "has one class per image",
    "multi_head": "has one class per head",
    "multi_label": "has any number of labels per image",
}
"""A description of a dataset, by its task."""


def check_compatibility(config: TrainConfig, task: Task) -> None:
    """Raise UsageError, naming the key and the reason, for options that contradict the dataset."""
    rules = {
        "single_label": _single_label_problem,
        "multi_head": _multi_head_problem,
        "multi_label": _multi_label_problem,
    }
    problem = rules[task.kind](config) or ("" if task.single else _multi_output_problem(config))
    if problem:
        key, _, reason = problem.partition(": ")
        raise UsageError(f"{key}: {config.data} {DESCRIPTIONS[task.kind]}; {reason}")


def _single_label_problem(config: TrainConfig) -> str:
    if config.monitor.metric == EXACT:
        return "monitor.metric: exact is for more than one output, with one class it is top1"
    return ""


def _multi_head_problem(config: TrainConfig) -> str:
    if config.loss.name == "bce":
        return "loss.name: bce is binary in each class, choose cross_entropy or focal"
    if config.augment.cutmix > 0:
        return (
            "augment.cutmix: the pasted box hides what some heads have to read, and its area is "
            "not the weight of their labels; choose augment.mixup or none"
        )
    return ""


def _multi_label_problem(config: TrainConfig) -> str:
    if config.loss.name not in LABEL_LOSSES:
        return f"loss.name: {config.loss.name} is for one class per image, choose bce or focal"
    if config.monitor.metric == "top5":
        return "monitor.metric: labels have no top5, choose exact, macro_f1 or loss"
    return ""


def _multi_output_problem(config: TrainConfig) -> str:
    if config.loss.class_weights is not None:
        return (
            "loss.class_weights: an image with more than one class would have more than one "
            "weight; weigh images instead (loss.sample_weights)"
        )
    if config.distill.teacher is not None:
        return "distill.teacher: distillation is for one class per image only"
    return ""
