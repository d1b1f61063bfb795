"""What a batch is trained on: its augmented images, its labels (perhaps mixed), and its losses."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from distcls.data.augment import Augment
from distcls.data.loader import Batch
from distcls.data.mixing import MIX_DRAWS, Mixing
from distcls.data.order import uniforms
from distcls.training.config import TrainConfig
from distcls.training.input import TrainingInput
from distcls.training.losses.several import given, make_loss
from distcls.training.losses.weights import find_weights
from distcls.training.teacher import Teacher


@dataclasses.dataclass(frozen=True)
class Examples:
    """A batch as the network sees it, on the training device."""

    images: Tensor
    """[B, H, W, 3] in 0..255, uint8 or float32."""
    targets: Tensor
    """Labels int64 as a split has them ([B], [B, heads] or [B, labels]), or where images are mixed
    each class's share, float32 [B, classes]."""
    weights: Tensor | None
    """How much each image counts, float32 [B]; None where all are 1."""


class Objective:
    """Turns batches into examples, and logits into the loss of each image.

    A pure function of (config, epoch, image and its neighbour in the step): nothing of it has to be
    saved for a resume.
    """

    def __init__(
        self, config: TrainConfig, data: TrainingInput, augment: Augment, device: torch.device
    ) -> None:
        self._seed = config.seed
        self._targets = data.targets
        self._device = device
        self._augment = augment
        self._mixing = Mixing(config.augment, device)
        by_class, self._image_weights = find_weights(
            config.loss, data.classes, data.train, data.train_samples
        )
        self._loss = make_loss(config.loss, data.targets, by_class, device)
        distill = config.distill
        self._teacher = Teacher(distill, data.classes, device) if distill.teacher else None

    @property
    def together(self) -> int:
        """Images in a row of a step that have to come in one batch."""
        return 2 if self._mixing.active else 1

    def examples(self, epoch: int, batch: Batch) -> Examples:
        """Augment and mix a batch of the training split."""
        count = self._augment.draws + (MIX_DRAWS if self._mixing.active else 0)
        draws = torch.from_numpy(uniforms(self._seed, epoch, batch.indices, count))
        images = self._augment(batch.images.to(self._device, non_blocking=True), draws)
        labels = batch.labels.to(self._device, non_blocking=True)
        weights = None
        if self._image_weights is not None:
            weights = torch.from_numpy(self._image_weights[batch.indices]).float()
            weights = weights.to(self._device)
        if not self._mixing.active:
            return Examples(images, labels, weights)
        mixed = self._mixing(images, draws[:, -MIX_DRAWS:].to(self._device))
        targets = mixed.shares(given(labels, self._targets))
        return Examples(mixed.images, targets, None if weights is None else mixed.blend(weights))

    def losses(self, logits: Tensor, examples: Examples) -> Tensor:
        """Loss of each image, [B], times its weight."""
        losses = self._loss(logits, examples.targets)
        if self._teacher is not None:
            losses = self._teacher.teach(losses, logits, examples.images)
        return losses if examples.weights is None else losses * examples.weights
