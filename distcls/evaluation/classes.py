"""`match_classes`: the labels of a split in the terms of a model, matched by the names of classes.

A later test set may lack some of the model's classes, have more, or list them in another order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.data.dataset import Split
from distcls.errors import UsageError, plain
from distcls.task import BLANK, BLANK_SHOWN, Head, Integers, Task

MAX_NAMED = 10
"""Classes that a message names; the rest are counted."""


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
        raise UsageError(f"{where}: labels outside of its {len(data.classes)} classes")
    if _keys(data) == _keys(model):
        return MatchedSplit(split=dataclasses.replace(split, task=model))
    places = _places(data, model, where)
    if data.kind == "multi_label":
        labels, known, counts = _translate_labels(split.labels, places, model)
    else:
        labels, known, counts = _translate_heads(split.labels, places, data, model)
    if not known.any():
        raise UsageError(
            f"{where}: no image of {split.name} has a class of the model; it predicts "
            f"{shown_names(model.classes)}, the data has {shown_names(data.classes)}"
        )
    left_out = int((~known).sum())
    what = f"; {left_out:,} images of other classes are left out" if left_out else ""
    log.say(f"{where} has other classes than the model; matched by name{what}")
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
        raise UsageError(
            f"{where} or the model has a class name twice: classes cannot be matched by name"
        )
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


def shown_names(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return ", ".join(plain(name) or BLANK_SHOWN for name in names[:MAX_NAMED]) + more


def _summary(task: Task) -> str:
    return f"one of {task.summary()}" if task.single else task.summary()
