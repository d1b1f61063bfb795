"""What the doors open: a model by its ending, an input that may be a dataset directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distcls.data.layout import CLASSES, INFO, MANIFEST, PACK
from distcls.errors import DistclsError, UsageError
from distcls.inference.features import WithFeatures
from distcls.inference.identity import begun_plans
from distcls.inference.inputs import TIMEOUT, Source, from_split, open_input, state_of
from distcls.inference.merge import Flipped, Merged
from distcls.inference.model import Model
from distcls.inference.options import PredictOptions
from distcls.inference.providers.plan import Asked, Plan
from distcls.inference.shrinking import shrunk

if TYPE_CHECKING:
    from distcls.data.dataset import Split


def open_model(
    path: Path,
    device: str = "auto",
    asked: Asked | None = None,
    source: Source | None = None,
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
        from distcls.inference.checksum import check_checksum
        from distcls.inference.providers.choosing import open_fastest
        from distcls.inference.session import OnnxModel

        check_checksum(path)
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


def open_predictor(
    options: PredictOptions, source: Source, plans: Sequence[Plan | None] | None = None
) -> Model:
    """The model, or models, that batch prediction asks for; raises as `open_model` does.

    They are run by `plans`, or unless given as the run that is continued ran them, where possible.
    """
    asked, paths = options.asked(len(source)), options.models
    if options.classes is None:
        plans = begun_plans(options) if plans is None else plans
        models = [
            _reopened(path, plan) or open_model(path, "auto", asked, source)
            for path, plan in zip(paths, plans, strict=True)
        ]
    else:
        models = [_open_foreign(path, options, asked) for path in paths]
    model: Model = models[0]
    if len(models) > 1:
        model = Merged(models, [str(path) for path in paths])
    if options.features is not None:
        return WithFeatures(model)
    return Flipped(model) if options.tta == "flip" else model


def reopen(options: PredictOptions, plans: Sequence[Plan]) -> tuple[Model, Source]:
    """Model and input of a batch prediction once more, in another process, run by `plans`."""
    source = open_source(options.input, options.split, options.fetch_timeout)
    model = open_predictor(options, source, plans)
    return model, shrunk(source, model) if options.scaled_decode else source


def _reopened(path: Path, plan: Plan | None) -> Model | None:
    """An exported model run as before, for a run that goes on; None if that cannot be."""
    if plan is None or path.suffix.lower() != ".onnx" or not path.is_file():
        return None
    from distcls.inference.checksum import check_checksum
    from distcls.inference.session import OnnxModel

    check_checksum(path)
    try:
        return OnnxModel(path, plan)
    except DistclsError:  # what it ran on is gone; the run is refused if that makes a difference
        return None


def _open_foreign(path: Path, options: PredictOptions, asked: Asked) -> Model:
    from distcls.inference.foreign import ForeignModel

    if path.suffix.lower() != ".onnx" or not path.is_file():
        raise UsageError(f"classes: {path} is no ONNX file; others carry their classes")
    return ForeignModel(path, options, asked)


def open_source(text: str, split: str | None = None, timeout: float = TIMEOUT) -> Source:
    """The images that `text` names; of a dataset directory those of `split`, test by default.

    `timeout` is for each attempt to fetch an image, in seconds. Raises UsageError if there are
    none.
    """
    if (Path(text) / INFO).is_file():
        from distcls.data.dataset import Dataset

        dataset = Dataset.open(Path(text))
        chosen = dataset.split(split or "test")
        return from_split(chosen, dataset.classes, lambda: _state(chosen))
    if split is not None:
        raise UsageError(f"split: {text} is not a dataset directory and has no splits")
    return open_input(text, timeout)


def _state(split: Split) -> str:
    """Digest of the sizes and times of the files that a split is read from."""
    files = [split.folder / name for name in (MANIFEST, CLASSES)]
    if split.packed:
        files.append(split.folder / PACK)
    else:
        files += [split.root / path for path in split.table.column("path").to_pylist()]
    return state_of(map(str, files))
