"""The losses: each image's own, from logits and labels that may be mixed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distcls.training.losses.config import LossConfig
from distcls.training.losses.weights import Weights


class Loss:
    """The configured loss, with the weights of the classes on the training device."""

    def __init__(
        self, config: LossConfig, class_weights: Weights | None, device: torch.device
    ) -> None:
        self._config = config
        self._function = LOSSES[config.name]
        weights = None if class_weights is None else torch.from_numpy(class_weights)
        self._weights = None if weights is None else weights.to(device, torch.float32)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each image, [B].

        Logits float [B, classes]; targets are labels int64 [B], or each class's share of the label
        float [B, classes], which adds up to 1 unless an image may be of several classes (bce).
        """
        weights = None if self._weights is None else self._weights.to(logits.dtype)
        return self._function(logits, targets, self._config, weights)


def cross_entropy(
    logits: Tensor, targets: Tensor, config: LossConfig, weights: Tensor | None
) -> Tensor:
    """PyTorch's own; a class's weight multiplies that class's part of the sum."""
    if targets.is_floating_point():
        targets = targets.to(logits.dtype)
    return F.cross_entropy(
        logits,
        targets,
        weight=weights,
        label_smoothing=config.label_smoothing,
        reduction="none",
    )


def focal(logits: Tensor, targets: Tensor, config: LossConfig, weights: Tensor | None) -> Tensor:
    """Sum over the classes of share * (1 - p)^gamma * -log p (Lin et al., 2017, equation 4).

    With gamma 0 it is `cross_entropy`; the weights are the paper's alpha.
    """
    log_p = F.log_softmax(logits, dim=1)
    # 1 - p without cancellation; kept off 0, where a power below 1 has no slope
    rest = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).eps)
    shares = _smoothed(_shares(logits, targets), config.label_smoothing)
    parts = shares * rest**config.gamma * -log_p
    return (parts if weights is None else parts * weights).sum(1)


def bce(logits: Tensor, targets: Tensor, config: LossConfig, weights: Tensor | None) -> Tensor:
    """Binary cross-entropy of each class's sigmoid, the mean over the classes (as timm's).

    The weights are those of the image's own classes: by class they would weigh yes and no alike,
    which makes up for no rare class.
    """
    shares = _shares(logits, targets)
    smooth = _smoothed(shares, config.label_smoothing)
    losses = F.binary_cross_entropy_with_logits(logits, smooth, reduction="none").mean(1)
    return losses if weights is None else losses * (shares * weights).sum(1)


LOSSES: dict[str, Callable[[Tensor, Tensor, LossConfig, Tensor | None], Tensor]] = {
    "cross_entropy": cross_entropy,
    "focal": focal,
    "bce": bce,
}
"""By the name in the config: (logits, targets, config, class weights [classes]) to losses [B]."""


def _shares(logits: Tensor, targets: Tensor) -> Tensor:
    """Labels as shares, [B, classes] in the logits' type."""
    if not targets.is_floating_point():
        targets = F.one_hot(targets, logits.shape[1])
    return targets.to(logits.dtype)


def _smoothed(shares: Tensor, smoothing: float) -> Tensor:
    """A part of each label spread over all classes (Szegedy et al.: Rethinking Inception, 2015)."""
    return shares * (1 - smoothing) + smoothing / shares.shape[1]
