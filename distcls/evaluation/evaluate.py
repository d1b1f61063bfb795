"""`evaluate`: the metrics of a model on a split, on one or more processes; `evaluate_model` for
programs.

Model and data meet by the names of their classes (see `match_classes`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distcls import log, plotting
from distcls.cli import import_pandas, packages_for
from distcls.config import build, options_layer
from distcls.data.dataset import IN_RUN, INFO, Dataset, Split, is_dataset, require_apart
from distcls.data.image_dataset import ImageDataset, StrPath, split_of, split_of_files
from distcls.data.integrity import read_info
from distcls.errors import UsageError, plain, require
from distcls.evaluation.classes import match_classes, shown_names
from distcls.evaluation.groups import MOST_GROUPS, Group, find_column, groups_of
from distcls.evaluation.metrics import Integers, Metrics, constant_answers
from distcls.evaluation.outputs import PREDICTIONS, Outputs
from distcls.evaluation.plots import PICTURES, draw
from distcls.evaluation.scores import figures, with_intervals
from distcls.evaluation.shards import evaluate_split, processes
from distcls.files import (
    csv_line,
    given_path,
    require_writable,
    unfinished,
    writable,
    write_json,
    write_text,
)
from distcls.imaging.decode import SUFFIXES
from distcls.model_card import BEST_ONNX, BEST_PTH, best_model, model_choice
from distcls.predictor import Predictor, load_model
from distcls.runtime.providers import ExecutionRequest, require_provider
from distcls.task import BLANK, BLANK_SHOWN, Task

if TYPE_CHECKING:
    import pandas

METRICS = "metrics.json"
GROUPS = "groups.csv"
FILES = (
    *(METRICS, "per_class.csv", "confusion.csv", "confusion.png"),
    *(GROUPS, PREDICTIONS, *PICTURES),
)
"""What `--out` gets."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of `distcls evaluate`."""

    model: Path
    """Model file: best.onnx, or a checkpoint best.pth; a run directory means its best.onnx, or its
    best.pth if that is newer or several processes evaluate."""
    data: Path
    """Dataset directory, folder of class folders, or manifest. Its classes are matched with the
    model's by name; images of other classes are counted separately."""
    split: str = "test"
    """Split of the dataset: train, val or test; a folder or manifest without splits is one for
    test."""
    out: Path | None = None
    """Folder for metrics.json, per_class.csv, confusion.csv, predictions.parquet and pictures."""
    by: str | None = None
    """Column of the manifest, such as camera: figures of the images of each of its values."""
    bins: int | None = None
    """With --by and a column of numbers: ranges to divide them into, of about as many images each,
    0 for none; default: 10 where there are more than 30 different numbers."""
    overwrite: bool = False
    """Replace an evaluation in --out."""
    batch_size: int | None = None
    """Batch size; default: chosen with the provider (64 for a .pth)."""
    provider: str = "auto"
    """Execution provider of an ONNX model: auto (the fastest installed one whose predictions match
    those of the CPU), cpu, openvino, cuda, tensorrt."""
    limit: int | None = None
    """Evaluate the first images only."""
    workers: int | None = None
    """Decoding threads; default: one per core."""
    json: bool = False
    """Print the result as one JSON object on standard output."""
    quiet: bool = False
    """Print the result, warnings and errors only."""

    def __post_init__(self) -> None:
        require_provider(self.provider, or_auto=True)
        for name in ("batch_size", "limit", "workers"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        fits = self.bins is None or 0 <= self.bins <= MOST_GROUPS
        require(fits, "bins", self.bins, f"0 to {MOST_GROUPS:,}")
        alone = self.bins is None or self.by is not None
        require(alone, "bins", self.bins, "nothing without --by")

    def execution_request(self, images: int) -> ExecutionRequest:
        """The execution request, for a split of this many images."""
        return ExecutionRequest.of(self, images)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EvaluationResult:
    """The metrics of a model on a split, and how they were computed; printed as a table.

    K counts the classes in the order of `classes`, which is the model's.
    """

    metrics: Metrics
    """All figures, over all images whatever the number of processes."""
    task: Task
    """The model's task."""
    model: str
    """Path of the model file."""
    data: str
    """Path of the dataset directory."""
    split: str
    """Name of the split."""
    provider: str
    """What computed: an execution provider or a torch device."""
    seconds: float
    """Seconds that the evaluation took, without opening the model."""
    unknown_images: int = 0
    """Images of classes that the model does not know; in no metric."""
    unknown_classes: dict[str, int] = dataclasses.field(default_factory=dict)
    """Those classes, with the number of images of each."""
    warnings: tuple[str, ...] = ()
    """What makes the predictions suspicious, such as the same one for every image."""
    outputs: Outputs
    """What the model gives for each image."""
    scores: dict[str, float]
    """The figures beside those of the metrics: auroc, average_precision, mcc, kappa,
    balanced_accuracy, ece, brier, and top2, top3, top5, top10 where there are more classes."""
    intervals: dict[str, tuple[float, float]]
    """95 % intervals of the figures that have one, lower and upper end."""
    by: str | None = None
    """The column of `groups`."""
    groups: tuple[Group, ...] = ()
    """Figures of the images of each value of a column of the manifest."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The model's class names, [K]; of heads as HEAD:CLASS."""
        return self.task.classes

    @property
    def count(self) -> int:
        """Number of images."""
        return self.metrics.count

    @property
    def top1(self) -> float:
        """Fraction of the images that are predicted right, 0 to 1; for multi-head and multi-label
        that of all decisions (a head's class, a label's yes or no)."""
        return self.metrics.top1

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return self.metrics.loss

    @property
    def per_class(self) -> dict[str, dict[str, float]]:
        """precision, recall, f1 (0 to 1) and support (the number of images) of each class."""
        keys = ("precision", "recall", "f1", "support")
        return {name: dict(zip(keys, row, strict=True)) for name, *row in self._per_class()}

    @property
    def confusion(self) -> Integers:
        """Number of images by true class (rows) and predicted class (columns), int64 [K, K]; of
        heads block by block, of labels for each one by no and yes, [K, 2, 2]."""
        return self.metrics.confusion

    def to_dataframe(self) -> pandas.DataFrame:
        """A pandas DataFrame with a row for each class, indexed by `class`.

        The columns are precision, recall, f1 and support, as in per_class.csv. Raises UsageError if
        pandas is not installed.
        """
        columns = ["class", "precision", "recall", "f1", "support"]
        return import_pandas().DataFrame(self._per_class(), columns=columns).set_index("class")

    @property
    def figures(self) -> dict[str, float]:
        """All figures of the whole split by name: those of the metrics, and `scores`."""
        scalars = self.metrics.scalars()
        return {**scalars, **self.scores, **scalars}

    @property
    def absent_classes(self) -> list[str]:
        """The model's classes without an image: in no macro mean."""
        counts = zip(self.task.classes, self.metrics.support.tolist(), strict=True)
        return [name for name, count in counts if not count]

    def to_json(self) -> dict[str, Any]:
        """All figures as plain values, as `distcls evaluate --json` prints them."""
        return {
            "model": self.model,
            "data": self.data,
            "split": self.split,
            "count": self.metrics.count,
            **self.figures,
            "intervals": {name: list(pair) for name, pair in self.intervals.items()},
            "per_class": self.per_class,
            **({} if self.by is None else {"by": self.by, "groups": self._groups()}),
            "absent_classes": self.absent_classes,
            "unknown_images": self.unknown_images,
            "unknown_classes": self.unknown_classes,
            "warnings": list(self.warnings),
        }

    def to_text(self) -> str:
        """The metrics as a printable table."""
        metrics, width = (
            self.metrics,
            max(8, *(log.width(plain(name)) for name in self.task.classes)),
        )
        lines = [f"{'class':<{width}}  precision  recall      f1  support"]
        lines += [_line(row, width) for row in self._per_class()]
        lines.append("")
        for kind in ("macro", "weighted"):
            means = [getattr(metrics, f"{kind}_{name}") for name in ("precision", "recall", "f1")]
            lines.append(_line([kind, *means, int(metrics.support.sum())], width))
        lines += ["", f"images  {metrics.count:,}"]
        for name, value in self.figures.items():
            if not name.startswith("weighted_"):
                ends = self.intervals.get(name)
                between = "" if ends is None else f"  ({ends[0]:.4f} to {ends[1]:.4f})"
                lines.append(f"{plotting.metric_title(name):<17} {value:.4f}{between}")
        lines.append("in brackets: 95 % intervals, of other images of the same kind")
        if several := self.task.outputs:
            lines.append(
                f"exact: images with all {several} right; top-1: of the {several} one by one"
            )
        if self.by is not None:
            values = (plain(each.value) for each in self.groups)
            wide = max(width, *map(log.width, (plain(self.by), *values)))
            lines += ["", f"{log.padded(plain(self.by), wide)}    images   top-1  95 % interval"]
            for each in self.groups:
                row = f"{log.padded(plain(each.value), wide)}  {each.count:8,}  {each.top1:.4f}"
                lines.append(f"{row}  {each.low:.4f} to {each.high:.4f}")
        return "\n".join([*lines, *self._left_out()])

    def _groups(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(group) for group in self.groups]

    def _left_out(self) -> list[str]:
        """What is in no metric, a line each."""
        lines, absent = [], self.absent_classes
        if absent:
            lines.append(
                f"absent  {len(absent):,} of {len(self.task.classes):,} classes have no image and "
                f"are in no macro mean: {shown_names(absent)}"
            )
        if self.unknown_images:
            counted = [f"{name} ({count:,})" for name, count in self.unknown_classes.items()]
            lines.append(
                f"unknown {self.unknown_images:,} images of classes that the model does not know "
                f"are in no figure: {shown_names(counted)}"
            )
        return lines

    def write(self, folder: Path) -> None:
        """Write metrics.json, per_class.csv, confusion.csv and, with matplotlib, confusion.png.

        confusion.csv of heads has their tables along its diagonal; of labels a row each. The figure
        is of a single label, or of heads with the same classes, summed.
        """
        write_json(folder / METRICS, self.to_json())
        about = {"model": self.model, "data": self.data, "split": self.split}
        self.outputs.write(folder / PREDICTIONS, about)
        columns = ("class", "precision", "recall", "f1", "support")
        write_text(folder / "per_class.csv", _table([columns, *self._per_class()]))
        classes = self.task.classes
        header = ["truth", *classes]
        if self.task.kind == "multi_label":
            header = ["label", "true_no", "false_yes", "false_no", "true_yes"]
        (folder / GROUPS).unlink(missing_ok=True)  # of an evaluation that is replaced
        if self.by is not None:
            names = [field.name for field in dataclasses.fields(Group)]
            rows = [[group[name] for name in names] for group in self._groups()]
            write_text(folder / GROUPS, _table([[self.by, *names[1:]], *rows]))
        counts = self.metrics.confusion.reshape(len(classes), -1).tolist()
        rows = [[name, *row] for name, row in zip(classes, counts, strict=True)]
        write_text(folder / "confusion.csv", _table([header, *rows]))
        drawn = _drawn_matrix(self.metrics.confusion, self.task)
        if drawn is None:
            (folder / "confusion.png").unlink(missing_ok=True)  # of an evaluation that is replaced
            log.say(
                "confusion.png is left out: the heads have different classes, or there are labels"
            )
            return
        try:
            plotting.confusion(*drawn, folder / "confusion.png")
        except UsageError as error:
            (folder / "confusion.png").unlink(missing_ok=True)
            log.warn(f"confusion.png is left out: {error}")

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        figures = f"{self.count:,} images, top1={self.top1:.4f}, loss={self.loss:.4f}"
        return f"EvaluationResult({self.model!r}, {self.data!r}, {self.split!r}, {figures})"

    def _per_class(self) -> list[list[Any]]:
        metrics = self.metrics
        arrays = (metrics.precision, metrics.recall, metrics.f1, metrics.support)
        columns = (array.tolist() for array in arrays)
        return [list(row) for row in zip(self.task.classes, *columns, strict=True)]


def evaluate_model(
    model: StrPath | Predictor,
    data: StrPath | ImageDataset,
    *,
    split: str | None = None,
    by: str | None = None,
    bins: int | None = None,
    out: StrPath | None = None,
    overwrite: bool = False,
    provider: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    limit: int | None = None,
    quiet: bool = False,
) -> EvaluationResult:
    """Measure a model on a split of a dataset directory, as `distcls evaluate` does.

        result = distcls.evaluate_model("runs/photos", "runs/photos/dataset")
        print(result.top1, result.per_class["cat"]["recall"])
        print(result)

    The classes of model and data are matched by name. In a script that `accelerate launch` starts,
    every process calls it with a path of a best.pth and gets the result of all images.

    Args:
        model: a best.onnx, a best.pth, a run directory, or a predictor, of an ensemble too.
        data: a dataset directory, a folder of class folders, a manifest, or an `ImageDataset` of a
            dataset directory.
        split: train, val or test; by default test, or the only one of an `ImageDataset`.
        by: a column of the manifest, such as camera, for figures of each of its values.
        bins: ranges to divide a column of numbers into; by default 10, where there are more than 30
            different ones; 0 for none.
        out: folder for metrics.json, predictions.parquet, pictures and more.
        overwrite: replace an evaluation in `out`.
        provider: execution provider of an exported model, see `distcls.load`; auto measures them
            for 256 images and more, and takes the fastest that agrees with the CPU.
        batch_size: images that are computed together; by default chosen with the provider.
        workers: decoding threads; by default one per core.
        limit: take the first images only.
        quiet: print warnings and errors only.

    Returns:
        The metrics, of which `to_json()` is what `distcls evaluate --json` prints.

    Raises:
        UsageError: for a model or data that cannot be read or do not fit each other, for an
            evaluation in `out`, and for a wrong value.
        DistclsError: if an image of the split cannot be decoded: nothing is left out silently.
    """
    return _evaluate_given(**locals())


def _evaluate_given(model: object, data: object, **given: object) -> EvaluationResult:
    if given["split"] is None:
        del given["split"]
    predictor = model if isinstance(model, Predictor) else None
    if predictor is not None:
        for name in ("provider", "batch_size", "workers"):
            if given[name] not in (None, "auto"):
                raise UsageError(f"{name}: {given[name]!r} is for distcls.load, not a predictor")
        if log.world_size() > 1:
            raise UsageError("model: several processes take the path of a .pth, not a predictor")
        model = ",".join(map(str, predictor.paths)) or "model"
    images = data if isinstance(data, ImageDataset) else None
    given["model"] = given_path(model, "model")
    given["data"] = given_path(data, "data") if images is None else images.location
    options = build(EvaluateOptions, options_layer(EvaluateOptions, given))
    with packages_for(str(options.data)), log.hushed(options.quiet):
        if predictor is None:
            if images is None:
                _check_data(options)
            options = _with_model_file(options)
        if images is None:
            return _evaluate(options, _open_split(options), predictor)
        split = split_of(images, options.split if "split" in given else None)
        return _evaluate(options, split, predictor)


def evaluate(options: EvaluateOptions) -> EvaluationResult:
    """Evaluate a model on a split, and write `options.out` if given.

    With multiple processes (see `distcls.log.world_size`) each evaluates a shard of the images,
    all of them get the result of all images, and rank 0 writes. Raises UsageError for a model that
    does not fit the data or an evaluation in `options.out`, and DistclsError, in all processes, if
    any image is bad.
    """
    _check_data(options)
    options = _with_model_file(options)
    return _evaluate(options, _open_split(options))


def _open_split(options: EvaluateOptions) -> Split:
    data = options.data
    if data.exists() and not is_dataset(data) and not is_dataset(data / IN_RUN):
        return split_of_files(data, options.split)
    return Dataset.open(data, prepare_flags="--test-fraction 1").split(options.split)


def _evaluate(
    options: EvaluateOptions, split: Split, predictor: Predictor | None = None
) -> EvaluationResult:
    """Evaluate the predictor, or the model of the options, on a split."""
    with _output(options):
        return _measure(options, split, predictor)


def _measure(
    options: EvaluateOptions, split: Split, predictor: Predictor | None
) -> EvaluationResult:
    by = None if options.by is None else find_column(split, options.by, options.bins)
    with processes(options.model) as (device, total):
        if predictor is None:
            request = options.execution_request(len(split))
            model = load_model(options.model, device, request, split)
            predictor = Predictor(model, batch_size=options.batch_size, workers=options.workers)
        task = predictor.task
        matched = match_classes(split.first(options.limit), task, str(options.data))
        began = time.monotonic()
        evaluated = evaluate_split(predictor, matched.split, total)
        seconds = time.monotonic() - began
    metrics, outputs = evaluated.state.compute(), evaluated.outputs(task)
    scores = figures(outputs)
    result = EvaluationResult(
        metrics=metrics,
        task=task,
        model=str(options.model),
        data=str(options.data),
        split=split.name,
        provider=predictor.model.provider,
        seconds=seconds,
        unknown_images=matched.unknown_images,
        unknown_classes=matched.unknown_classes,
        warnings=tuple(constant_answers(metrics, evaluated.spread, task)),
        outputs=outputs,
        scores={name: figure.value for name, figure in scores.items()},
        intervals=with_intervals(scores),
        by=by,
        groups=groups_of(outputs, evaluated.split, by, options.bins),
    )
    log.say(f"{metrics.count / seconds:,.0f} images/s on {result.provider}")
    for warning in result.warnings:
        log.warn(warning)
    if options.out is not None and log.rank() == 0:
        with _replacing(options.out) as folder:
            result.write(folder)
            draw(outputs, evaluated.split, folder)
        log.say(f"written: {options.out}")
    return result


def _check_data(options: EvaluateOptions) -> None:
    """Name the dataset of the model's run where `data` is the folder that it was made of: most of
    its images were trained on."""
    run = options.model if options.model.is_dir() else options.model.parent
    own = run / IN_RUN
    if is_dataset(options.data) or not options.data.exists() or not (own / INFO).is_file():
        return
    if read_info(own / INFO).get("source") == str(options.data.resolve()):
        raise UsageError(
            f"{options.data} is what the model was trained on; its test split is in --data {own}"
        )


def _with_model_file(options: EvaluateOptions) -> EvaluateOptions:
    found = best_model(options.model, exported=log.world_size() == 1)
    if line := model_choice(options.model, found):
        log.say(line)
    return dataclasses.replace(options, model=found)


@contextlib.contextmanager
def _output(options: EvaluateOptions) -> Iterator[None]:
    """Where `out` can be written; folders that were made for it go again if nothing is."""
    out = options.out
    missing = [] if out is None else [each for each in (out, *out.parents) if not each.exists()]
    try:
        _require_new_output(options)
        yield
    except BaseException:
        if log.rank() == 0:
            with contextlib.suppress(OSError):
                for folder in missing:
                    folder.rmdir()
        raise


def _require_new_output(options: EvaluateOptions) -> None:
    """Raise UsageError, in all processes and before any work, if `out` cannot be written."""
    if options.out is None:
        return
    _require_own_folder(options.out, options.data)
    there = [options.out / name for name in FILES if (options.out / name).exists()]
    if not options.overwrite and there:
        raise UsageError(f"{there[0]} exists already; choose another --out or add --overwrite")
    if folders := [path for path in there if path.is_dir()]:
        raise UsageError(f"{folders[0]} is a folder, expected the name of a file")
    if log.rank() == 0:
        require_writable(options.out)


def _require_own_folder(out: Path, data: Path) -> None:
    """Raise BadValue for a folder that holds something else: its files would be mixed with it."""
    for path in (out, *(out / name for name in FILES)):
        require_apart("out", path, data)
    holds = next((name for name in (BEST_PTH, BEST_ONNX, INFO) if (out / name).exists()), None)
    if holds is None and out.is_dir() and not (out / METRICS).exists():
        names = (path.name for path in out.iterdir() if path.suffix.lower() in SUFFIXES)
        holds = next((name for name in names if name not in FILES), None)
    expected = f"a folder of its own; {holds} is in this one"
    require(holds is None, "out", str(out), expected)


@contextlib.contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A folder for the files of an evaluation, which take the place of those in `out` if all could
    be written; metrics.json comes last."""
    with writable(out), unfinished(out / "evaluation", folder=True) as folder:
        yield folder
        for name in reversed(FILES):
            if (folder / name).exists():
                (folder / name).replace(out / name)
            else:
                (out / name).unlink(missing_ok=True)  # of an evaluation that is replaced


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
    start = log.padded(plain(name), width)
    return f"{start}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {support:7,}"


def _table(rows: Sequence[Sequence[object]]) -> str:
    return "".join(csv_line(row) for row in rows)
