"""What a run cannot do with its dataset's kind of answers: refused before anything is built."""

from __future__ import annotations

from distcls.errors import UsageError
from distcls.evaluation.metrics import EXACT
from distcls.targets import Targets
from distcls.training.config import TrainConfig

LABEL_LOSSES = ("bce", "focal")
"""Those that ask yes or no of each label (see `LabelsLoss`)."""
SAID = {
    "single": "has one class an image",
    "heads": "has several heads of one class each",
    "multi_label": "has any number of labels an image",
}
"""What is said of a dataset, by its kind."""


def require_possible(config: TrainConfig, targets: Targets) -> None:
    """Raise UsageError, naming the key and the reason, for options that contradict the dataset."""
    rules = {"single": _of_single, "heads": _of_heads, "multi_label": _of_labels}
    problem = rules[targets.kind](config) or ("" if targets.single else _of_several(config))
    if problem:
        key, _, reason = problem.partition(": ")
        raise UsageError(f"{key}: {config.data} {SAID[targets.kind]}; {reason}")


def _of_single(config: TrainConfig) -> str:
    if config.monitor.metric == EXACT:
        return "monitor.metric: exact is of several answers, of one class it is top1"
    return ""


def _of_heads(config: TrainConfig) -> str:
    if config.loss.name == "bce":
        return "loss.name: bce asks yes or no of each class, choose cross_entropy or focal"
    if config.augment.cutmix > 0:
        return (
            "augment.cutmix: the pasted box hides what some heads have to read, and the shares of "
            "its area are not those of their answers; choose augment.mixup or none"
        )
    return ""


def _of_labels(config: TrainConfig) -> str:
    if config.loss.name not in LABEL_LOSSES:
        return f"loss.name: {config.loss.name} has one class win, choose bce or focal"
    if config.monitor.metric == "top5":
        return "monitor.metric: labels have no top5, choose exact, macro_f1 or loss"
    return ""


def _of_several(config: TrainConfig) -> str:
    if config.loss.class_weights is not None:
        return (
            "loss.class_weights: an image of several classes would have several weights; weigh "
            "images instead (loss.sample_weights)"
        )
    if config.distill.teacher is not None:
        return "distill.teacher: distillation is of one class an image alone"
    return ""
