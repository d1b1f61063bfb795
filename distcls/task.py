"""`Task`: what a model predicts, which is single-label, multi-head or multi-label.

The layout is flat: the network gives one row of logits per image, those of the heads one after the
other (or one per label), and the classes of heads are called HEAD:CLASS. So code that counts and
names classes does not depend on heads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from distcls import stored
from distcls.errors import BadValue, plain, require

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Kind = Literal["single_label", "multi_head", "multi_label"]
KINDS = get_args(Kind)

BLANK = ""
"""Padding class of the positions after the end of a text, where texts differ in length."""
BLANK_SHOWN = "␣"
"""A blank before a character: no true text has one, so the prediction is visibly wrong."""
JOINT = "|"
"""Separates the classes or labels of one prediction, unless they are characters."""
THRESHOLD = 0.5
"""Probability from which a label is predicted, unless the model has its own thresholds."""


@dataclasses.dataclass(frozen=True)
class Head:
    """One output head of a multi-head task, such as a character position in a text."""

    name: str
    """Name of the head."""
    classes: tuple[str, ...]
    """Its class names; the index is that of the logit among the head's own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """The type of a model's output and its classes."""

    kind: Kind = "single_label"
    """single_label: one class per image; multi_head: one class per head; multi_label: any number of
    labels, none included."""
    classes: tuple[str, ...]
    """All class names, flat: those of heads as HEAD:CLASS. The index is that of the logit."""
    heads: tuple[Head, ...] = ()
    """Multi-head tasks only."""
    thresholds: tuple[float, ...] | None = None
    """Multi-label tasks only: probability from which each label is predicted; None is 0.5."""
    temperatures: tuple[float, ...] | None = None
    """What the logits are divided by before they become probabilities, which calibrates these: one
    number, one for each head, or one for each label; None is 1. See `distcls calibrate`."""

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "kind", self.kind, f"one of {', '.join(KINDS)}")
        fits = bool(self.heads) == (self.kind == "multi_head")
        require(fits, "heads", self.heads, "heads for multi-head tasks only")
        if self.heads:
            require(self.classes == _flat_names(self.heads), "classes", self.classes, "HEAD:CLASS")
        thresholds = self.thresholds
        if thresholds is not None:
            fits = self.kind == "multi_label" and len(thresholds) == len(self.classes)
            require(fits, "thresholds", thresholds, "one for each label")
            valid = all(0 < number < 1 for number in thresholds)
            require(valid, "thresholds", thresholds, "numbers between 0 and 1")
        self._check_temperatures()
        if not self.single and len(set(self.classes)) < len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise BadValue("classes", twice, "unique names")

    def _check_temperatures(self) -> None:
        given = self.temperatures
        if given is not None:
            count = len(self.classes) if self.kind == "multi_label" else len(self.slices)
            one = "label" if self.kind == "multi_label" else "head" if self.heads else "task"
            require(len(given) == count, "temperatures", given, f"one for each {one}")
            valid = all(number > 0 and math.isfinite(number) for number in given)
            require(valid, "temperatures", given, "finite numbers above 0")

    @classmethod
    def of_heads(cls, heads: Sequence[Head]) -> Task:
        """A multi-head task with these heads."""
        return cls(kind="multi_head", heads=tuple(heads), classes=_flat_names(heads))

    @property
    def single(self) -> bool:
        """Whether the task is single-label."""
        return self.kind == "single_label"

    @property
    def outputs(self) -> str:
        """What its several outputs are called, `heads` or `labels`; empty for a single label."""
        return {"multi_head": "heads", "multi_label": "labels"}.get(self.kind, "")

    @functools.cached_property
    def slices(self) -> tuple[slice, ...]:
        """Which logits compete: those of each head, or of a single class all."""
        sizes = [len(head.classes) for head in self.heads] or [len(self.classes)]
        ends = np.cumsum(sizes).tolist()
        return tuple(slice(end - size, end) for size, end in zip(sizes, ends, strict=True))

    @property
    def alphabet(self) -> tuple[str, ...] | None:
        """The classes of all heads if they are the same, else None."""
        shared = {head.classes for head in self.heads}
        return next(iter(shared)) if len(shared) == 1 else None

    def summary(self) -> str:
        """Type of task and number of classes, for display."""
        if self.kind == "multi_label":
            return f"{len(self.classes)} labels"
        if self.single:
            return f"{len(self.classes)} classes"
        if self.alphabet is not None:
            return f"{len(self.heads)} heads of {len(self.alphabet)} classes each"
        sizes = ", ".join(f"{head.name} {len(head.classes)}" for head in self.heads)
        return f"{len(self.heads)} heads of several classes ({sizes})"

    def shortage(self) -> str:
        """Why there is nothing to choose from, such as `one class only ('cat')`; empty if there is.

        A multi-label task with one label is a choice already: present or absent.
        """
        if self.kind == "multi_label":
            return "" if self.classes else "no label"
        for head in self.heads or (Head("", self.classes),):
            where = f"head {head.name!r} has " if self.heads else ""
            if not head.classes:
                return f"{where}no class"
            if len(head.classes) == 1:
                return f"{where}one class only ({head.classes[0]!r})"
        return ""

    @property
    def plain(self) -> Task:
        """The same task without temperatures, for logits that are `scaled` already."""
        return self if self.temperatures is None else dataclasses.replace(self, temperatures=None)

    @functools.cached_property
    def scales(self) -> Floats | None:
        """What each logit is multiplied by before it becomes a probability, float32 [classes]; None
        without temperatures."""
        if self.temperatures is None:
            return None
        inverse = 1 / np.array(self.temperatures)
        if self.kind != "multi_label":
            inverse = np.repeat(inverse, [span.stop - span.start for span in self.slices])
        return np.asarray(inverse, np.float32)

    def scaled(self, logits: Floats) -> Floats:
        """Logits [N, classes] divided by the temperatures."""
        return logits if self.scales is None else np.asarray(logits * self.scales, np.float32)

    def probabilities(self, logits: Floats) -> Floats:
        """Logits [N, classes] to probabilities, float32 [N, classes].

        Softmax over each head, or a sigmoid for each label, of the logits divided by the
        temperatures.
        """
        logits = self.scaled(logits)
        if self.kind == "multi_label":
            return sigmoid(logits).astype(np.float32)
        parts = [softmax(logits[:, span]) for span in self.slices]
        return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    def decide(self, logits: Floats) -> Integers:
        """Predictions from logits [N, classes], int64.

        Class in each head [N, heads] (a single class is [N, 1]), of equal logits the first; or 0
        and 1 for each label [N, labels].
        """
        if self.kind == "multi_label":
            limits = np.array(self.thresholds or [THRESHOLD] * len(self.classes))
            return (sigmoid(self.scaled(logits)) >= limits).astype(np.int64)
        answers = [logits[:, span].argmax(axis=1) for span in self.slices]
        return np.asarray(np.stack(answers, axis=1), np.int64)

    def confidence(self, probabilities: Floats, answers: Integers) -> Floats:
        """Joint probability of each prediction, float32 [N]: outputs taken as independent."""
        if self.kind == "multi_label":
            parts = np.where(answers == 1, probabilities, 1 - probabilities)
        else:
            parts = self.of_answers(probabilities, answers)
        return np.asarray(parts.prod(axis=1), np.float32)

    def of_answers(self, probabilities: Floats, answers: Integers) -> Floats:
        """Probability of the class predicted by each head, float32 [N, heads]."""
        starts = np.array([span.start for span in self.slices])
        return np.take_along_axis(probabilities, answers + starts, axis=1)

    def text(self, answer: Sequence[int] | Integers) -> str:
        """A prediction as `decide` returns it, as text for people and tables.

        Heads of single characters make a word, without trailing blanks. Other heads and
        labels are separated by `|`.
        """
        if self.kind == "multi_label":
            return JOINT.join(self.classes[index] for index in np.flatnonzero(answer).tolist())
        if self.single:
            return self.classes[answer[0]]
        names = [head.classes[index] for head, index in zip(self.heads, answer, strict=True)]
        if not self._characters:
            return JOINT.join(names)
        last = max((place for place, name in enumerate(names) if name != BLANK), default=-1)
        return "".join(name or BLANK_SHOWN for name in names[: last + 1])

    def texts(self, answers: Integers) -> list[str]:
        """`text` of each of [N] (single), [N, heads] or [N, labels]."""
        rows = answers[:, None] if answers.ndim == 1 else answers
        # an image has few of thousands of labels: NumPy finds them
        return [self.text(row) for row in (rows if self.kind == "multi_label" else rows.tolist())]

    @functools.cached_property
    def _characters(self) -> bool:
        return all(len(name) <= 1 for head in self.heads for name in head.classes)

    def flat(self, labels: Sequence[int]) -> list[int]:
        """Positions in `classes` of a class in each head, or of the labels that are given."""
        if self.kind == "multi_label":
            return list(labels)
        return [span.start + label for span, label in zip(self.slices, labels, strict=True)]

    def to_json(self) -> list[str] | dict[str, Any]:
        """Plain values; of a single class the list of names alone."""
        if self.single:
            return list(self.classes)
        if self.heads:
            heads = [{"name": head.name, "classes": list(head.classes)} for head in self.heads]
            return {"kind": "heads", "heads": heads}
        values: dict[str, Any] = {"kind": self.kind, "classes": list(self.classes)}
        return values | ({"thresholds": list(self.thresholds)} if self.thresholds else {})

    @classmethod
    def from_json(cls, values: Any) -> Task:
        """The inverse of `to_json`. Raises Unfit or BadValue for anything else."""
        task_schema(values, "")
        if isinstance(values, list | tuple):
            return cls(classes=tuple(values))
        if values["kind"] == "heads":
            return cls.of_heads([Head(h["name"], tuple(h["classes"])) for h in values["heads"]])
        thresholds = values.get("thresholds")
        return cls(
            kind=values["kind"],
            classes=tuple(values["classes"]),
            thresholds=None if thresholds is None else tuple(map(float, thresholds)),
        )


_HEAD = stored.record({"name": stored.text(), "classes": stored.names()})
_HEADS = stored.record(
    {"kind": stored.one_of("heads"), "heads": stored.each(_HEAD, stored.MOST_NAMES)}
)
_FLAT = stored.record(
    {"kind": stored.one_of("single_label", "multi_label"), "classes": stored.names()},
    {"thresholds": stored.nothing_or(stored.each(stored.number(0, 1), stored.MOST_NAMES))},
)


def task_schema(value: Any, place: str) -> None:
    """What `Task.to_json` gives: names, each once; or heads or labels with theirs."""
    if isinstance(value, list | tuple):
        stored.names()(value, place)
    else:
        heads = isinstance(value, dict) and value.get("kind") == "heads"
        (_HEADS if heads else _FLAT)(value, place)


def softmax(logits: Floats) -> Floats:
    """Probabilities of each row, float32 [N, K]; the sums are taken in float64."""
    exact = logits.astype(np.float64)
    scaled = np.exp(exact - exact.max(axis=1, keepdims=True))
    return np.asarray(scaled / scaled.sum(axis=1, keepdims=True), np.float32)


def sigmoid(logits: Floats) -> NDArray[np.float64]:
    """1 / (1 + exp(-logits)) without overflow, float64 in the logits' shape."""
    return np.asarray(np.exp(-softplus(-logits.astype(np.float64))))


def softplus(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(1 + exp(values)) without overflow: -log of the sigmoid of -values, in their shape."""
    with np.errstate(invalid="ignore"):  # a NaN gives NaN, which the caller sees
        return np.asarray(np.logaddexp(0.0, values))


def _flat_names(heads: Sequence[Head]) -> tuple[str, ...]:
    return tuple(f"{head.name}:{name}" for head in heads for name in head.classes)


MOST_NAMED, NAMED = 20, 10
"""Up to so many classes are all named, of more only the first ones."""
NAME_LETTERS = 40
"""Of the name of a class, in messages."""


def plain_name(name: str) -> str:
    """A class name without what is easily mistyped: case, blanks, Unicode form.

    >>> plain_name(" Cafe\\u0301  au lait") == plain_name("CAF\\u00c9 au lait")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def same_names(classes: Iterable[str]) -> list[list[str]]:
    """The class names that differ in case, blanks or Unicode form alone, together."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        groups[plain_name(name)].append(name)
    return [names for names in groups.values() if len(names) > 1]


def class_list(names: Sequence[str]) -> str:
    """The class names for a line of text; of more than 20 the first ones and their number."""
    shown = [_in_a_list(name) for name in names[:MOST_NAMED]]
    if len(names) <= MOST_NAMED:
        return ", ".join(shown)
    return f"{', '.join(shown[:NAMED])}, ... ({len(names):,} in all)"


def _in_a_list(name: str) -> str:
    name = plain(name, NAME_LETTERS)
    return f"'{name}'" if "," in name else name
