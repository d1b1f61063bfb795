"""The weights that torchvision and timm publish, with the preprocessing they were trained with."""

from __future__ import annotations

import dataclasses
import pickle
import textwrap
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from distcls.errors import DistclsError, UsageError
from distcls.imaging import Preprocess
from distcls.imaging.preprocess import Interpolation, Resize
from distcls.models.libraries import torchvision_parameters
from distcls.models.names import Origin

INTERPOLATIONS: dict[str, Interpolation] = {
    "bilinear": "area",
    "bicubic": "area",
    "lanczos": "lanczos",
    "nearest": "nearest",
}
"""Pillow's filters, which the libraries mean, by what comes nearest to them here: Pillow averages
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
    except Exception as error:  # of timm, of the Hugging Face hub, of its HTTP library
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
