"""How far a run is, and its full state on disk."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import yaml

from distcls.config import dump_yaml
from distcls.config.load import flatten
from distcls.errors import UsageError
from distcls.models.checkpoint import load_tensors
from distcls.training.checkpoints import newest_whole
from distcls.training.config import MonitorConfig, TrainConfig

MAY_CHANGE = (
    "out",
    "resume",
    "quiet",
    "json",
    "processes",
    "threads",
    "collective_timeout",
    "auto_micro_batch",
    "log_every",
    "tracker",
    "checkpoint.",
    "loader.",
)
"""Config keys that a resumed run may give other values; all others shape the result."""


@dataclasses.dataclass
class Progress:
    """Everything a run has to remember besides tensors."""

    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Optimiser steps finished."""
    epoch_step: int = 0
    """Those of them that belong to the unfinished epoch."""
    loss_sum: float = 0.0
    """Sum of the losses of the unfinished epoch's images so far."""
    accumulate: int | None = None
    """Parts that a step is cut into: the config's number, or what memory allowed."""
    evaluation_batch: int | None = None
    """Images evaluated at a time."""
    seconds: float = 0.0
    """Training time so far, over all resumptions."""
    best_score: float | None = None
    best_epoch: int = 0
    epochs_since_best: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """One row an epoch, as in history.csv."""
    kept: list[tuple[float, str]] = dataclasses.field(default_factory=list)
    """Score and file name of the kept models, best first."""

    def judge(self, score: float, monitor: MonitorConfig) -> bool:
        """Take the score of the epoch just finished; True if it is the best so far.

        A score that is not a number is never an improvement.
        """
        better = not math.isnan(score) and (
            self.best_score is None
            or (
                score > self.best_score + monitor.min_delta
                if monitor.resolved_mode == "max"
                else score < self.best_score - monitor.min_delta
            )
        )
        if better:
            self.best_score, self.best_epoch, self.epochs_since_best = score, self.epoch, 0
        else:
            self.epochs_since_best += 1
        return better

    def out_of_patience(self, monitor: MonitorConfig) -> bool:
        """Whether early stopping is due."""
        return monitor.patience is not None and self.epochs_since_best >= monitor.patience


def to_content(config: TrainConfig, progress: Progress, tensors: dict[str, Any]) -> dict[str, Any]:
    """Everything a later process needs, as plain values and tensors."""
    return {
        "config": dump_yaml(config),
        "progress": dataclasses.asdict(progress),
        "tensors": tensors,
    }


def load_state(folder: Path, config: TrainConfig) -> tuple[Progress, dict[str, Any]] | None:
    """Read the newest whole state, or None if there is none.

    Raises UsageError if it is none, or if the config differs from the state's in a key that shapes
    the result; DistclsError if all states are damaged.
    """
    found = newest_whole(folder)
    if found is None:
        return None
    return _state(*found, config)


def load_kept_state(path: Path, config: TrainConfig) -> tuple[Progress, dict[str, Any]]:
    """Read the state within a kept model. Raises UsageError if it has none, or as `load_state`."""
    content = load_tensors(path)
    if "state" not in content:
        raise UsageError(f"{path}: holds no state to resume from (checkpoint.whole writes it)")
    return _state(path, content["state"], config)


def _state(
    path: Path, content: dict[str, Any], config: TrainConfig
) -> tuple[Progress, dict[str, Any]]:
    if set(content) != {"config", "progress", "tensors"}:
        raise UsageError(f"{path}: not the state of a run; remove it to start anew")
    _check_same_config(content["config"], dump_yaml(config), path)
    return Progress(**content["progress"]), content["tensors"]


def _check_same_config(saved: str, now: str, path: Path) -> None:
    before, after = flatten(yaml.safe_load(saved)), flatten(yaml.safe_load(now))
    for key in {**after, **before}:  # a mapping's keys may be in one of them alone
        if key.startswith(MAY_CHANGE) or before.get(key) == after.get(key):
            continue
        raise UsageError(
            f"{key}: {after.get(key)!r} given, but {path} was written with {before.get(key)!r}; "
            "a resumed run keeps its config"
        )
