"""The losses of images with several answers: a class in each head, or any number of labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distcls.targets import Targets
from distcls.training.losses.config import LossConfig
from distcls.training.losses.loss import LOSSES, Loss
from distcls.training.losses.weights import Weights

LossFunction = Callable[[Tensor, Tensor], Tensor]


def make_loss(
    config: LossConfig, targets: Targets, class_weights: Weights | None, device: torch.device
) -> LossFunction:
    """The configured loss for this kind of answers: logits [B, classes] and targets to losses [B].

    Which targets, see `Loss`, `HeadsLoss` and `LabelsLoss`.
    """
    if targets.single:
        return Loss(config, class_weights, device)
    return HeadsLoss(config, targets) if targets.heads else LabelsLoss(config)


class HeadsLoss:
    """The mean of the configured loss over the heads, each with its own logits."""

    def __init__(self, config: LossConfig, targets: Targets) -> None:
        self._config = config
        self._parts = targets.slices

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each image, [B].

        Logits float [B, classes]; targets are the class in each head int64 [B, heads], or each
        class's share float [B, classes], which adds up to 1 in each head.
        """
        shares = targets.is_floating_point()
        losses = [
            LOSSES[self._config.name](
                logits[:, part],
                targets[:, part] if shares else targets[:, place],
                self._config,
                None,
            )
            for place, part in enumerate(self._parts)
        ]
        return torch.stack(losses).mean(0)


class LabelsLoss:
    """Yes or no for each label: the mean of BCE, or of the focal loss of a sigmoid."""

    def __init__(self, config: LossConfig) -> None:
        self._smoothing = config.label_smoothing
        self._gamma = config.gamma if config.name == "focal" else 0.0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each image, [B]. Logits float [B, labels]; targets 0 to 1, [B, labels].

        Smoothing moves yes and no towards 1/2. Focal is share * (1 - p)^gamma * -log p and the same
        of no (Lin et al., 2017, equation 4, of a sigmoid); with gamma 0 it is BCE.
        """
        shares = targets.to(logits.dtype) * (1 - self._smoothing) + self._smoothing / 2
        if not self._gamma:
            return F.binary_cross_entropy_with_logits(logits, shares, reduction="none").mean(1)
        # kept off 0, where a power below 1 has no slope
        tiny = torch.finfo(logits.dtype).eps
        miss, hit = (torch.sigmoid(x).clamp(min=tiny) for x in (-logits, logits))
        yes = shares * miss**self._gamma * -F.logsigmoid(logits)
        no = (1 - shares) * hit**self._gamma * -F.logsigmoid(-logits)
        return (yes + no).mean(1)


def given(labels: Tensor, targets: Targets) -> Tensor:
    """0 and 1 for each class, int64 [B, classes], from labels int64 as a split has them."""
    if targets.kind == "multi_label":
        return labels
    if targets.single:
        return F.one_hot(labels, len(targets.classes))
    sizes = [part.stop - part.start for part in targets.slices]
    return torch.cat([F.one_hot(labels[:, i], size) for i, size in enumerate(sizes)], dim=1)
