"""What can be said about the network."""

from __future__ import annotations

import dataclasses
from typing import Literal

from distcls.errors import require

SMALL_INPUT = 64
"""Up to this many pixels a side, the stem keeps the resolution (stride 1) by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network, its head and the weights it starts from."""

    name: str = "mobilenet_v3_small"
    """Architecture, by torchvision's name."""
    stem_stride: Literal["auto", 1, 2] = "auto"
    """Stride of the first convolution; auto is 1 for inputs of up to 64 pixels, whose detail five
    halvings would leave nothing of, else the architecture's own."""
    dropout: float = 0.2
    """Share of features dropped before the last layer, in training."""
    norm_momentum: float = 0.1
    """How fast batch norm's running statistics follow. torchvision's MobileNetV3 has 0.01, made for
    600 epochs of ImageNet: after 100 steps its evaluation still sees mostly the initial zeros and
    ones (FashionMNIST, 94 steps: val top-1 0.10; with 0.1 it is 0.72)."""
    pretrained: str | None = None
    """Weights to start from: a file (.pth), or `torchvision` for its own best ones."""

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a number from 0 to below 1")
        momentum = self.norm_momentum
        require(0 < momentum <= 1, "norm_momentum", momentum, "a number above 0 and at most 1")

    def resolved_stride(self, size: tuple[int, int]) -> int:
        """The stem's stride for an input of `size` (height, width)."""
        if self.stem_stride == "auto":
            return 1 if max(size) <= SMALL_INPUT else 2
        return self.stem_stride
