"""Per-image losses, class and sample weights, and the targets of a batch.

The loss of a step is the mean over the images of its global batch: the sum of a batch's weights
does not enter, so the result depends on neither processes nor gradient accumulation. (PyTorch's
weighted mean divides by the batch's sum of weights instead.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from distcls.data.dataset import Split
from distcls.errors import UsageError, did_you_mean
from distcls.registry import kind_of, positional
from distcls.task import Task
from distcls.training.augment import Augment
from distcls.training.config import LOSSES, LossConfig, TrainConfig
from distcls.training.distillation import Teacher
from distcls.training.inputs import TrainingInput
from distcls.training.loader import Batch
from distcls.training.mixup import MIX_DRAWS, Mixing
from distcls.training.sampler import Indices, uniforms


class Loss:
    """The configured loss, with the weights of the classes on the training device."""

    def __init__(
        self, config: LossConfig, class_weights: Weights | None, device: torch.device
    ) -> None:
        self._config = LOSSES.filled(config)
        self._function = loss_function(config, device)
        weights = None if class_weights is None else torch.from_numpy(class_weights)
        self._weights = None if weights is None else weights.to(device, torch.float32)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each image, [B].

        Logits float [B, classes]; targets are labels int64 [B], or soft labels float [B, classes],
        which add up to 1 unless an image may have multiple classes (bce).
        """
        weights = None if self._weights is None else self._weights.to(logits.dtype)
        losses: Tensor = self._function(logits, targets, self._config, weights)
        return losses


def loss_function(config: LossConfig, device: torch.device) -> Any:
    """The configured loss, called with (logits, targets, config, weights)."""
    entry = LOSSES.find(config.name)
    return OwnLoss(config, entry.value, device) if entry.own else entry.value


class OwnLoss:
    """A loss of the user's: a function, PyTorch module, or class of either.

    Called with logits float [B, classes] and targets (see `Loss`), and with the config and the
    class weights, float [classes] or None, if it takes four. It returns the loss of each image,
    [B], which is what makes a step independent of processes and gradient accumulation.
    """

    def __init__(self, config: LossConfig, value: Any, device: torch.device) -> None:
        """Raises UsageError for what is none, or would not be used as the config says."""
        self._name = config.name
        made = value() if isinstance(value, type) else value
        if not callable(made):
            raise UsageError(
                f"loss.name: {self._name} is {kind_of(made)}, expected a function of (logits, "
                "targets), or an nn.Module"
            )
        if isinstance(made, nn.Module):
            if any(True for _ in made.parameters()):
                raise UsageError(
                    f"loss.name: {self._name} has parameters, which nothing trains or saves; make "
                    "them buffers, or part of the network"
                )
            made = made.to(device)
        self._function = made
        least, most = positional(made)
        self._with_config = least > 2
        if not (least <= 2 <= most or least <= 4 <= most):
            raise UsageError(
                f"loss.name: {self._name} takes {least} arguments, expected (logits, targets) or "
                "(logits, targets, config, weights)"
            )
        for key, off in (("label_smoothing", 0.0), ("class_weights", None)):
            if not self._with_config and getattr(config, key) != off:
                raise UsageError(
                    f"loss.{key}: {getattr(config, key)!r} given, but {self._name} takes logits "
                    "and targets alone; with (logits, targets, config, weights) it could read it"
                )

    def __call__(
        self, logits: Tensor, targets: Tensor, config: LossConfig, weights: Tensor | None
    ) -> Tensor:
        """The loss of each image, [B]. Raises UsageError for anything else."""
        more = (config, weights) if self._with_config else ()
        losses = self._function(logits, targets, *more)
        if not isinstance(losses, Tensor):
            found = f"returned a value {kind_of(losses)}"
        elif losses.shape != logits.shape[:1]:
            found = f"returned the shape {list(losses.shape)} for a batch of {len(logits)} images"
        elif not losses.is_floating_point():
            found = f"returned {losses.dtype}"
        else:
            return losses
        raise UsageError(
            f"loss.name: {self._name} {found}, expected the loss of each image, float [B] (of "
            "PyTorch's own, reduction='none')"
        )


@LOSSES.register("cross_entropy")
def cross_entropy(
    logits: Tensor, targets: Tensor, config: LossConfig, weights: Tensor | None
) -> Tensor:
    """PyTorch's own; a class's weight multiplies that class's term of the sum."""
    if targets.is_floating_point():
        targets = targets.to(logits.dtype)
    return F.cross_entropy(
        logits,
        targets,
        weight=weights,
        label_smoothing=config.label_smoothing,
        reduction="none",
    )


@LOSSES.register("focal", focal_gamma=2.0)  # the value that Lin et al. found best
def focal(logits: Tensor, targets: Tensor, config: LossConfig, weights: Tensor | None) -> Tensor:
    """Sum over the classes of y * (1 - p)^gamma * -log p (Lin et al., 2017, equation 4).

    With gamma 0 it is `cross_entropy`; the weights are the paper's alpha.
    """
    log_p = F.log_softmax(logits, dim=1)
    # 1 - p without cancellation; kept off 0, where a power below 1 has no slope
    rest = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).eps)
    soft = _smoothed(soft_labels(logits, targets), config.label_smoothing)
    terms = soft * rest ** (config.focal_gamma or 0.0) * -log_p
    return (terms if weights is None else terms * weights).sum(1)


@LOSSES.register("bce")
def bce(logits: Tensor, targets: Tensor, config: LossConfig, weights: Tensor | None) -> Tensor:
    """Binary cross-entropy of each class's sigmoid, the mean over the classes (as timm's).

    The weights are those of the image's own classes: by class they would weigh positives and
    negatives alike, which does not correct class imbalance.
    """
    soft = soft_labels(logits, targets)
    smooth = _smoothed(soft, config.label_smoothing)
    losses = F.binary_cross_entropy_with_logits(logits, smooth, reduction="none").mean(1)
    return losses if weights is None else losses * (soft * weights).sum(1)


def soft_labels(logits: Tensor, targets: Tensor) -> Tensor:
    """Labels int64 [B] as one-hot ones, or soft labels as they are: [B, classes] in the logits'
    type."""
    if not targets.is_floating_point():
        targets = F.one_hot(targets, logits.shape[1])
    return targets.to(logits.dtype)


def _smoothed(soft: Tensor, smoothing: float) -> Tensor:
    """Label smoothing (Szegedy et al.: Rethinking the Inception Architecture, 2015)."""
    return soft * (1 - smoothing) + smoothing / soft.shape[1]


LossFunction = Callable[[Tensor, Tensor], Tensor]


def make_loss(
    config: LossConfig, task: Task, class_weights: Weights | None, device: torch.device
) -> LossFunction:
    """The configured loss for the task: logits [B, classes] and targets to losses [B].

    Which targets, see `Loss`, `HeadsLoss` and `LabelsLoss`.
    """
    if task.single or (not task.heads and LOSSES.find(config.name).own):
        return Loss(config, class_weights, device)
    return HeadsLoss(config, task, device) if task.heads else LabelsLoss(config)


class HeadsLoss:
    """The mean of the configured loss over the heads, each with its own logits."""

    def __init__(self, config: LossConfig, task: Task, device: torch.device) -> None:
        self._config = LOSSES.filled(config)
        self._function = loss_function(config, device)
        self._heads = task.slices

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each image, [B].

        Logits float [B, classes]; targets are the class in each head int64 [B, heads], or soft
        labels float [B, classes], which add up to 1 in each head.
        """
        soft = targets.is_floating_point()
        losses = [
            self._function(
                logits[:, head],
                targets[:, head] if soft else targets[:, index],
                self._config,
                None,
            )
            for index, head in enumerate(self._heads)
        ]
        return torch.stack(losses).mean(0)


class LabelsLoss:
    """Binary loss of each label: the mean of BCE, or of the focal loss of a sigmoid."""

    def __init__(self, config: LossConfig) -> None:
        self._smoothing = config.label_smoothing
        self._gamma = LOSSES.filled(config).focal_gamma or 0.0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each image, [B]. Logits float [B, labels]; targets 0 to 1, [B, labels].

        Smoothing moves targets 0 and 1 towards 1/2. Focal is y * (1 - p)^gamma * -log p and the
        same of 1 - y and 1 - p (Lin et al., 2017, equation 4, of a sigmoid); gamma 0 gives BCE.
        """
        soft = targets.to(logits.dtype) * (1 - self._smoothing) + self._smoothing / 2
        if not self._gamma:
            return F.binary_cross_entropy_with_logits(logits, soft, reduction="none").mean(1)
        # kept off 0, where a power below 1 has no slope
        tiny = torch.finfo(logits.dtype).eps
        miss, hit = (torch.sigmoid(x).clamp(min=tiny) for x in (-logits, logits))
        yes = soft * miss**self._gamma * -F.logsigmoid(logits)
        no = (1 - soft) * hit**self._gamma * -F.logsigmoid(-logits)
        return (yes + no).mean(1)


def right_decisions(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """How many of each image's decisions are right, float32 [B]: 0 or 1, or the number of its heads
    or labels that are. Over all decisions it is `Metrics.top1`.

    Logits and targets as the losses take them. Of a mixed image each decision counts with the
    weight that the soft label gives it (as in the code of Zhang et al.: mixup, 2017); label
    smoothing, and the weights of classes and images, do not enter.
    """
    if task.kind == "multi_label":
        soft = targets.float()
        return torch.where(logits >= 0, soft, 1 - soft).sum(1)
    right = []
    for index, head in enumerate(task.slices):
        predicted = logits[:, head].argmax(1)
        if targets.is_floating_point():
            right.append(targets[:, head].gather(1, predicted[:, None])[:, 0].float())
        else:
            labels = targets if task.single else targets[:, index]
            right.append((predicted == labels).float())
    return torch.stack(right).sum(0)


def multi_hot(labels: Tensor, task: Task) -> Tensor:
    """0 and 1 for each class, int64 [B, classes], from labels int64 as a split has them."""
    if task.kind == "multi_label":
        return labels
    if task.single:
        return F.one_hot(labels, len(task.classes))
    sizes = [head.stop - head.start for head in task.slices]
    return torch.cat([F.one_hot(labels[:, i], size) for i, size in enumerate(sizes)], dim=1)


Weights = NDArray[np.float64]


def find_weights(
    config: LossConfig, classes: Sequence[str], split: Split, used: Indices
) -> tuple[Weights | None, Weights | None]:
    """Weights of the classes [classes] and of the split's images [N], None where all are 1.

    `used` are the images trained on: over them, class weight times image weight is 1 on average.
    Raises UsageError for classes that are not there and for weights that are all 0.
    """
    by_image = _by_image(config, split, used)
    by_class = _by_class(config, classes, split.labels[used])
    if by_class is not None:
        weighed = by_class[split.labels[used]]
        if by_image is not None:
            weighed = weighed * by_image[used]
        if not weighed.any():
            raise UsageError(
                "loss.class_weights: with these weights every training image has weight 0"
            )
        by_class = by_class / weighed.mean()
    return by_class, by_image


def _by_class(config: LossConfig, classes: Sequence[str], labels: Indices) -> Weights | None:
    weights = config.class_weights
    if weights is None:
        return None
    if weights == "balanced":
        return balanced(labels, len(classes))
    if isinstance(weights, dict):
        for name in weights:
            if name not in classes:
                hint = did_you_mean(name, classes)
                raise UsageError(f"loss.class_weights: the dataset has no class {name!r}{hint}")
        return np.array([weights.get(name, 1.0) for name in classes])
    if len(weights) != len(classes):
        raise UsageError(
            f"loss.class_weights: {len(weights)} numbers for {len(classes)} classes "
            f"({', '.join(classes[:3])}, ...); give one for each, in label order"
        )
    return np.array([float(weight) for weight in weights])


def balanced(labels: Indices, classes: int) -> Weights:
    """images / (classes * images of the class), as scikit-learn's `compute_class_weight`.

    Classes without images are not counted, and weigh 1.
    """
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    return np.where(present, len(labels) / (present.sum() * np.maximum(counts, 1)), 1.0)


def _by_image(config: LossConfig, split: Split, used: Indices) -> Weights | None:
    weights = None if config.sample_weights == "off" else split.weights
    if weights is None:
        if config.sample_weights == "on":
            raise UsageError(
                f"loss.sample_weights: {split.folder} has no weights; prepare it from a manifest "
                "with a weight column"
            )
        return None
    mean = float(weights[used].mean())
    if mean == 0:
        raise UsageError(
            f"loss.sample_weights: all training images of {split.folder} have weight 0; "
            "--loss.sample-weights off ignores them"
        )
    return weights / mean


@dataclasses.dataclass(frozen=True)
class Examples:
    """A batch as the network sees it, on the training device."""

    images: Tensor
    """[B, H, W, 3] in 0..255, uint8 or float32."""
    targets: Tensor
    """Labels int64 as a split has them ([B], [B, heads] or [B, labels]), or where images are mixed
    soft labels, float32 [B, classes]."""
    weights: Tensor | None
    """Sample weights, float32 [B]; None where all are 1."""


class Objective:
    """Turns batches into examples, and logits into the loss of each image.

    A pure function of (config, epoch, image and its neighbour in the step): nothing of it has to be
    saved for a resume.
    """

    def __init__(
        self, config: TrainConfig, data: TrainingInput, augment: Augment, device: torch.device
    ) -> None:
        self._seed = config.seed
        self._task = data.task
        self._device = device
        self._augment = augment
        self._mixing = Mixing(config.augment, device)
        loss = config.loss.for_task(data.task.kind)
        by_class, self._image_weights = find_weights(
            loss, data.classes, data.train, data.train_samples
        )
        self._loss = make_loss(loss, data.task, by_class, device)
        augment.try_transform(device)
        if LOSSES.find(loss.name).own:
            self._try_loss(loss.name, data)
        distill = config.distill
        self._teacher = Teacher(distill, data.classes, device) if distill.teacher else None

    @property
    def group_size(self) -> int:
        """Consecutive images of a step that have to be in one batch."""
        return 2 if self._mixing.active else 1

    def _try_loss(self, name: str, data: TrainingInput) -> None:
        """Have a loss of the user's show its mistakes before the first step."""
        classes = len(data.classes)
        labels = torch.from_numpy(data.train.labels[: 2 if classes == 3 else 3].copy())
        labels = labels.to(self._device)
        targets = multi_hot(labels, self._task).float() if self._mixing.active else labels
        logits = torch.zeros(len(labels), classes, device=self._device, requires_grad=True)
        if not self._loss(logits, targets).requires_grad:
            raise UsageError(
                f"loss.name: {name} does not depend on the logits: they are detached, or it "
                "computes outside of PyTorch"
            )

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
        targets = mixed.soft_labels(multi_hot(labels, self._task))
        return Examples(mixed.images, targets, None if weights is None else mixed.blend(weights))

    @property
    def decisions(self) -> int:
        """Decisions on an image: 1, or its heads or labels."""
        task = self._task
        return len(task.classes) if task.kind == "multi_label" else len(task.slices)

    def right(self, logits: Tensor, examples: Examples) -> Tensor:
        """How many of them are right, float32 [B] (`right_decisions`)."""
        return right_decisions(logits.detach(), examples.targets, self._task)

    def losses(self, logits: Tensor, examples: Examples) -> Tensor:
        """Loss of each image, [B], times its weight."""
        losses = self._loss(logits, examples.targets)
        if self._teacher is not None:
            losses = self._teacher.teach(losses, logits, examples.images)
        return losses if examples.weights is None else losses * examples.weights
