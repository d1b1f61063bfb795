"""What the doors open: a model by its ending, an input that may be a dataset directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distcls.data.source import ImageSource
from distcls.errors import UsageError
from distcls.runtime.model import Model
from distcls.runtime.providers import ExecutionRequest

if TYPE_CHECKING:
    pass


def load_model(
    path: Path,
    device: str = "auto",
    asked: ExecutionRequest | None = None,
    source: ImageSource | None = None,
) -> Model:
    """Open `best.onnx` in ONNX Runtime or `best.pth` in PyTorch, by the ending.

    `device` is PyTorch's. With `asked` an ONNX model runs on the provider asked for, or on the
    fastest one here, measured on images of `source`; without, on the CPU. Raises UsageError for a
    file that is missing, another kind or damaged, and for a provider that is not installed.
    """
    if path.suffix.lower() not in (".onnx", ".pth"):
        raise UsageError(f"model: {str(path)!r} has no known ending, expected .onnx or .pth")
    if not path.is_file():
        raise UsageError(f"model: {path} does not exist")
    if path.suffix.lower() == ".onnx":
        from distcls.runtime.autotune import open_fastest
        from distcls.runtime.model import OnnxModel

        return OnnxModel(path) if asked is None else open_fastest(path, asked, source)
    if asked is not None and asked.provider != "auto":
        raise UsageError(
            f"provider: {asked.provider} runs exported models; {path} runs in PyTorch, export it "
            "with python -m export.onnx"
        )
    try:
        from distcls.models.checkpoint import open_checkpoint
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("torch", "torchvision"):
            raise
        raise UsageError(
            f'{path} needs PyTorch, which is not installed; pip install "distcls[train]", '
            "or use the exported .onnx"
        ) from error
    return open_checkpoint(path, device)
