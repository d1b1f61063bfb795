"""`ModelCard`: the metadata of a model file, the same in `best.pth` and in `best.onnx`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
from pathlib import Path
from typing import Any

from distcls import __version__, log, stored
from distcls.errors import BadValue, UsageError, require, shown
from distcls.imaging import Preprocess
from distcls.imaging.preprocess import preprocess_schema
from distcls.task import Task, task_schema

PREFIX = "distcls."
BEST_ONNX, BEST_PTH = "best.onnx", "best.pth"
"""The best model in a run directory: as exported, and as training wrote it."""
CHECKSUM, METADATA_CHECKSUM = "sha256", "metadata_sha256"
"""Checksums beside the card: of all else in a best.pth; of graph and weights, and of the metadata,
in a best.onnx."""
GOLDEN = "golden"
"""Beside the card in a best.onnx: logits of a few inputs, see `distcls.runtime.golden`."""
FIRST_FOLD, OUT_OF_FOLD = "fold-1", "out_of_fold.parquet"
"""In the folder of a cross-validation."""
SEARCH_TABLE = "search.csv"
"""In the folder of a search: a row for each trial."""
FORMAT = 1
LEAST_TEMPERATURE = 1e-3
"""Of a calibration; the greatest is its inverse."""


_measured = stored.mapping(stored.plain(most=stored.MOST_NAMES))


_options = stored.mapping(stored.plain(most=100, longest=1000), most=100)


def _architecture(value: Any, place: str) -> None:
    _options(value, place)
    stored.text(1000)(value.get("name", ""), f"{place}.name")


def _training(value: Any, place: str) -> None:
    _measured(value, place)
    stored.nothing_or(stored.text())(value.get("dataset"), f"{place}.dataset")


def _certificate(value: Any, place: str) -> None:
    _measured(value, place)
    stored.number(0, 1e6)(value.get("tolerance", 0), f"{place}.tolerance")


def _calibration(value: Any, place: str) -> None:
    _measured(value, place)
    temperature = stored.number(LEAST_TEMPERATURE, 1 / LEAST_TEMPERATURE)
    each = stored.each(temperature, stored.MOST_NAMES, 1)
    each(value.get("temperatures"), f"{place}.temperatures")
    sets = stored.each(_SETS, 100)
    sets(value.get("sets", []), f"{place}.sets")


_SETS = stored.record(
    {
        "coverage": stored.number(0, 1),
        "least_probability": stored.each(stored.number(0, 1), stored.MOST_NAMES, 1),
        "size": stored.number(0),
    }
)


card_schema = stored.record(
    {
        "format": stored.whole(FORMAT, FORMAT),
        "architecture": _architecture,
        "classes": stored.names(),
        "preprocess": preprocess_schema,
        "training": _training,
        "certificate": stored.nothing_or(_certificate),
    },
    {
        "version": stored.text(100),
        "targets": task_schema,
        "calibration": stored.nothing_or(_calibration),
    },
)
"""What `ModelCard.to_json` gives."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard:
    """All that is needed to use a model, and its measured scores."""

    architecture: dict[str, Any]
    """The model config that rebuilds the network: name, stem stride, dropout, ..."""
    task: Task
    """The task: one class per image, one class per head, or any number of labels."""
    preprocess: Preprocess
    """How an image becomes an input."""
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Training provenance: epoch, step, scores, dataset."""
    certificate: dict[str, Any] | None = None
    """Parity with the checkpoint on real images; set by the export."""
    calibration: dict[str, Any] | None = None
    """What `distcls calibrate` fitted and measured, see docs/evaluation.md; its `temperatures` are
    the task's."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, of heads as HEAD:CLASS; the index is that of the logit."""
        return self.task.classes

    @property
    def of_means(self) -> ModelCard:
        """The card of logits that are the logarithm of calibrated probabilities: no temperature is
        applied twice, and prediction sets of the one model do not hold."""
        return dataclasses.replace(self, task=self.task.plain, calibration=None)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as stored in a checkpoint; `targets` only for multi-output tasks,
        `calibration` of calibrated models."""
        several: dict[str, Any] = {} if self.task.single else {"targets": self.task.to_json()}
        if self.calibration is not None:
            several["calibration"] = self.calibration
        return {
            "format": FORMAT,
            "version": __version__,
            "architecture": self.architecture,
            "classes": list(self.classes),
            "preprocess": self.preprocess.to_json(),
            "training": self.training,
            "certificate": self.certificate,
            **several,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> ModelCard:
        """The inverse of `to_json`. Raises UsageError, naming `where`, if it is no such card."""
        try:
            if values["format"] != FORMAT:
                raise UsageError(
                    f"{where}: model format {shown(values['format'])} is not known to "
                    f"distcls {__version__} (it reads {FORMAT}); was it written by a newer version?"
                )
            card_schema(values, "")
            classes = tuple(values["classes"])
            task = Task(classes=classes)
            if "targets" in values:
                task = Task.from_json(values["targets"])
                require(task.classes == classes, "classes", classes, "those of targets")
            calibration = values.get("calibration")
            if calibration is not None:
                given = tuple(map(float, calibration["temperatures"]))
                task = dataclasses.replace(task, temperatures=given)
                limits = 2 * len(classes) if task.kind == "multi_label" else len(given)
                for entry in calibration.get("sets", []):
                    found = entry["least_probability"]
                    require(len(found) == limits, "calibration.sets", found, f"{limits} numbers")
            return cls(
                architecture=dict(values["architecture"]),
                task=task,
                preprocess=Preprocess.from_json(values["preprocess"]),
                training=dict(values["training"]),
                certificate=values["certificate"],
                calibration=calibration,
            )
        except (KeyError, TypeError, ValueError, AttributeError, BadValue) as error:
            raise UsageError(f"{where}: not a model written by distcls ({error})") from error

    def to_metadata(self) -> dict[str, str]:
        """The card as ONNX metadata: `distcls.*` keys with JSON values."""
        return {PREFIX + key: json.dumps(value) for key, value in self.to_json().items()}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], where: str) -> ModelCard:
        """The inverse of `to_metadata`; other keys are ignored."""
        own = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}
        for key in (CHECKSUM, METADATA_CHECKSUM, GOLDEN):
            own.pop(key, None)
        if not own:
            raise UsageError(
                f"{where}: carries no distcls metadata; export it with export.onnx, or "
                "describe it to distcls predict with --classes, --size, --mean and --std"
            )
        try:
            values = {key: stored.parse_json(value, place=key) for key, value in own.items()}
        except ValueError as error:
            raise UsageError(f"{where}: its distcls metadata is damaged: {error}") from error
        return cls.from_json(values, where)


def model_paths(text: str) -> list[Path]:
    """The paths of `--model`: one, or those of an ensemble, as in a.onnx,b.onnx.

    The name of an existing file may hold a comma.
    """
    whole = Path(text)
    if "," not in text or whole.exists():
        return [whole]
    return [Path(name.strip()) for name in text.split(",") if name.strip()]


def best_model(path: Path, *, exported: bool = True, key: str = "model") -> Path:
    """The model file that `path` means: itself, or the best model of a run directory.

    That is its best.onnx, unless best.pth is newer (the run went on), which a warning says, or
    `exported` is false: the one rule of all commands. Raises UsageError, naming the `key` of the
    option, for a directory without one.
    """
    if not path.is_dir():
        return path
    onnx, checkpoint = path / BEST_ONNX, path / BEST_PTH
    if exported and onnx.is_file() and not _is_older(onnx, checkpoint):
        return onnx
    if checkpoint.is_file():
        if exported and onnx.is_file():
            _warn_of_age(path)
        return checkpoint
    if (path / FIRST_FOLD).is_dir():
        raise UsageError(
            f"{key}: {path} has the runs of a cross-validation; name one, such as "
            f"{path / FIRST_FOLD} (what each says of images that it has not seen is in "
            f"{path / OUT_OF_FOLD})"
        )
    if (path / SEARCH_TABLE).is_file():
        raise UsageError(
            f"{key}: {path} has the trials of a search; name one (distcls report {path} and its "
            f"{SEARCH_TABLE} say which is the best)"
        )
    wanted = f"{BEST_ONNX} or {BEST_PTH}" if exported else BEST_PTH
    raise UsageError(
        f"{key}: {path} is a folder without {wanted}; a run directory has one after its first epoch"
    )


def require_model(path: Path) -> None:
    """Raise UsageError, with the nearest name beside it, for a model that is not there."""
    if path.exists():
        return
    beside = os.listdir(path.parent) if path.parent.is_dir() else []  # noqa: PTH208 - names only
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6)
    hint = f"; did you mean {str(path.parent / near[0])!r}?" if near else ""
    raise UsageError(f"model: {path} does not exist{hint}")


def model_choice(path: Path, found: Path) -> str:
    """What `best_model` found for `path`, in a line for the user; empty for a file."""
    return "" if found == path else f"model: {found}"


@functools.cache
def _warn_of_age(run: Path) -> None:
    """Once, however often the run is asked for."""
    log.warn(
        f"{run}: {BEST_PTH} is used, {BEST_ONNX} is older; distcls export --ckpt {run} --overwrite "
        f"renews it (in a copy, whose times are those of copying: touch {run / BEST_ONNX})"
    )


def _is_older(one: Path, other: Path) -> bool:
    return other.is_file() and one.stat().st_mtime < other.stat().st_mtime
