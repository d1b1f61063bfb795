"""The input of a run: its places, dataset and preprocessing, and whether the config fits them.

Data other than a dataset directory is prepared into the run directory, not into a user's cache:
a run holds all that it was trained on, and no disk fills where nobody looks. Preparing takes about
as long as an epoch's decoding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import statistics
from pathlib import Path
from typing import TypeVar

import numpy as np
from accelerate.utils import gather_object

from distcls import log
from distcls.data.dataset import (
    IN_RUN,
    DataFingerprint,
    Dataset,
    Split,
    fingerprint_of,
    is_dataset,
)
from distcls.data.formats.detect import open_source
from distcls.data.prepare import PrepareOptions, prepare
from distcls.data.source import ImageSource
from distcls.errors import DistclsError, UsageError
from distcls.evaluation.metrics import EXACT, has_top5
from distcls.files import safe_names, writable
from distcls.imaging import Color, Preprocess
from distcls.imaging.preprocess import background_color
from distcls.log import say, warn, world_size
from distcls.models.config import AUTO, SMALLEST_PRETRAINED
from distcls.models.pretrained import Weights, find_weights
from distcls.models.registry import own_module
from distcls.task import Task, class_list
from distcls.training.config import (
    LARGE_INPUT,
    LOSSES,
    NEW_OUT,
    RUN_FILES,
    SMALL_IMAGE,
    SMALLEST_INPUT,
    InputConfig,
    TrainConfig,
    unprepared,
)
from distcls.training.sampler import Indices

SCRATCH = (
    "model.pretrained: {reason}: training from scratch, which needs more images and epochs; "
    "--model.pretrained FILE gives weights, --model.pretrained none turns this off"
)
"""Said where `auto` finds no weights."""
C = TypeVar("C", bound=TrainConfig)

REPEATED = 0.01
"""Fraction of the validation images that may also be training images without a word."""
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
    fingerprint: DataFingerprint | None = None
    """By which a resumed run recognises its data."""

    @property
    def fill(self) -> Color | None:
        """The colour around the images, where some are transparent; None where it is not known."""
        return self.train.background if self.train.transparent else None

    @property
    def task(self) -> Task:
        """The task of the model."""
        return self.train.task


def place(config: C) -> C:
    """The config with its run directory, and data that is a dataset directory.

    Chooses and makes the run directory where `out` is left out, and prepares data that is no
    dataset directory. One process of a run calls it. Raises UsageError for data that cannot be
    prepared; a new run directory is then removed.
    """
    found = _unprepared(config)  # raises before anything is made
    out = _new_out(config.data) if config.out == NEW_OUT else config.out
    try:
        placed = dataclasses.replace(config, out=out)
        return placed if found is None else _prepared(placed, *found, folder=out / IN_RUN)
    except BaseException:
        discard_unused(config, out)
        raise


def discard_unused(config: TrainConfig, out: Path) -> None:
    """Remove the run directory `out`, chosen by `place` for `config`, if no run began in it."""
    begun = (path.name for path in out.glob("[!.]*") if path.name != IN_RUN)
    if config.out != NEW_OUT or any(begun):
        return
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.suppress(OSError):
        out.parent.rmdir()  # if it is empty


def prepared(config: C, folder: Path) -> C:
    """The config with data that is a dataset directory: `folder`, prepared if need be."""
    found = _unprepared(config)
    return config if found is None else _prepared(config, *found, folder=folder)


def _unprepared(config: TrainConfig) -> tuple[str, ImageSource | UsageError] | None:
    """What is to be prepared, and its images; None where `data` is a dataset directory.

    Of a run that is continued the source may be gone: then with the error that tells so.
    """
    text = unprepared(config)
    if text is None:
        return None
    try:
        with log.hushed():  # `prepare` says what was recognised and left out
            return text, open_source(text)
    except UsageError as error:
        if config.resume == "auto" and is_dataset(config.out / IN_RUN):
            return text, error
        raise UsageError(f"data: {error}") from error


def _prepared(config: C, text: str, images: ImageSource | UsageError, *, folder: Path) -> C:
    """Prepare the images into `folder`, or take what was prepared there before."""
    absolute = str(Path(text).absolute()) if Path(text).exists() else text
    config = dataclasses.replace(config, data=folder, source=absolute)
    if is_dataset(folder) and _is_outdated(config, text, images):
        log.say(f"data: {text} has changed since {folder} was prepared; prepared again")
        shutil.rmtree(folder)
    if is_dataset(folder):
        _check_unchanged(config, text, images)
        return config
    if isinstance(images, UsageError):
        raise images
    if folder.resolve().is_relative_to(Path(text).resolve()):
        raise UsageError(f"out: {folder.parent} lies inside {text}, the data; choose another --out")
    options = PrepareOptions(
        source=text,
        out=folder,
        seed=config.seed,
        max_bad=config.max_bad,
        pack=config.loader.pack,
        quiet=True,
    )
    if config.input.background is not None:
        options = dataclasses.replace(options, background=config.input.background)
    try:
        found = prepare(options)
    except UsageError as error:
        others = set(re.findall(r"--\w[\w-]*", str(error))) - {"--max-bad"}
        advice = "; for its options run distcls prepare first" if others else ""
        raise UsageError(f"data: {error}{advice}") from error
    counts = ", ".join(f"{count:,} {split}" for split, count in found.counts.items())
    log.say(
        f"data: {text}, prepared in {folder}: "
        f"{sum(found.counts.values()):,} images ({counts}) of {len(found.classes)} classes: "
        f"{class_list(found.classes)}"
    )
    return config


def _is_outdated(config: TrainConfig, text: str, images: ImageSource | UsageError) -> bool:
    """Whether a failed start prepared these images, no run began, and they have changed since."""
    if any((config.out / name).exists() for name in RUN_FILES) or isinstance(images, UsageError):
        return False
    info = Dataset.open(config.data).info
    same_place = info.get("source") in (str(Path(text).absolute()), str(Path(text).resolve()))
    return same_place and info.get("source_fingerprint") != images.fingerprint()


def _check_unchanged(config: TrainConfig, text: str, images: ImageSource | UsageError) -> None:
    """Compare the images with those that were prepared before; a continued run takes these."""
    info = Dataset.open(config.data).info
    before, resumed = info["source"], config.resume == "auto"
    if isinstance(images, UsageError):
        change = f"cannot be read any more ({images})"
    else:
        same = images.fingerprint() == info.get("source_fingerprint")
        change = "" if same else "has changed since"
    moved = change and before not in (text, str(Path(text).absolute()), str(Path(text).resolve()))
    if not (change or resumed or info["seed"] == config.seed):
        change = f"was split by seed {info['seed']}"
    if not change:
        log.say(f"data: {text}, as prepared before in {config.data}")
    elif resumed and not moved:
        log.warn(f"{text} {change}; the run continues with what was prepared in {config.data}")
    else:
        raise UsageError(
            f"data: {config.data} was prepared from {before}, and {text} "
            f"{'is not the same' if moved else change}; choose another --out, or give it as --data"
        )


def _new_out(data: Path) -> Path:
    """Make the run directory NAME-N with the first free number; atomic, several may start."""
    name = data.resolve().name if data.exists() else data.name
    name = re.split(r"[{*?\[]", name)[0]
    name = (name if data.is_dir() else name.partition(".")[0]).rstrip("-_. ")
    [name] = safe_names([name or "run"])
    with writable(NEW_OUT.parent):
        NEW_OUT.parent.mkdir(exist_ok=True)
        for number in itertools.count(1):
            out = NEW_OUT.with_name(f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                out.mkdir()
                break
    log.say(f"out: {out}, a new run directory (--out names another)")
    return out


def open_input(config: TrainConfig) -> TrainingInput:
    """Open the dataset for training. Raises UsageError if the config cannot train on it."""
    dataset = Dataset.open(config.data)
    check_compatibility(config, dataset.task)
    counts = dataset.counts()
    for name in ("train", "val"):
        if name not in counts:
            how = "give more" if config.source else "prepare it with --val-fraction, from more"
            raise UsageError(f"{config.data}: no {name} split; {how} than one image of a class")
    use_pack = {"auto": None, "on": True, "off": False}[config.loader.pack]
    train = dataset.split("train", use_pack=use_pack)
    _check_classes(dataset, train)
    val = dataset.split("val", use_pack=use_pack)
    if config.source is None:  # else `prepare` has just said it
        _warn_of_repeated(dataset, len(val))
    return TrainingInput(
        classes=dataset.classes,
        train=train,
        val=val,
        train_samples=_subset(len(train), config),
        val_samples=_subset(len(val), config),
        fingerprint=fingerprint_of(dataset, train, val),
    )


def _warn_of_repeated(dataset: Dataset, images: int) -> None:
    """Say that validation is better than possible, as `prepare` found it."""
    repeated = dataset.info.get("repeated")
    count = repeated.get("val") if isinstance(repeated, dict) else None
    if isinstance(count, int) and count >= REPEATED * images:
        warn(
            f"{dataset.folder}: {count:,} of {images:,} validation images are also training images "
            "(same pixels): the scores below will be too high"
        )


def choose_preprocess(config: InputConfig, split: Split, weights: Preprocess | None) -> Preprocess:
    """The preprocessing of a run: from the config, else from the weights, else from the images.

    The background is the dataset's by default; raises UsageError for another one than the pack's.
    """
    background = split.background
    if config.background is not None:
        background = background_color(config.background)
        if clash := split.clash(background):
            raise UsageError(f"input.{clash}, or leave it out")
    base = weights or Preprocess(size=_own_size(split))
    return dataclasses.replace(
        base,
        size=config.size or base.size,
        resize=config.resize or base.resize,
        interpolation=config.interpolation or base.interpolation,
        crop_fraction=config.crop_fraction or base.crop_fraction,
        background=background,
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
    if own_module(model.name) is not None:
        return None  # nobody publishes weights for a network of the user's own
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
    if not problem and config.monitor.metric == "top5" and not has_top5(task):
        problem = "monitor.metric: top5 is always 1 with five classes or fewer, choose top1 or loss"
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
    loss = config.loss.for_task("multi_label").name
    if loss not in LABEL_LOSSES and not LOSSES.find(loss).own:
        return f"loss.name: {loss} is for one class per image, choose bce or focal"
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
