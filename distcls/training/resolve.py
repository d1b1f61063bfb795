"""Resolving a config: its names and options checked, its defaults filled in.

`config.yaml` and the training states hold the resolved config, so that a later version with other
defaults gives the same run from it. Resolved is what changes the result, `precision` included.
Null (or auto) stay:
- `threads`, `processes`, `loader.workers`, `loader.pack`: they follow the machine and do not change
  the data order or the arithmetic of a step beyond the order of sums;
- `accumulate` under `auto_micro_batch`, which fits it to the machine's memory in each run;
- `model.dropout` of timm's networks and of those that have none, and a `model.stem_stride` that
  cannot be set: the network's own, in which distcls has no default;
- what null switches off.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import yaml
from torch import nn

from distcls.config import dump_yaml, flatten
from distcls.config.schema import Mismatch, convert, describe
from distcls.errors import BadValue
from distcls.evaluation.metrics import METRICS
from distcls.imaging import Preprocess
from distcls.imaging.preprocess import background_option
from distcls.models import factory
from distcls.models.classifier import Classifier
from distcls.models.config import AUTO, SMALLEST_PRETRAINED, ModelConfig
from distcls.models.pretrained import Weights
from distcls.models.registry import NETWORKS, recorded_name, resolve
from distcls.registry import MAIN, OBJECT
from distcls.training import optim
from distcls.training.config import (
    LOSSES,
    OPTIMIZERS,
    POLICIES,
    AugmentConfig,
    DistillConfig,
    LossConfig,
    TrainConfig,
)
from distcls.training.hooks import make_transforms, require_callback
from distcls.training.inputs import TrainingInput
from distcls.training.recipe import fill_known, fill_recipe
from distcls.training.schedule import SCHEDULES

C = TypeVar("C", bound=TrainConfig)

PRECISIONS: dict[str, Literal["fp32", "bf16", "fp16"]] = {
    "no": "fp32",
    "bf16": "bf16",
    "fp16": "fp16",
}
"""Values of `precision` by accelerate's names."""


def require_usable(config: TrainConfig) -> None:
    """Raise UsageError for a network, loss, optimiser or augmentation policy that is not known, for
    an option that the chosen one does not read, and for a transform or callback that is none.

    `TrainConfig` cannot check these, as the implementations load torch.
    """
    factory.require_known(config.model.name)
    with _section("optimizer"):
        optim.require_usable(config.optimizer)
    with _section("loss"):
        LOSSES.check(config.loss.for_task("single_label"))
    with _section("augment"):
        POLICIES.check(config.augment)
    make_transforms(config.augment)
    for name in config.callbacks:
        require_callback(name)


@contextmanager
def _section(name: str) -> Iterator[None]:
    """Have errors of a section's field name the whole key."""
    try:
        yield
    except BadValue as error:
        raise BadValue(f"{name}.{error.field}", error.value, error.expected) from None


def resolved(
    config: TrainConfig,
    *,
    data: TrainingInput,
    preprocess: Preprocess,
    model: Classifier,
    precision: str,
    weights: Weights | None,
) -> tuple[TrainConfig, list[str]]:
    """The config with the values that the defaults, the weights and the dataset filled in, and in
    words what `auto` became.

    `model` is built from the config, `precision` as accelerate calls it, `weights` are those that
    the run started from. Resolving a resolved config changes nothing.
    """
    height, width = preprocess.size
    config, reasons = fill_recipe(
        config,
        images=len(data.train_samples),
        task=data.task,
        size=preprocess.size,
        pretrained=weights is not None,
    )
    config = _by_name(config)
    filled = dataclasses.replace(
        config,
        precision=PRECISIONS[precision],
        model=_model(config.model, model, weights),
        input=dataclasses.replace(
            config.input,
            size=(height, width),
            resize=preprocess.resize,
            interpolation=preprocess.interpolation,
            crop_fraction=preprocess.crop_fraction,
            background=background_option(preprocess.background),
        ),
        loss=_loss(config.loss, data),
    )
    return filled, reasons


def resolved_without_data(config: C) -> C:
    """The config with what `resolved` fills in whatever the images, the weights and the machine
    are; all else stays as it is.

    Raises UsageError as `require_usable` does.
    """
    require_usable(config)
    model, size = config.model, config.input.size
    small = size is not None and min(size) < SMALLEST_PRETRAINED
    pretrained: bool | None = model.pretrained is not None
    if model.pretrained == AUTO:
        pretrained = False if small or model.init != "library" else None
    return _by_name(fill_known(config, pretrained))


def _by_name(config: C) -> C:
    """The config with the defaults of what is chosen by name."""
    loss, optimizer = LOSSES.filled(config.loss), optim.filled_optimizer(config.optimizer)
    schedule, metric = SCHEDULES.filled(config.schedule), config.monitor.metric
    mode = config.monitor.resolved_mode
    # a user's own by its module: a later process finds it without that being imported already
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, name=recorded_name(config.model.name)),
        augment=_augment(config.augment),
        optimizer=dataclasses.replace(optimizer, name=OPTIMIZERS.recorded(optimizer.name)),
        schedule=dataclasses.replace(schedule, name=SCHEDULES.recorded(schedule.name)),
        loss=dataclasses.replace(loss, name=LOSSES.recorded(loss.name)),
        distill=_distill(config.distill),
        monitor=dataclasses.replace(config.monitor, metric=METRICS.recorded(metric), mode=mode),
    )


def _model(config: ModelConfig, model: Classifier, weights: Weights | None) -> ModelConfig:
    name, sha256 = (None, None) if weights is None else (weights.name, weights.sha256)
    config = dataclasses.replace(config, pretrained=name, pretrained_sha256=sha256)
    stride = factory.stem_stride(model.backbone)
    if config.stem_stride == "auto" and stride in (1, 2):
        config = dataclasses.replace(config, stem_stride=1 if stride == 1 else 2)
    if config.dropout is None:
        config = dataclasses.replace(config, dropout=_own_dropout(config.name, model.backbone))
    return config


def _own_dropout(name: str, network: nn.Module) -> float | None:
    """The dropout that the network's constructor takes, by default; None where that is not
    known."""
    origin = resolve(name)
    if origin.library == "distcls":
        parameter = inspect.signature(NETWORKS.find(origin.name).value).parameters.get("dropout")
        return parameter.default if parameter and isinstance(parameter.default, float) else None
    if origin.library == "timm" or not factory.takes_dropout(origin.name):
        return None
    rates = [module.p for module in network.modules() if isinstance(module, nn.Dropout)]
    return float(rates[-1]) if rates else None


def _augment(config: AugmentConfig) -> AugmentConfig:
    config = POLICIES.filled(config)
    if config.policy is not None:
        config = dataclasses.replace(config, policy=POLICIES.recorded(config.policy))
    if config.mixup > 0 and config.cutmix > 0:
        probability = config.resolved_cutmix_probability
        config = dataclasses.replace(config, cutmix_probability=probability)
    return config


def _distill(config: DistillConfig) -> DistillConfig:
    if config.teacher is None:
        return config
    return dataclasses.replace(
        config, temperature=config.resolved_temperature, weight=config.resolved_weight
    )


def _loss(config: LossConfig, data: TrainingInput) -> LossConfig:
    if config.sample_weights == "auto":
        there = data.train.weights is not None
        config = dataclasses.replace(config, sample_weights="on" if there else "off")
    return config


def of_this_process(config: TrainConfig) -> list[str]:
    """What a later process cannot find again, being of this script or notebook, in a line."""
    values = flatten(yaml.safe_load(dump_yaml(config)))
    found = dict.fromkeys(
        key
        for key, value in values.items()
        for name in (value if isinstance(value, list) else [value])
        if isinstance(name, str) and name.startswith((f"{MAIN}:", f"{OBJECT}:"))
    )
    if not found:
        return []
    opened = " or to open best.pth" if config.model.name.startswith((MAIN, OBJECT)) else ""
    return [
        f"note       this script or notebook alone has what {', '.join(found)} name: to resume"
        f"{opened}, run it again, or put them into a module; an exported best.onnx needs no code"
    ]


RECORDED = {
    "": ("epochs", "batch_size", "lr"),
    "augment": ("flip", "crop_padding", "resized_crop"),
    "loss": ("name",),
    "monitor": ("patience",),
    "optimizer": ("head_lr_scale",),
}
"""The keys, by section, that the recipe fills in."""


def with_recorded_recipe(config: TrainConfig, recorded: Mapping[str, Any]) -> TrainConfig:
    """A resumed run's config with the values that the run was started with in place of `auto`.

    `recorded` is the run's config by dotted keys, as it was written. Raises UsageError for a value
    that is none.
    """
    sections: dict[str, Any] = {}
    for section, keys in RECORDED.items():
        part = getattr(config, section) if section else config
        kinds = typing.get_type_hints(type(part))
        values = {}
        for key in keys:
            name = f"{section}.{key}".lstrip(".")
            if getattr(part, key) == "auto" and name in recorded:
                try:
                    values[key] = convert(recorded[name], kinds[key])
                except Mismatch as error:
                    found = recorded[name]
                    raise BadValue(name, found, describe(kinds[key])) from error
        if section:
            sections[section] = dataclasses.replace(part, **values)
        else:
            sections |= values
    if recorded and "model.batch_norm_bias_correction" not in recorded:  # of before 0.3
        model = dataclasses.replace(config.model, batch_norm_bias_correction=False)
        sections["model"] = model
    return dataclasses.replace(config, **sections)
