"""`Outputs`: what a model gives for each image of a split; and predictions.parquet, its table."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distcls import __version__, log
from distcls.files import atomic_path, zeros
from distcls.task import (
    BLANK,
    BLANK_SHOWN,
    JOINT,
    THRESHOLD,
    Floats,
    Integers,
    Task,
    softplus,
)

if TYPE_CHECKING:
    import pyarrow as pa

PREDICTIONS = "predictions.parquet"
BLOCK, MOST_ROWS = 1 << 17, 1 << 13
"""Values, and rows, that are computed with at a time."""
SUM_ERROR = 1e-3
"""How far from 1 the sum of an image's probabilities may be."""
KEY = b"distcls"
"""Key of the table's metadata, JSON: the model, the data, the split, and the task."""


def blocks(count: int, width: int) -> Iterator[slice]:
    """Consecutive rows of [count, width], at most BLOCK values each."""
    rows = min(MOST_ROWS, max(1, BLOCK // max(1, width)))
    return (slice(start, min(count, start + rows)) for start in range(0, count, rows))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Outputs:
    """Probabilities of all images, and what follows for each; N images, K classes.

    H is the number of heads, 1 for a single label; of a multi-label task that of the labels, K.
    """

    task: Task
    """The model's."""
    image_ids: Sequence[str]
    labels: Integers
    """The truth, int64 [N, H]: a class in each head, or 0 and 1 for each label."""
    probabilities: Floats
    """float32 [N, K], calibrated if the task has temperatures."""
    decided: NDArray[np.int32]
    """The predictions, in the form of `labels`."""
    loss: NDArray[np.float64]
    """Cross-entropy in nats, the mean over heads or labels, [N]."""
    ranks: NDArray[np.int32]
    """How many classes have a greater logit than the true one, [N, H]; of labels zeros [N, 0]."""
    columns: pa.Table | None = None
    """The manifest's other columns, [N]."""

    @classmethod
    def of(
        cls,
        task: Task,
        logits: Floats,
        labels: Integers,
        image_ids: Sequence[str],
        columns: pa.Table | None = None,
    ) -> Outputs:
        """Those of raw logits, float32 [N, K]; `labels` as `Split.labels` has them."""
        count, width = logits.shape
        truth = labels.reshape(count, -1)
        labelled = task.kind == "multi_label"
        found = cls(
            task=task,
            image_ids=image_ids,
            labels=truth,
            probabilities=zeros((count, width), np.float32),
            decided=np.zeros(truth.shape, np.int32),
            loss=np.zeros(count),
            ranks=np.zeros((count, 0 if labelled else truth.shape[1]), np.int32),
            columns=columns,
        )
        for rows in blocks(count, width):
            scaled = task.scaled(logits[rows])
            found.probabilities[rows] = task.plain.probabilities(scaled)
            found.decided[rows] = task.plain.decide(scaled)
            found.loss[rows] = losses(task, scaled, truth[rows])
            if not labelled:
                found.ranks[rows] = _ranks(task, scaled, truth[rows])
        return found

    def __len__(self) -> int:
        return len(self.loss)

    @functools.cached_property
    def hits(self) -> NDArray[np.bool_]:
        """Which decisions are right, [N, H]."""
        return np.asarray(self.decided == self.labels)

    @functools.cached_property
    def right(self) -> NDArray[np.bool_]:
        """Which images are right in all heads or labels, [N]."""
        return np.asarray(self.hits.all(axis=1))

    def confidence(self, rows: slice) -> Floats:
        """Probability of each image's prediction, of several outputs the joint one, [n]."""
        return self.task.confidence(self.probabilities[rows], self._of(rows))

    def weakest(self, rows: slice) -> Floats:
        """Probability of each image's prediction, of heads that of the least likely one, [n]: what
        `distcls predict --threshold` compares."""
        return np.asarray(
            self.task.of_answers(self.probabilities[rows], self._of(rows)).min(axis=1), np.float32
        )

    def margin(self, rows: slice) -> Floats:
        """How far each image's prediction is from another one, float32 [n].

        Between the two likeliest classes, of heads the least; of labels the least distance of a
        probability from its threshold.
        """
        chances = self.probabilities[rows]
        if self.task.kind == "multi_label":
            limits = np.array(self.task.thresholds or [THRESHOLD] * chances.shape[1], np.float32)
            return np.asarray(np.abs(chances - limits).min(axis=1), np.float32)
        parts = [chances[:, span] for span in self.task.slices]
        return np.asarray(np.min([_lead(part) for part in parts], axis=0), np.float32)

    def take(self, places: NDArray[np.int64]) -> Outputs:
        """Those of some images, in another order."""
        ids = [self.image_ids[place] for place in places.tolist()]
        arrays = ("labels", "probabilities", "decided", "loss", "ranks")
        taken = {name: getattr(self, name)[places] for name in arrays}
        columns = None if self.columns is None else self.columns.take(places)
        return dataclasses.replace(self, image_ids=ids, columns=columns, **taken)

    def write(self, path: Path, about: dict[str, Any]) -> None:
        """Write predictions.parquet, atomically and in groups of rows; `about` goes into its
        metadata."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        temperatures = self.task.temperatures
        about = {**about, "distcls": __version__, "task": self.task.to_json()}
        about |= {"temperatures": None if temperatures is None else list(temperatures)}
        width = self.probabilities.shape[1]
        schema = pa.schema(
            {
                **{"image_id": pa.string(), "truth": pa.string(), "label": pa.string()},
                **{"right": pa.bool_(), "probability": pa.float32(), "margin": pa.float32()},
                **{"loss": pa.float64(), "probabilities": pa.list_(pa.float32(), width)},
            }
        )
        for field in () if self.columns is None else self.columns.schema:
            schema = schema.append(field)
        schema = schema.with_metadata({KEY: json.dumps(about).encode()})
        with atomic_path(path) as part, pq.ParquetWriter(part, schema) as writer:
            for rows in blocks(len(self), width):
                writer.write_table(self._table(rows, schema))

    def _table(self, rows: slice, schema: pa.Schema) -> pa.Table:
        import pyarrow as pa

        chances = pa.array(self.probabilities[rows].ravel())
        columns = [
            pa.array(self.image_ids[rows]),
            pa.array(self.task.texts(self.labels[rows])),
            pa.array(self.task.texts(self._of(rows))),
            pa.array(self.right[rows]),
            pa.array(self.confidence(rows)),
            pa.array(self.margin(rows)),
            pa.array(self.loss[rows]),
            pa.FixedSizeListArray.from_arrays(chances, self.probabilities.shape[1]),
        ]
        if self.columns is not None:
            columns += self.columns[rows].columns
        return pa.Table.from_arrays(columns, schema=schema)

    def _of(self, rows: slice) -> Integers:
        return self.decided[rows].astype(np.int64)


def labels_of(task: Task, texts: Sequence[str]) -> Integers | None:
    """What `Task.texts` made the texts of: int64 [N, H]; None where class names hold its separator.

    Raises ValueError for a text that is of no classes.
    """
    heads = [head.classes for head in task.heads] or [task.classes]
    letters = task.kind == "multi_head" and all(len(n) <= 1 for names in heads for n in names)
    if not task.single and not letters and any(JOINT in name for names in heads for name in names):
        return None
    places = [{name: place for place, name in enumerate(names)} for names in heads]
    found = np.zeros((len(texts), len(task.classes if task.kind == "multi_label" else heads)), int)
    for row, text in zip(found, texts, strict=True):
        try:
            if task.kind == "multi_label":
                row[[places[0][name] for name in text.split(JOINT) if text]] = 1
                continue
            names = [text] if task.single else text.split(JOINT)
            if letters:
                shown = BLANK if BLANK_SHOWN not in places[0] else BLANK_SHOWN
                names = [shown if letter == BLANK_SHOWN else letter for letter in text]
                names += [BLANK] * (len(heads) - len(names))
            row[:] = [known[name] for known, name in zip(places, names, strict=True)]
        except (KeyError, ValueError) as error:
            raise ValueError(f"label {text!r} is none of its classes") from error
    return found


def require_probabilities(
    task: Task, chances: Floats, loss: NDArray[np.float64], image_ids: Sequence[str]
) -> None:
    """Raise ValueError, naming the first image, for numbers that no model gives."""
    with np.errstate(invalid="ignore", over="ignore"):
        off = ~((chances >= 0) & (chances <= 1 + SUM_ERROR)).all(axis=1)
        if task.kind != "multi_label":
            for span in task.slices:
                off |= ~(np.abs(chances[:, span].sum(axis=1) - 1) <= SUM_ERROR)
    wrong = (
        (off, "probabilities that are not 0 to 1, or of which the sum is not 1"),
        (~(np.isfinite(loss) & (loss >= 0)), "a loss that is no number of at least 0"),
    )
    for bad, words in wrong:
        if bad.any():
            count, first = log.counted(int(bad.sum()), "image"), image_ids[int(bad.argmax())]
            raise ValueError(f"{count} with {words}, first {first!r}")


def losses(task: Task, scaled: Floats, labels: Integers) -> NDArray[np.float64]:
    """Cross-entropy of each image, [N], of logits that are divided by the temperatures already."""
    exact = scaled.astype(np.float64)
    if task.kind == "multi_label":
        return np.asarray(softplus(np.where(labels == 1, -exact, exact)).mean(axis=1))
    total = np.zeros(len(exact))
    for place, span in enumerate(task.slices):
        part = exact[:, span]
        peak = part.max(axis=1)
        sums = np.log(np.exp(part - peak[:, None]).sum(axis=1)) + peak
        total += sums - np.take_along_axis(part, labels[:, place, None], axis=1)[:, 0]
    return total / len(task.slices)


def _ranks(task: Task, scaled: Floats, labels: Integers) -> NDArray[np.int32]:
    """Classes before the true one, [N, H]; of equal logits the lower class comes first."""
    columns = []
    for place, span in enumerate(task.slices):
        part, truth = scaled[:, span], labels[:, place, None]
        own = np.take_along_axis(part, truth, axis=1)
        tied = (part == own) & (np.arange(part.shape[1]) < truth)
        columns.append(((part > own) | tied).sum(axis=1))
    return np.stack(columns, axis=1).astype(np.int32)


def _lead(chances: Floats) -> Floats:
    """The greatest probability minus the second, [N]; of one class the greatest."""
    if chances.shape[1] < 2:
        return chances[:, 0]
    top = np.partition(chances, -2, axis=1)[:, -2:]
    return np.asarray(top[:, 1] - top[:, 0], np.float32)
