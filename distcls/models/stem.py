"""The stem, a network's first convolution, and its stride."""

from __future__ import annotations

from torch import nn

from distcls.errors import UsageError


def stem_stride(backbone: nn.Module) -> int | None:
    """Stride of the convolution that sees the image; None where there is none."""
    stem = _stem(backbone)
    return None if stem is None else int(stem.stride[0])


def set_stem_stride(backbone: nn.Module, stride: int) -> None:
    """Give the stem another stride; its weights fit any."""
    stem = _stem(backbone)
    assert stem is not None
    stem.stride = (stride, stride)


def require_stride(backbone: nn.Module, stride: int) -> None:
    """Raise UsageError where the network cannot do with this stride."""
    stem = _stem(backbone)
    if stem is None:
        raise UsageError(
            f"model.stem_stride: {stride} given, but this network has no convolution over the image"
        )
    own = int(stem.stride[0])
    if own not in (2, stride):
        raise UsageError(
            f"model.stem_stride: {stride} given, but the first convolution of this network has "
            f"stride {own} by design (it cuts the image into patches, or is made for small images);"
            " leave it at auto"
        )


def _stem(backbone: nn.Module) -> nn.Conv2d | None:
    convolutions = (module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    return next((layer for layer in convolutions if layer.in_channels == 3), None)
