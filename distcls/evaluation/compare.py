"""`compare`: the difference of models on the same images, and whether it may be chance."""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls import log, plotting, stored
from distcls.config import positional
from distcls.errors import BadValue, UsageError, plain, require
from distcls.evaluation.evaluate import EvaluateOptions, EvaluationResult, evaluate
from distcls.evaluation.intervals import (
    LEAST_P,
    LEVEL,
    bootstrap_p,
    mcnemar,
    paired_difference,
    percentiles,
    resampled_means,
    student_p,
    student_quantile,
)
from distcls.evaluation.outputs import (
    KEY,
    PREDICTIONS,
    Outputs,
    labels_of,
    require_probabilities,
)
from distcls.evaluation.overlap import dataset_of, training_images, warn_of_training_images
from distcls.evaluation.scores import figures
from distcls.model_card import best_model
from distcls.task import Task

Floats = NDArray[np.float64]

TOP1, EXACT = "top1", "exact"
"""The figure that the verdict is about, of a single label and of several outputs."""
COMPARED = ("macro_f1", "micro_f1", "auroc", "average_precision", "brier")
"""The other figures of both sides, beside the loss and the accuracy of each head."""
OF_HEAD, MOST_HEADS = "accuracy of ", 50
"""Begins the figure of a head; of more heads only the first have one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Options of `distcls compare`."""

    runs: str | tuple[str, ...] = positional()
    """Two or more of: run directory, model file, folder of an evaluation, predictions.parquet. With
    commas between, as in a1,a2,a3, runs of one recipe with several seeds. All are compared with the
    first."""
    data: Path | None = None
    """Dataset directory that runs and model files are evaluated on; default: that of each run."""
    split: str = "test"
    """Its split: train, val or test."""
    intersect: bool = False
    """Compare the images that all have, where the images differ."""
    limit: int | None = None
    """Evaluate the first images only."""
    batch_size: int | None = None
    """Batch size of an evaluation; default: chosen with the provider (64 for a .pth)."""
    provider: str = "auto"
    """Execution provider of an ONNX model, as for `distcls evaluate`."""
    workers: int | None = None
    """Decoding threads; default: one per core."""
    json: bool = False
    """Print the result as one JSON object on standard output."""
    quiet: bool = False
    """Print the result, warnings and errors only."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "limit", "workers"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        count = len(self.sides)
        require(2 <= count <= 26, "runs", ", ".join(self.given), "2 to 26 of them to compare")

    @property
    def given(self) -> tuple[str, ...]:
        """The sides as they were given."""
        return (self.runs,) if isinstance(self.runs, str) else self.runs

    @property
    def sides(self) -> list[list[Path]]:
        """The paths of each side; the name of an existing file may hold a comma."""
        return [
            [Path(text)]
            if Path(text).exists()
            else [Path(name.strip()) for name in text.split(",") if name.strip()]
            for text in self.given
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How a side differs from the first in one figure."""

    figure: str
    first: float
    """The first side's, the mean over its runs."""
    other: float
    low: float
    """Of the 95 % interval of `other` minus `first`."""
    high: float
    p: float
    """Of a difference at least as great if there is none."""
    test: str
    """McNemar (exact), bootstrap (paired), or Welch's t over images and runs."""

    @property
    def value(self) -> float:
        """`other` minus `first`."""
        return self.other - self.first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """All sides against the first."""

    names: tuple[str, ...]
    """Of the sides, as given."""
    runs: tuple[int, ...]
    """Of each side."""
    images: int
    left_out: int
    """Images that not all have."""
    trained_on: tuple[int, ...]
    """Of each side, how many of the images were training images of one of its runs."""
    differences: tuple[tuple[Difference, ...], ...]
    """Of each side but the first, the figures."""
    outputs: str = ""
    """`heads` or `labels`, all of which have to be right in an image that counts as right."""

    @property
    def figure(self) -> str:
        """What the verdict is about: `top1`, or of several outputs `exact`."""
        return EXACT if self.outputs else TOP1

    def verdict(self, place: int) -> str:
        """In words, of side 1, 2, ... against the first.

        The p-value is corrected for the number of sides (Holm 1979).
        """
        letter, found = string.ascii_uppercase[place], self._judged(place)
        of = plotting.metric_title(self.figure)
        of += f", all {self.outputs} of an image right" if self.outputs else ""
        ends = f"{_points(found.low)} to {_points(found.high)}"
        p = self._corrected()[place - 1]
        if p < 1 - LEVEL and (found.low > 0 or found.high < 0):
            better, worse = (letter, "A") if found.value > 0 else ("A", letter)
            low, high = sorted((abs(found.low), abs(found.high)))
            ends = f"{100 * low:.2f} to {100 * high:.2f}"
            return (
                f"{better} is better than {worse} by {100 * abs(found.value):.2f} points of {of} "
                f"({ends}), p {p_text(p)}"
            )
        return (
            f"A and {letter} cannot be told apart: {letter} has {_points(found.value)} points of "
            f"{of} ({ends}), p {p_text(p)}"
        )

    def to_text(self) -> str:
        """The comparison for people."""
        lines = [
            f"{string.ascii_uppercase[place]}  {name}" + (f"  ({count} runs)" if count > 1 else "")
            for place, (name, count) in enumerate(zip(self.names, self.runs, strict=True))
        ]
        for place, found in enumerate(self.differences, 1):
            letter = string.ascii_uppercase[place]
            wide = max(17, *(log.width(_title(each.figure)) for each in found))
            head = f"{'':<{wide}} {'A':>8} {letter:>8}   {letter} - A (95 % interval)"
            lines += ["", f"{head:<{wide + 49}} p"]
            for each in found:
                ends = f"{each.value:+.4f} ({each.low:+.4f} to {each.high:+.4f})"
                row = f"{each.first:8.4f} {each.other:8.4f}   {ends}"
                start = f"{log.padded(_title(each.figure), wide)} {row:<48}"
                lines.append(f"{start} {p_text(each.p)}  {each.test}")
        lines.append("")
        lines += [self.verdict(place) for place in range(1, len(self.names))]
        also = f"; {self.left_out:,} that not all have are left out" if self.left_out else ""
        lines.append(f"on {self.images:,} images{also}")
        if max(self.runs) == 1:
            lines.append(
                "this is about these models, not their recipes: another seed gives another model; "
                "to compare recipes give several runs of each, as in a1,a2,a3 b1,b2,b3"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `distcls compare --json` prints them."""
        return {
            "images": self.images,
            "left_out": self.left_out,
            "sides": [
                {"name": name, "runs": count, "trained_on": seen}
                for name, count, seen in zip(self.names, self.runs, self.trained_on, strict=True)
            ],
            "comparisons": [
                {
                    "side": place,
                    "figure": self.figure,
                    "verdict": self.verdict(place),
                    "differences": [
                        {**dataclasses.asdict(each), "difference": each.value} for each in found
                    ],
                }
                for place, found in enumerate(self.differences, 1)
            ],
        }

    def _judged(self, place: int) -> Difference:
        return next(each for each in self.differences[place - 1] if each.figure == self.figure)

    def _corrected(self) -> list[float]:
        """The p-values of the verdicts, of each side but the first."""
        plain = np.array([self._judged(at).p for at in range(1, len(self.names))])
        order = np.argsort(plain, kind="stable")
        factors = np.arange(len(plain), 0, -1)
        corrected = np.empty(len(plain))
        corrected[order] = np.minimum(1, np.maximum.accumulate(plain[order] * factors))
        return corrected.tolist()


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """The predictions of one run."""

    name: str
    task: Task
    image_ids: list[str]
    truth: NDArray[Any]
    """Names of the true classes, [N]."""
    right: NDArray[np.bool_]
    loss: Floats
    outputs: Outputs | None
    """From which more figures follow; None where labels cannot be told from their texts."""
    trained_on: frozenset[str] = frozenset()
    """Ids of those images that it was trained on."""

    def take(self, image_ids: Sequence[str]) -> _Run:
        """Some of the images, in this order."""
        places = {name: place for place, name in enumerate(self.image_ids)}
        order = np.array([places[name] for name in image_ids], np.int64)
        outputs = None if self.outputs is None else self.outputs.take(order)
        arrays = (self.truth[order], self.right[order], self.loss[order])
        trained_on = self.trained_on.intersection(image_ids)
        return _Run(self.name, self.task, list(image_ids), *arrays, outputs, trained_on)

    def values(self, judged: str) -> dict[str, Floats]:
        """The numbers of each image whose mean is a figure, [N] each; of `judged`, which images are
        right."""
        found = {judged: self.right.astype(np.float64), "loss": self.loss}
        if self.outputs is not None:
            if not self.task.single:
                found = {judged: found[judged], TOP1: self.outputs.hits.mean(axis=1), **found}
            heads = zip(self.outputs.task.heads[:MOST_HEADS], self.outputs.hits.T, strict=False)
            found |= {f"{OF_HEAD}{head.name}": own.astype(np.float64) for head, own in heads}
            every = figures(self.outputs)
            found |= {name: np.asarray(every[name].values) for name in COMPARED if name in every}
        return found


def compare(options: CompareOptions) -> Comparison:
    """Compare all sides with the first, on the same images, matched by their ids.

    Raises UsageError for what is no run, other images (unless `intersect`) or other true classes.
    """
    if log.world_size() > 1:
        raise UsageError("compare runs in one process; start it without a launcher")
    for path in (path for side in options.sides for path in side):
        _check_side(path, options)
    read = [[_read(path, options) for path in paths] for paths in options.sides]
    return _compared(options.given, read, options.intersect)


def compare_results(names: Sequence[str], results: Sequence[EvaluationResult]) -> Comparison:
    """The same of models that are evaluated already, on the same images."""
    runs = [_of_result(name, result) for name, result in zip(names, results, strict=True)]
    return _compared(names, [[run] for run in runs], intersect=False)


def _compared(names: Sequence[str], read: Sequence[Sequence[_Run]], intersect: bool) -> Comparison:
    shared, left_out = _shared([run for side in read for run in side], intersect)
    sides = [[run.take(shared) for run in side] for side in read]
    _require_same_truth([run for side in sides for run in side])
    for run in (run for side in sides for run in side):
        warn_of_training_images(run.name, len(run.trained_on), len(shared))
    tasks = [run.task for side in sides for run in side]
    outputs = next((task.outputs for task in tasks if task.outputs), "")
    judged = EXACT if outputs else TOP1
    values = [[run.values(judged) for run in side] for side in sides]
    return Comparison(
        names=tuple(names),
        runs=tuple(map(len, sides)),
        images=len(shared),
        left_out=left_out,
        trained_on=tuple(len(frozenset().union(*(r.trained_on for r in side))) for side in sides),
        differences=tuple(tuple(_differences(values[0], other, judged)) for other in values[1:]),
        outputs=outputs,
    )


def _shared(runs: Sequence[_Run], intersect: bool) -> tuple[list[str], int]:
    """The ids of the images that all runs have, in the first's order, and how many others are."""
    sets = [set(run.image_ids) for run in runs]
    for run, ids in zip(runs, sets, strict=True):
        if len(ids) < len(run.image_ids):
            raise UsageError(f"{run.name}: has an image twice, so that images cannot be matched")
    common, every = set.intersection(*sets), set.union(*sets)
    if not common:
        raise UsageError(f"{runs[0].name} and the others have no image in common")
    if len(common) < len(every) and not intersect:
        other = next(i for i, ids in enumerate(sets) if ids != sets[0])
        first, second = runs[0], runs[other]
        raise UsageError(
            f"{first.name} has {len(sets[0]):,} images and {second.name} {len(sets[other]):,}, "
            f"{len(sets[0] & sets[other]):,} of them the same; --intersect compares those that "
            "all have"
        )
    shared = [name for name in runs[0].image_ids if name in common]
    return shared, len(every) - len(common)


def _require_same_truth(runs: Sequence[_Run]) -> None:
    for run in runs[1:]:
        other = np.flatnonzero(run.truth != runs[0].truth)
        if len(other):
            place = int(other[0])
            raise UsageError(
                f"{run.name}: {log.counted(len(other), 'image')} of other true classes than in "
                f"{runs[0].name}, first {run.image_ids[place]!r}: {run.truth[place]!r}, not "
                f"{runs[0].truth[place]!r}"
            )


def _differences(
    first: Sequence[dict[str, Floats]], other: Sequence[dict[str, Floats]], judged: str
) -> list[Difference]:
    """The figures that all runs have, of two sides; `judged` counts images that are right."""
    known = [name for name in first[0] if all(name in run for run in (*first, *other))]
    means = [
        {name: np.mean([run[name] for run in side], axis=0) for name in known}
        for side in (first, other)
    ]
    changes = np.stack([means[1][name] - means[0][name] for name in known], axis=1)
    several = len(first) > 1 or len(other) > 1
    resampled = None if several else resampled_means(changes)
    found = []
    for place, name in enumerate(known):
        if several:
            seeds = [[float(run[name].mean()) for run in side] for side in (first, other)]
            low, high, p = _over_seeds(changes[:, place], *seeds)
            test = "Welch, over images and runs"
        elif name == judged or name.startswith(OF_HEAD):
            only_first = int((changes[:, place] < 0).sum())
            only_other = int((changes[:, place] > 0).sum())
            low, high = paired_difference(only_other, only_first, len(changes))
            p, test = mcnemar(only_other, only_first), "McNemar, exact"
        else:
            assert resampled is not None
            column = resampled[:, place : place + 1]
            low, high = percentiles(column)[0] or (float(column[0, 0]),) * 2
            p, test = float(bootstrap_p(column)[0]), "bootstrap, paired"
        found.append(
            Difference(
                figure=name,
                first=float(means[0][name].mean()),
                other=float(means[1][name].mean()),
                low=low,
                high=high,
                p=p,
                test=test,
            )
        )
    return found


def _over_seeds(
    changes: Floats, first: Sequence[float], other: Sequence[float]
) -> tuple[float, float, float]:
    """Interval and p-value of the mean of `changes`, [N], over other images and other runs.

    The variance is that of the images plus that of the runs of each side, with the degrees of
    freedom of Welch and Satterthwaite; a side of one run is taken to vary as the other does.
    """
    count, sides = len(changes), (first, other)
    known = [(float(np.var(side, ddof=1)), len(side) - 1) for side in sides if len(side) > 1]
    own = known if len(known) > 1 else known * 2
    parts = [(float(changes.var(ddof=min(1, count - 1))) / count, count - 1)]
    parts += [(v / len(side), f) for (v, f), side in zip(own, sides, strict=True)]
    variance = sum(part for part, _ in parts)
    mean = float(changes.mean())
    if not variance:
        return mean, mean, 1.0 if mean == 0 else 0.0
    freedom = variance**2 / sum(part**2 / max(1, number) for part, number in parts)
    half = student_quantile(freedom) * math.sqrt(variance)
    return mean - half, mean + half, student_p(mean / math.sqrt(variance), freedom)


def _check_side(path: Path, options: CompareOptions) -> None:
    """Raise UsageError, before anything is evaluated, for what is none."""
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    if path.suffix.lower() == ".parquet" or (path / PREDICTIONS).is_file():
        return
    if path.is_file() and path.suffix.lower() not in (".onnx", ".pth"):
        raise UsageError(
            f"{path}: expected {PREDICTIONS} of an evaluation (evaluate --out), its folder, a run "
            "directory, or a model file .onnx or .pth"
        )
    best_model(path, key="runs")
    if options.data is None:
        dataset_of(path)


def _read(path: Path, options: CompareOptions) -> _Run:
    """The predictions of a file, of an evaluation, or of a run that is evaluated now."""
    if path.suffix.lower() == ".parquet":
        return _read_table(path)
    if (path / PREDICTIONS).is_file():
        return _read_table(path / PREDICTIONS)
    data = options.data or dataset_of(path)
    log.say(f"{path}: evaluating it on {options.split} of {data}")
    result = evaluate(
        EvaluateOptions(
            model=path,
            data=data,
            split=options.split,
            limit=options.limit,
            batch_size=options.batch_size,
            provider=options.provider,
            workers=options.workers,
        )
    )
    return _of_result(str(path), result)


def _of_result(name: str, result: EvaluationResult) -> _Run:
    found, task = result.outputs, result.task
    truth = np.array(task.texts(found.labels), object)
    ids = list(found.image_ids)
    seen = training_images(Path(result.model), Path(result.data), result.split, ids)
    return _Run(name, task, ids, truth, found.right, found.loss, found, frozenset(seen))


def _read_table(path: Path) -> _Run:
    """Raises UsageError for what `Outputs.write` has not written."""
    import pyarrow as pa

    columns = ["image_id", "truth", "label", "right", "loss", "probabilities"]
    try:
        with stored.open_parquet(path) as file:
            metadata = file.schema_arrow.metadata or {}
            if KEY not in metadata:
                raise ValueError("it does not say of which model and classes it is")
            about = stored.parse_json(metadata[KEY])
            task = Task.from_json(about["task"])
            table = file.read(columns)
        texts = [table.column(name).to_pylist() for name in columns[:3]]
        right = np.asarray(table.column("right").to_numpy(zero_copy_only=False), np.bool_)
        loss = np.asarray(table.column("loss").to_numpy(), np.float64)
        flat = table.column("probabilities").combine_chunks().flatten().to_numpy()
        chances = np.asarray(flat, np.float32).reshape(len(loss), len(task.classes))
        if any(value is None for column in texts for value in column) or not len(loss):
            raise ValueError("it has no row, or a cell without a value")
        require_probabilities(task, chances, loss, texts[0])
        outputs = _outputs_of(task, texts, chances, loss)
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except (OSError, KeyError, TypeError, ValueError, BadValue, pa.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{path}: not the {PREDICTIONS} of distcls evaluate --out ({reason})"
        ) from error
    ids, truth, _ = texts
    given = [about.get(name) for name in ("model", "data", "split")]
    seen: set[str] = set()
    if all(isinstance(value, str) and value for value in given):
        model, data, split = given
        seen = training_images(Path(model), Path(data), split, ids)
    names = np.array(truth, object)
    return _Run(str(path), task, ids, names, right, loss, outputs, frozenset(seen))


def _outputs_of(
    task: Task, texts: Sequence[list[str]], chances: NDArray[np.float32], loss: Floats
) -> Outputs | None:
    """Raises ValueError for labels that are no class."""
    ids, truth, labels = texts
    known, said = labels_of(task, truth), labels_of(task, labels)
    if known is None or said is None:
        return None
    return Outputs(
        task=task,
        image_ids=ids,
        labels=known,
        probabilities=chances,
        decided=said.astype(np.int32),
        loss=loss,
        ranks=np.zeros((len(ids), known.shape[1]), np.int32),
    )


def _title(figure: str) -> str:
    return plain(figure, 40) if figure.startswith(OF_HEAD) else plotting.metric_title(figure)


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"


def p_text(value: float) -> str:
    """A p-value for people."""
    return f"< {LEAST_P:.3f}" if value < LEAST_P else f"{value:.3f}"
