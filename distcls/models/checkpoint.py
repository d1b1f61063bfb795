"""`best.pth`: a state dict with its model card; read without unpickling anything.

Two things find damage: the CRC-32 that `torch.save` gives each part of the zip archive, which torch
itself never looks at, and in files of ours a SHA-256 over all tensors and plain values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import pickle
import re
import textwrap
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distcls import log, stored
from distcls.config import build as build_config
from distcls.config.load import Given, current_names, flatten
from distcls.errors import DistclsError, UsageError, shown
from distcls.files import atomic_path
from distcls.model_card import CHECKSUM, ModelCard
from distcls.models import factory
from distcls.models.classifier import Classifier
from distcls.models.config import ModelConfig
from distcls.models.registry import require_loaded
from distcls.runtime.providers import ExecutionConfig


class TorchModel:
    """A checkpoint ready to classify; the torch counterpart of `runtime.model.OnnxModel`."""

    def __init__(self, model: Classifier, card: ModelCard, device: torch.device) -> None:
        self.model = model.to(device).to(memory_format=torch.channels_last).eval()
        self.card = card
        self.device = device
        self.execution = ExecutionConfig()

    @property
    def output_width(self) -> int:
        """One logit per class."""
        return len(self.card.classes)

    @property
    def provider(self) -> str:
        """The backend that computes, for display."""
        return f"PyTorch {torch.__version__} on {self.device}"

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Logits, float32 [N, classes], of uint8 RGB images [N, H, W, 3]."""
        with torch.inference_mode():
            pixels = torch.from_numpy(images).to(self.device)
            found = np.asarray(self.model(pixels).float().cpu().numpy(), np.float32)
        if found.shape != (len(images), self.output_width):  # NumPy might broadcast it
            raise DistclsError(
                f"model.name: the network's output for {len(images)} images has the shape "
                f"{list(found.shape)}, expected [{len(images)}, {self.output_width}]"
            )
        return found


def save_checkpoint(
    path: Path,
    model: Classifier | Mapping[str, Tensor],
    card: ModelCard,
    state: dict[str, Any] | None = None,
) -> None:
    """Write the weights (a network's, or its state dict), the card, and the state of the run that
    they come from, with their checksum; atomically."""
    weights = model.state_dict() if isinstance(model, Classifier) else model
    content = {"card": card.to_json(), "model": weights}
    content |= {} if state is None else {"state": state}
    save_tensors(path, content | {CHECKSUM: content_digest(content)})


def write_calibration(path: Path, card: ModelCard) -> None:
    """Give a checkpoint the task and the calibration of a card; all else in it stays."""
    own, _ = read_checkpoint(path)
    content = {key: value for key, value in load_tensors(path).items() if key != CHECKSUM}
    content["card"] = dataclasses.replace(
        own, task=card.task, calibration=card.calibration
    ).to_json()
    save_tensors(path, content | {CHECKSUM: content_digest(content)})


def read_checkpoint(path: Path) -> tuple[ModelCard, dict[str, Tensor]]:
    """Card and state dict of a checkpoint. Raises UsageError if it is not one of distcls."""
    content = load_tensors(path)
    if "card" not in content or "model" not in content:
        raise UsageError(f"{path}: not a checkpoint of distcls (no model card in it)")
    card, tensors = ModelCard.from_json(content["card"], str(path)), content["model"]
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise UsageError(f"{path}: its weights do not fit its card: no state dict")
    return card, tensors


def open_checkpoint(path: Path, device: str = "auto") -> TorchModel:
    """Rebuild the network of a checkpoint and fill it.

    Raises UsageError if they do not fit, and for a device that this machine does not have.
    """
    card, tensors = read_checkpoint(path)
    try:
        keys = current_names(flatten(card.architecture), "model.")
        given = {key: Given(value, str(path)) for key, value in keys.items()}
        config = build_config(ModelConfig, given)
        require_loaded(config.name, path)
        model = factory.build(config, len(card.classes), card.preprocess)
    except UsageError as error:
        if str(path) in str(error):
            raise
        raise UsageError(f"{path}: its card: {error}") from error
    try:
        model.load_state_dict(tensors)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise UsageError(f"{path}: its weights do not fit its card: {reason}") from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return TorchModel(model, card, torch.device(device))
    except (RuntimeError, TypeError, AssertionError) as error:  # by the device and the build
        reason = str(error).splitlines()[0]
        raise UsageError(f"device: {device!r} cannot be used: {reason}") from error


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """`torch.save` of tensors and plain values, written atomically."""
    buffer = io.BytesIO()  # torch's own writer hides a full disk behind an internal error
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


class _Inert:
    """Stands in for an object that training scripts keep beside the weights, and drops its data."""

    def __init__(self, *_: object) -> None:
        """Take anything, keep nothing."""

    def __setstate__(self, state: object) -> None:
        """Take anything, keep nothing."""


def _empty_mapping(*_: object) -> dict[object, object]:
    return {}


def _empty_list(*_: object) -> list[object]:
    return []


_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")  # before numpy 2, and since
HARMLESS: tuple[tuple[Any, str], ...] = (
    *((_Inert, name) for name in ("argparse.Namespace", "types.SimpleNamespace")),
    *((_Inert, name) for name in ("numpy.dtype", "numpy.ndarray")),
    *(
        (_Inert, f"{module}.{name}")
        for module in _MULTIARRAY
        for name in ("scalar", "_reconstruct")
    ),
    *((_Inert, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *(
        (_Inert, f"datetime.{name}")
        for name in ("datetime", "date", "time", "timedelta", "timezone")
    ),
    *((_Inert, f"builtins.{name}") for name in ("int", "float", "bool", "str", "list", "dict")),
    *((_Inert, f"builtins.{name}") for name in ("tuple", "frozenset", "slice", "range")),
    (_empty_mapping, "collections.defaultdict"),
    (_empty_list, "collections.deque"),
)
"""What pickles of training scripts name beside tensors, and what is built in its place: the name is
never looked up, so nothing of it runs. torch itself knows OrderedDict, Size, device and dtype."""
UNKNOWN_TYPE = re.compile(r"GLOBAL ([\w.]{1,100}) was not an allowed global")


def load_tensors(path: Path, *, checked: bool = False) -> dict[str, Any]:
    """Load what `save_tensors` or a training script wrote; nothing in the file is executed.

    Objects of the `HARMLESS` types come back empty. Raises UsageError for anything else: a pickle
    with code in it, a truncated or damaged file, no file. One that is `checked` was compared with a
    checksum of all its bytes.
    """
    try:
        size = _check_kind(path, checked=checked)
        with torch.serialization.safe_globals(list(HARMLESS)), warnings.catch_warnings():
            # what torch has to say of pickles that it refuses a moment later
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path}: a folder, expected a checkpoint file") from error
    except pickle.UnpicklingError as error:
        found = UNKNOWN_TYPE.search(str(error))
        which = f" (first {found[1]})" if found else ""
        raise UsageError(
            f"{path}: refused: it contains pickled objects other than tensors and plain values"
            f"{which}; none of it was executed; where its code is available, save "
            "`model.state_dict()` alone"
        ) from error
    except UsageError:
        raise
    except Exception as error:  # torch's readers raise a dozen types on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{path}: cannot be read as a checkpoint: {reason}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds {type(content).__name__}, expected a checkpoint")
    if "card" in content and CHECKSUM in content:
        _verify(path, content, size)
    return content


def _check_kind(path: Path, *, checked: bool) -> int:
    """Refuse what torch stumbles over, or takes as it is; the size of the file in bytes."""
    with stored.open_regular(path) as handle:
        start = handle.read(4)  # torch takes text for a pickle and stumbles somewhere inside it
        if not start.startswith((b"PK\x03\x04", b"\x80")):
            raise UsageError(f"{path}: not a checkpoint (neither a zip archive nor a pickle)")
        size = handle.seek(0, io.SEEK_END)
        if start.startswith(b"PK") and not checked:
            with zipfile.ZipFile(handle) as archive:
                _check_archive(path, archive, size)
    return size


def _check_archive(path: Path, archive: zipfile.ZipFile, size: int) -> None:
    """Compare the parts of an archive with their CRC-32. Raises UsageError or BadZipFile.

    `torch.save` compresses nothing; a few compressed megabytes may be gigabytes.
    """
    parts = archive.infolist()
    plain = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
    if not plain or sum(part.file_size for part in parts) > size:
        raise UsageError(f"{path}: its parts are compressed, which torch.save never does; refused")
    wrong = [part for part in parts if not _is_intact(archive, part)]
    # torch.serialization.set_crc32_options(False) writes zeros
    if wrong and all(part.CRC == 0 for part in parts if part.file_size):
        log.say(f"{path}: was written without checksums; whether it is damaged cannot be known")
    elif wrong:
        name = wrong[0].filename.rpartition("/")[2]
        raise UsageError(
            f"{path}: damaged, the checksum of its part {shown(name)} is wrong; copy or "
            "train it again"
        )


def _is_intact(archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(part) as handle:
            while handle.read(1 << 20):
                pass
    except zipfile.BadZipFile:
        return False
    return True


_MOST_VALUES, _DEEPEST = 10_000_000, 24


def content_digest(content: Any, most_bytes: float = math.inf) -> str:
    """SHA-256 of nested tensors and plain values, hexadecimal; tuples count as lists.

    Raises ValueError for other values, and for more bytes of tensors than `most_bytes`: however
    small a file, its parts may be shared, and its tensors may repeat their memory.
    """
    total, left = hashlib.sha256(), most_bytes
    for count, value in enumerate(_flat(content, 0)):
        if isinstance(value, Tensor):
            left -= value.numel() * value.element_size()
            if left < 0:
                raise ValueError("its tensors repeat their memory")
            total.update(f"{value.dtype} {list(value.shape)}\n".encode())
            total.update(_bytes_of(value))
        else:
            total.update(f"{value!r}\n".encode("utf-8", "surrogatepass"))
        if count > _MOST_VALUES:
            raise ValueError("it holds too many values")
    return total.hexdigest()


def _flat(value: Any, depth: int) -> Iterator[Any]:
    """The tensors and plain values in a nested one, in order, and where its parts begin."""
    if depth > _DEEPEST:
        raise ValueError("it is nested too deep")
    if isinstance(value, dict):
        yield len(value), "entries"
        for key, item in value.items():
            yield from _flat(key, depth + 1)
            yield from _flat(item, depth + 1)
    elif isinstance(value, list | tuple):
        yield len(value), "items"
        for item in value:
            yield from _flat(item, depth + 1)
    elif value is None or isinstance(value, Tensor | bool | int | float | str):
        yield value
    else:
        raise ValueError(f"it holds a {type(value).__name__}")


def _bytes_of(tensor: Tensor) -> memoryview:
    """Its elements in order, wherever they lie."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    elements: NDArray[np.uint8] = plain.view(torch.uint8).numpy()
    return elements.data


def _verify(path: Path, content: dict[str, Any], size: int) -> None:
    """Raise UsageError unless the content has the checksum that is in it."""
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    try:
        good = content_digest(rest, 16 * size + 2**20) == content[CHECKSUM]
    except (ValueError, RuntimeError, TypeError) as error:
        raise UsageError(f"{path}: not a checkpoint of distcls: {error}") from error
    if not good:
        raise UsageError(
            f"{path}: wrong checksum, its weights or its card are not what training wrote; copy or "
            "train it again"
        )
