"""`evaluate_model`: the metrics of a model on a split, on one or more processes."""

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
from distcls.data.dataset import Dataset, Split
from distcls.errors import DistclsError, UsageError, require
from distcls.evaluation.metrics import Integers, Metrics, MetricState, metric_state
from distcls.files import csv_line, require_writable, write_json, write_text
from distcls.model_card import best_model, model_choice
from distcls.predictor import Predictor, load_model
from distcls.runtime.providers import ExecutionRequest, require_provider
from distcls.task import BLANK, BLANK_SHOWN, Task

MAX_NAMED = 10
"""Bad images that an error names; the rest are counted."""

Sum = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Sums a vector over all processes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of `distcls evaluate`."""

    model: Path
    """Model file: best.onnx, or a checkpoint best.pth; a run directory means its best.onnx, or its
    best.pth where that is newer or several processes evaluate."""
    data: Path
    """Dataset directory, as `distcls prepare` makes it."""
    split: str = "test"
    """Split of the dataset: train, val or test."""
    out: Path | None = None
    """Folder for metrics.json, per_class.csv, confusion.csv and confusion.png."""
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
        return "\n".join(lines)

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
            log.say("confusion.png is left out: there is no one table of classes to draw")
            return
        try:
            plotting.confusion(*drawn, folder / "confusion.png")
        except UsageError as error:
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
    does not fit the data, and DistclsError, in all processes, if any image is bad.
    """
    options = _with_model_file(options)
    dataset = Dataset.open(options.data)
    split = dataset.split(options.split)
    if options.out is not None and log.rank() == 0:
        require_writable(options.out)
    with _processes(options.model) as (device, total):
        request = options.execution_request(len(split))
        model = load_model(options.model, device, request, split)
        task = model.card.task
        check_task(task, dataset.task, str(options.data))
        began = time.monotonic()
        predictor = Predictor(model, batch_size=options.batch_size, workers=options.workers)
        images = min(len(split), options.limit or len(split))
        shard = range(log.rank(), images, log.world_size())
        state = _sum_over_ranks(*_evaluate_shard(predictor, split, shard), task, total)
        seconds = time.monotonic() - began
    result = EvaluationResult(
        metrics=state.compute(),
        task=task,
        model=str(options.model),
        data=str(options.data),
        split=split.name,
        provider=model.provider,
        seconds=seconds,
    )
    log.say(f"{result.metrics.count / seconds:,.0f} images/s on {model.provider}")
    if options.out is not None and log.rank() == 0:
        result.write(options.out)
        log.say(f"written: {options.out}")
    return result


def _with_model_file(options: EvaluateOptions) -> EvaluateOptions:
    found = best_model(options.model, exported=log.world_size() == 1)
    if line := model_choice(options.model, found):
        log.say(line)
    return dataclasses.replace(options, model=found)


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


def _evaluate_shard(
    predictor: Predictor, split: Split, indices: range
) -> tuple[MetricState, list[str]]:
    """The metric state of the images at `indices`, and the bad ones with their reasons.

    The shards of all ranks are the split, each image once.
    """
    state, bad = metric_state(predictor.task), []
    with (
        contextlib.closing(predictor.stream(split, indices=indices)) as chunks,
        tqdm(total=len(indices), unit="img", disable=not log.show_progress()) as bar,
    ):
        for chunk in chunks:
            good = np.array([error is None for error in chunk.errors])
            state.update(chunk.logits[good], split.labels[np.array(chunk.indices)[good]])
            for index, error in zip(chunk.indices, chunk.errors, strict=True):
                if error is not None:
                    bad.append(f"{split.image_ids[index]}: {error}")
            bar.update(len(chunk.indices))
    return state, bad


def _sum_over_ranks(own: MetricState, bad: list[str], task: Task, total: Sum) -> MetricState:
    """The state of all processes. Raises DistclsError, in all of them, if any image was bad."""
    for line in bad[:MAX_NAMED]:
        log.fail(line)
    vector = total(np.append(own.state(), len(bad)))
    all_bad = round(float(vector[-1]))
    if all_bad:
        raise DistclsError(
            f"{all_bad:,} images cannot be evaluated; the data has to be repaired first"
        )
    state = metric_state(task)
    state.merge(vector[:-1])
    return state


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
    """Raise UsageError unless a model has the task of the data, with the same classes."""
    if model.kind != data.kind:
        raise UsageError(f"the model predicts {_summary(model)}, {where} has {_summary(data)}")
    check_classes(model.classes, data.classes, where)


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
