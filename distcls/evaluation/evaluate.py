"""`evaluate_model`: the metrics of a model on a split, on one or more processes.

Model and data meet by the names of their classes (`match_classes`): a later test set may lack some,
have more, or list them in another order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from distcls import log, plotting
from distcls.data.dataset import IN_RUN, Dataset, Split, is_dataset, prepare_command
from distcls.errors import DistclsError, UsageError, require
from distcls.evaluation.metrics import (
    Integers,
    LogitSpread,
    Metrics,
    MetricState,
    constant_answers,
    metric_state,
)
from distcls.files import csv_line, require_writable, write_json, write_text
from distcls.model_card import best_model, model_choice
from distcls.predictor import Predictor, load_model
from distcls.runtime.providers import ExecutionRequest, require_provider
from distcls.task import BLANK, BLANK_SHOWN, Head, Task

MAX_NAMED = 10
"""Bad images, and classes, that a message names; the rest are counted."""
FILES = ("metrics.json", "per_class.csv", "confusion.csv", "confusion.png")
"""What `--out` gets."""

Sum = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Sums a vector over all processes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of `distcls evaluate`."""

    model: Path
    """Model file: best.onnx, or a checkpoint best.pth; a run directory means its best.onnx, or its
    best.pth where that is newer or several processes evaluate."""
    data: Path
    """Dataset directory, as `distcls prepare` makes it. Its classes are matched with the model's by
    name; images of other classes are counted apart."""
    split: str = "test"
    """Split of the dataset: train, val or test."""
    out: Path | None = None
    """Folder for metrics.json, per_class.csv, confusion.csv and confusion.png."""
    overwrite: bool = False
    """Replace an evaluation that --out holds already."""
    batch_size: int | None = None
    """Images the model takes at a time; by default chosen with the provider (64 for a .pth)."""
    provider: str = "auto"
    """What runs an ONNX model: auto takes the fastest that is installed and agrees with the CPU;
    or cpu, openvino, cuda, tensorrt."""
    limit: int | None = None
    """Take the first images only."""
    workers: int | None = None
    """Decoding threads; default: one per core."""
    json: bool = False
    """Print one JSON object on standard output, for machines."""
    quiet: bool = False
    """Print warnings and errors only."""

    def __post_init__(self) -> None:
        require_provider(self.provider, or_auto=True)
        for name in ("batch_size", "limit", "workers"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")

    def execution_request(self, images: int) -> ExecutionRequest:
        """The execution request, for a split of this many images."""
        return ExecutionRequest.of(self, images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The metrics of a model on a split, and how they were computed."""

    metrics: Metrics
    """Of all images, whatever the number of processes."""
    task: Task
    """The model's."""
    model: str
    """Name of the model file."""
    data: str
    """Name of the dataset directory."""
    split: str
    """Name of the split."""
    provider: str
    """What computed: an execution provider or a torch device."""
    seconds: float
    """Time of the evaluation, without opening the model."""
    unknown_images: int = 0
    """Images of classes that the model does not know; in no metric."""
    unknown_classes: dict[str, int] = dataclasses.field(default_factory=dict)
    """Those classes, with their images."""
    warnings: tuple[str, ...] = ()
    """What makes the answers suspicious (see `constant_answers`)."""

    @property
    def absent_classes(self) -> list[str]:
        """The model's classes without an image: in no macro mean."""
        counts = zip(self.task.classes, self.metrics.support.tolist(), strict=True)
        return [name for name, count in counts if not count]

    def to_json(self) -> dict[str, Any]:
        """All figures as plain values."""
        keys = ("precision", "recall", "f1", "support")
        return {
            "model": self.model,
            "data": self.data,
            "split": self.split,
            "count": self.metrics.count,
            **self.metrics.scalars(),
            "per_class": {
                name: dict(zip(keys, row, strict=True)) for name, *row in self._per_class()
            },
            "absent_classes": self.absent_classes,
            "unknown_images": self.unknown_images,
            "unknown_classes": self.unknown_classes,
            "warnings": list(self.warnings),
        }

    def to_text(self) -> str:
        """The metrics as a printable table."""
        metrics, width = self.metrics, max(8, *(len(name) for name in self.task.classes))
        lines = [f"{'class':<{width}}  precision  recall      f1  support"]
        lines += [_line(row, width) for row in self._per_class()]
        lines.append("")
        for kind in ("macro", "weighted"):
            means = [getattr(metrics, f"{kind}_{name}") for name in ("precision", "recall", "f1")]
            lines.append(_line([kind, *means, int(metrics.support.sum())], width))
        lines += ["", f"images  {metrics.count:,}"]
        titles = {"top1": "top-1", "top5": "top-5"}
        for name, value in metrics.scalars().items():
            if not name.startswith(("macro_", "weighted_")):
                lines.append(f"{titles.get(name, name):<7} {value:.4f}")
        return "\n".join([*lines, *self._left_out()])

    def _left_out(self) -> list[str]:
        """What is in no metric, a line each."""
        lines, absent = [], self.absent_classes
        if absent:
            lines.append(
                f"absent  {len(absent):,} of {len(self.task.classes):,} classes have no image and "
                f"are in no macro mean: {_named(absent)}"
            )
        if self.unknown_images:
            counted = [f"{name} ({count:,})" for name, count in self.unknown_classes.items()]
            lines.append(
                f"unknown {self.unknown_images:,} images of classes that the model does not know "
                f"are in no figure: {_named(counted)}"
            )
        return lines

    def write(self, folder: Path) -> None:
        """Write metrics.json, per_class.csv, confusion.csv and, with matplotlib, confusion.png.

        confusion.csv of heads has their tables along its diagonal; of labels a row each. The figure
        is of a single label, or of heads with the same classes, summed.
        """
        write_json(folder / "metrics.json", self.to_json())
        columns = ("class", "precision", "recall", "f1", "support")
        write_text(folder / "per_class.csv", _table([columns, *self._per_class()]))
        classes = self.task.classes
        header = ["truth", *classes]
        if self.task.kind == "multi_label":
            header = ["label", "true_no", "false_yes", "false_no", "true_yes"]
        counts = self.metrics.confusion.reshape(len(classes), -1).tolist()
        rows = [[name, *row] for name, row in zip(classes, counts, strict=True)]
        write_text(folder / "confusion.csv", _table([header, *rows]))
        drawn = _drawn_matrix(self.metrics.confusion, self.task)
        if drawn is None:
            (folder / "confusion.png").unlink(missing_ok=True)  # of an evaluation that is replaced
            log.say("confusion.png is left out: there is no one table of classes to draw")
            return
        try:
            plotting.confusion(*drawn, folder / "confusion.png")
        except UsageError as error:
            (folder / "confusion.png").unlink(missing_ok=True)
            log.warn(f"confusion.png is left out: {error}")

    def _per_class(self) -> list[list[Any]]:
        metrics = self.metrics
        arrays = (metrics.precision, metrics.recall, metrics.f1, metrics.support)
        columns = (array.tolist() for array in arrays)
        return [list(row) for row in zip(self.task.classes, *columns, strict=True)]


def evaluate_model(options: EvaluateOptions) -> EvaluationResult:
    """Evaluate a model on a split, and write `options.out` if given.

    With multiple processes (see `distcls.log.world_size`) each evaluates a shard of the images,
    all of them get the result of all images, and rank 0 writes. Raises UsageError for a model that
    does not fit the data or an evaluation in `options.out`, and DistclsError, in all processes, if
    any image is bad.
    """
    _check_data(options)
    options = _with_model_file(options)
    dataset = Dataset.open(options.data, prepare_flags="--test-fraction 1")
    split = dataset.split(options.split)
    _require_new_output(options)
    with _processes(options.model) as (device, total):
        request = options.execution_request(len(split))
        model = load_model(options.model, device, request, split)
        task = model.card.task
        matched = match_classes(split.first(options.limit), task, str(options.data))
        began = time.monotonic()
        predictor = Predictor(model, batch_size=options.batch_size, workers=options.workers)
        shard = range(log.rank(), len(matched.split), log.world_size())
        sums, bad = _evaluate_shard(predictor, matched.split, shard)
        state, spread = _sum_over_ranks(sums, bad, task, total)
        seconds = time.monotonic() - began
    metrics = state.compute()
    result = EvaluationResult(
        metrics=metrics,
        task=task,
        model=str(options.model),
        data=str(options.data),
        split=split.name,
        provider=model.provider,
        seconds=seconds,
        unknown_images=matched.unknown_images,
        unknown_classes=matched.unknown_classes,
        warnings=tuple(constant_answers(metrics, spread, task)),
    )
    log.say(f"{metrics.count / seconds:,.0f} images/s on {model.provider}")
    for warning in result.warnings:
        log.warn(warning)
    if options.out is not None and log.rank() == 0:
        result.write(options.out)
        log.say(f"written: {options.out}")
    return result


def _check_data(options: EvaluateOptions) -> None:
    """Name the dataset of the model's run where `data` is none: a new one of the same folder would
    test on what was trained on."""
    run = options.model if options.model.is_dir() else options.model.parent
    known = is_dataset(options.data) or is_dataset(options.data / IN_RUN)
    if options.data.is_dir() and not known and is_dataset(run / IN_RUN):
        command = prepare_command(str(options.data), "--test-fraction 1")
        raise UsageError(
            f"{options.data} is no dataset directory; the model's own, with its test split, is "
            f"--data {run / IN_RUN}; for other images make one of them: {command}"
        )


def _with_model_file(options: EvaluateOptions) -> EvaluateOptions:
    found = best_model(options.model, exported=log.world_size() == 1)
    if line := model_choice(options.model, found):
        log.say(line)
    return dataclasses.replace(options, model=found)


def _require_new_output(options: EvaluateOptions) -> None:
    """Raise UsageError, in all processes and before any work, if `out` cannot be written."""
    if options.out is None:
        return
    there = [options.out / name for name in FILES if (options.out / name).exists()]
    if not options.overwrite and there:
        raise UsageError(f"{there[0]} exists already; choose another --out or add --overwrite")
    if log.rank() == 0:
        require_writable(options.out)


@contextlib.contextmanager
def _processes(model: Path) -> Iterator[tuple[str, Sum]]:
    """The device of this process, and a function that sums a vector over all processes."""
    if log.world_size() == 1:
        yield "auto", lambda vector: vector
        return
    if model.suffix.lower() != ".pth":
        raise UsageError(f"model: {model} runs in one process, {log.world_size()} were started")
    import torch
    from accelerate import PartialState
    from accelerate.utils import reduce

    state = PartialState(cpu=not torch.cuda.is_available())

    def total(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        summed = reduce(torch.from_numpy(vector).to(state.device), "sum")
        return np.asarray(summed.cpu().numpy(), np.float64)

    try:
        yield str(state.device), total
    finally:
        state.destroy_process_group()


Sums = tuple[MetricState, LogitSpread]


def _evaluate_shard(predictor: Predictor, split: Split, indices: range) -> tuple[Sums, list[str]]:
    """The sums over the images at `indices`, and the bad ones with their reasons.

    The shards of all ranks are the split, each image once.
    """
    task = predictor.task
    state, spread, bad = metric_state(task), LogitSpread(task), []
    with (
        contextlib.closing(predictor.chunks(split, indices=indices)) as chunks,
        tqdm(total=len(indices), unit="img", disable=not log.show_progress()) as bar,
    ):
        for chunk in chunks:
            good = np.array([error is None for error in chunk.errors])
            state.update(chunk.logits[good], split.labels[np.array(chunk.indices)[good]])
            spread.update(chunk.logits[good])
            for index, error in zip(chunk.indices, chunk.errors, strict=True):
                if error is not None:
                    bad.append(f"{split.image_ids[index]}: {error}")
            bar.update(len(chunk.indices))
    return (state, spread), bad


def _sum_over_ranks(own: Sums, bad: list[str], task: Task, total: Sum) -> Sums:
    """The sums of all processes. Raises DistclsError, in all of them, if any image was bad."""
    for line in bad[:MAX_NAMED]:
        log.fail(line)
    parts = [part.state() for part in own]
    vector = total(np.concatenate([*parts, [len(bad)]]))
    all_bad = round(float(vector[-1]))
    if all_bad:
        raise DistclsError(
            f"{all_bad:,} images cannot be evaluated; the data has to be repaired first"
        )
    state, spread = metric_state(task), LogitSpread(task)
    state.merge(vector[: len(parts[0])])
    spread.merge(vector[len(parts[0]) : -1])
    return state, spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchedSplit:
    """The images of a split that a model can be measured on, with labels in the model's terms."""

    split: Split
    """The images whose classes the model knows; its task is the model's, and so are its labels."""
    unknown_images: int = 0
    """Images that were left out because the model does not know their class."""
    unknown_classes: dict[str, int] = dataclasses.field(default_factory=dict)
    """Their classes that the model does not know, with the number of images of each."""


UNKNOWN, IGNORED = -1, -2
"""Instead of a place among the model's classes: it has no such class; it need not have it."""


def match_classes(split: Split, model: Task, where: str) -> MatchedSplit:
    """Translate the labels of a split into a model's, by the names of classes, heads and labels.

    Classes of the model that the data lacks have no image. Images of classes that the model does
    not know, be it in one head or among other labels, are left out and counted. Raises UsageError,
    naming the first difference, if the kinds or the heads differ or no image is left.
    """
    data = split.task
    if model.kind != data.kind:
        raise UsageError(f"the model predicts {_summary(model)}, {where} has {_summary(data)}")
    if data.single and not ((split.labels >= 0) & (split.labels < len(data.classes))).all():
        raise UsageError(f"{where}: labels that are none of its {len(data.classes)} classes")
    if _keys(data) == _keys(model):
        return MatchedSplit(split=dataclasses.replace(split, task=model))
    places = _places(data, model, where)
    if data.kind == "multi_label":
        labels, known, counts = _translate_labels(split.labels, places, model)
    else:
        labels, known, counts = _translate_heads(split.labels, places, data, model)
    if not known.any():
        raise UsageError(
            f"{where}: the model knows the class of no image of {split.name}; it predicts "
            f"{_named(model.classes)}, the data has {_named(data.classes)}"
        )
    left_out = int((~known).sum())
    what = f"; {left_out:,} images of other classes are left out" if left_out else ""
    log.say(f"{where} lists other classes than the model, matched by name{what}")
    pairs = zip(data.classes, places.tolist(), counts.tolist(), strict=True)
    return MatchedSplit(
        split=split.relabelled(labels[known], model, known),
        unknown_images=left_out,
        unknown_classes={n: count for n, place, count in pairs if place == UNKNOWN and count},
    )


def _keys(task: Task) -> list[tuple[str, str]]:
    """What identifies each class: its name, and that of its head."""
    heads = task.heads or (Head("", task.classes),)
    return [(head.name, name) for head in heads for name in head.classes]


def _places(data: Task, model: Task, where: str) -> Integers:
    """The place of each class of the data among the model's, or UNKNOWN or IGNORED, [K].

    A head that one side lacks is a position after the end of a shorter text, so all is well where
    it is blank. Raises UsageError for another one, and for names that are ambiguous.
    """
    own = {key: place for place, key in enumerate(_keys(model))}
    if len(own) < len(model.classes) or len(set(_keys(data))) < len(data.classes):
        raise UsageError(f"{where} or the model has a class twice: no match by name is possible")
    sides = (("the model has", model, data), (f"{where} has", data, model))
    for owner, task, other in sides:
        names = {head.name for head in other.heads}
        for head in task.heads:
            if head.name not in names and BLANK not in head.classes:
                missing = "the data lacks" if task is model else "the model lacks"
                raise UsageError(f"{owner} a head {head.name!r}, which {missing}")
    names = {head.name for head in model.heads}
    return np.array(
        [
            own.get(key, IGNORED if data.heads and key[0] not in names and not key[1] else UNKNOWN)
            for key in _keys(data)
        ]
    )


def _translate_labels(
    labels: Integers, places: Integers, model: Task
) -> tuple[Integers, NDArray[np.bool_], Integers]:
    """Labels [N, labels] as the model's, which images it knows [N], images of each label [K]."""
    translated = np.zeros((len(labels), len(model.classes)), np.int64)
    translated[:, places[places >= 0]] = labels[:, places >= 0]
    known = np.asarray((labels[:, places == UNKNOWN] == 0).all(axis=1))
    return translated, known, labels.sum(axis=0)


def _translate_heads(
    labels: Integers, places: Integers, data: Task, model: Task
) -> tuple[Integers, NDArray[np.bool_], Integers]:
    """As `_translate_labels`, of one class [N] or one in each head [N, heads]."""
    flat = labels.reshape(len(labels), -1) + [span.start for span in data.slices]
    found = places[flat]
    columns = {head.name: found[:, place] for place, head in enumerate(data.heads)}
    translated = np.zeros((len(labels), len(model.slices)), np.int64)
    heads = model.heads or (Head("", model.classes),)
    columns = columns or {"": found[:, 0]}
    for place, (head, span) in enumerate(zip(heads, model.slices, strict=True)):
        if head.name in columns:
            translated[:, place] = columns[head.name] - span.start
        else:
            translated[:, place] = head.classes.index(BLANK)
    known = np.asarray((found != UNKNOWN).all(axis=1))
    return translated, known, np.bincount(flat.ravel(), minlength=len(places))


def _named(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return ", ".join(name or BLANK_SHOWN for name in names[:MAX_NAMED]) + more


def _summary(task: Task) -> str:
    return f"one of {task.summary()}" if task.single else task.summary()


def _drawn_matrix(confusion: Integers, task: Task) -> tuple[Integers, Sequence[str]] | None:
    """The confusion matrix to draw, with its classes: the sum over heads of the same classes."""
    if task.single:
        return confusion, task.classes
    if task.alphabet is None:
        return None
    blocks = [confusion[span, span] for span in task.slices]
    names = [BLANK_SHOWN if name == BLANK else name for name in task.alphabet]
    return np.sum(blocks, axis=0), names


def _line(row: Sequence[Any], width: int) -> str:
    name, precision, recall, f1, support = row
    return f"{name:<{width}}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {support:7,}"


def _table(rows: Sequence[Sequence[object]]) -> str:
    return "".join(csv_line(row) for row in rows)
