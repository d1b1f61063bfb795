"""Weights to start from: published ones, out of the library's cache or downloaded, and files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pickle
import socket
import ssl
import textwrap
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from distcls.errors import DistclsError, UsageError, did_you_mean
from distcls.files import digest
from distcls.imaging import Preprocess
from distcls.imaging.preprocess import Interpolation, Resize
from distcls.log import say
from distcls.models.checkpoint import load_tensors, read_checkpoint
from distcls.models.config import AUTO, LIBRARY, OFFLINE, ModelConfig, is_published
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
CONNECT_SECONDS = 3.0
"""Limit on a server's first answer, which is asked for once before a download."""
ANSWER_SECONDS = 8.0
"""Limit on all of its addresses together, its name looked up included."""
STALL_SECONDS = 15.0
"""Limit on a silence during a download."""
IN_FOLDER = ("model.safetensors", "pytorch_model.bin", "best.pth")
"""Files looked for in a folder: the Hugging Face layout's, and that of a run directory."""
LARGEST_CONFIG = 2**20
"""Bytes of a config.json that are read at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """A state dict for a backbone, and the preprocessing that it was trained with."""

    tensors: dict[str, Tensor]
    source: str
    """For display."""
    preprocess: Preprocess | None
    name: str
    """The value of `model.pretrained` that names these and no others."""
    sha256: str | None = None
    """Of the file, in hexadecimal; None where it was not read."""
    ordered: bool = True
    """Whether the tensors come in the order in which their network registered them."""
    notes: tuple[str, ...] = ()
    """What else the file says that the user should know."""


def find_weights(config: ModelConfig, *, download: bool = True) -> Weights | None:
    """The weights that `model.pretrained` names (auto as `library`), or None.

    Without `download`, published ones have no tensors, only their preprocessing, and the hash that
    the config has. Raises UsageError for a wrong name, file or hash; DistclsError if published ones
    cannot be had.
    """
    value = config.pretrained
    if value is None:
        return None
    library, _, tag = value.partition(":")
    if not is_published(value):
        found = _from_file(Path(value), config.name)
    else:
        origin = resolve(config.name)
        if library not in (AUTO, LIBRARY, origin.library):
            raise UsageError(
                f"model.pretrained: {value} has no {config.name}, which is of {origin.library}; "
                "`library` takes the weights of a network's own library"
            )
        libraries = {"torchvision": _from_torchvision, "timm": _from_timm}
        if origin.library not in libraries:
            raise _no_weights(origin)
        found = libraries[origin.library](origin.name, tag, download)
        if not download:
            return dataclasses.replace(found, sha256=config.pretrained_sha256)
    if config.pretrained_sha256 not in (None, found.sha256):
        raise UsageError(
            f"model.pretrained: {found.source} has SHA-256 {found.sha256}, expected "
            f"{config.pretrained_sha256} (model.pretrained_sha256): it is not the file that the "
            "config was written with"
        )
    return found


def library_preprocess(origin: Origin, file: str | None = None) -> Preprocess | None:
    """The preprocessing of a network's best weights, or of those published as `file`.

    None if there are none such. Weights that were downloaded by hand keep their published name.
    """
    if origin.library == "torchvision":
        return _torchvision_preprocess(origin.name, file)
    return _timm_preprocess(origin.name, file) if origin.library == "timm" else None


def _from_torchvision(name: str, tag: str, download: bool) -> Weights:
    from torchvision.models import get_model_weights

    published: Any = get_model_weights(name)
    weights: Any = published.__members__.get(tag or "DEFAULT")
    if weights is None and tag:
        raise _unknown_tag("torchvision", name, tag, published.__members__)
    if weights is None:
        raise _no_weights(Origin("torchvision", name))
    found = Weights(
        tensors={},
        source=str(weights),
        preprocess=_in_our_terms(name, weights),
        name=f"torchvision:{weights.name}",
    )
    if not download:
        return found
    stored = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        with _reachable(weights.url, stored=stored.exists()):
            tensors = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise DistclsError(
            f"model.pretrained: the stored copy of {weights.url} is damaged; remove it from "
            f"{stored.parent}"
        ) from error
    except (OSError, RuntimeError) as error:  # urllib's errors, and a hash that differs
        _cannot_get(weights.url, error)
    sha256 = digest(stored) if stored.exists() else None
    return dataclasses.replace(found, tensors=dict(tensors), sha256=sha256)


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


def _from_timm(name: str, tag: str, download: bool) -> Weights:
    import timm

    if tag:
        known = timm.models.get_arch_pretrained_cfgs(name)
        name = f"{name.partition('.')[0]}.{tag}"
        if name not in known:
            raise _unknown_tag("timm", name, tag, [each.partition(".")[2] for each in known])
    published = timm.get_pretrained_cfg(name)
    if published is None or not published.has_weights:
        raise _no_weights(Origin("timm", name))
    own = f".{published.tag}" if published.tag else ""
    found = Weights(
        tensors={},
        source=f"timm's {published.architecture}{own}",
        preprocess=_timm_preprocess(name, None),
        name=f"timm:{published.tag}" if published.tag else "timm",
    )
    if not download:
        return found
    stored, address = _timm_file(published)
    try:
        with _reachable(address, stored=stored is not None):
            # timm's own loading knows the formats of its many sources, and unpickles nothing
            network = timm.create_model(name, pretrained=True)
    except Exception as error:  # of timm, of the Hugging Face Hub, of its HTTP library
        hub = published.hf_hub_id
        _cannot_get(f"https://huggingface.co/{hub}" if hub else published.url, error)
    stored, _ = _timm_file(published)
    sha256 = None if stored is None else digest(stored)
    return dataclasses.replace(found, tensors=dict(network.state_dict()), sha256=sha256)


def _timm_file(published: Any) -> tuple[Path | None, str]:
    """Where timm's cache holds the file of these weights, if it does, and its address."""
    from huggingface_hub import hf_hub_url, try_to_load_from_cache

    if not published.hf_hub_id:
        stored = Path(torch.hub.get_dir()) / "checkpoints" / Path(published.url).name
        return (stored if stored.exists() else None), published.url
    hub, _, revision = published.hf_hub_id.partition("@")
    named = published.hf_hub_filename
    names = [named] if named else ["model.safetensors", "pytorch_model.bin"]
    if named and named.endswith(".bin"):
        names.insert(0, f"{named[:-4]}.safetensors")
    for name in names:
        cached = try_to_load_from_cache(hub, name, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached), ""
    return None, hf_hub_url(hub, names[0], revision=revision or None)


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


def _unknown_tag(library: str, name: str, tag: str, known: Any) -> UsageError:
    hint = did_you_mean(tag, [each for each in known if each and each != "DEFAULT"])
    name = name.partition(".")[0]
    return UsageError(f"model.pretrained: {library}'s {name} has no weights {tag!r}{hint}")


def _cannot_get(address: str, error: Exception) -> NoReturn:
    cause = getattr(error, "reason", error)  # urllib's: what the system says
    text = getattr(cause, "strerror", None) or str(cause) or type(error).__name__
    reason = textwrap.shorten(str(text), 200)
    raise DistclsError(
        f"model.pretrained: cannot download {address} ({reason}); fetch it elsewhere and give the "
        "file's path"
    ) from error


@contextlib.contextmanager
def _reachable(address: str, *, stored: bool) -> Iterator[None]:
    """A block that reads a stored file without any connection, or downloads `address`.

    Raises OSError within seconds if nobody answers there: the libraries would wait for minutes, and
    the Hugging Face Hub's try again and again.
    """
    import huggingface_hub.constants as hub

    if stored:
        before, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True
        try:
            yield
        finally:
            hub.HF_HUB_OFFLINE = before
        return
    if os.environ.get(OFFLINE, "") not in ("", "0"):
        raise OSError(f"{OFFLINE} is set, and it is not in the cache")
    if hub.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set, and it is not in the cache")
    _require_answer(address)
    say(f"pretrained: downloading {address}")
    limit = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)  # torch's downloads have no limit of their own
    try:
        yield
    finally:
        socket.setdefaulttimeout(limit)


def _require_answer(address: str) -> None:
    """Raise OSError unless the server answers, through the proxy if there is one."""
    found: list[OSError | None] = []

    def ask() -> None:
        request = urllib.request.Request(address, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=CONNECT_SECONDS):
                found.append(None)
        except urllib.error.HTTPError as error:
            error.close()
            found.append(None)
        except OSError as error:
            reason = getattr(error, "reason", error)
            # the library may know certificates that Python's own installation does not
            found.append(None if isinstance(reason, ssl.SSLError) else error)

    # a look-up of the server's name cannot be given a limit
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not found:
        raise TimeoutError(f"no answer within {ANSWER_SECONDS:.0f} s")
    if found[0] is not None:
        raise found[0]


WRAPPERS = (
    *("tensors", "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "teacher"),
    *("state_dict", "model_state_dict", "model_state", "model", "network", "net", "weights"),
    *("params", "student", "module"),
)
"""Keys under which training scripts keep a state dict; an average of the weights goes first."""
DEEPEST = 6
"""Dictionaries within one another that are looked into."""


def _from_file(given: Path, model: str) -> Weights:
    """The weights of a file or folder. Raises UsageError."""
    path = _file_in(given) if given.is_dir() else given
    safe = path.suffix == ".safetensors"
    content = _load_safetensors(path) if safe else load_tensors(path)
    sha256 = digest(path)
    if isinstance(content.get("card"), dict):
        card, tensors = read_checkpoint(path)
        preprocess: Preprocess | None = card.preprocess
        notes: tuple[str, ...] = ()
    else:
        tensors = _state_dict(content)
        origin = resolve(model)
        preprocess, notes = library_preprocess(origin, path.name), ()
        if (described := path.parent / "config.json") != path and given.is_dir():
            preprocess, notes = _read_config(described, origin)
        if preprocess is None and "." in origin.name:  # timm's tag names the weights
            preprocess = library_preprocess(origin)
    return Weights(
        tensors=tensors,
        source=str(path),
        preprocess=preprocess,
        name=str(given),
        sha256=sha256,
        ordered=not safe,
        notes=notes,
    )


def _file_in(folder: Path) -> Path:
    found = next((folder / name for name in IN_FOLDER if (folder / name).is_file()), None)
    if found is None:
        raise UsageError(
            f"model.pretrained: {folder} is a folder without weights, expected one of "
            f"{', '.join(IN_FOLDER)} in it; or give a file"
        )
    return found


def _read_config(path: Path, origin: Origin) -> tuple[Preprocess | None, tuple[str, ...]]:
    """What a folder's config.json, in timm's layout, says: preprocessing, and remarks.

    Raises UsageError for a file that says nothing sensible; without one there is nothing to say.
    """
    try:
        with path.open("rb") as handle:
            text = handle.read(LARGEST_CONFIG + 1)
        if len(text) > LARGEST_CONFIG:
            raise UsageError(
                f"{path}: larger than {LARGEST_CONFIG >> 20} MiB, no config of weights"
            )
        values = json.loads(text)
    except FileNotFoundError:
        return None, ("no config.json beside it: its preprocessing is not known",)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected a JSON object")
    notes = []
    architecture = values.get("architecture")
    if isinstance(architecture, str) and len(architecture) < 100:
        same = origin.library == "timm" and architecture == origin.name.partition(".")[0]
        if not same:
            ours = f"{origin.library}'s {origin.name}"
            notes.append(
                f"its config.json names timm's {architecture} (--model.name timm:{architecture}), "
                f"model.name is {ours}"
            )
    else:
        notes.append("its config.json names no `architecture` of timm's")
    if values.get("model_args"):
        notes.append("its config.json has model_args, which are not used")
    details = values.get("pretrained_cfg", values)
    return _described(details, path) if isinstance(details, dict) else None, tuple(notes)


def _described(values: Mapping[str, Any], path: Path) -> Preprocess | None:
    """The preprocessing of a config.json; None where it has none."""
    if not {"input_size", "mean", "std"} <= values.keys():
        return None
    interpolation, mode = values.get("interpolation", "bicubic"), values.get("crop_mode", "center")
    size = _numbers(path, "input_size", values["input_size"], 1, 8192)
    fraction = values.get("crop_pct", 0.875)  # timm's default, as those above
    if size[0] != 3:
        raise UsageError(f"{path}: its network takes {size[0]:g} channels, images here have 3")
    if not isinstance(mode, str) or mode not in RESIZES:
        raise UsageError(f"{path}: crop_mode: {mode!s:.60} is not one of {', '.join(RESIZES)}")
    return Preprocess(
        size=(int(size[1]), int(size[2])),
        resize=RESIZES[mode],
        interpolation=INTERPOLATIONS.get(str(interpolation), "area"),
        crop_fraction=_numbers(path, "crop_pct", [fraction] * 3, 0.01, 1)[0],
        mean=_numbers(path, "mean", values["mean"], -1e3, 1e3),
        std=_numbers(path, "std", values["std"], 1e-6, 1e3),
    )


def _numbers(
    path: Path, key: str, value: object, low: float, high: float
) -> tuple[float, float, float]:
    valid = isinstance(value, list) and len(value) == 3
    items = [each for each in value if type(each) in (int, float)] if valid else []  # type: ignore[attr-defined]
    if len(items) != 3 or not all(math.isfinite(each) and low <= each <= high for each in items):
        raise UsageError(
            f"{path}: {key}: {textwrap.shorten(repr(value), 60)} is not valid, expected 3 numbers"
        )
    return float(items[0]), float(items[1]), float(items[2])


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UsageError(f"{path}: cannot be read as safetensors: {reason}") from error


def _state_dict(content: Mapping[Any, Any], depth: int = 0) -> dict[str, Tensor]:
    """The tensors of a file, out of the dictionaries that they are wrapped in.

    Where none has a known name, of those without tensors beside them that with most is taken.
    """
    for key in WRAPPERS:
        inner = content.get(key)
        # an average that is off may be stored as None, or as its settings only
        if isinstance(inner, dict) and _count(inner, depth + 1):
            return _state_dict(inner, depth + 1)
    tensors = {str(name): value for name, value in content.items() if _is_weight(value)}
    if tensors or depth > DEEPEST:
        return tensors
    named = {
        key: value
        for key, value in content.items()
        if isinstance(value, dict) and isinstance(key, str) and "optim" not in key.lower()
    }
    if not named:
        return {}
    return _state_dict(max(named.values(), key=lambda each: _count(each, depth + 1)), depth + 1)


def _count(content: Mapping[Any, Any], depth: int) -> int:
    """How many tensors it holds, at any depth."""
    if depth > DEEPEST:
        return 0
    inner = (each for each in content.values() if isinstance(each, dict))
    return sum(map(_is_weight, content.values())) + sum(_count(each, depth + 1) for each in inner)


def _is_weight(value: object) -> bool:
    if not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and not value.is_quantized
