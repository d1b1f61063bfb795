"""Models kept under names of their own: the best few epochs, beside the stable `best.pth`.

The checksum (the first half of the SHA-256) stands in the name, so one rename makes file and
checksum appear together. An older state goes only after the newer one is whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

from distcls.config import dump_yaml
from distcls.config.load import current_names, flatten
from distcls.errors import DistclsError, UsageError
from distcls.files import atomic_path
from distcls.log import say, warn
from distcls.models.checkpoint import load_tensors
from distcls.training.config import CheckpointConfig, MonitorConfig, TrainConfig

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
        raise UsageError(
            f"{path}: holds no state to resume from (checkpoint.save_training_state writes it)"
        )
    return _state(path, content["state"], config)


def _state(
    path: Path, content: dict[str, Any], config: TrainConfig
) -> tuple[Progress, dict[str, Any]]:
    if set(content) != {"config", "progress", "tensors"}:
        raise UsageError(f"{path}: not the state of a run; remove it to start anew")
    _check_same_config(content["config"], dump_yaml(config), path)
    return Progress(**content["progress"]), content["tensors"]


def _check_same_config(saved: str, now: str, path: Path) -> None:
    before = current_names(flatten(yaml.safe_load(saved)))
    after = flatten(yaml.safe_load(now))
    for key in {**after, **before}:  # a mapping's keys may be in one of them alone
        if key.startswith(MAY_CHANGE) or before.get(key) == after.get(key):
            continue
        raise UsageError(
            f"{key}: {after.get(key)!r} given, but {path} was written with {before.get(key)!r}; "
            "a resumed run keeps its config"
        )


NAME = re.compile(r"step_(\d+)\.([0-9a-f]{32})\.pth")


class Checkpoints:
    """Writes states in the background, one at a time."""

    def __init__(self, folder: Path, config: CheckpointConfig, step: int) -> None:
        self._folder = folder
        self._config = config
        self._step = step
        self._time = time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="distcls-checkpoint")
        self._task: Future[None] | None = None
        for part in folder.glob(".step_*.part"):  # what a killed process was writing
            part.unlink(missing_ok=True)

    def due(self, step: int) -> bool:
        """Whether a state within the epoch is due after `step` steps."""
        steps, minutes = self._config.every_steps, self._config.every_minutes
        if steps is not None and step - self._step >= steps:
            return True
        return minutes is not None and time.monotonic() - self._time >= 60 * minutes

    def save(self, step: int, content: dict[str, Any]) -> None:
        """Copy the state after `step` steps and write the copy while training goes on.

        Raises DistclsError if the one before could not be written (naming path and free space).
        """
        self.wait()
        self._step, self._time = step, time.monotonic()
        self._task = self._pool.submit(self._write, step, _copied(content))

    def wait(self) -> None:
        """Return when nothing is being written any more; raises what went wrong."""
        if self._task is not None:
            task, self._task = self._task, None
            task.result()

    def close(self) -> None:
        """Finish writing."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _write(self, step: int, content: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        data = buffer.getbuffer()
        path = self._folder / f"step_{step:08d}.{_checksum(data)}.pth"
        with atomic_path(path) as part:
            part.write_bytes(data)
        others = [other for other in states(self._folder) if other != path]
        # a state of this step or a later one was damaged, or this run would have started from it
        whole = [other for other in others if step_of(other) < step]
        for other in set(others) - set(whole[: self._config.keep_last - 1]):
            other.unlink()


def newest_whole(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest state whose checksum is right, with its content; None if there is no state.

    Damaged ones are passed over with a warning. Raises DistclsError if all are.
    """
    candidates = states(folder)
    for path in candidates:
        name = NAME.fullmatch(path.name)
        assert name is not None
        if _checksum(path.read_bytes()) == name[2]:
            return path, load_tensors(path)
        warn(f"{path} is damaged (its checksum is wrong); the state before it is tried")
    if candidates:
        raise DistclsError(f"{folder}: no state is whole; start anew in another --out")
    return None


def states(folder: Path) -> list[Path]:
    """The states in a folder, newest first."""
    found = [path for path in folder.glob("step_*.pth") if NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a state's name."""
    name = NAME.fullmatch(path.name)
    assert name is not None
    return int(name[1])


def _checksum(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _copied(value: Any) -> Any:
    """A copy in main memory that training does not change any more."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Epoch:
    """What a file's name and its place in the ranking are made from."""

    number: int
    """Counted from 1."""
    step: int
    score: float
    """Its value of the monitored metric."""
    best: bool
    """Whether it is the best so far."""


def keep(
    config: TrainConfig, progress: Progress, epoch: Epoch, write: Callable[[Path], None]
) -> None:
    """Have `write` write this epoch's model if it is to be kept, and remove what it displaces.

    `progress.kept` remembers the files, best first, so that a resumed run goes on counting.
    """
    options, mode = config.checkpoint, config.monitor.resolved_mode
    if options.save_top_k == 0 or (options.save_best_only and not epoch.best):
        return
    name = options.filename.format(
        model=config.model.name,
        epoch=epoch.number,
        step=epoch.step,
        metric=config.monitor.metric,
        score=epoch.score,
    )
    sign = -1.0 if mode == "max" else 1.0

    def place(row: tuple[float, str]) -> float:
        return math.inf if math.isnan(row[0]) else sign * row[0]

    others = [(score, file) for score, file in progress.kept if file != name]
    ranking = sorted([*others, (epoch.score, name)], key=place)[: options.save_top_k]
    progress.kept = ranking  # before writing: the file may carry the state itself
    if (epoch.score, name) in ranking:
        write(config.out / name)
        say(f"saved {config.out / name} ({config.monitor.metric} {epoch.score:.5f})")
    for _, file in others:
        if file not in {kept for _, kept in ranking}:
            (config.out / file).unlink(missing_ok=True)  # a killed run may have come so far
