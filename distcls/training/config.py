"""The config of a training run: every key of `distcls train`, in sections."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from distcls.config import build, config_file, options_layer, read_yaml, take_plain_values, told
from distcls.config.schema import require_duration
from distcls.errors import BadValue, UsageError, require
from distcls.evaluation.metrics import METRICS, default_mode
from distcls.imaging.preprocess import (
    Background,
    Interpolation,
    Resize,
    background_color,
    require_color,
)
from distcls.models.config import ModelConfig, is_published
from distcls.registry import Registry
from distcls.training.schedule import ScheduleConfig

# filled by the modules that implement them, which load torch
LOSSES: Registry[Any] = Registry("loss", "loss.name", home="distcls.training.losses")


def _library_of_optimizer(name: str) -> str | None:
    from timm.optim import list_optimizers

    return "timm" if name in list_optimizers() else None


OPTIMIZERS: Registry[Any] = Registry(
    "optimiser",
    "optimizer.name",
    home="distcls.training.optim",
    prefixes=("timm",),
    library_of=_library_of_optimizer,
)
POLICIES: Registry[Any] = Registry("policy", "augment.policy", home="distcls.training.augment")
register_loss = LOSSES.register
"""Decorate a loss of your own: a function of (logits, targets) that returns the loss of each image,
`@distcls.register_loss("name")`. See `distcls.training.losses.OwnLoss`. Raises UsageError for a
name that is taken or none."""
register_optimizer = OPTIMIZERS.register
"""Decorate what makes an optimiser: a function of (groups, lr, config), or a function or class of
(params, lr), as those of `torch.optim` are. Both are given the parameter groups, dicts with
`params`, `lr_scale` and `weight_decay`; `config` is the `optimizer` section.
`@distcls.register_optimizer("name", momentum=0.9)`; the options are the config keys that it reads.
Raises UsageError for a name that is taken or none. An optimiser whose `step` needs a closure or
sparse gradients is refused before a run begins."""

Value = TypeVar("Value")
Auto = Literal["auto"]
"""A default that depends on the images; `training/recipe.py` decides."""
LARGEST_SIDE = 8192
"""Of an input: what one image takes in a network of that size already fills most GPUs."""
Keys = Mapping[str, object]
"""A section as a dict with its keys."""


def chosen(value: Value | Auto) -> Value:
    """The value of a field that may be `auto`, in a resolved config."""
    assert value != "auto", "the config is not resolved"
    return value


MOST_THREADS = 4096
"""More crash the libraries of operations: one million ends in a segmentation fault."""
LONGEST_TIMEOUT = 365 * 24 * 3600
"""Seconds; PyTorch's timeouts overflow at 2^63 nanoseconds."""
NEW_OUT = Path("runs/NAME-N")
"""The default of `out`, which stands for a new run directory."""
SMALL_IMAGE = 64
"""Images of up to this many pixels per side are trained on at their own size by default."""
SMALLEST_INPUT = 28
LARGE_INPUT = 224


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Preprocessing, from an image to the network's input; saved with the model."""

    size: tuple[int, int] | None = None
    """Height and width in pixels, such as 224 or 192x256; default: those of the pretrained weights,
    else the size of the images if it is at most 64, else 224."""
    resize: Resize | None = None
    """squash ignores the aspect ratio; crop fills the frame and crops the centre; pad fits the
    whole image into the frame, padded with black; default: that of the pretrained weights, else
    crop."""
    interpolation: Interpolation | None = None
    """Resampling method; area averages when shrinking and is linear when enlarging; default: that
    of the pretrained weights, else area."""
    crop_fraction: float | None = None
    """crop: size of the centre crop as a fraction of the resized image; default: that of the
    pretrained weights, else 1."""
    background: Background | None = None
    """Colour that transparent pixels are blended with, as red, green and blue from 0 to 255; ignore
    discards the alpha channel; default: that of `distcls prepare` (white)."""

    def __post_init__(self) -> None:
        size, fraction = self.size, self.crop_fraction
        valid = size is None or (min(size) >= 1 and max(size) <= LARGEST_SIDE)
        require(valid, "size", size, f"height and width of 1 to {LARGEST_SIDE:,}")
        valid = fraction is None or 0 < fraction <= 1
        require(valid, "crop_fraction", fraction, "a number above 0 and at most 1, or null")
        if self.background is not None:
            require_color("background", background_color(self.background))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Data loading. Except for `pack`, none of it changes the result."""

    pack: Literal["auto", "on", "off"] = "auto"
    """Read decoded images from the dataset's pack: auto if there is one, on, or off. The images are
    the same, except JPEG files under `augment.resized_crop`: those are decoded at a reduced size
    where a crop allows it, with slightly different pixels."""
    workers: int | None = None
    """Decoding threads; default: the number of cores of this process."""
    prefetch: int = 3
    """Number of batches to prefetch."""
    timeout: float = 300.0
    """Seconds without a batch after which the run stops and names the files being read."""

    def __post_init__(self) -> None:
        workers = self.workers
        require(workers is None or workers >= 1, "workers", workers, "at least 1, or null")
        require(self.prefetch >= 1, "prefetch", self.prefetch, "at least 1")
        require(self.timeout > 0, "timeout", self.timeout, "a number of seconds above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Data augmentation of training images, drawn per image from (seed, epoch, image)."""

    flip: float | Auto = "auto"
    """Probability of a horizontal flip; auto: 0.5, or 0 if the classes are characters or an image
    has several outputs."""
    crop_padding: int | Auto = "auto"
    """Random crop after padding: shift by up to this many pixels in each direction; auto: an eighth
    of the side for inputs up to 64 pixels, else 0."""
    resized_crop: tuple[float, float] | Auto | None = "auto"
    """Random resized crop: smallest and largest fraction of the area, such as 0.35,1, with an
    aspect ratio of 3/4 to 4/3 of the input's. Cropped from the original pixels, whatever
    `input.resize` says; images up to 64 pixels and no larger than the input are enlarged first.
    auto: 0.35,1 for inputs above 64 pixels, else off."""
    rotate: float = 0.0
    """Random rotation by up to this many degrees in each direction, after the crop; corners are
    filled with black."""
    erase: float = 0.0
    """Random erasing: probability of filling a rectangle of 2 to 33 % of the area with a random
    colour (Zhong et al., 2017)."""
    policy: str | None = None
    """Augmentation policy with torchvision's operations: autoaugment (Cubuk et al., 2018; the
    ImageNet policy), randaugment (Cubuk et al., 2019), trivialaugment (Mueller, Hutter, 2021); or
    module:attribute of your own; null is off."""
    randaugment_ops: int | None = None
    """randaugment: number of operations per image; default 2."""
    randaugment_magnitude: int | None = None
    """randaugment: magnitude of the operations, 0 to 30; default 9."""
    color_jitter: tuple[float, float, float, float] | None = None
    """Colour jitter: maximum change of brightness, contrast, saturation (0 or more; 0.4 means
    factors of 0.6 to 1.4) and hue (0 to 0.5), such as 0.4,0.4,0.4,0.1; null is off."""
    transform: str | None = None
    """A transform of your own, as module:attribute, in addition to the above: a function of (image,
    rng), or a transform of albumentations or torchvision (v2), of one uint8 image at the network's
    size, before flips, shifts, rotation and all else but the resized crop; or an object with
    `draws`, of a uint8 batch, after all but erasing. docs/python.md has examples."""
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al., 2017): images and labels are blended in pairs, weighted by
    Beta(alpha, alpha); 0 is off, 0.2 is common."""
    cutmix: float = 0.0
    """Alpha of CutMix (Yun et al., 2019): a box of another image is pasted into each, and labels
    are weighted by area, from Beta(alpha, alpha); 0 is off, 1 is common."""
    mix_probability: float = 1.0
    """mixup, cutmix: probability that an image is mixed."""
    cutmix_probability: float | None = None
    """With both: probability that a mixed image uses CutMix instead of mixup; default 0.5."""

    def __post_init__(self) -> None:
        for name in ("flip", "erase"):
            value = getattr(self, name)
            valid = value == "auto" or 0 <= value <= 1
            require(valid, name, value, "a probability from 0 to 1")
        padding = self.crop_padding
        valid = padding == "auto" or 0 <= padding <= LARGEST_SIDE
        require(valid, "crop_padding", padding, f"0 to {LARGEST_SIDE:,} pixels")
        require(0 <= self.rotate <= 180, "rotate", self.rotate, "0 to 180 degrees")
        if self.resized_crop is not None and self.resized_crop != "auto":
            low, high = self.resized_crop
            valid = 0 < low <= high <= 1
            require(valid, "resized_crop", self.resized_crop, "two fractions, 0 < low <= high <= 1")
            fits = padding in (0, "auto")
            require(fits, "crop_padding", padding, "0 where resized_crop is on")
        self._check_policy()
        if self.color_jitter is not None:
            *factors, hue = self.color_jitter
            valid = all(0 <= each < math.inf for each in factors) and 0 <= hue <= 0.5
            expected = "three numbers of 0 or more and one from 0 to 0.5, or null"
            require(valid, "color_jitter", self.color_jitter, expected)
        self._check_mixing()

    def _check_policy(self) -> None:
        for name, low, high in (("ops", 1, 14), ("magnitude", 0, 30)):
            key = f"randaugment_{name}"
            value = getattr(self, key)
            valid = value is None or low <= value <= high
            require(valid, key, value, f"{low} to {high}, or null")

    def _check_mixing(self) -> None:
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, value, "0 (off) or a number above it")
        rate, cutmix = self.mix_probability, self.cutmix_probability
        require(0 < rate <= 1, "mix_probability", rate, "above 0 and at most 1")
        used = rate == 1 or self.mixup > 0 or self.cutmix > 0
        require(used, "mix_probability", rate, "1 where mixup and cutmix are off")
        if cutmix is not None:
            expected = "a probability from 0 to 1, or null"
            require(0 <= cutmix <= 1, "cutmix_probability", cutmix, expected)
            both = self.mixup > 0 and self.cutmix > 0
            require(both, "cutmix_probability", cutmix, "null unless mixup and cutmix are both on")

    def without_auto(self) -> AugmentConfig:
        """The same with everything off that is still `auto`."""
        off: dict[str, Any] = {"flip": 0.0, "crop_padding": 0, "resized_crop": None}
        still = {name: value for name, value in off.items() if getattr(self, name) == "auto"}
        return dataclasses.replace(self, **still)

    @property
    def resolved_cutmix_probability(self) -> float:
        """Probability that a mixed image takes CutMix rather than mixup."""
        if self.mixup > 0 and self.cutmix > 0:
            return 0.5 if self.cutmix_probability is None else self.cutmix_probability
        return 1.0 if self.cutmix > 0 else 0.0


DEFAULT_TEMPERATURE, DEFAULT_TEACHER_WEIGHT = 4.0, 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss, and the weights of classes and samples, against class imbalance.

    The evaluation's `val_loss` is plain cross-entropy (of multi-label tasks, BCE) in any case.
    """

    name: str = "auto"
    """cross_entropy; focal, which gives hard images more weight (Lin et al.: Focal Loss for Dense
    Object Detection, 2017); bce, binary cross-entropy of each class, averaged over the classes
    (Wightman et al.: ResNet strikes back, 2021); or module:attribute of your own; auto: bce for
    multi-label tasks, else cross_entropy. Multi-head tasks average over the heads and exclude bce;
    multi-label tasks use bce, or focal of each sigmoid."""
    label_smoothing: float = 0.0
    """Label smoothing: share of each label that is spread over all classes."""
    focal_gamma: float | None = None
    """focal: exponent that lowers the weight of images that are classified correctly; 0 is
    cross-entropy; default 2."""
    class_weights: Literal["balanced"] | tuple[float, ...] | dict[str, float] | None = None
    """Weight of each class in the loss, against class imbalance: `balanced` (inversely proportional
    to the class's training images, as in scikit-learn), a list in label order, or some classes by
    name, such as cat=2,dog=0.5, with 1 for the others. Scaled to a mean of 1 over the training
    images."""
    sample_weights: Literal["auto", "on", "off"] = "auto"
    """Weigh each image by its weight in the dataset: auto if it has weights, on, or off. Scaled to
    a mean of 1 over the training images."""

    def __post_init__(self) -> None:
        smoothing, gamma = self.label_smoothing, self.focal_gamma
        require(0 <= smoothing < 1, "label_smoothing", smoothing, "a number from 0 to below 1")
        valid = gamma is None or (math.isfinite(gamma) and gamma >= 0)
        require(valid, "focal_gamma", gamma, "a number of 0 or more, or null")
        weights = self.class_weights
        numbers = weights.values() if isinstance(weights, dict) else weights
        if numbers is not None and not isinstance(numbers, str):
            valid = all(math.isfinite(number) and number >= 0 for number in numbers)
            require(valid, "class_weights", weights, "numbers of 0 or more")
            # classes that a mapping leaves out weigh 1
            some = isinstance(weights, dict) or any(numbers)
            require(some, "class_weights", weights, "at least one number above 0")

    def for_task(self, kind: str) -> LossConfig:
        """The same with a name in place of `auto`, for a task of that kind."""
        if self.name != "auto":
            return self
        return dataclasses.replace(self, name="bce" if kind == "multi_label" else "cross_entropy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Knowledge distillation from a trained model (Hinton et al., 2015), in addition to the
    labels."""

    teacher: Path | None = None
    """Teacher: a trained model (best.pth, best.onnx, or a run directory) with the same classes;
    null is off."""
    temperature: float | None = None
    """With a teacher: temperature, by which the logits of both models are divided; default 4."""
    weight: float | None = None
    """With a teacher: weight of the distillation loss; the loss of the labels has the weight 1
    minus it; default 0.5."""

    def __post_init__(self) -> None:
        temperature, weight = self.temperature, self.weight
        valid = temperature is None or 0 < temperature < math.inf
        require(valid, "temperature", temperature, "a number above 0, or null")
        valid = weight is None or 0 < weight <= 1
        require(valid, "weight", weight, "above 0 and at most 1, or null")
        for name in ("temperature", "weight"):
            used = getattr(self, name) is None or self.teacher is not None
            require(used, name, getattr(self, name), "null without a teacher")

    @property
    def resolved_temperature(self) -> float:
        """The temperature, set or default."""
        return DEFAULT_TEMPERATURE if self.temperature is None else self.temperature

    @property
    def resolved_weight(self) -> float:
        """The weight of the teacher's term, set or default."""
        return DEFAULT_TEACHER_WEIGHT if self.weight is None else self.weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser, and the learning rates of the layers.

    Null stands for the optimiser's default; a key that it does not read is refused.
    """

    name: str = "adamw"
    """adamw, adam, sgd, rmsprop, adabelief, ranger; any of timm's, such as `lamb` or `timm:adamw`
    (timm's version where both have the name); or module:attribute of your own."""
    weight_decay: float | None = None
    """Weight decay, not applied to norms and biases. Decoupled for adamw, adabelief and ranger
    (default 0.05); added to the gradient for sgd (1e-4), rmsprop (1e-5) and adam (0); timm's
    optimisers: 0."""
    beta1: float | None = None
    """Decay rate of the mean of the gradients; default 0.9, ranger: 0.95."""
    beta2: float | None = None
    """Decay rate of the mean of the squared gradients; default 0.999, rmsprop (its alpha): 0.99."""
    eps: float | None = None
    """Term added to the denominator; default 1e-8, adabelief: 1e-16, ranger: 1e-5."""
    momentum: float | None = None
    """Momentum of sgd (default 0.9) and rmsprop (default 0)."""
    nesterov: bool | None = None
    """Nesterov momentum with sgd; default false."""
    layer_decay: float | None = None
    """Layer-wise learning rate decay, for fine-tuning: the learning rate of each layer is this
    times that of the layer above it, starting with `lr` at the head; null: off."""
    head_lr_scale: float | Auto = "auto"
    """Learning rate of the head (the last layer), as a multiple of `lr`; auto: 4 with pretrained
    weights, else 1."""
    clip_norm: float | None = 1.0
    """Gradient clipping: maximum norm of all gradients, after unscaling; null is off."""

    def __post_init__(self) -> None:
        decay = self.weight_decay
        require(decay is None or decay >= 0, "weight_decay", decay, "0 or more, or null")
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            known = value is None or 0 <= value < 1
            require(known, name, value, "a number from 0 to below 1, or null")
        if self.nesterov:
            require(self.momentum != 0, "nesterov", True, "false, as momentum is 0")
        require(self.eps is None or self.eps > 0, "eps", self.eps, "a number above 0, or null")
        layer = self.layer_decay
        require(
            layer is None or 0 < layer <= 1, "layer_decay", layer, "above 0, at most 1, or null"
        )
        scale = self.head_lr_scale
        require(scale == "auto" or scale > 0, "head_lr_scale", scale, "a number above 0, or auto")
        clip = self.clip_norm
        require(clip is None or clip > 0, "clip_norm", clip, "a number above 0, or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Exponential moving average (EMA) of the weights. It is evaluated beside the raw weights, and
    the better of both is saved."""

    decay: float | None = None
    """Decay of the average per step, such as 0.999; null is off."""

    def __post_init__(self) -> None:
        value = self.decay
        require(value is None or 0 < value < 1, "decay", value, "between 0 and 1, or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """Frozen layers, for transfer learning and fine-tuning. Frozen batch norms keep their
    statistics."""

    backbone: str | None = None
    """How long all layers but the head are frozen, such as `3 epochs` or `10%`; null: never."""
    names: tuple[str, ...] = ()
    """Layers or parameters that are frozen for the whole run, by their names in the backbone:
    `features.0`, `layer[12]`, `*.bias`."""

    def __post_init__(self) -> None:
        if self.backbone is not None:
            require_duration("backbone", self.backbone)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Mean of the weights over the last epochs, which is evaluated and saved in these epochs."""

    last_epochs: int | None = None
    """Number of final epochs whose weights are averaged; null is off. A run that stops early does
    not reach them."""

    def __post_init__(self) -> None:
        last = self.last_epochs
        require(last is None or last >= 2, "last_epochs", last, "at least 2, or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Which epoch is best, and early stopping."""

    metric: str = "top1"
    """Validation metric that decides which epoch is best: top1, top5 (more than five classes),
    loss, macro_f1, and the other columns of history.csv; for tasks with several outputs also exact,
    the fraction of images with all labels right; or module:attribute of your own. Ties are broken
    by the lower loss."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Whether a lower (min) or a higher (max) value is better; auto: by the metric; max for your
    own, unless it is registered otherwise."""
    patience: int | Auto | None = "auto"
    """Early stopping: epochs without improvement after which training stops; null is off; auto: a
    third of `epochs`, at least 10."""
    min_delta: float = 0.0
    """Minimum change that counts as an improvement; if it is above 0, ties are not broken by the
    loss."""

    def __post_init__(self) -> None:
        try:
            default_mode(self.metric)
        except BadValue as error:
            raise BadValue("metric", error.value, error.expected) from None
        patience = self.patience
        valid = patience is None or patience == "auto" or patience >= 1
        require(valid, "patience", patience, "at least 1, auto, or null")
        require(self.min_delta >= 0, "min_delta", self.min_delta, "0 or more")

    @property
    def figure(self) -> str:
        """The name of the metric in an evaluation's figures."""
        return METRICS.short(self.metric)

    @property
    def beside(self) -> tuple[str, ...]:
        """The metric, if evaluations would not have it anyway."""
        return () if self.figure in METRICS.names() else (self.metric,)

    @property
    def resolved_mode(self) -> Literal["min", "max"]:
        """Whether less or more of the metric is better."""
        return default_mode(self.metric) if self.mode == "auto" else self.mode

    def best_of(self, scores: Mapping[str, float], losses: Mapping[str, float]) -> str:
        """The name of the best score, of equals that with the lowest loss; NaN comes last."""
        sign = 1 if self.resolved_mode == "max" else -1

        def rank(name: str) -> tuple[bool, float, float]:
            return not math.isnan(scores[name]), sign * scores[name], -losses.get(name, 0.0)

        return max(scores, key=rank)


FORMAT = re.compile(r"(?:[^/\\{}]?[<>=^])?[-+ ]?0?\d{0,2}[,_]?(?:\.\d{1,2})?[sdeEfFgGn%]?")
"""How a field of `checkpoint.filename` may be formatted."""
LONGEST_NAME = 180
"""Bytes; file systems take 255, and a file being written has a longer name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Training states in `last/`, from which a run resumes (one at the end of each epoch), and
    copies of the best models beside `best.pth`."""

    every_steps: int | None = None
    """Optimiser steps between two training states within an epoch; null: not by steps."""
    every_minutes: float | None = 10.0
    """Minutes between two training states within an epoch; null: not by time."""
    keep_last: int = 2
    """Number of training states to keep; if the newest is damaged, the one before is used."""
    filename: str = "{model}_e{epoch}_{score:.5f}.pth"
    """File name of these model files, built from {model}, {epoch}, {step}, {metric} and {score}."""
    save_top_k: int | None = 1
    """Number of such model files to keep, those of the best scores; 0: none, null: all."""
    save_best_only: bool = True
    """Save such a file only if the model is the best so far."""
    save_training_state: bool = False
    """Save the training state in these files; `--resume FILE` continues from one."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "a number above 0, or null")
        require(self.keep_last >= 1, "keep_last", self.keep_last, "at least 1")
        top = self.save_top_k
        require(top is None or top >= 0, "save_top_k", top, "0 or more, or null")
        self._check_filename()

    def _formatted(self, **values: object) -> str:
        """The name with these values; empty where it has other fields or formats than those of
        `FORMAT`, of which none reads a field's attributes or fills gigabytes with blanks."""
        try:
            parts = list(string.Formatter().parse(self.filename))
            known = all(
                name is None
                or (name in values and conversion is None and FORMAT.fullmatch(spec or ""))
                for _, name, spec, conversion in parts
            )
            return self.filename.format(**values) if known else ""
        except ValueError:
            return ""

    def _check_filename(self) -> None:
        values = {"model": "m", "metric": "top1", "score": 0.5}
        first, second = (self._formatted(**values, epoch=n, step=n) for n in (1, 2))
        plain = (
            first == Path(first).name and first.endswith(".pth") and first != "best.pth"
        ) and "\\" not in first
        expected = "a file name ending in .pth, of {model} {epoch} {step} {metric} {score:.5f}"
        require(plain and first.isprintable(), "filename", self.filename, expected)
        expected = f"a file name of at most {LONGEST_NAME} bytes"
        short = len(os.fsencode(first)) <= LONGEST_NAME
        require(short, "filename", self.filename, expected)
        alone = self.save_top_k in (0, 1) or first != second
        expected = "a name with {epoch} or {step}: several files are saved"
        require(alone, "filename", self.filename, expected)


@told
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The config of a training run: the keys of `distcls train` and of its YAML files.

        TrainConfig(data="photos", model="efficientnet_b0", ema={"decay": 0.99})

    Paths may be given as texts, a section as a dict or as its `name` alone; `config.ema.decay`
    reads a value. Raises BadValue or UsageError, with the key and the value, for what is not valid.
    """

    data: Path
    """Dataset directory, as `distcls prepare` writes it, or anything that `distcls prepare` reads,
    such as a folder with one folder per class: that is prepared into the run directory, with
    default options."""
    out: Path = NEW_OUT
    """Run directory to write; by default a new one, with the name of the data and the next free
    number."""
    source: str | None = None
    """Where `data` was prepared from, as recorded in config.yaml; used to prepare it again if
    `data` is missing."""
    max_bad: float | None = None
    """Fraction of the images that may be unreadable where `data` is prepared first; 0 allows none,
    1 any number; default: that of `distcls prepare` (0.1, and 10 images of any number)."""
    epochs: int | Auto = "auto"
    """Passes over the training images; auto: 10, more for small datasets, whose epochs have few
    steps."""
    batch_size: int | Auto = "auto"
    """Global batch size: images per optimiser step, over all processes and accumulated batches;
    auto: 128, less for datasets of less than 1,280 images."""
    lr: float | Auto = "auto"
    """Peak learning rate; auto: by the batch size, and lower for pretrained weights."""
    seed: int = 0
    """Seed of data order, augmentation, initialisation and dropout."""
    limit: int | None = None
    """Train and evaluate on at most this many images of each split, for quick trials."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Mixed precision (AMP): dtype of the forward pass; auto is bf16 on GPUs that support it, fp16
    with gradient scaling on other GPUs, fp32 on CPUs (where bf16 measured slower in training)."""
    memory_format: Literal["channels_last", "contiguous"] = "channels_last"
    """Memory format of activations and weights; channels_last trains MobileNetV3 3 times as
    fast on CPUs. Sharded weights (FSDP) are contiguous."""
    compile: bool = False
    """Compile the model with torch.compile; cost and gain are printed at the start of the run (a
    step of MobileNetV3-Large on 2 CPU cores: 445 to 463 img/s at 28 px after 52 s, 42 to 40 at 224
    after 59 s)."""
    cuda_graphs: bool = True
    """On one GPU, record forward and backward pass as CUDA graphs and launch them at once (an
    H200 trains MobileNetV3-Large at 32x32 with 39,200 instead of 7,700 images/s). Networks of your
    own are not recorded, nor are runs with `accumulate`, `compile`, several processes or too little
    memory."""
    accumulate: int = 1
    """Gradient accumulation: micro-batches per optimiser step; each needs less memory."""
    auto_micro_batch: bool = False
    """Run a trial step first and double `accumulate` until it fits into memory. Off by default, as
    batch norm computes its statistics on each micro-batch: the result then depends on the machine's
    memory."""
    sync_batch_norm: bool = False
    """Synchronised batch norm: statistics over the images of all processes, so that the number of
    processes does not change the result; with `accumulate`, over one micro-batch at a time."""
    processes: int | None = None
    """Number of processes that the run requires; null: any."""
    threads: int | None = None
    """CPU compute threads per process; null divides the cores among the processes."""
    resume: str = "none"
    """auto continues the run in `out` from its last state, if there is one; a file name continues
    from that file (see `checkpoint.save_training_state`). Options that affect the result must be
    unchanged, except `epochs` and `monitor.patience`, which may extend a finished run."""
    max_nonfinite_steps: int = 20
    """Number of consecutive steps with a non-finite loss or gradient after which the run stops;
    each such step is skipped by all processes."""
    collective_timeout: float = 600.0
    """Timeout of collective operations in seconds, after which a process fails, so that a broken
    network ends the run instead of blocking it."""
    log_every: int = 50
    """Steps between two log lines in metrics.jsonl."""
    callbacks: tuple[str, ...] = ()
    """Callbacks of your own, as module:attribute: objects with on_train_start(run),
    on_epoch_end(run, metrics) or on_train_end(run), or a function for the second; called on the
    main process. If on_epoch_end returns True, the run ends."""
    tracker: str | None = None
    """Experiment tracker to log the metrics to as well: tensorboard, mlflow, wandb and others."""
    quiet: bool = False
    """Print warnings and errors only."""
    json: bool = False
    """Print the result as one JSON object on standard output."""
    model: ModelConfig = ModelConfig()
    input: InputConfig = InputConfig()
    loader: LoaderConfig = LoaderConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    freeze: FreezeConfig = FreezeConfig()
    ema: EmaConfig = EmaConfig()
    average: AverageConfig = AverageConfig()
    monitor: MonitorConfig = MonitorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    if TYPE_CHECKING:  # what `__post_init__` converts; at run time the dataclass makes its own

        def __init__(
            self,
            *,
            data: str | os.PathLike[str],
            out: str | os.PathLike[str] = ...,
            model: ModelConfig | Keys | str = ...,
            input: InputConfig | Keys = ...,
            loader: LoaderConfig | Keys = ...,
            augment: AugmentConfig | Keys = ...,
            optimizer: OptimizerConfig | Keys | str = ...,
            schedule: ScheduleConfig | Keys | str = ...,
            loss: LossConfig | Keys | str = ...,
            distill: DistillConfig | Keys = ...,
            freeze: FreezeConfig | Keys = ...,
            ema: EmaConfig | Keys = ...,
            average: AverageConfig | Keys = ...,
            monitor: MonitorConfig | Keys = ...,
            checkpoint: CheckpointConfig | Keys = ...,
            **options: Any,
        ) -> None: ...

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **overrides: object) -> Self:
        """The config in a YAML file, or of a recipe (`distcls recipes` lists them), with other
        values for some keys, of a section's keys too.

            TrainConfig.from_yaml("runs/photos/config.yaml", epochs=3)
            TrainConfig.from_yaml("digits", data="digits", optimizer={"weight_decay": 0.1})

        Raises UsageError for a file that cannot be read, a name that is no recipe's, an unknown key
        or a value that does not fit.
        """
        if not isinstance(path, str | os.PathLike):
            raise UsageError(
                f"config: {path!r} is not a path, expected a YAML file or a recipe's name"
            )
        return build(cls, read_yaml(config_file(path)), options_layer(cls, overrides))

    def __post_init__(self) -> None:
        take_plain_values(self)
        self._check_places()
        for name in ("accumulate", "max_nonfinite_steps", "log_every"):
            value = getattr(self, name)
            require(value >= 1, name, value, "at least 1")
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            require(value == "auto" or value >= 1, name, value, "at least 1, or auto")
        for name in ("limit", "processes"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1, or null")
        valid = self.threads is None or 1 <= self.threads <= MOST_THREADS
        require(valid, "threads", self.threads, f"1 to {MOST_THREADS:,}, or null")
        limit = self.collective_timeout
        expected = f"a number of seconds above 0 and at most {LONGEST_TIMEOUT:,} (a year)"
        require(0 < limit <= LONGEST_TIMEOUT, "collective_timeout", limit, expected)
        valid = self.lr == "auto" or 0 < self.lr < math.inf
        require(valid, "lr", self.lr, "a number above 0, or auto")
        last = self.average.last_epochs
        fits = last is None or self.epochs == "auto" or last <= self.epochs
        require(fits, "average.last_epochs", last, f"at most epochs ({self.epochs})")
        alone = last is None or self.ema.decay is None
        require(alone, "average.last_epochs", last, "null with ema.decay: one average is saved")
        bad = self.max_bad
        require(bad is None or 0 <= bad <= 1, "max_bad", bad, "at least 0 and at most 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 or more")

    def _check_places(self) -> None:
        known = self.out != NEW_OUT or self.resume != "auto"
        require(known, "resume", self.resume, "none without --out, the run to continue")
        require(self.source != "", "source", self.source, "a path, or null")


GROUPS = {
    "essential options": (
        *("data", "out", "epochs", "batch_size", "lr", "model.name", "model.pretrained"),
        *("input.size", "precision", "resume", "seed"),
    ),
    "speed and memory": (
        *("compile", "cuda_graphs", "memory_format", "accumulate", "auto_micro_batch", "threads"),
    ),
    "processes": ("processes", "sync_batch_norm", "collective_timeout"),
}
"""The groups of `--help`, before the sections."""
RUN_FILES = ("config.yaml", "metrics.jsonl", "history.csv", "best.pth", "last")
"""Any of them in a folder makes it the directory of a run (`logging`, `checkpointing`)."""


def require_free(out: Path, resume: str) -> None:
    """Raise UsageError if `out` holds a run that this one would overwrite."""
    found = [name for name in RUN_FILES if (out / name).exists()]
    if resume == "none" and found:
        raise UsageError(
            f"{out} already contains a run ({found[0]}); choose another --out, or continue it with "
            "--resume auto"
        )


def require_places(config: TrainConfig) -> None:
    """Raise UsageError for a path of the config that cannot work, before torch loads or an image is
    read: `out` holds a run or is a file, or data, state, weights or teacher do not exist."""
    require_free(config.out, config.resume)
    nearest = next(each for each in (config.out, *config.out.parents) if each.exists())
    if not nearest.is_dir():
        raise UsageError(f"out: {nearest} is a file, expected a folder")
    require_data(config)
    pretrained = config.model.pretrained
    files = {
        "resume": None if config.resume in ("none", "auto") else config.resume,
        "model.pretrained": None if is_published(pretrained) else pretrained,
        "distill.teacher": config.distill.teacher,
    }
    for key, file in files.items():
        if file is not None and not Path(file).exists():
            hint = "; auto takes the network's published weights" * (key == "model.pretrained")
            raise UsageError(f"{key}: {file} does not exist{hint}")


def require_data(config: TrainConfig) -> None:
    """Raise UsageError if `data` is not a dataset directory and nothing that `prepare` reads."""
    from distcls.data.dataset import IN_RUN, is_dataset  # `--help` needs none of it
    from distcls.data.formats.detect import format_of

    text = unprepared(config)
    if text is None or (config.resume == "auto" and is_dataset(config.out / IN_RUN)):
        return
    try:
        format_of(text)
    except UsageError as error:
        raise UsageError(f"data: {error}") from error


def unprepared(config: TrainConfig) -> str | None:
    """What has to be prepared before training; None where `data` is a dataset directory.

    Raises UsageError for a URL.
    """
    from distcls.data.dataset import IN_RUN, is_dataset

    if is_dataset(config.data) or is_dataset(config.data / IN_RUN):
        return None
    there = config.data.exists()
    url = re.match(r"(\w\w+):/+", str(config.data))  # pathlib leaves one slash of two
    if url and not there:
        address = f"{url[1]}://{str(config.data)[url.end() :]}"
        raise UsageError(f"data: {address}: a dataset is prepared from local files; copy them here")
    return str(config.data) if there or config.source is None else config.source
