"""Experiment trackers (TensorBoard, MLflow, W&B and others), as far as Accelerate knows them."""

from __future__ import annotations

from collections.abc import Callable

import yaml
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils.dataclasses import LoggerType

from distcls.config import dump_yaml, flatten
from distcls.errors import UsageError, did_you_mean
from distcls.training.config import TrainConfig

PROJECT = "distcls"

Track = Callable[[dict[str, float], int], None]
"""Takes named figures and the step that they belong to."""


def require_tracker(name: str | None) -> None:
    """Raise UsageError unless the tracker is known and its package installed."""
    if name is None:
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        known = sorted(LOGGER_TYPE_TO_CLASS)
        raise UsageError(f"tracker: unknown tracker {name!r}{did_you_mean(name, known)}")
    if LoggerType(name) not in get_available_trackers():
        raise UsageError(f"tracker: {name} is not installed; `pip install {name}`")


def open_tracker(config: TrainConfig, accelerator: Accelerator, step: int) -> Track:
    """Begin, or go on after `step` steps; what it returns does nothing if none was asked for.

    TensorBoard's files go to `distcls/` in the run directory; others follow their own settings.
    """
    if config.tracker is None:
        return lambda values, step: None
    # what a run that was killed has written beyond the state that it is resumed from
    own = {"tensorboard": {"purge_step": step}} if step else {}
    settings = flatten(yaml.safe_load(dump_yaml(config)))
    values = {key: _plain(value) for key, value in settings.items()}
    accelerator.init_trackers(PROJECT, config=values, init_kwargs=own)
    return lambda values, step: accelerator.log(values, step=step)


def _plain(value: object) -> bool | int | float | str:
    """What every tracker takes as a setting."""
    return value if isinstance(value, bool | int | float | str) else str(value)
