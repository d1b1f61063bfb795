"""The evaluation of a model on a split, and the files that tell of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distcls import log, plotting
from distcls.data.dataset import Split
from distcls.data.source import from_split
from distcls.errors import UsageError, require
from distcls.evaluation.metrics import AnyTally, Integers, Metrics, new_tally
from distcls.files import csv_line, write_json, write_text
from distcls.runtime.model import Model
from distcls.runtime.pipeline import stream
from distcls.runtime.providers import ExecutionRequest, require_provider
from distcls.task import BLANK, BLANK_SHOWN, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What `distcls evaluate` is asked."""

    model: Path
    """Model file: best.onnx, or a checkpoint best.pth."""
    data: Path
    """Dataset directory, as `distcls prepare` makes it."""
    split: str = "test"
    """Split of the dataset: train, val or test."""
    out: Path | None = None
    """Folder for metrics.json, per_class.csv, confusion.csv and confusion.png."""
    batch_size: int | None = None
    """Images the model takes at a time; unset, chosen with the provider (64 for a .pth)."""
    provider: str = "auto"
    """What runs an ONNX model: auto takes the fastest that is installed and agrees with the CPU;
    or cpu, openvino, cuda, tensorrt."""
    limit: int | None = None
    """Take the first images only."""
    workers: int | None = None
    """Threads that decode; one a core unless given."""
    json: bool = False
    """Print one JSON object on standard output, for machines."""
    quiet: bool = False
    """Say nothing but warnings and errors."""

    def __post_init__(self) -> None:
        require_provider(self.provider, or_auto=True)
        for name in ("batch_size", "limit", "workers"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")

    def asked(self, images: int) -> ExecutionRequest:
        """How the model is to be run, on a split of so many images."""
        return ExecutionRequest.of(self, images)


@dataclasses.dataclass(frozen=True)
class Share:
    """What one process found: its tally, and the images it could not use."""

    tally: AnyTally
    bad: list[str]


def check_classes(model: Sequence[str], data: Sequence[str], where: str) -> None:
    """Raise UsageError unless a model's classes are those of the data, in the same order."""
    if len(model) != len(data):
        raise UsageError(f"the model has {len(model)} classes, {where} has {len(data)}")
    for index, (own, given) in enumerate(zip(model, data, strict=True)):
        if own != given:
            raise UsageError(
                f"class {index} is {own!r} in the model and {given!r} in {where}; "
                "their classes have to be the same in the same order"
            )


def check_task(model: Task, data: Task, where: str) -> None:
    """Raise UsageError unless a model answers what the data asks, with the same classes."""
    if model.kind != data.kind:
        raise UsageError(f"the model answers with {_said(model)}, {where} has {_said(data)}")
    check_classes(model.classes, data.classes, where)


def _said(task: Task) -> str:
    return f"one of {task.summary()}" if task.single else task.summary()


def evaluate_share(
    model: Model,
    split: Split,
    *,
    batch_size: int | None = None,
    limit: int | None = None,
    workers: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Share:
    """Run every `world_size`th image of a split, from `rank` on, through the model.

    The shares of all ranks are the split, each image once. A bad image is named in the share; the
    caller decides, for all ranks together, what that means.
    """
    source = from_split(split, model.card.classes)
    indices = range(rank, min(len(split), limit or len(split)), world_size)
    tally, bad = new_tally(model.card.task), []
    chunks = stream(source, model, indices=indices, batch_size=batch_size, workers=workers)
    with (
        contextlib.closing(chunks),
        tqdm(total=len(indices), unit="img", disable=not log.show_progress()) as bar,
    ):
        for chunk in chunks:
            good = np.array([error is None for error in chunk.errors])
            tally.update(chunk.logits[good], split.labels[np.array(chunk.indices)[good]])
            for index, error in zip(chunk.indices, chunk.errors, strict=True):
                if error is not None:
                    bad.append(f"{split.image_ids[index]}: {error}")
            bar.update(len(chunk.indices))
    return Share(tally, bad)


def write_results(folder: Path, metrics: Metrics, task: Task, about: dict[str, Any]) -> None:
    """Write metrics.json, per_class.csv, confusion.csv and, with matplotlib, confusion.png.

    confusion.csv of heads has their tables along its diagonal; of labels a row each. The picture is
    of one class an image, or of heads with the same classes, added up.
    """
    classes = task.classes
    write_json(folder / "metrics.json", {**about, **to_json(metrics, classes)})
    columns = ("class", "precision", "recall", "f1", "support")
    write_text(folder / "per_class.csv", _table([columns, *_per_class(metrics, classes)]))
    labels = task.kind == "multi_label"
    header = (
        ["label", "true_no", "false_yes", "false_no", "true_yes"] if labels else ["truth", *classes]
    )
    counts = metrics.confusion.reshape(len(classes), -1).tolist()
    rows = [[name, *row] for name, row in zip(classes, counts, strict=True)]
    write_text(folder / "confusion.csv", _table([header, *rows]))
    drawn = _drawn(metrics.confusion, task)
    if drawn is None:
        log.say("confusion.png is left out: there is no one table of classes to draw")
        return
    try:
        plotting.confusion(*drawn, folder / "confusion.png")
    except UsageError as error:
        log.warn(f"confusion.png is left out: {error}")


def _drawn(confusion: Integers, task: Task) -> tuple[Integers, Sequence[str]] | None:
    """The table to draw with its classes: of heads that share theirs, the sum over the heads."""
    if task.single:
        return confusion, task.classes
    if task.alphabet is None:
        return None
    blocks = [confusion[part, part] for part in task.slices]
    names = [BLANK_SHOWN if name == BLANK else name for name in task.alphabet]
    return np.sum(blocks, axis=0), names


def to_json(metrics: Metrics, classes: Sequence[str]) -> dict[str, Any]:
    """All figures as plain values."""
    keys = ("precision", "recall", "f1", "support")
    per_class = {
        name: dict(zip(keys, row, strict=True)) for name, *row in _per_class(metrics, classes)
    }
    return {"count": metrics.count, **metrics.scalars(), "per_class": per_class}


def to_text(metrics: Metrics, classes: Sequence[str]) -> str:
    """The figures as a table for people."""
    width = max(8, *(len(name) for name in classes))
    means = {
        kind: [getattr(metrics, f"{kind}_{name}") for name in ("precision", "recall", "f1")]
        for kind in ("macro", "weighted")
    }
    lines = [f"{'class':<{width}}  precision  recall      f1  support"]
    lines += [_line(row, width) for row in _per_class(metrics, classes)]
    lines.append("")
    total = int(metrics.support.sum())
    lines += [_line([kind, *row, total], width) for kind, row in means.items()]
    lines += ["", f"images  {metrics.count:,}"]
    figures = {"loss": metrics.loss, "top-1": metrics.top1, "top-5": metrics.top5}
    figures["exact"] = metrics.exact
    lines += [f"{name:<7} {value:.4f}" for name, value in figures.items() if value is not None]
    return "\n".join(lines)


def _per_class(metrics: Metrics, classes: Sequence[str]) -> list[list[Any]]:
    arrays = (metrics.precision, metrics.recall, metrics.f1, metrics.support)
    return [list(row) for row in zip(classes, *(a.tolist() for a in arrays), strict=True)]


def _line(row: Sequence[Any], width: int) -> str:
    name, precision, recall, f1, support = row
    return f"{name:<{width}}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {support:7,}"


def _table(rows: Sequence[Sequence[object]]) -> str:
    return "".join(csv_line(row) for row in rows)
