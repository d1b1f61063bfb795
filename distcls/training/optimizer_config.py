"""Which optimiser trains the model, and with what; known without torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from distcls.errors import require
from distcls.training.choice import refuse_unread

USUAL: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.05, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
    "adam": {"weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
    "sgd": {"weight_decay": 1e-4, "momentum": 0.9, "nesterov": False},
    "rmsprop": {"weight_decay": 1e-5, "beta2": 0.99, "eps": 1e-8, "momentum": 0.0},
    "adabelief": {"weight_decay": 0.05, "beta1": 0.9, "beta2": 0.999, "eps": 1e-16},
    "ranger": {"weight_decay": 0.05, "beta1": 0.95, "beta2": 0.999, "eps": 1e-5},
}
"""Our optimisers: the keys that each reads, and their values where the config says null."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser, and the learning rates of the layers.

    Null stands for what is usual with the optimiser; a key that it does not read is refused.
    """

    name: str = "adamw"
    """adamw, adam, sgd, rmsprop, adabelief, ranger, or any that timm knows, such as `lamb` or
    `timm:adamw` (timm's own where both know the name)."""
    weight_decay: float | None = None
    """Weight decay; norms and biases are spared. Decoupled, usually 0.05, with adamw, adabelief and
    ranger; added to the gradient with sgd (1e-4), rmsprop (1e-5) and adam (0); timm's: 0."""
    beta1: float | None = None
    """Decay of the mean of gradients; usually 0.9, of ranger 0.95."""
    beta2: float | None = None
    """Decay of the mean of squared gradients; usually 0.999, of rmsprop (its alpha) 0.99."""
    eps: float | None = None
    """Added to the divisor; usually 1e-8, of adabelief 1e-16, of ranger 1e-5."""
    momentum: float | None = None
    """Momentum of sgd (usually 0.9) and rmsprop (0)."""
    nesterov: bool | None = None
    """Nesterov's momentum with sgd; usually false."""
    layer_decay: float | None = None
    """Each layer's learning rate is this times that of the layer above it, the head's being `lr`;
    null: all learn alike."""
    head_lr_scale: float = 1.0
    """Learning rate of the head (the last layer), as a multiple of `lr`."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this norm, after unscaling; null leaves them."""

    def __post_init__(self) -> None:
        if self.name in USUAL:  # timm's are checked when timm is loaded
            refuse_unread(self, USUAL)
        decay = self.weight_decay
        require(decay is None or decay >= 0, "weight_decay", decay, "0 or more, or null")
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            known = value is None or 0 <= value < 1
            require(known, name, value, "a number from 0 to below 1, or null")
        if self.nesterov:
            require(self.momentum != 0, "nesterov", True, "false, as momentum is 0")
        require(self.eps is None or self.eps > 0, "eps", self.eps, "a number above 0, or null")
        layer = self.layer_decay
        require(
            layer is None or 0 < layer <= 1, "layer_decay", layer, "above 0, at most 1, or null"
        )
        scale = self.head_lr_scale
        require(scale > 0, "head_lr_scale", scale, "a number above 0")
        clip = self.clip_norm
        require(clip is None or clip > 0, "clip_norm", clip, "a number above 0, or null")

    def value(self, key: str) -> Any:
        """The value of a key: what is given, or else what is usual with the optimiser."""
        value = getattr(self, key)
        return USUAL.get(self.name, {}).get(key) if value is None else value
