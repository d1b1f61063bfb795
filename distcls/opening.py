"""What the doors open: a model by its ending, an input that may be a dataset directory."""

from __future__ import annotations

from pathlib import Path

from distcls.data.dataset import INFO, Dataset
from distcls.errors import UsageError
from distcls.inference.inputs import Source, from_split, open_input
from distcls.inference.model import Model


def open_model(path: Path, device: str = "auto") -> Model:
    """Open `best.onnx` in ONNX Runtime or `best.pth` in PyTorch, by the ending.

    `device` is PyTorch's. Raises UsageError for a file that is missing, another kind or damaged.
    """
    if path.suffix.lower() not in (".onnx", ".pth"):
        raise UsageError(f"model: {str(path)!r} has no known ending, expected .onnx or .pth")
    if not path.is_file():
        raise UsageError(f"model: {path} does not exist")
    if path.suffix.lower() == ".onnx":
        from distcls.inference.session import OnnxModel

        return OnnxModel(path)
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


def open_source(text: str, split: str | None = None) -> Source:
    """The images that `text` names; of a dataset directory those of `split`, test by default.

    Raises UsageError if there are none.
    """
    if (Path(text) / INFO).is_file():
        dataset = Dataset.open(Path(text))
        return from_split(dataset.split(split or "test"), dataset.classes)
    if split is not None:
        raise UsageError(f"split: {text} is not a dataset directory and has no splits")
    return open_input(text)
