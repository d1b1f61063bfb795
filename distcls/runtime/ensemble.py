"""Ensembling: the mean over multiple models, or over an image and its mirror image.

Probabilities are averaged; the output is their logarithm, whose softmax gives them back, and for
multi-label tasks their log-odds, whose sigmoid does. Averages of logits would let one
overconfident model outvote the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls.errors import UsageError
from distcls.model_card import ModelCard
from distcls.runtime.model import Model, WithFeatures
from distcls.runtime.providers import ExecutionConfig
from distcls.task import THRESHOLD, Task, sigmoid

Floats = NDArray[np.float32]
Images = NDArray[np.uint8]


class FlipAveraged:
    """Test-time augmentation: the mean over an image and its mirror image, left to right."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._card = model.card.of_means

    @property
    def card(self) -> ModelCard:
        """The model's own, without its calibration: that is in the logits."""
        return self._card

    @property
    def provider(self) -> str:
        """The model's own, with a mention of the second pass."""
        return f"{self._model.provider}, with flips"

    @property
    def execution(self) -> ExecutionConfig:
        """The model's own."""
        return self._model.execution

    @property
    def output_width(self) -> int:
        """The model's own."""
        return self._model.output_width

    def logits(self, images: Images) -> Floats:
        """Logits of the mean probabilities, float32 [N, K], of images [N, H, W, 3]."""
        mirrored = np.ascontiguousarray(images[:, :, ::-1])
        outputs = [self._model.logits(images), self._model.logits(mirrored)]
        return _log_mean(outputs, [self._model.card.task] * 2)


class Ensemble:
    """Multiple models with the same classes and the same preprocessing of images."""

    def __init__(self, models: Sequence[Model], names: Sequence[str]) -> None:
        """Raises UsageError, with the models' `names`, if classes or preprocessing differ."""
        self.models = list(models)
        first = self.models[0].card
        for model, name in zip(self.models[1:], names[1:], strict=True):
            _check_same(first, model.card, names[0], name)
        self._card = _ensemble_card([model.card for model in self.models])

    @property
    def card(self) -> ModelCard:
        """The first model's, without certificate and calibration, which do not cover the mean.

        The thresholds of labels are the means of the models', as the probabilities are.
        """
        return self._card

    @property
    def provider(self) -> str:
        """The models' providers, each once."""
        return ", ".join(dict.fromkeys(model.provider for model in self.models))

    @property
    def execution(self) -> ExecutionConfig:
        """The first model's."""
        return self.models[0].execution

    @property
    def output_width(self) -> int:
        """The first model's."""
        return self.models[0].output_width

    def logits(self, images: Images) -> Floats:
        """Logits of the mean probabilities, float32 [N, K], of images [N, H, W, 3]."""
        outputs = [model.logits(images) for model in self.models]
        return _log_mean(outputs, [model.card.task for model in self.models])


def opened_models(model: Model) -> list[Model]:
    """The models that were opened from files, in their order, whatever wraps them."""
    if isinstance(model, Ensemble):
        return [opened for each in model.models for opened in opened_models(each)]
    if isinstance(model, FlipAveraged):
        return opened_models(model._model)
    return opened_models(model.model) if isinstance(model, WithFeatures) else [model]


def executions_of(model: Model) -> list[ExecutionConfig]:
    """The execution configs of the opened models, in their order."""
    return [each.execution for each in opened_models(model)]


def _log_mean(outputs: Sequence[Floats], tasks: Sequence[Task]) -> Floats:
    """The logits that give the mean of the probabilities of [N, K] each, calibrated ones where a
    task has temperatures."""
    if not len(outputs[0]):
        return outputs[0]
    with np.errstate(invalid="ignore"):  # infinite logits become NaN, which the stream reports
        pairs = list(zip(tasks, outputs, strict=True))
        if tasks[0].kind != "multi_label":
            return _log([task.probabilities(logits) for task, logits in pairs])
        # both outcomes separately: one minus a probability near one would be zero
        broken = np.any([~np.isfinite(logits) for logits in outputs], axis=0)
        odds = _log([sigmoid(task.scaled(logits)) for task, logits in pairs])
        odds -= _log([sigmoid(-task.scaled(logits)) for task, logits in pairs])
    odds[broken] = np.nan
    return odds


def _log(probabilities: Sequence[NDArray[Any]]) -> Floats:
    """Logarithm of the mean, float32; finite where the mean is 0: infinity is a broken model."""
    mean = np.mean([values.astype(np.float64) for values in probabilities], axis=0)
    return np.asarray(np.log(np.maximum(mean, np.finfo(np.float32).tiny)), np.float32)


def _ensemble_card(cards: Sequence[ModelCard]) -> ModelCard:
    task = cards[0].task
    if task.kind == "multi_label":
        known = [_thresholds(card.task) for card in cards]
        thresholds = tuple(float(mean) for mean in np.mean(known, axis=0))
        task = dataclasses.replace(task, thresholds=thresholds)
    return dataclasses.replace(cards[0], task=task, certificate=None).of_means


def _thresholds(task: Task) -> tuple[float, ...]:
    return task.thresholds or (THRESHOLD,) * len(task.classes)


def _check_same(first: ModelCard, other: ModelCard, name: str, other_name: str) -> None:
    own_task, other_task = first.task, other.task
    same_heads = not own_task.heads or own_task.slices == other_task.slices
    if own_task.kind != other_task.kind or not same_heads:
        raise UsageError(
            f"model: {name} has {own_task.summary()}, {other_name} {other_task.summary()}; the "
            "models of an ensemble have the same task"
        )
    if len(first.classes) != len(other.classes):
        raise UsageError(
            f"model: {name} has {len(first.classes)} classes, {other_name} {len(other.classes)}; "
            "the models of an ensemble have the same classes"
        )
    for index, (own, given) in enumerate(zip(first.classes, other.classes, strict=True)):
        if own != given:
            raise UsageError(
                f"model: class {index} is {own!r} in {name} and {given!r} in {other_name}; the "
                "models of an ensemble have the same classes in the same order"
            )
    ours, theirs = first.preprocess, other.preprocess
    for key in ("size", "resize", "interpolation", "crop_fraction", "background"):
        if getattr(ours, key) != getattr(theirs, key):
            raise UsageError(
                f"model: {name} takes images by {key} {getattr(ours, key)}, {other_name} by "
                f"{getattr(theirs, key)}; the models of an ensemble have the same preprocessing"
            )
