"""The checkpoints of a run: `best.pth`, the top-k models, and the training states in `last/`.

`CheckpointManager` writes them all, each to a temporary file, flushed and renamed. A training state
has its checksum (the first half of the SHA-256) in its name, so one rename makes file and checksum
appear together; an older one is deleted only after the newer one is complete.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import math
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from distcls.config import build, dump_yaml
from distcls.config.load import Given, current_names, flatten, read_yaml
from distcls.data.dataset import DataFingerprint
from distcls.errors import DistclsError, UsageError, shown
from distcls.files import atomic_path, second_name, writable, write_text
from distcls.log import say, warn
from distcls.model_card import ModelCard
from distcls.models.checkpoint import load_tensors, save_checkpoint
from distcls.models.registry import NETWORKS
from distcls.registry import MAIN, OBJECT, same_reference
from distcls.stored import FILE_NAME, Schema, Unfit, read_bytes
from distcls.training.config import RUN_FILES, MonitorConfig, TrainConfig, chosen

BEST, LAST, HISTORY, CONFIG = "best.pth", "last", "history.csv", "config.yaml"
MAY_CHANGE = (
    "out",
    "source",
    "max_bad",
    "resume",
    "quiet",
    "json",
    "processes",
    "threads",
    "collective_timeout",
    "auto_micro_batch",
    "cuda_graphs",
    "max_nonfinite_steps",
    "log_every",
    "callbacks",
    "tracker",
    "epochs",
    "monitor.patience",
    "monitor.min_delta",
    "checkpoint.",
    "loader.",
    "model.pretrained_match",
    "model.batch_norm_bias_correction",
)
"""Config keys, and sections, that may differ in a resumed run: they do not affect what was learned
so far. `epochs` has rules of its own, and so has `data`."""
ON_DISK = {"top_models": "kept"}
"""Fields of `TrainingState` stored under another name, the one they had before 0.3."""
STATE_NAME = re.compile(r"step_(\d+)\.([0-9a-f]{32})\.pth")


@dataclasses.dataclass
class TrainingState:
    """All state of a run besides tensors."""

    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Optimiser steps finished."""
    epoch_step: int = 0
    """Those of them that belong to the unfinished epoch."""
    loss_sum: float = 0.0
    """Sum of the losses of the unfinished epoch's images so far."""
    right_sum: float = 0.0
    """Right decisions on them (see `right_decisions`)."""
    counted: int = 0
    """Those images, without skipped steps; in states of before 0.3, 0."""
    accumulate: int | None = None
    """Micro-batches of a step: the config's number, or what memory allowed."""
    evaluation_batch: int | None = None
    """Images evaluated at a time."""
    seconds: float = 0.0
    """Training time so far, over all resumptions."""
    best_score: float | None = None
    best_epoch: int = 0
    epochs_since_best: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """One row per epoch, as in history.csv."""
    stopped_by: str | None = None
    """The callback that ended the run."""
    top_models: list[tuple[float, str]] = dataclasses.field(default_factory=list)
    """Score and file name of the top-k models in the run directory, best first."""
    data: DataFingerprint | None = None
    """What it was trained on; None in states of before 0.3."""

    def judge(self, score: float, monitor: MonitorConfig) -> bool:
        """Take the score of the epoch just finished; True if it is the best so far.

        Of equal scores, which few validation images make frequent, the one with the lower
        validation loss in `history` is better, unless `min_delta` asks for more. One that is not a
        number is never an improvement.
        """
        better = not math.isnan(score) and (
            self.best_score is None
            or (
                score > self.best_score + monitor.min_delta
                if monitor.resolved_mode == "max"
                else score < self.best_score - monitor.min_delta
            )
            or (
                score == self.best_score
                and monitor.min_delta == 0
                and self._loss(self.epoch) < self._loss(self.best_epoch)
            )
        )
        if better:
            self.best_score, self.best_epoch, self.epochs_since_best = score, self.epoch, 0
        else:
            self.epochs_since_best += 1
        return better

    def _loss(self, epoch: int) -> float:
        rows = (row for row in reversed(self.history) if row["epoch"] == epoch)
        return next(rows, {}).get("val_loss", math.nan)

    def out_of_patience(self, monitor: MonitorConfig) -> bool:
        """Whether early stopping is due."""
        patience = chosen(monitor.patience)
        return patience is not None and self.epochs_since_best >= patience

    def to_plain(self) -> dict[str, Any]:
        """As plain values, under the names that files have."""
        return {ON_DISK.get(name, name): value for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any], path: Path) -> TrainingState:
        """What `to_plain` gave. Raises UsageError, naming `path`, for anything else.

        A file name that leads out of the run directory is refused: that file would be deleted once
        a better model displaces it.
        """
        names = {ON_DISK.get(name, name): name for name in cls.__dataclass_fields__}
        if unknown := sorted(set(map(str, values)) - set(names)):
            raise UsageError(
                f"{path}: its training state has a field {unknown[0]!r} that this version does "
                "not know; resume it with the version that wrote it"
            )
        for name, value in values.items():
            valid, expected = EXPECTED.get(name, (_is_anything, ""))
            if not valid(value):
                raise _forged(path, f"has {name}: {shown(value, 60)}, expected {expected}")
        state = cls(**{names[name]: value for name, value in values.items()})
        for _, name in state.top_models:
            if not _is_model_name(name):
                expected = "expected a plain file name ending in .pth"
                raise _forged(path, f"names {shown(name, 60)} as a model of the run, {expected}")
        if max(state.best_epoch, state.epochs_since_best, len(state.history)) > state.epoch:
            raise _forged(path, f"has scores of more epochs than its {state.epoch}")
        if state.data is not None:
            try:
                state.data = DataFingerprint.from_plain(state.data)
            except ValueError as error:
                raise _forged(path, f"has a fingerprint of its data with {error}") from error
        return state


def _is_anything(value: object) -> bool:
    return True


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _is_count_above_zero(value: object) -> bool:
    return value is None or (_is_count(value) and value != 0)


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _is_duration(value: Any) -> bool:
    return _is_number(value) and 0 <= value < math.inf


def _is_history(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict)
        and _is_count(row.get("epoch"))
        and all(isinstance(name, str) and _is_number(each) for name, each in row.items())
        for row in value
    )


def _is_ranking(value: object) -> bool:
    """Whether it is a list of scores and names, whatever the names."""
    return isinstance(value, list) and all(
        isinstance(row, tuple | list) and len(row) == 2 and _is_number(row[0]) for row in value
    )


COUNT = (_is_count, "a whole number of 0 or more")
COUNT_ABOVE_ZERO = (_is_count_above_zero, "a whole number above 0, or nothing")
EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epoch": COUNT,
    "step": COUNT,
    "epoch_step": COUNT,
    "loss_sum": (_is_number, "a number"),
    "right_sum": (_is_number, "a number"),
    "counted": COUNT,
    "accumulate": COUNT_ABOVE_ZERO,
    "evaluation_batch": COUNT_ABOVE_ZERO,
    "seconds": (_is_duration, "a number of 0 or more"),
    "best_score": (lambda value: value is None or _is_number(value), "a number, or nothing"),
    "best_epoch": COUNT,
    "epochs_since_best": COUNT,
    "history": (_is_history, "a list of epochs with numbers"),
    "stopped_by": (lambda value: value is None or isinstance(value, str), "a name, or nothing"),
    "kept": (_is_ranking, "a list of scores with file names"),
}
"""What the fields of a stored `TrainingState` have to be, each by a check and in words."""


def _forged(path: Path, what: str) -> UsageError:
    return UsageError(
        f"{path}: its training state {what}; the file is damaged or was tampered with"
    )


def _fits(schema: Schema, value: object) -> bool:
    try:
        schema(value, "")
    except Unfit:
        return False
    return True


def _is_model_name(name: object) -> bool:
    """Whether it is the name of a file that the top-k models may have, in the run directory."""
    return _fits(FILE_NAME, name) and str(name).endswith(".pth") and name != BEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochModel:
    """The weights of an epoch that are to be saved: the best of those that it evaluated."""

    weights: Mapping[str, Tensor]
    card: ModelCard
    score: float
    """Their value of the monitored metric."""
    best: bool
    """Whether it is the best so far."""


class Resumption(NamedTuple):
    """What a run continues from."""

    state: TrainingState
    tensors: dict[str, Any]
    """`Engine.state_dict()`."""
    epochs: int
    """Of the config that the state was written with."""
    before: dict[str, Any]
    """That config, by dotted keys."""
    path: Path


class CheckpointManager:
    """Finds, reads and writes the checkpoints of a run directory.

    All processes read a state, only the main process writes: on all others saving does nothing.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        given: TrainConfig | None = None,
        data: DataFingerprint | None = None,
        main_process: bool = True,
    ) -> None:
        """Remove the unfinished files of a killed run.

        `config` is resolved; `given` is it as the user wrote it, which states of 0.1.0 hold. `data`
        is what a state to resume from must have been trained on; None compares the paths.
        """
        self._config, self._given, self._data = config, given or config, data
        self._main_process = main_process
        self._folder = config.out / LAST
        self._saved_step, self._saved_at = 0, time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="distcls-checkpoint")
        self._writing: Future[None] | None = None
        if main_process:
            with writable(config.out):
                for folder in (self._folder, config.out):
                    for unfinished in folder.glob(".*.pth.*.part"):
                        if not unfinished.is_dir():  # none of ours
                            unfinished.unlink(missing_ok=True)

    def resume(self) -> Resumption | None:
        """The state to resume from; None to start anew.

        Raises UsageError if it is none, if it was trained on other data, or if the config differs
        from the state's in a key that affects the result; DistclsError if all states are damaged.
        """
        resume = self._config.resume
        if resume == "none":
            return None
        if resume == "auto":
            source = self._folder
            if source.exists() and not source.is_dir():
                raise UsageError(f"{source} is a file, expected the folder of a run's states")
            newest = newest_intact(source)
            if newest is None:
                if (self._config.out / RUN_FILES[0]).exists():
                    say(f"{source} holds no state; the run starts from the beginning")
                return None
            found = self._read(*newest)
        else:
            source = Path(resume)
            content = load_tensors(source)
            if "state" not in content:
                raise UsageError(
                    f"{source}: holds no state to resume from "
                    "(checkpoint.save_training_state writes it)"
                )
            found = self._read(source, content["state"])
        state = found.state
        if resume == "auto":
            self._require_unedited(found)
        self._saved_step, self._saved_at = state.step, time.monotonic()
        say(f"resumed from {source} after step {state.step}, epoch {state.epoch}")
        return found

    def _read(self, path: Path, content: object) -> Resumption:
        parts = {"config": str, "progress": dict, "tensors": dict}
        if (
            not isinstance(content, dict)
            or set(content) != set(parts)
            or not all(isinstance(content[name], kind) for name, kind in parts.items())
        ):
            raise UsageError(f"{path}: not the state of a run; remove it to start over")
        before = _saved_config(content["config"], path)
        state = TrainingState.from_plain(content["progress"], path)
        _require_plain(content["tensors"], path)
        self._require_same_config(before, path, with_data=None in (state.data, self._data))
        self._require_same_data(state, before, path)
        epochs = int(before["epochs"])
        begun = state.epoch + (state.epoch_step > 0)
        if chosen(self._config.epochs) < begun:
            raise UsageError(
                f"epochs: {self._config.epochs} given, but {path} has started epoch {begun}; give "
                f"{begun} or more, or start over in another --out"
            )
        return Resumption(state, content["tensors"], epochs, before, path)

    def _require_same_config(self, before: dict[str, Any], path: Path, *, with_data: bool) -> None:
        """Raise UsageError for a key that affects the result and is not what it was `before`."""
        after, unresolved = map(_dotted, (self._config, self._given))
        differing = [
            key
            for key in {**after, **before}  # a mapping's keys may be in one of them alone
            if not _may_change(key)
            and (with_data or key != "data")
            and not any(
                same_reference(before.get(key), now.get(key)) for now in (after, unresolved)
            )
        ]
        if not differing:
            return
        key, *others = differing
        elsewhere = (f"{MAIN}:", f"{OBJECT}:")
        key = next((k for k in differing if str(before.get(k)).startswith(elsewhere)), key)
        how = "given" if after.get(key) == unresolved.get(key) else "is the default now"
        if str(before.get(key)).startswith(elsewhere):
            raise UsageError(
                f"{key}: {after.get(key)!r} {how}, but {path} was written with {before[key]!r}, of "
                "a script or notebook: continue it there, by distcls.fit with resume='auto', or "
                "put it into a module and name it as module:attribute"
            )
        more = f" (changed, too: {', '.join(others)})" if others else ""
        if key == "data":
            more += " (by its path, as this state has no fingerprint of its data)"
        anew = "start over in another --out"
        if (weights := self._weights()) and key != "model.name":
            anew = f"start from its weights: --model.pretrained {weights} and another --out"
        raise UsageError(
            f"{key}: {after.get(key)!r} {how}, but {path} was written with {before.get(key)!r}"
            f"{more}; a resumed run keeps its config: give it as it was, or {anew}"
        )

    def _require_unedited(self, found: Resumption) -> None:
        """Raise UsageError for a value of config.yaml that was edited and would be ignored."""
        path = self._config.out / CONFIG
        if not path.exists():
            return
        edited = _in_every_process(read_recorded(path))
        values = _dotted(build(TrainConfig, edited))
        known = [found.before, *map(_dotted, (self._config, self._given))]
        for key in edited.keys() & values.keys() - {"data"}:
            same = any(same_reference(values[key], each.get(key)) for each in known)
            if not _may_change(key) and not same:
                raise UsageError(
                    f"{path}: {key} was edited to {values[key]!r}, but the run began with "
                    f"{found.before.get(key)!r}; a resumed run keeps its config: undo the edit, or "
                    "start over in another --out"
                )

    def _require_same_data(self, state: TrainingState, before: dict[str, Any], path: Path) -> None:
        """Raise UsageError if the state was trained on other data, as far as that is known."""
        if state.data is None or self._data is None:
            return
        if differences := state.data.differences(self._data):
            weights = self._weights()
            leak = "which may have been trained on images that are for validation now"
            more = f" (--model.pretrained {weights} takes its weights, {leak})" if weights else ""
            raise UsageError(
                f"data: {self._config.data} is not what {path} was trained on (then "
                f"{before.get('data')}): {'; '.join(differences)}; restore that data, or "
                f"start over in another --out{more}"
            )

    def _weights(self) -> Path | None:
        """The model file that a new run could start from."""
        auto = self._config.resume == "auto"
        weights = self._config.out / BEST if auto else Path(self._config.resume)
        return weights if weights.is_file() else None

    def save_epoch(
        self,
        state: TrainingState,
        tensors: dict[str, Any],
        model: EpochModel,
        before_state: Callable[[], None] = lambda: None,
    ) -> None:
        """Write the files of an epoch: best.pth, the top-k models, history.csv, the training state.

        The state comes last: a resume starts from it and rewrites the other files. `tensors` are
        `Engine.state_dict()` at the end of the epoch. `before_state` may change the state when the
        other files are there; it is called on all processes. If it raises, the state is written all
        the same: the epoch is done.
        """
        if self._main_process:
            if model.best:
                save_checkpoint(self._config.out / BEST, model.weights, model.card)
            self._save_top_k(state, tensors, model)
            _write_history(self._config.out / HISTORY, state.history)
        try:
            before_state()
        finally:
            self.save(state, tensors)

    def due(self, step: int) -> bool:
        """Whether a state within the epoch is due after `step` steps."""
        steps, minutes = self._config.checkpoint.every_steps, self._config.checkpoint.every_minutes
        if not self._main_process:
            return False
        if steps is not None and step - self._saved_step >= steps:
            return True
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, state: TrainingState, tensors: dict[str, Any]) -> None:
        """Copy the current training state and write the copy while training continues.

        Raises DistclsError if the one before could not be written (naming path and free space).
        """
        if not self._main_process:
            return
        self.wait()
        self._saved_step, self._saved_at = state.step, time.monotonic()
        content = _copied(_to_content(self._config, state, tensors))
        self._writing = self._pool.submit(self._write, state.step, content)

    def wait(self) -> None:
        """Wait for the write in progress; raises its error."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

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
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
        others = [other for other in states(self._folder) if other != path and other.is_file()]
        # a state of this step or a later one was damaged, or this run would have started from it
        older = [other for other in others if step_of(other) < step]
        for other in set(others) - set(older[: self._config.checkpoint.keep_last - 1]):
            other.unlink()

    def _save_top_k(self, state: TrainingState, tensors: dict[str, Any], model: EpochModel) -> None:
        """Save the epoch's model if it is among the best, and remove the one it displaces.

        `state.top_models` records the files, so that a resumed run continues the ranking.
        """
        config, options = self._config, self._config.checkpoint
        if options.save_top_k == 0 or (options.save_best_only and not model.best):
            return
        name = options.filename.format(
            model=NETWORKS.short(config.model.name),
            epoch=state.epoch,
            step=state.step,
            metric=config.monitor.figure,
            score=model.score,
        )
        sign = -1.0 if config.monitor.resolved_mode == "max" else 1.0

        def place(row: tuple[float, str]) -> float:
            return math.inf if math.isnan(row[0]) else sign * row[0]

        others = [(score, file) for score, file in state.top_models if file != name]
        here = [(model.score, name)]
        rows = [*here, *others] if model.best else [*others, *here]  # of equals, the first ranks
        ranking = sorted(rows, key=place)[: options.save_top_k]
        state.top_models = ranking  # before writing: the file may carry the state itself
        if (model.score, name) in ranking:
            self._write_top_model(config.out / name, state, tensors, model)
        for _, file in others:
            if file not in {ranked for _, ranked in ranking}:
                (config.out / file).unlink(missing_ok=True)  # a killed run may have come so far

    def _write_top_model(
        self, path: Path, state: TrainingState, tensors: dict[str, Any], model: EpochModel
    ) -> None:
        if self._config.checkpoint.save_training_state:
            content = _to_content(self._config, state, tensors)
            save_checkpoint(path, model.weights, model.card, content)
        elif model.best:  # the same content, just written: not serialised and flushed again
            second_name(self._config.out / BEST, path)
        else:
            save_checkpoint(path, model.weights, model.card)


def recorded_config(config: TrainConfig) -> dict[str, Any] | None:
    """The resolved config, by dotted keys, of the run that is to be resumed; None to start anew.

    Raises UsageError if that file cannot be read, or was edited to what is no config.
    """
    if config.resume == "none" or (config.resume == "auto" and not states(config.out / LAST)):
        return None
    if config.resume == "auto":  # written before the first state; a state would be read twice
        path = config.out / CONFIG
        recorded = read_recorded(path) if path.exists() else {}
        return {key: given.value for key, given in recorded.items()}
    state = load_tensors(Path(config.resume)).get("state")
    saved = state.get("config") if isinstance(state, dict) else None
    values = yaml.safe_load(saved) if isinstance(saved, str) else {}
    return current_names(flatten(values)) if isinstance(values, dict) else {}


def read_recorded(path: Path) -> dict[str, Given]:
    """The values of a run's config.yaml by dotted keys, under their present names.

    Raises UsageError, as for a `--config`, for an unknown key or a value that does not fit.
    """
    values = current_names(read_yaml(path))
    build(TrainConfig, _in_every_process(values))
    return values


def _in_every_process(values: dict[str, Given]) -> dict[str, Given]:
    """The values without names of objects that another process may not have."""
    own = (f"{MAIN}:", f"{OBJECT}:")
    return {key: given for key, given in values.items() if not str(given.value).startswith(own)}


def newest_intact(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest state whose checksum is right, with its content; None if there is no state.

    Damaged ones are skipped with a warning. Raises DistclsError if all are.
    """
    found = states(folder)
    for path in found:
        name = STATE_NAME.fullmatch(path.name)
        assert name is not None
        try:
            problem = "" if _checksum(read_bytes(path)) == name[2] else "its checksum is wrong"
        except OSError as error:  # a folder, say
            problem = error.strerror or str(error)
        if not problem:
            return path, load_tensors(path, checked=True)
        warn(f"{path} is damaged ({problem}); trying the one before it")
    if found:
        raise DistclsError(f"{folder}: no state is intact; start over in another --out")
    return None


def states(folder: Path) -> list[Path]:
    """The states in a folder, newest first."""
    found = [path for path in folder.glob("step_*.pth") if STATE_NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a state's name."""
    name = STATE_NAME.fullmatch(path.name)
    assert name is not None
    return int(name[1])


def _to_content(
    config: TrainConfig, state: TrainingState, tensors: dict[str, Any]
) -> dict[str, Any]:
    """Everything a later process needs, as plain values and tensors."""
    return {"config": dump_yaml(config), "progress": state.to_plain(), "tensors": tensors}


def _dotted(config: TrainConfig) -> dict[str, Any]:
    """A config by dotted keys, as a file holds it."""
    return flatten(yaml.safe_load(dump_yaml(config)))


def _may_change(key: str) -> bool:
    """Whether a resumed run may have another value of a config key."""
    sections = tuple(name for name in MAY_CHANGE if name.endswith("."))
    return key in MAY_CHANGE or key.startswith(sections)


def _saved_config(text: str, path: Path) -> dict[str, Any]:
    """The config in a state, by dotted keys under their present names."""
    try:
        values = yaml.safe_load(text)
        before = current_names(flatten(values)) if isinstance(values, dict) else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        before = {}
    if not _is_count(before.get("epochs")):
        raise UsageError(f"{path}: its config is not that of a run; remove it to start over")
    return before


def _require_plain(tensors: dict[str, Any], path: Path) -> None:
    """Raise UsageError for a part beside the weights and moments that is not what it has to be.

    Those are compared with the network's when they are loaded.
    """
    average = tensors.get("average") or {}
    schedule, recent = tensors.get("schedule") or {}, tensors.get("recent_losses")
    valid = {
        "ema_updates": _is_count(tensors.get("ema_updates") or 0),
        "average": isinstance(average, dict) and _is_count(average.get("taken", 0)),
        "schedule": isinstance(schedule, dict) and all(map(_is_count, schedule.values())),
        "recent_losses": recent is None
        or (isinstance(recent, Tensor) and recent.ndim == 1 and recent.is_floating_point()),
    }
    for name, found in valid.items():
        if not found:
            raise _forged(path, f"has {name}: {shown(tensors[name], 60)}, which is none")


def _write_history(path: Path, history: list[dict[str, float]]) -> None:
    """Rewrite history.csv from all epochs so far."""
    table = io.StringIO()
    # a resumed run may have other metrics
    columns = list(dict.fromkeys(name for row in [history[-1], *history] for name in row))
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text(path, table.getvalue())


def _checksum(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _copied(value: Any) -> Any:
    """A copy in main memory that training does not change any more."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value
