"""Fresh networks out of torchvision, timm and our own: a constructor is told only what it knows."""

from __future__ import annotations

import inspect
import typing
from typing import Any, NamedTuple

from torch import nn

from distcls.errors import UsageError
from distcls.models.names import Origin


class Built(NamedTuple):
    """A fresh network."""

    network: nn.Module
    """float [N, 3, H, W] to logits [N, classes]."""
    dropped: bool
    """Whether the constructor took the dropout; if not, there is none before the last layer."""


def construct(
    origin: Origin, classes: int, size: tuple[int, int], dropout: float | None = None
) -> Built:
    """Build a network for inputs of `size` (height, width), with its library's fresh weights.

    `dropout` goes before the last layer where the constructor knows of it; None is its own.
    Raises UsageError if the network cannot be built for that size.
    """
    make = {"distcls": _ours, "torchvision": _from_torchvision, "timm": _from_timm}[origin.library]
    try:
        return make(origin.name, classes, size, dropout)
    except (AssertionError, ValueError) as error:
        height, width = size
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"model.name: {origin.name} cannot be built for {height}x{width} pixels: {reason}; "
            "choose another input.size or model"
        ) from error


def torchvision_parameters(name: str) -> set[str]:
    """What the class behind one of torchvision's models can be told."""
    from torchvision.models import get_model_builder

    kind = typing.get_type_hints(get_model_builder(name))["return"]
    return set(inspect.signature(kind).parameters)


def _ours(name: str, classes: int, size: tuple[int, int], dropout: float | None) -> Built:
    from distcls.models.simple import NETWORKS

    kind = NETWORKS[name]
    return Built(kind(classes, size) if dropout is None else kind(classes, size, dropout), True)


def _from_torchvision(
    name: str, classes: int, size: tuple[int, int], dropout: float | None
) -> Built:
    from torchvision.models import get_model

    known = torchvision_parameters(name)
    options: dict[str, Any] = {"num_classes": classes}
    if "aux_logits" in known:
        options["aux_logits"] = (
            False  # heads of GoogLeNet and Inception that train deep layers only
        )
    if "init_weights" in known:
        options["init_weights"] = True  # unset, it is the same with a warning
    if "image_size" in known:
        if size[0] != size[1]:
            raise ValueError("it takes square images only")
        options["image_size"] = size[0]
    if "input_size" in known:
        options["input_size"] = size
    # where attention has a dropout of its own, `dropout` is that of every block
    takes = "dropout" in known and "attention_dropout" not in known
    if takes and dropout is not None:
        options["dropout"] = dropout
    return Built(get_model(name, weights=None, **options), takes)


def _from_timm(name: str, classes: int, size: tuple[int, int], dropout: float | None) -> Built:
    import timm

    options: dict[str, Any] = {"num_classes": classes}
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        options["img_size"] = size
    if dropout is None:
        return Built(timm.create_model(name, **options), False)
    try:
        return Built(timm.create_model(name, drop_rate=dropout, **options), True)
    except TypeError as error:  # timm's entry points take anything, their classes do not
        if "'drop_rate'" not in str(error):
            raise
        return Built(timm.create_model(name, **options), False)
