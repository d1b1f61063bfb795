"""Training configs that leave nothing to the recipe."""

from __future__ import annotations

from typing import Any

from distcls.training.config import AugmentConfig, MonitorConfig, TrainConfig


def plain_config(**fields: Any) -> TrainConfig:
    """A config of 10 epochs without augmentation or early stopping, with `fields` changed."""
    plain: dict[str, Any] = {
        "epochs": 10,
        "batch_size": 128,
        "lr": 1e-3,
        "augment": AugmentConfig(flip=0.0, crop_padding=0, resized_crop=None),
        "monitor": MonitorConfig(patience=None),
    }
    return TrainConfig(**{**plain, **fields})
