"""Labels that the other images contradict: confident learning on out-of-fold probabilities.

Northcutt, Jiang, Chuang: Confident Learning: Estimating Uncertainty in Dataset Labels, 2021. Each
image is predicted by a model that was trained without it; a class is believed where its probability
is at least what it is on average for the images with that label.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

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
from distcls.registry import reference
from distcls.task import Task

if TYPE_CHECKING:
    from distcls.training.config import TrainConfig
    from distcls.training.hooks import CallbackRun

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

LONG_LIST = 0.1
"""Share of the images from which a list of suspects is mostly false. Of simulated classes, 2 to 100
of them, with 3 % of the labels wrong, such a list has a quarter of wrong labels or fewer; published
datasets have 0.2 to 10 % of them (Northcutt, Athalye, Mueller: Pervasive Label Errors, 2021)."""


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


class Judged(NamedTuple):
    """The labels that models contradict, and what these models are worth."""

    findings: list[Finding]
    accuracy: float
    """How often the models are right."""
    poor: bool
    """Whether that is too seldom for the list to be worth much."""


def label_findings(inside: Opened, task: Task, good: Integers, judges: Judges) -> Judged:
    """Train on all folds but one, for each of them, and judge the labels of the images `good`.
    Warns where the models are right too seldom for a judgement.

    Raises UsageError where no folds can be made, and what `fit` raises.
    """
    good = judges.divided(inside.records, good)
    with tempfile.TemporaryDirectory(prefix="distcls-audit-") as folder:
        probabilities = out_of_fold(inside, task, good, Path(folder), judges)
    labels = np.array([inside.records[at].label for at in good], np.int64)
    issues = find_label_issues(labels, probabilities)
    accuracy = float((probabilities.argmax(1) == labels).mean())
    poor = are_poor(accuracy, labels, len(issues.suspects))
    if poor:
        log.warn(
            f"label errors: the models that judge are right for {accuracy:.1%} of the images only "
            f"and contradict {log.counted(len(issues.suspects), 'label')}, so the list is not "
            "worth much; a better --recipe, or pretrained weights, help"
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
        value, rather = (round(float(row[each]), 4) for each in (labels[place], other))
        finding = tell(int(good[place]), "label_error", "warning", text, value=value)
        found.append(
            dataclasses.replace(finding, related=task.classes[other], related_value=rather)
        )
    return Judged(found, accuracy, poor)


def are_poor(accuracy: float, labels: Integers, suspects: int) -> bool:
    """Whether models of that accuracy on `labels`, [N], which contradict so many of them, are too
    poor to judge: their list is long, or they are nearer to naming the largest class always than
    to being right always."""
    largest = np.bincount(labels).max() / len(labels)
    return bool(suspects > LONG_LIST * len(labels) or accuracy < (1 + largest) / 2)


class FoldProgress:
    """Shows how far the runs of the folds are, which are quiet themselves; a callback of theirs."""

    def __init__(self, folds: int) -> None:
        self._folds, self._fold = folds, 0
        self._began = time.monotonic()
        self._live = log.Live()

    def __enter__(self) -> Self:
        """The next fold begins."""
        self._fold += 1
        log.say(f"label errors: fold {self._fold} of {self._folds}")
        self._live = log.live()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.close()

    def on_train_start(self, run: CallbackRun) -> None:
        """Show that its first epoch is on."""
        self._draw(run)

    def on_epoch_end(self, run: CallbackRun, metrics: dict[str, float]) -> None:
        """Show that one more epoch is over."""
        if run.epoch < run.epochs:
            self._draw(run)

    def _draw(self, run: CallbackRun) -> None:
        done = (self._fold - 1 + run.epoch / run.epochs) / self._folds
        details = []
        if done:
            left = (time.monotonic() - self._began) * (1 - done) / done
            details = [f"at most {log.duration(left)} left"]  # runs may stop early
        title = f"fold {self._fold}/{self._folds}  epoch {run.epoch + 1}/{run.epochs}"
        self._live.draw(title, done, details)


def out_of_fold(inside: Opened, task: Task, good: Integers, folder: Path, judges: Judges) -> Floats:
    """Probabilities of the images `good` (positions), each by a model that has not seen it: [n, K].

    The images of all splits are divided into folds; `folder` is for the runs' files.
    """
    from distcls.training.run import fit  # torch

    manifest = _manifest(inside, good, folder)
    found = np.zeros((len(good), len(task.classes)))
    folds, progress = judges.folds, FoldProgress(judges.folds)
    for fold in range(1, folds + 1):
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
        config = judges.config(data, folder / f"run-{fold}")
        shown = (*config.callbacks, reference(progress))
        try:
            with progress:
                result = fit(dataclasses.replace(config, callbacks=shown))
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
