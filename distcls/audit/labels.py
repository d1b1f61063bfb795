"""Labels that the other images contradict: confident learning on out-of-fold probabilities.

Northcutt, Jiang, Chuang: Confident Learning: Estimating Uncertainty in Dataset Labels, 2021. Each
image is predicted by a model that was trained without it; a class is believed where its probability
is at least what it is on average for the images with that label.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.audit.checks import Teller
from distcls.audit.findings import Finding
from distcls.cli import packages_for
from distcls.config import build, config_file, options_layer, read_yaml
from distcls.data.dataset import Dataset
from distcls.data.image_dataset import Opened
from distcls.data.prepare import PrepareOptions, prepare
from distcls.data.source import ImageRecord, Images
from distcls.data.writer import write_png
from distcls.errors import DistclsError, Stopped, UsageError
from distcls.files import csv_line
from distcls.task import Task

if TYPE_CHECKING:
    from distcls.training.config import TrainConfig

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelIssues:
    """Which labels are probably wrong."""

    suspects: Integers
    """Positions of the images whose label is probably wrong, the surest first."""
    joint: Integers
    """The confident joint: images by label (rows) and believed class (columns), [K, K]."""


def find_label_issues(labels: Integers, probabilities: Floats) -> LabelIssues:
    """Confident learning from labels [N] and out-of-fold probabilities [N, K].

    The confident joint says how many labels are wrong; so many images with the least probability
    of their label are suspects, unless their label is the likeliest class all the same. (On 6,000
    images of clothes with 3 % of the labels flipped the first 180 by this order are right more
    often than by the margin, or among the off-diagonal images alone.)
    """
    count, classes = probabilities.shape
    own = probabilities[np.arange(count), labels]
    sizes = np.bincount(labels, minlength=classes)
    means = np.bincount(labels, own, minlength=classes) / np.maximum(sizes, 1)
    sure = probabilities >= np.where(sizes > 0, means, 2.0)
    believed = np.where(sure, probabilities, -1.0).argmax(1)
    confident = sure.any(1)
    joint = np.zeros((classes, classes), np.int64)
    np.add.at(joint, (labels[confident], believed[confident]), 1)
    totals = joint.sum(1)
    wrong = (sizes * (totals - joint.diagonal()) / np.maximum(totals, 1)).sum()
    order = np.argsort(own, kind="stable")[: round(float(wrong))]
    suspects = order[probabilities[order].argmax(1) != labels[order]]
    return LabelIssues(suspects=suspects, joint=joint)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judges:
    """The runs whose models judge the labels; see `AuditOptions`."""

    folds: int
    recipe: str | None
    seed: int

    def check(self, task: Task, records: Sequence[ImageRecord]) -> None:
        """Raise UsageError, before any image is read, for tasks with several outputs, images that
        cannot be divided into folds, and a recipe that nothing can be trained with."""
        if not task.single:
            raise UsageError("label_errors: only for one class per image")
        self.divided(records, np.arange(len(records)))
        with packages_for("label_errors"):
            from distcls.training.resolve import require_usable  # torch

            require_usable(self.config(Path("data"), Path("run")))

    def divided(self, records: Sequence[ImageRecord], good: Integers) -> Integers:
        """Those of the images `good` that can be judged: a class of one image cannot be learnt
        without it. Raises UsageError for fewer than folds."""
        classes = np.array([records[at].label for at in good], np.int64)
        good = good[np.bincount(classes)[classes] > 1] if len(good) else good
        if len(good) < self.folds:
            raise UsageError(
                f"folds: {self.folds}, but only {len(good):,} of {len(records):,} images can be "
                "divided: readable ones of classes with at least two"
            )
        return good

    def config(self, data: Path, out: Path) -> TrainConfig:
        """Of a run."""
        from distcls.training.config import TrainConfig

        layers = [] if self.recipe is None else [read_yaml(config_file(self.recipe))]
        given: dict[str, Any] = {"data": data, "out": out, "seed": self.seed, "quiet": True}
        return build(TrainConfig, *layers, options_layer(TrainConfig, given))


def label_findings(
    inside: Opened, task: Task, good: Integers, judges: Judges
) -> tuple[list[Finding], float]:
    """Train on all folds but one, for each of them, and judge the labels of the images `good`; also
    how often these models are right. Warns where that is too seldom for a judgement.

    Raises UsageError where no folds can be made, and what `fit` raises.
    """
    good = judges.divided(inside.records, good)
    with tempfile.TemporaryDirectory(prefix="distcls-audit-") as folder:
        probabilities = out_of_fold(inside, task, good, Path(folder), judges)
    labels = np.array([inside.records[at].label for at in good], np.int64)
    issues = find_label_issues(labels, probabilities)
    accuracy = float((probabilities.argmax(1) == labels).mean())
    poor = (1 + np.bincount(labels).max() / len(labels)) / 2
    if accuracy < poor:
        log.warn(
            f"label errors: the models that judge are right for {accuracy:.1%} of the images only, "
            "so the list is not worth much; a better --recipe, or pretrained weights, help"
        )
    tell = Teller(inside.records, task)
    found = []
    for place in issues.suspects.tolist():
        row = probabilities[place]
        other = int(np.where(np.arange(len(row)) == labels[place], -1, row).argmax())
        text = (
            f"models trained without it say {task.classes[other]!r} ({row[other]:.2f}), "
            f"not {task.classes[labels[place]]!r} ({row[labels[place]]:.2f})"
        )
        value = round(float(row[labels[place]]), 4)
        finding = tell(int(good[place]), "label_error", "warning", text, value=value)
        found.append(dataclasses.replace(finding, related=task.classes[other]))
    return found, accuracy


def out_of_fold(inside: Opened, task: Task, good: Integers, folder: Path, judges: Judges) -> Floats:
    """Probabilities of the images `good` (positions), each by a model that has not seen it: [n, K].

    The images of all splits are divided into folds; `folder` is for the runs' files.
    """
    from distcls.training.run import fit  # torch

    manifest = _manifest(inside, good, folder)
    found = np.zeros((len(good), len(task.classes)))
    folds = judges.folds
    for fold in range(1, folds + 1):
        log.say(f"label errors: fold {fold} of {folds}")
        data = folder / f"data-{fold}"
        prepare(
            PrepareOptions(
                source=str(manifest),
                out=data,
                folds=folds,
                fold=fold,
                test_fraction=0.0,
                seed=judges.seed,
                max_bad=0.0,
                quiet=True,
            )
        )
        try:
            result = fit(judges.config(data, folder / f"run-{fold}"))
        except Stopped as stopped:  # its state goes with the folder
            before = str(stopped).partition(" after step")[0]
            raise DistclsError(f"label errors: fold {fold} of {folds} {before}") from stopped
        split = Dataset.open(data).split("val")
        ids = split.image_ids
        with result.load() as predictor:
            columns = [int(name) for name in predictor.classes]
            for chunk in predictor.chunks(split):
                probabilities = predictor.task.probabilities(chunk.logits)
                for index, row in zip(chunk.indices, probabilities, strict=True):
                    found[int(ids[index]), columns] = row
    return found


def _manifest(inside: Opened, good: Integers, folder: Path) -> Path:
    """A manifest of the images, without their splits and with the numbers of their classes; those
    that are no files become some."""
    pictures, found = folder / "images", folder / "images.csv"
    pictures.mkdir()
    with found.open("w", encoding="utf-8", newline="") as handle:
        handle.write(csv_line(("image_id", "path", "label")))
        for place, at in enumerate(good.tolist()):
            record = inside.records[at]
            if inside.root is not None and record.path is not None:
                path = inside.root / record.path
            else:
                path = pictures / f"{_name(place)}.png"
                image: Images = inside.source_of(record.split).image(record.index)
                write_png(path, image)
            handle.write(csv_line((_name(place), path.resolve(), record.label)))
    return found


def _name(place: int) -> str:
    return f"{place:09d}"
