"""Weights to start from: matched by name and shape, with every mismatch named."""

from __future__ import annotations

import dataclasses
import pickle
import re
import textwrap
from collections.abc import Container
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from distcls.errors import DistclsError, UsageError
from distcls.imaging import Preprocess
from distcls.imaging.preprocess import Interpolation, Resize
from distcls.models.checkpoint import load_tensors, read_checkpoint
from distcls.models.classifier import Classifier
from distcls.models.config import ModelConfig
from distcls.models.factory import torchvision_parameters
from distcls.models.registry import Origin, resolve

INTERPOLATIONS: dict[str, Interpolation] = {
    "bilinear": "area",
    "bicubic": "area",
    "lanczos": "lanczos",
    "nearest": "nearest",
}
"""The resampling here that is nearest to each of Pillow's filters (the libraries'): Pillow averages
where it shrinks, as `area` alone does of OpenCV's (tests/test_weights.py measures it)."""
RESIZES: dict[str, Resize] = {"center": "crop", "squash": "squash", "border": "pad"}
"""timm's crop modes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """A state dict for a backbone, and the preprocessing that it was trained with."""

    tensors: dict[str, Tensor]
    source: str
    preprocess: Preprocess | None


def library_weights(origin: Origin) -> Weights:
    """The best weights of a network's own library, from its cache or downloaded.

    Raises UsageError if it publishes none; DistclsError if they cannot be had.
    """
    if origin.library == "torchvision":
        return _from_torchvision(origin.name)
    if origin.library == "timm":
        return _from_timm(origin.name)
    raise _no_weights(origin)


def library_preprocess(origin: Origin, file: str | None = None) -> Preprocess | None:
    """The preprocessing of a network's best weights, or of those published as `file`.

    None if there are none such. Weights that were downloaded by hand keep their published name.
    """
    if origin.library == "torchvision":
        return _torchvision_preprocess(origin.name, file)
    return _timm_preprocess(origin.name, file) if origin.library == "timm" else None


def _from_torchvision(name: str) -> Weights:
    from torchvision.models import get_model_weights

    weights: Any = getattr(get_model_weights(name), "DEFAULT", None)
    if weights is None:
        raise _no_weights(Origin("torchvision", name))
    try:
        tensors = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise DistclsError(
            f"model.pretrained: the stored copy of {weights.url} is damaged; remove it from "
            f"{torch.hub.get_dir()}/checkpoints"
        ) from error
    except (OSError, RuntimeError) as error:  # urllib's errors, and a hash that differs
        _cannot_get(weights.url, error)
    preprocess = _in_our_terms(name, weights)
    return Weights(tensors=tensors, source=str(weights), preprocess=preprocess)


def _torchvision_preprocess(name: str, file: str | None) -> Preprocess | None:
    from torchvision.models import get_model_weights

    published: Any = get_model_weights(name)
    if file is None:
        weights = getattr(published, "DEFAULT", None)
    else:
        weights = next((each for each in published if Path(each.url).name == file), None)
    return None if weights is None else _in_our_terms(name, weights)


def _in_our_terms(name: str, weights: Any) -> Preprocess:
    """torchvision's evaluation transform."""
    transform = weights.transforms()
    side, resized = transform.crop_size[0], transform.resize_size[0]
    mean, std = tuple(transform.mean), tuple(transform.std)
    if "transform_input" in torchvision_parameters(name):
        # with these weights, the network itself turns torchvision's normalisation into this one
        mean = std = (0.5, 0.5, 0.5)
    return Preprocess(
        size=(side, side),
        resize="crop",
        interpolation=INTERPOLATIONS.get(transform.interpolation.value, "area"),
        crop_fraction=side / resized,
        mean=mean,
        std=std,
    )


def _from_timm(name: str) -> Weights:
    import timm

    published = timm.get_pretrained_cfg(name)
    if published is None or not published.has_weights:
        raise _no_weights(Origin("timm", name))
    try:
        # timm's own loading knows the formats of its many sources, and unpickles nothing
        network = timm.create_model(name, pretrained=True)
    except Exception as error:  # of timm, of the Hugging Face Hub, of its HTTP library
        hub = published.hf_hub_id
        _cannot_get(f"https://huggingface.co/{hub}" if hub else published.url, error)
    tag = f".{published.tag}" if published.tag else ""
    source = f"timm's {published.architecture}{tag}"
    preprocess = _timm_preprocess(name, None)
    return Weights(tensors=network.state_dict(), source=source, preprocess=preprocess)


def _timm_preprocess(name: str, file: str | None) -> Preprocess | None:
    import timm

    if file is None:
        published = timm.get_pretrained_cfg(name)
    else:
        tagged = timm.models.get_arch_pretrained_cfgs(name).values()
        published = next((each for each in tagged if str(each.url).endswith(f"/{file}")), None)
    if published is None:
        return None
    return Preprocess(
        size=tuple(published.input_size[1:]),
        resize=RESIZES[published.crop_mode],
        interpolation=INTERPOLATIONS.get(published.interpolation, "area"),
        crop_fraction=published.crop_pct,
        mean=tuple(published.mean),
        std=tuple(published.std),
    )


def _no_weights(origin: Origin) -> UsageError:
    return UsageError(
        f"model.pretrained: {origin.library} publishes no weights for {origin.name}; give a file"
    )


def _cannot_get(address: str, error: Exception) -> NoReturn:
    reason = textwrap.shorten(str(error) or type(error).__name__, 200)
    raise DistclsError(
        f"model.pretrained: cannot download {address} ({reason}); fetch it elsewhere and give the "
        "file's path"
    ) from error


LIBRARIES = ("library", "torchvision", "timm")
"""Values of `model.pretrained` that are no file."""
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "pretrain_")
"""Prefixes that wrappers add to a tensor's name."""
WRAPPERS = (
    *("tensors", "state_dict_ema", "model_ema", "ema"),
    *("state_dict", "model_state_dict", "model"),
)
"""Keys under which training scripts keep a state dict; an average of the weights goes first."""
DENSE = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
"""torchvision's DenseNet files are older than PyTorch's ban on dots within a name."""
MOST_NAMED = 20
"""Tensors that a report names of each table row; the rest are counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of each tensor, as (name, number of values)."""

    source: str
    loaded: dict[str, int]
    skipped: dict[str, int]
    """In the file, not taken: `name (why)`."""
    missing: dict[str, int]
    """In the network, not in the file; these keep their initialisation."""

    def lines(self) -> list[str]:
        """Printable: a table, then a line for each tensor that was not simply loaded."""
        rows = {"loaded": self.loaded, "skipped": self.skipped, "missing": self.missing}
        table = [
            f"  {row:<8}{len(found):>5,} tensors {sum(found.values()):>13,} values"
            for row, found in rows.items()
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


def apply_weights(
    model: Classifier, weights: Weights, *, allow_partial: bool = False
) -> LoadReport:
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
    _require_half(weights.source, loaded, own, allow_partial)
    with torch.no_grad():
        for name, tensor in fitting.items():
            own[name].copy_(tensor)
    missing = {name: tensor.numel() for name, tensor in own.items() if name not in met}
    return LoadReport(source=weights.source, loaded=loaded, skipped=skipped, missing=missing)


def _from_file(path: Path, model: str) -> Weights:
    content = _load_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path)
    if isinstance(content.get("card"), dict):
        card, tensors = read_checkpoint(path)
        return Weights(tensors=tensors, source=str(path), preprocess=card.preprocess)
    origin = resolve(model)
    published = library_preprocess(origin, path.name)
    if published is None and "." in origin.name:  # timm's tag names the weights
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


def _require_half(
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


def _named(row: str, tensors: dict[str, int]) -> list[str]:
    rows = [f"  {row} {name}" for name in list(tensors)[:MOST_NAMED]]
    more = len(tensors) - MOST_NAMED
    return [*rows, f"  ... and {more} more {row}"] if more > 0 else rows
