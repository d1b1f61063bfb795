"""The config of the network."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from distcls.errors import require

SMALL_INPUT = 64
"""Up to this many pixels per side, the stem keeps the resolution (stride 1) by default."""
AUTO = "auto"
LIBRARY = "library"
"""Value of `model.pretrained`: the best weights that the network's own library publishes."""
OFFLINE = "DISTCLS_OFFLINE"
"""Environment variable: no weights are downloaded, only the libraries' caches are read."""
SMALLEST_PRETRAINED = 64
"""Inputs with a shorter side start from scratch under `model.pretrained: auto`: published weights
are for inputs of about 224."""


def is_published(value: str | None) -> bool:
    """Whether a value of `model.pretrained` means weights of a library, no file."""
    return value is not None and value.partition(":")[0] in (AUTO, LIBRARY, "torchvision", "timm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network, its head and the weights it starts from."""

    name: str = "mobilenet_v3_small"
    """Architecture, as `distcls models` lists them: torchvision's names, then timm's; `timm:NAME`
    and `torchvision:NAME` choose the library; `module:attribute` is one of your own: a class, or a
    function of the number of classes."""
    stem_stride: Literal["auto", 1, 2] = "auto"
    """Stride of the first convolution; auto is that of the architecture, but 1 instead of 2 for
    inputs up to 64 pixels, which five halvings would leave with too little detail; networks of
    your own keep theirs."""
    dropout: float | None = None
    """Dropout probability before the last layer; default: that of the architecture (0.2 in
    MobileNets, none in ResNets)."""
    pool: Literal["avg", "columns"] = "avg"
    """Pooling of the last feature map: avg is the mean over the image; columns is the mean of each
    column, concatenated, for texts, whose heads depend on the order from left to right. For
    MobileNetV3, EfficientNet, ResNet, RegNet, torchvision's ConvNeXt, Swin and others."""
    batch_norm_momentum: float = 0.1
    """Momentum of batch norm's running statistics. torchvision's MobileNetV3 has 0.01, made for 600
    epochs of ImageNet: after 100 steps its running statistics are still mostly the initial zeros
    and ones (FashionMNIST, 94 steps: val top-1 0.10; with 0.1 it is 0.72)."""
    batch_norm_bias_correction: bool = True
    """Average the statistics of batch norm's first batches evenly until `batch_norm_momentum` is
    the smaller weight, like Adam's bias correction. Without it the initial zeros and ones count for
    60 to 80 steps, and small datasets end at chance (240 photographs of 4 classes, 60 steps: val
    top-1 0.75 at the end, 0.25 for 15 of 20 epochs; with it 1.0)."""
    pretrained: str | None = AUTO
    """Pretrained weights, for transfer learning and fine-tuning: a file (.pth, .safetensors), a
    folder with `model.safetensors` and `config.json` (Hugging Face), a run directory, or `library`
    for the best ones that the architecture's own library publishes (`torchvision`, `timm`: only
    from that library; `torchvision:IMAGENET1K_V1`, `timm:a1_in1k`: these); null trains from
    scratch. auto is library for inputs of 64 pixels and more, if the weights are in the library's
    cache or can be downloaded (DISTCLS_OFFLINE=1 prevents it), else null."""
    pretrained_sha256: str | None = None
    """Required SHA-256 of the file with the pretrained weights; default: not checked."""
    pretrained_match: Literal["auto", "name", "structure"] = "auto"
    """How the tensors of a file are matched with the network's: by name, or by structure (the same
    shapes in the same order under other names). auto: by name, by structure if too few names
    match."""
    allow_partial: bool = False
    """Accept a file whose weights fill less than half of the network, which is otherwise refused as
    one of another architecture."""
    init: Literal["library", "xavier", "he"] = "library"
    """Weight initialisation: the library's own, Xavier (uniform) or He (normal) for all
    convolutions and linear layers."""

    def __post_init__(self) -> None:
        digest = self.pretrained_sha256
        valid = digest is None or re.fullmatch("[0-9a-f]{64}", digest) is not None
        require(valid, "pretrained_sha256", digest, "64 hexadecimal digits in lower case, or null")
        needed = digest is None or self.pretrained is not None
        require(needed, "pretrained_sha256", digest, "null without model.pretrained")
        dropout = self.dropout
        valid = dropout is None or 0 <= dropout < 1
        require(valid, "dropout", dropout, "a number from 0 to below 1, or null")
        momentum = self.batch_norm_momentum
        require(
            0 < momentum <= 1, "batch_norm_momentum", momentum, "a number above 0 and at most 1"
        )

    def wanted_stride(self, size: tuple[int, int]) -> int | None:
        """The stem's stride for an input of `size` (height, width); None: the network's own."""
        if self.stem_stride == "auto":
            return 1 if max(size) <= SMALL_INPUT else None
        return self.stem_stride
