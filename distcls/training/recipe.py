"""The recipe where the config leaves it open (`auto`): by the number and the kind of the images.

Few images make few steps per epoch, so small sets take smaller batches and more epochs; what is
pretrained learns slower and shorter. Photographs may be mirrored and cropped, characters may not.
The figures behind the numbers are in benchmarks/README.md, "folders".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from distcls.task import Task
from distcls.training.config import (
    SMALL_IMAGE,
    AugmentConfig,
    OptimizerConfig,
    TrainConfig,
    chosen,
)

C = TypeVar("C", bound=TrainConfig)

BATCHES = (16, 128)
"""Smallest and largest batch that is chosen (of 8, batch norm's statistics say too little), ..."""
STEPS_AN_EPOCH = 10
"""... with at least this many steps per epoch, as far as the smallest allows."""
FEWEST_EPOCHS, MOST_EPOCHS = 10, 100
"""Epochs that are chosen, and the least patience."""
STEPS, STEPS_PRETRAINED = 600, 300
"""Optimiser steps of a run on a small set, from scratch and from pretrained weights."""
LR, LR_PRETRAINED = 1e-3, 5e-4
"""Peak learning rate for batches of 128; for smaller ones less, by the square root."""
HEAD_SCALE = 4.0
"""Learning rate of a new head, as a multiple of that of the pretrained layers below it."""
SHIFT = 8
"""Small images are shifted by up to their side divided by this."""
CROP = (0.35, 1.0)
"""Area of the random resized crops of photographs."""


def fill_recipe(
    config: TrainConfig, *, images: int, task: Task, size: tuple[int, int], pretrained: bool
) -> tuple[TrainConfig, list[str]]:
    """The config with a value for each `auto`, and in words what was chosen and why.

    `images` are those of training, `size` the height and width of the network's input.
    """
    batch = config.batch_size
    batch = chosen_batch(images) if batch == "auto" else batch
    epochs = config.epochs
    if epochs == "auto":
        epochs = chosen_epochs(math.ceil(images / batch), pretrained)
    filled = dataclasses.replace(config, epochs=epochs, batch_size=batch)
    filled = fill_known(filled, pretrained)
    before, after = (
        {
            "epochs": each.epochs,
            "batch size": each.batch_size,
            "learning rate": each.lr,
            "that of the head": each.optimizer.head_lr_scale if pretrained else None,
            "patience": each.monitor.patience,
        }
        for each in (config, filled)
    )
    times = {"that of the head": " times"}
    parts = [
        f"{name} {after[name]}{times.get(name, '')}"
        for name, value in before.items()
        if value == "auto"
    ]
    start = "pretrained" if pretrained else "from scratch"
    lines = [f"recipe     {', '.join(parts)} (auto: {images:,} images, {start})"] if parts else []
    loss = config.loss.for_task(task.kind)
    if task.kind == "multi_label" and config.loss.name == "auto":
        lines.append(f"loss       {loss.name} (auto: any number of labels per image)")
    augment, reasons = fill_augment(config.augment, task=task, size=size)
    filled = dataclasses.replace(filled, augment=augment, loss=loss)
    return filled, [*lines, *reasons]


def fill_known(config: C, pretrained: bool | None) -> C:
    """The config with a value for each `auto` that follows from other values and from `pretrained`,
    which is None where it is not known."""
    lr, monitor = config.lr, config.monitor
    if lr == "auto" and config.batch_size != "auto" and pretrained is not None:
        lr = chosen_lr(config.batch_size, pretrained)
    if monitor.patience == "auto" and config.epochs != "auto":
        patience = max(FEWEST_EPOCHS, math.ceil(config.epochs / 3))
        monitor = dataclasses.replace(monitor, patience=patience)
    optimizer = config.optimizer
    if pretrained is not None:
        optimizer = _optimizer(optimizer, pretrained)
    return dataclasses.replace(config, lr=lr, monitor=monitor, optimizer=optimizer)


def _optimizer(config: OptimizerConfig, pretrained: bool) -> OptimizerConfig:
    if config.head_lr_scale != "auto":
        return config
    return dataclasses.replace(config, head_lr_scale=HEAD_SCALE if pretrained else 1.0)


def chosen_batch(images: int) -> int:
    """The largest power of two that leaves ten steps per epoch, within bounds."""
    low, high = BATCHES
    size = high
    while size > low and size * STEPS_AN_EPOCH > images:
        size //= 2
    return size


def chosen_epochs(steps_per_epoch: int, pretrained: bool) -> int:
    """Epochs of enough steps."""
    steps = STEPS_PRETRAINED if pretrained else STEPS
    return max(FEWEST_EPOCHS, min(MOST_EPOCHS, math.ceil(steps / steps_per_epoch)))


def chosen_lr(batch: int, pretrained: bool) -> float:
    """The peak learning rate, rounded to two digits: it stands in config.yaml."""
    rate = (LR_PRETRAINED if pretrained else LR) * math.sqrt(min(1.0, batch / BATCHES[1]))
    return float(f"{rate:.2g}")


def fill_augment(
    config: AugmentConfig, *, task: Task, size: tuple[int, int]
) -> tuple[AugmentConfig, list[str]]:
    """The augmentation with a value for each `auto`, and in words what was chosen and why.

    Large pictures are taken for photographs: mirrored and cropped. Small ones are shifted. Nothing
    is mirrored where classes are characters, or an image has several outputs, which may stand at
    fixed places.
    """
    characters = task.single and are_characters(task.classes)
    small = max(size) <= SMALL_IMAGE
    mirrored = task.single and not characters
    cropped = not small and task.single
    values: dict[str, Any] = {
        "flip": 0.5 if mirrored else 0.0,
        "resized_crop": CROP if cropped and config.crop_padding in (0, "auto") else None,
        "crop_padding": max(1, min(size) // SHIFT) if small else 0,
    }
    if config.resized_crop not in (None, "auto"):
        values["crop_padding"] = 0
    auto = {name: value for name, value in values.items() if getattr(config, name) == "auto"}
    if not auto:
        return config, []
    filled = dataclasses.replace(config, **auto)
    kind = "characters" if characters else "small images" if small else "photographs"
    kind = kind if task.single else "several outputs per image"
    return filled, [f"augment    {_in_words(filled)} (auto: {kind})"]


def _in_words(config: AugmentConfig) -> str:
    """The flips, shifts and crops of a config."""
    crop = chosen(config.resized_crop)
    parts = [
        f"flips {chosen(config.flip):g}" if config.flip else "no flips",
        f"shifts up to {config.crop_padding} pixels" if config.crop_padding else "",
        f"crops of {crop[0]:g} to {crop[1]:g} of the area" if crop else "",
    ]
    return ", ".join(filter(None, parts))


def are_characters(classes: Sequence[str]) -> bool:
    """Whether all class names are single characters or numbers, as those of digits are."""
    return all(len(name) == 1 or name.isdigit() for name in classes)
