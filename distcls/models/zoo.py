"""Building a network by name, for any number of classes and any size of input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distcls.errors import UsageError
from distcls.imaging import Preprocess
from distcls.models.classifier import Classifier
from distcls.models.config import ModelConfig
from distcls.models.fresh import drop_before_last, initialise, set_norm_momentum
from distcls.models.libraries import construct
from distcls.models.names import resolve
from distcls.models.pooling import keep_columns
from distcls.models.stem import require_stride, set_stem_stride, stem_stride


def build(config: ModelConfig, classes: int, preprocess: Preprocess) -> Classifier:
    """A network with fresh weights, in training mode.

    Raises UsageError for an unknown name, with the nearest known, for options that the network
    cannot follow, and for a size of input that it cannot take.
    """
    built = construct(resolve(config.name), classes, preprocess.size, config.dropout)
    if config.dropout is not None and not built.dropped:
        drop_before_last(built.network, classes, config.dropout)
    model = Classifier(built.network, preprocess)
    _fit_to_size(model, config, classes, preprocess.size)
    if config.pool == "columns":
        keep_columns(model, preprocess.size)
        if reason := _failure(model, classes, preprocess.size):
            raise UsageError(f"model.pool: {config.name} cannot keep its columns: {reason}")
    initialise(built.network, config.init)
    set_norm_momentum(built.network, config.norm_momentum)
    return model


def require_known(name: str) -> None:
    """Raise UsageError unless `name` is a network that we can build."""
    resolve(name)


def _fit_to_size(
    model: Classifier, config: ModelConfig, classes: int, size: tuple[int, int]
) -> None:
    """Set the stem's stride and see whether an image passes."""
    wanted = config.wanted_stride(size)
    if config.stem_stride != "auto":
        require_stride(model.backbone, config.stem_stride)
        set_stem_stride(model.backbone, config.stem_stride)
    elif wanted == 1 and stem_stride(model.backbone) == 2:
        set_stem_stride(model.backbone, 1)
        if _failure(model, classes, size) is None:
            return
        set_stem_stride(model.backbone, 2)  # a hybrid, whose attention knows one resolution only
    if reason := _failure(model, classes, size):
        height, width = size
        raise UsageError(
            f"model.name: {config.name} cannot take images of {height}x{width} pixels: {reason}; "
            "choose another input.size or model"
        )


def _failure(model: nn.Module, classes: int, size: tuple[int, int]) -> str | None:
    """Why an image of this size does not pass through the network; None if it does."""
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, *size, 3, dtype=torch.uint8))
    except Exception as error:  # hundreds of networks of others, and as many ways to fail
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    finally:
        model.train()
    if not isinstance(logits, Tensor) or logits.shape != (1, classes):
        return "it does not answer with one logit a class"
    return None
