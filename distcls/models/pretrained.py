"""Weights to start from: matched by name and shape, with every mismatch named."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distcls.errors import DistclsError, UsageError
from distcls.imaging import Preprocess
from distcls.models.checkpoint import load_tensors, read_checkpoint
from distcls.models.classifier import Classifier
from distcls.models.config import ModelConfig

TORCHVISION = "torchvision"
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
"""What wrappers put before a tensor's name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """A state dict for a backbone, and the preprocessing that it was trained with."""

    tensors: dict[str, Tensor]
    source: str
    preprocess: Preprocess | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What became of each tensor."""

    source: str
    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    """In the file, not taken: `name (why)`."""
    missing: tuple[str, ...]
    """In the network, not in the file; these keep their fresh values."""

    def lines(self) -> list[str]:
        """For people: a count, then a line for each tensor that was not simply loaded."""
        head = f"pretrained: {len(self.loaded)} tensors loaded from {self.source}"
        rows = [f"  skipped {name}" for name in self.skipped]
        return [head, *rows, *(f"  missing {name}" for name in self.missing)]


def find_weights(config: ModelConfig) -> Weights | None:
    """The weights that `model.pretrained` names, or None. Raises UsageError or DistclsError."""
    if config.pretrained is None:
        return None
    if config.pretrained == TORCHVISION:
        return _from_torchvision(config.name)
    path = Path(config.pretrained)
    content = load_tensors(path)
    if "card" in content:
        card, tensors = read_checkpoint(path)
        return Weights(tensors=_bare(tensors), source=str(path), preprocess=card.preprocess)
    for key in ("state_dict", "model"):  # how most training scripts wrap a state dict
        if isinstance(content.get(key), dict):
            content = content[key]
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    return Weights(tensors=_bare(tensors), source=str(path), preprocess=None)


def apply_weights(model: Classifier, weights: Weights) -> Report:
    """Copy every tensor that fits by name and shape into the backbone.

    Raises UsageError if fewer than half of the backbone's tensors find a match: such a file is of
    another network.
    """
    own = model.backbone.state_dict()
    loaded: dict[str, Tensor] = {}
    skipped: list[str] = []
    for name, tensor in weights.tensors.items():
        if name not in own:
            skipped.append(f"{name} (not in the network)")
        elif own[name].shape != tensor.shape:
            shapes = f"{list(tensor.shape)} in the file, {list(own[name].shape)} in the network"
            skipped.append(f"{name} ({shapes})")
        else:
            loaded[name] = tensor
    if len(loaded) * 2 < len(own):
        raise UsageError(
            f"model.pretrained: {weights.source} fits {len(loaded)} of the network's {len(own)} "
            "tensors; it is of another architecture"
        )
    model.backbone.load_state_dict(loaded, strict=False)
    return Report(
        source=weights.source,
        loaded=tuple(loaded),
        skipped=tuple(skipped),
        missing=tuple(name for name in own if name not in weights.tensors),
    )


def _bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _bare({name.removeprefix(prefix): value for name, value in tensors.items()})
    return tensors


def _from_torchvision(name: str) -> Weights:
    from torchvision.models import get_model_weights

    weights: Any = get_model_weights(name).DEFAULT
    try:
        tensors = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise DistclsError(
            f"model.pretrained: the stored copy of {weights.url} is damaged; remove it from "
            f"{torch.hub.get_dir()}/checkpoints"
        ) from error
    except (OSError, RuntimeError) as error:  # urllib's errors, and a hash that differs
        raise DistclsError(
            f"model.pretrained: cannot download {weights.url} ({error}); fetch it elsewhere and "
            "give the file's path"
        ) from error
    return Weights(
        tensors=tensors, source=str(weights), preprocess=_torchvision_preprocess(weights)
    )


def _torchvision_preprocess(weights: Any) -> Preprocess:
    """torchvision's evaluation transform in our terms."""
    transform = weights.transforms()
    side, resized = transform.crop_size[0], transform.resize_size[0]
    return Preprocess(
        size=(side, side),
        resize="crop",
        crop_fraction=side / resized,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )
