"""What a run directory, or a model file alone, says of a run; read as the untrusted file it is."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.config.load import read_yaml
from distcls.data.dataset import Split
from distcls.data.source import Images
from distcls.errors import BadImage, UsageError, plain
from distcls.evaluation.evaluate import EvaluateOptions, EvaluationResult, evaluate
from distcls.evaluation.outputs import Outputs
from distcls.files import read_bounded
from distcls.model_card import ModelCard, best_model

CONFIG, HISTORY = "config.yaml", "history.csv"
MOST_BYTES = 1 << 25
"""Of a history."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run, and what its model does on the images of the report."""

    path: Path
    """As it was given."""
    name: str
    model: Path
    """The model file."""
    card: ModelCard
    config: dict[str, Any]
    """Dotted keys of config.yaml; empty for a model file alone."""
    history: list[dict[str, float]]
    """A row an epoch: `epoch`, `train_loss`, `val_top1`, ..., of those that are numbers."""
    result: EvaluationResult


def files_of(path: Path) -> list[Path]:
    """The files of a run or dataset directory, or the file itself, which nothing may replace."""
    if not path.is_dir():
        return [path]
    return [each for each in path.iterdir() if each.is_file() and each.suffix != ".html"]


def read_run(path: Path, data: Path, split: str, limit: int | None) -> Run:
    """Read a run and evaluate its model. Raises UsageError for what is none."""
    model = best_model(path, key="runs")
    folder = path if path.is_dir() else path.parent
    log.say(f"{path}: measuring {model.name} on the {split} split")
    options = EvaluateOptions(model=model, data=data, split=split, limit=limit, quiet=True)
    result = evaluate(options)
    return Run(
        path=path,
        name=path.resolve().name if path.is_dir() else str(path),
        model=model,
        card=_card(model),
        config=read_config(folder / CONFIG),
        history=read_history(folder / HISTORY),
        result=result,
    )


def costly(outputs: Outputs, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The positions of the chosen images, [N], the greatest loss first."""
    places = np.flatnonzero(chosen)
    return places[np.argsort(-outputs.loss[places], kind="stable")]


def images_of(source: Split, image_ids: Sequence[str]) -> Iterator[tuple[int, Images]]:
    """Images of a split by their ids: the position of each among these, and its pixels.

    One that cannot be read any more is left out, with a warning.
    """
    places = {name: place for place, name in enumerate(source.image_ids)}
    for at, name in enumerate(image_ids):
        try:
            yield at, source.image(places[name])
        except (BadImage, KeyError) as error:
            log.warn(f"{plain(name)} is left out of the report: {error}")


def _card(model: Path) -> ModelCard:
    if model.suffix.lower() == ".onnx":
        from distcls.runtime.onnx_file import OnnxFile

        return ModelCard.from_metadata(OnnxFile(model).metadata, str(model))
    from distcls.models.checkpoint import read_checkpoint  # needs torch, as the file does

    card, _ = read_checkpoint(model)
    return card


def read_config(path: Path) -> dict[str, Any]:
    """Dotted keys of a config file; empty, with a warning if it is damaged, without it."""
    if not path.is_file():
        return {}
    try:
        return {key: given.value for key, given in read_yaml(path).items()}
    except UsageError as error:
        log.warn(f"left out of the report: {error}")
        return {}


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a history.csv, of those values that are numbers; none, with a warning if it is
    damaged, without it."""
    if not path.is_file():
        return []
    try:
        lines = read_bounded(path, MOST_BYTES).decode("utf-8").splitlines()
        rows = [_numbers(row) for row in csv.DictReader(lines)]
    except (OSError, ValueError, csv.Error) as error:
        log.warn(f"{path} is left out of the report: {error}")
        return []
    found = [row for row in rows if "epoch" in row]
    if not found:
        log.warn(f"{path} has no epochs: the report has no curves")
    return found


def _numbers(row: dict[str | Any, str | Any]) -> dict[str, float]:
    found = {}
    for key, value in row.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(number):
            found[str(key)] = number
    return found
