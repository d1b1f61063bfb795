"""What a model says of images: each one's `Prediction`, a list of them, and the rows of a table.

`predictions_of` and `RowBuilder` both read the chunks of a pipeline, so an object in Python and a
row of `distcls predict` hold the same label and the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray

from distcls.cli import import_pandas
from distcls.errors import BadImage, UsageError, is_count, require
from distcls.task import BLANK_SHOWN, JOINT, Floats, Integers, Task, class_list

if TYPE_CHECKING:
    import pandas

    from distcls.runtime.pipeline import Chunk

MOST_SHOWN = 60
"""Letters of a label in a `repr`: a multi-label model may have thousands."""
ROWS_SHOWN = 20
"""Predictions in the `repr` of a list."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Prediction:
    """The prediction for one image."""

    image_id: str | None
    """The image's name: its path or URL as given, of a folder's image the path below the folder;
    None for bytes and arrays, which have none."""
    error: str | None
    """Why there is no prediction: the image cannot be decoded, or the output is not finite."""
    logits: Floats
    """float32 [K]; NaN with an error."""
    probabilities: Floats
    """Of each class, float32 [K], 0 to 1: softmax, separately for each head, or sigmoid of labels;
    NaN with an error."""
    label: str | None
    """The predicted class; the classes of all heads, as one word where they are characters, else
    with `|` between; the labels found, with `|` between. None with an error."""
    probability: float | None
    """Of the label, 0 to 1; of several classes the joint one, as if they were independent. None
    with an error."""
    features: Floats | None
    """float32 [D], the input of the network's last layer, if the model returns it."""
    task: Task
    """The model's task: its classes, and which of the logits compete."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of `probabilities`, [K]; of heads as HEAD:CLASS."""
        return self.task.classes

    @property
    def labels(self) -> tuple[str, ...]:
        """The predicted class, the class of each head, or all labels found; empty with an error."""
        if self.error is not None:
            return ()
        decided = self._decided()[0].tolist()
        if self.task.heads:
            named = zip(self.task.heads, decided, strict=True)
            return tuple(head.classes[index] for head, index in named)
        chosen = decided if self.task.single else np.flatnonzero(decided).tolist()
        return tuple(self.classes[index] for index in chosen)

    @property
    def heads(self) -> dict[str, tuple[str, float]]:
        """Multi-head models: class and probability of each head, by its name; else empty."""
        if self.error is not None or not self.task.heads:
            return {}
        own = shortest(self.task.of_answers(self.probabilities[None], self._decided())[0])
        names = [head.name for head in self.task.heads]
        return dict(zip(names, zip(self.labels, own, strict=True), strict=True))

    def top_k(self, k: int = 5) -> list[tuple[str, float]]:
        """The likeliest classes with their probabilities.

        Args:
            k: number of classes, 1 to the number that there are.

        Returns:
            `k` pairs (class, probability), the likeliest first; of equal ones the lower class.

        Raises:
            BadValue: for another `k`.
            UsageError: for multi-head and multi-label models; see `heads` and `probabilities`.
            BadImage: if the prediction has an `error`.
        """
        if not self.task.single:
            raise UsageError(
                f"top_k: {k} is for a single label per image, the model has {self.task.summary()}; "
                f"see {'heads' if self.task.heads else 'labels'} and probabilities"
            )
        require(
            is_count(k) and k <= len(self.classes),
            "top_k",
            k,
            f"1 to {len(self.classes)}, the classes",
        )
        self.raise_error()
        ranked = ranking(self.logits[None], k)[0]
        values = shortest(self.probabilities[ranked])
        return [(self.classes[i], value) for i, value in zip(ranked.tolist(), values, strict=True)]

    def raise_error(self) -> None:
        """Raise BadImage, with the image's name if it has one, if there is an error."""
        if self.error is not None:
            name = "" if self.image_id is None else f"{self.image_id}: "
            raise BadImage(name + self.error)

    def _decided(self) -> Integers:
        return self.task.decide(self.logits[None])

    def __repr__(self) -> str:
        name = "" if self.image_id is None else f"{self.image_id!r}, "
        if self.error is not None:
            return f"Prediction({name}error={self.error!r})"
        label = repr(self.label)
        if len(label) > MOST_SHOWN:
            label = f"{label[: MOST_SHOWN - 4]}...{label[0]}"
        return f"Prediction({name}label={label}, probability={self.probability:.4f})"


class Predictions(list[Prediction]):
    """Predictions in the order of their images: a list, whose slices are `Predictions` too."""

    def to_dataframe(self, *, top_k: int = 1, probabilities: bool = False) -> pandas.DataFrame:
        """A pandas DataFrame with the columns and values of `distcls predict`'s CSV.

        Args:
            top_k: number of classes to name, the likeliest first; 1 for multi-head and multi-label.
            probabilities: whether to add the probability of each class.

        Returns:
            A row for each prediction. The columns are image_id, label, probability, with `top_k`
            label_2, probability_2, ..., of heads label:HEAD and probability:HEAD, with
            `probabilities` p:CLASS, and error. What the CSV leaves empty is None or NaN.

        Raises:
            UsageError: if pandas is not installed, without a prediction, for a `top_k` that the
                task does not have, and for predictions of models with other classes.
        """
        make_frame = import_pandas().DataFrame
        if not self:
            raise UsageError("to_dataframe: there is no prediction, so its columns are not known")
        task = self[0].task
        other = next((each.task for each in self if each.classes != task.classes), None)
        if other is not None:
            raise UsageError(
                "to_dataframe: predictions of two models with other classes, of "
                f"{task.summary()} ({class_list(task.classes)}) and of {other.summary()} "
                f"({class_list(other.classes)}); make a table of each"
            )
        from distcls.runtime.pipeline import Chunk

        rows = RowBuilder(task, top_k=top_k, probabilities=probabilities)
        chunk = Chunk(
            indices=range(len(self)),
            logits=np.stack([prediction.logits for prediction in self]),
            errors=[prediction.error for prediction in self],
        )
        columns = rows(chunk, [prediction.image_id for prediction in self])
        return make_frame(columns)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> Predictions: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Prediction | Predictions:
        found = super().__getitem__(index)
        return found if isinstance(found, Prediction) else Predictions(found)

    def __repr__(self) -> str:
        """A line for each of the first ones."""
        lines = [f"  {prediction!r}," for prediction in self[:ROWS_SHOWN]]
        if len(self) > ROWS_SHOWN:
            lines.append(f"  ... ({len(self):,} in all)")
        return "\n".join(["Predictions([", *lines, "])"]) if self else "Predictions([])"


def predictions_of(chunk: Chunk, image_ids: Iterable[str | None], task: Task) -> list[Prediction]:
    """The predictions of a chunk; `image_ids` are those of its images, in order."""
    good = np.array([error is None for error in chunk.errors])
    probabilities = np.full_like(chunk.logits, np.nan)
    probabilities[good] = task.probabilities(chunk.logits[good])
    decided = task.decide(chunk.logits[good])
    confidence = shortest(task.confidence(probabilities[good], decided))
    named = iter(zip(task.texts(decided), confidence, strict=True))
    results = []
    for position, (error, image_id) in enumerate(zip(chunk.errors, image_ids, strict=True)):
        label, probability = next(named) if error is None else (None, None)
        results.append(
            Prediction(
                image_id=image_id,
                error=error,
                logits=chunk.logits[position],
                probabilities=probabilities[position],
                label=label,
                probability=probability,
                features=None if chunk.features is None else chunk.features[position],
                task=task,
            )
        )
    return results


def ranking(logits: Floats, k: int) -> Integers:
    """The `k` likeliest classes of each row of logits [N, K], int64 [N, k].

    Of equal logits the lower class comes first.
    """
    return np.argsort(-logits, axis=1, kind="stable")[:, :k]


ABSTAINED = "abstained"
"""Column with --threshold: whether a label, or that of any head, was not likely enough."""

SET, UNSURE = "set", "unsure"
"""Columns with --coverage: the classes of the prediction set, with `|` between; of labels those
that an image has, and those that it may have or not."""


def require_coverage(value: float | None) -> None:
    """Raise BadValue for what is no coverage of prediction sets."""
    require(value is None or 0 < value < 1, "coverage", value, "between 0 and 1, as in 0.9")


def least_probabilities(
    calibration: dict[str, Any] | None, coverage: float | None
) -> list[float] | None:
    """What a card's calibration has of prediction sets: the least probability of a class in that of
    each head, or for labels that of each yes and of each no; None without a coverage.

    Raises UsageError for a coverage that the model was not calibrated for, BadValue for none.
    """
    if coverage is None:
        return None
    require_coverage(coverage)
    sets = (calibration or {}).get("sets", [])
    for entry in sets:
        if math.isclose(entry["coverage"], coverage, abs_tol=1e-9):
            return list(entry["least_probability"])
    known = ", ".join(f"{entry['coverage']:g}" for entry in sets)
    has = (
        f"the model has prediction sets of {known}" if known else "the model has no prediction sets"
    )
    raise UsageError(f"coverage: {has}; distcls calibrate MODEL --coverage {coverage:g} fits them")


def prediction_sets(
    task: Task, probabilities: Floats, least: Sequence[float]
) -> list[list[list[str]]]:
    """The classes in the prediction set of each image, the likeliest first, a list for each head.

    `least` are the least probabilities of each head's classes. A set may be empty. Of labels there
    are two lists: those of which yes is in the set and no is not, and those that are unsure, of
    which both are or neither is; `least` are then those of yes for each label, and those of no.
    """
    if task.kind == "multi_label":
        limits = np.array(least, np.float32).reshape(2, -1)
        yes, no = probabilities >= limits[0], 1 - probabilities >= limits[1]
        return [_members(task.classes, probabilities, inside) for inside in (yes & ~no, yes == no)]
    heads = [head.classes for head in task.heads] or [task.classes]
    return [
        _members(classes, probabilities[:, span], probabilities[:, span] >= np.float32(limit))
        for classes, span, limit in zip(heads, task.slices, least, strict=True)
    ]


def _members(
    classes: Sequence[str], probabilities: Floats, inside: NDArray[np.bool_]
) -> list[list[str]]:
    """The names of the classes that are `inside`, [N, K], the likeliest first."""
    sizes = inside.sum(axis=1)
    ranks = np.where(inside, -probabilities, np.inf)
    ranked = np.argsort(ranks, axis=1, kind="stable")[:, : sizes.max(initial=0)]
    return [
        [classes[place] or BLANK_SHOWN for place in row[:count]]
        for row, count in zip(ranked.tolist(), sizes.tolist(), strict=True)
    ]


Columns = dict[str, Sequence[Any]]
"""Some rows, by column: text, numbers or None."""
LabelColumns = tuple[list[str | None], Floats]
"""Labels and probabilities of some images, for one pair of columns."""


class RowBuilder:
    """Turns chunks into columns of a table.

    image_id, label, probability, then for single-label tasks the next likely classes (label_2,
    probability_2, ...), for heads each one's own (label:HEAD, probability:HEAD), then on request
    p:CLASS and the prediction set (set, or set:HEAD, or of labels set and unsure), with a threshold
    abstained, and error. The
    probability of a multi-head or multi-label prediction is the joint one of all its classes, as if
    they were independent.
    """

    def __init__(
        self,
        task: Task,
        *,
        top_k: int = 1,
        probabilities: bool = False,
        threshold: float | None = None,
        least: Sequence[float] | None = None,
    ) -> None:
        """`least`, the least probability of each head's classes, asks for prediction sets.

        Raises BadValue for a `top_k` below 1, UsageError for what the task does not support.

        That is a `top_k` of more classes than there are, or of heads or labels at all, and a
        threshold of labels.
        """
        require(is_count(top_k), "top_k", top_k, "an integer of at least 1")
        if not task.single and top_k > 1:
            raise UsageError(
                f"top_k: {top_k} is for a single label per image, the model has {task.summary()}; "
                "probabilities gives them all"
            )
        if top_k > len(task.classes):
            number = len(task.classes)
            raise UsageError(f"top_k: {top_k} is more than the model's {number} classes")
        if task.kind == "multi_label" and threshold is not None:
            raise UsageError(
                f"threshold: {threshold:g} is for a single label per image or head, the model "
                f"has {task.summary()}, each with its own threshold; probabilities gives "
                "them all"
            )
        self._task = task
        self._top_k = top_k
        self._threshold = threshold
        self._least = least
        endings = [f":{head.name}" for head in task.heads] or [""]
        sets = [SET, UNSURE] if task.kind == "multi_label" else [f"{SET}{e}" for e in endings]
        self._sets = [] if least is None else sets
        self._all = [f"p:{name}" for name in task.classes] if probabilities else []
        endings = [f"_{rank + 1}" if rank else "" for rank in range(top_k)]
        endings += [f":{head.name}" for head in task.heads]
        self._pairs = [(f"label{ending}", f"probability{ending}") for ending in endings]

    @property
    def names(self) -> list[str]:
        """All columns in order."""
        pairs = [name for pair in self._pairs for name in pair]
        more = (*self._sets, *sorted(self.booleans))
        return ["image_id", *pairs, *self._all, *more, "error"]

    @property
    def numbers(self) -> set[str]:
        """The columns that hold numbers."""
        return {probability for _, probability in self._pairs} | set(self._all)

    @property
    def booleans(self) -> set[str]:
        """The columns that hold true or false."""
        return set() if self._threshold is None else {ABSTAINED}

    def __call__(self, chunk: Chunk, image_ids: Sequence[str | None]) -> Columns:
        """The rows of a chunk; a bad image's is empty but for its name and the error.

        With a threshold, a class that is less likely is not named; its probability stays. The label
        of all heads is named if each head's class is.
        """
        good = np.array([error is None for error in chunk.errors])
        logits = chunk.logits[good]
        probabilities = self._task.probabilities(logits)
        labels = self._top_classes if self._task.single else self._multi_output
        found, abstained = labels(logits, probabilities)
        columns: Columns = {"image_id": [image_ids[index] for index in chunk.indices]}
        for (label, probability), (texts, values) in zip(self._pairs, found, strict=True):
            columns[label] = _spread(good, texts)
            columns[probability] = _spread(good, shortest(values))
        for index, name in enumerate(self._all):
            columns[name] = _spread(good, shortest(probabilities[:, index]))
        if self._least is not None:
            found_sets = prediction_sets(self._task, probabilities, self._least)
            for name, sets in zip(self._sets, found_sets, strict=True):
                columns[name] = _spread(good, [JOINT.join(names) for names in sets])
        if self._threshold is not None:
            columns[ABSTAINED] = _spread(good, abstained.tolist())
        columns["error"] = chunk.errors
        return columns

    def _top_classes(
        self, logits: Floats, probabilities: Floats
    ) -> tuple[list[LabelColumns], NDArray[np.bool_]]:
        """The likeliest class, the next, and so on; and which images are abstained from, [N]."""
        ranked = self._task.decide(logits) if self._top_k == 1 else ranking(logits, self._top_k)
        of_rank = np.take_along_axis(probabilities, ranked, axis=1)
        abstained = self._below_threshold(of_rank[:, 0])
        named = np.array(self._task.classes, object)[ranked]
        named[abstained, 0] = None
        columns = [(named[:, rank].tolist(), of_rank[:, rank]) for rank in range(self._top_k)]
        return columns, abstained

    def _multi_output(
        self, logits: Floats, probabilities: Floats
    ) -> tuple[list[LabelColumns], NDArray[np.bool_]]:
        """All heads or labels as one text, then each head's; and which are abstained from, [N]."""
        decided = self._task.decide(logits)
        joint = self._task.confidence(probabilities, decided)
        abstained = np.zeros(len(logits), np.bool_)
        heads: list[LabelColumns] = []
        if self._task.heads:
            own = self._task.of_answers(probabilities, decided)
            for position, head in enumerate(self._task.heads):
                below = self._below_threshold(own[:, position])
                names = [head.classes[index] for index in decided[:, position].tolist()]
                heads.append((_blank_where(names, below), own[:, position]))
                abstained |= below
        return [(_blank_where(self._task.texts(decided), abstained), joint), *heads], abstained

    def _below_threshold(self, probabilities: Floats) -> NDArray[np.bool_]:
        """Whether each of [N] is less than the threshold; all False without one."""
        if self._threshold is None:
            return np.zeros(len(probabilities), np.bool_)
        return np.asarray(probabilities < self._threshold, np.bool_)


def _blank_where(texts: list[str], abstained: NDArray[np.bool_]) -> list[str | None]:
    return [None if blank else text for text, blank in zip(texts, abstained.tolist(), strict=True)]


def _spread(good: NDArray[np.bool_], values: list[Any]) -> list[Any]:
    """`values` for the readable images, None for bad ones."""
    if good.all():
        return values
    left = iter(values)
    return [next(left) if is_good else None for is_good in good.tolist()]


def shortest(values: NDArray[np.float32]) -> list[float]:
    """Numbers whose decimal form is the shortest that gives the same float32 back."""
    return [float(text) for text in values.astype(np.str_).tolist()]
