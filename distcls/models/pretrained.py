"""Weights to start from: matched by name and shape, with every mismatch named."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distcls.errors import UsageError
from distcls.models.checkpoint import load_tensors, read_checkpoint
from distcls.models.classifier import Classifier
from distcls.models.config import ModelConfig
from distcls.models.names import resolve
from distcls.models.weights import Weights, library_preprocess, library_weights

LIBRARIES = ("library", "torchvision", "timm")
"""Values of `model.pretrained` that are no file."""
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "pretrain_")
"""What wrappers put before a tensor's name."""
WRAPPERS = (
    *("tensors", "state_dict_ema", "model_ema", "ema"),
    *("state_dict", "model_state_dict", "model"),
)
"""Keys under which training scripts keep a state dict; an average of the weights goes first."""
DENSE = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
"""torchvision's DenseNet files are older than PyTorch's ban on dots within a name."""
MOST_NAMED = 20
"""Tensors of a kind that a report names; the rest are counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What became of each tensor, as (name, number of values)."""

    source: str
    loaded: dict[str, int]
    skipped: dict[str, int]
    """In the file, not taken: `name (why)`."""
    missing: dict[str, int]
    """In the network, not in the file; these keep their fresh values."""

    def lines(self) -> list[str]:
        """For people: a table, then a line for each tensor that was not simply loaded."""
        kinds = {"loaded": self.loaded, "skipped": self.skipped, "missing": self.missing}
        table = [
            f"  {kind:<8}{len(found):>5,} tensors {sum(found.values()):>13,} values"
            for kind, found in kinds.items()
        ]
        names = [*_named("skipped", self.skipped), *_named("missing", self.missing)]
        return [f"pretrained: {self.source}", *table, *names]


def find_weights(config: ModelConfig) -> Weights | None:
    """The weights that `model.pretrained` names, or None. Raises UsageError or DistclsError."""
    if config.pretrained is None:
        return None
    origin = resolve(config.name)
    if config.pretrained not in LIBRARIES:
        return _from_file(Path(config.pretrained), config.name)
    if config.pretrained not in ("library", origin.library):
        raise UsageError(
            f"model.pretrained: {config.pretrained} has no {config.name}, which is of "
            f"{origin.library}; `library` takes the weights of a network's own library"
        )
    return library_weights(origin)


def apply_weights(model: Classifier, weights: Weights, *, allow_partial: bool = False) -> Report:
    """Copy every tensor that fits by name and shape into the backbone.

    Raises UsageError if they fill less than half of the backbone's values (batch norm's statistics
    included), unless `allow_partial`, or if nothing fits: such a file is of another network.
    """
    own = model.backbone.state_dict()
    fitting: dict[str, Tensor] = {}
    skipped: dict[str, int] = {}
    met: set[str] = set()
    for name, tensor in weights.tensors.items():
        target = _own_name(name, own)
        reason = ""
        if target is None:
            reason = "not in the network"
        elif target in met:
            reason = "in the file twice"
        elif own[target].shape != tensor.shape:
            reason = f"{list(tensor.shape)} in the file, {list(own[target].shape)} in the network"
        if target is not None:
            met.add(target)
        if reason:
            skipped[f"{name if target is None else target} ({reason})"] = tensor.numel()
        elif target is not None:
            fitting[target] = tensor
    loaded = {name: tensor.numel() for name, tensor in fitting.items()}
    _check_share(weights.source, loaded, own, allow_partial)
    with torch.no_grad():
        for name, tensor in fitting.items():
            own[name].copy_(tensor)
    missing = {name: tensor.numel() for name, tensor in own.items() if name not in met}
    return Report(source=weights.source, loaded=loaded, skipped=skipped, missing=missing)


def _from_file(path: Path, model: str) -> Weights:
    content = _load_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path)
    if isinstance(content.get("card"), dict):
        card, tensors = read_checkpoint(path)
        return Weights(tensors=tensors, source=str(path), preprocess=card.preprocess)
    origin = resolve(model)
    published = library_preprocess(origin, path.name)
    if published is None and "." in origin.name:  # timm's tag says which weights are meant
        published = library_preprocess(origin)
    return Weights(tensors=_state_dict(content), source=str(path), preprocess=published)


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UsageError(f"{path}: cannot be read as safetensors: {reason}") from error


def _state_dict(content: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file, out of the dictionaries that they are wrapped in."""
    for key in WRAPPERS:
        inner = content.get(key)
        if isinstance(inner, dict) and inner:  # an average that is off may be stored as None
            return _state_dict(inner)
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _own_name(name: str, own: Container[str]) -> str | None:
    """The network's tensor that a file's name means, without what wrappers put before it."""
    name = DENSE.sub(r"\1\2", name)
    while name not in own:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return name


def _check_share(
    source: str, loaded: dict[str, int], own: dict[str, Tensor], allow_partial: bool
) -> None:
    """Raise UsageError if the tensors that fit are too few to be of this network."""
    total, found = sum(tensor.numel() for tensor in own.values()), sum(loaded.values())
    if loaded and (allow_partial or found * 2 >= total):
        return
    remedy = "; model.allow_partial takes it all the same" if loaded else ""
    raise UsageError(
        f"model.pretrained: {source} fills {found:,} of the network's {total:,} values "
        f"({len(loaded)} of its {len(own)} tensors); it is of another architecture{remedy}"
    )


def _named(kind: str, tensors: dict[str, int]) -> list[str]:
    rows = [f"  {kind} {name}" for name in list(tensors)[:MOST_NAMED]]
    more = len(tensors) - MOST_NAMED
    return [*rows, f"  ... and {more} more {kind}"] if more > 0 else rows
