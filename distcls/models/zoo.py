"""Building a network by name, for any number of classes and any size of input."""

from __future__ import annotations

from torch import nn

from distcls.errors import UsageError, did_you_mean
from distcls.imaging import Preprocess
from distcls.models.classifier import Classifier
from distcls.models.config import ModelConfig

MODELS = ("mobilenet_v3_large", "mobilenet_v3_small")


def build(config: ModelConfig, classes: int, preprocess: Preprocess) -> Classifier:
    """A network with fresh weights. Raises UsageError for an unknown name, with the choices."""
    from torchvision.models import get_model

    require_known(config.name)
    backbone = get_model(config.name, weights=None, num_classes=classes, dropout=config.dropout)
    _set_stem_stride(backbone, config.resolved_stride(preprocess.size))
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = config.norm_momentum
    return Classifier(backbone, preprocess)


def require_known(name: str) -> None:
    """Raise UsageError unless `name` is an architecture of ours."""
    if name not in MODELS:
        raise UsageError(f"model.name: unknown model {name!r}{did_you_mean(name, MODELS)}")


def _set_stem_stride(backbone: nn.Module, stride: int) -> None:
    """The first convolution of a network is its stem; its weights fit any stride."""
    stem = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    stem.stride = (stride, stride)
