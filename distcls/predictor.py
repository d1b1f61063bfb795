"""`load_model` and `Predictor`: a model file, and images through it.

Decode, preprocess, logits, finite?, task: pulled over a source of images (`Predictor.chunks`), as
batch prediction and evaluation do, or pushed image by image (`Predictor.submit`), as a server does.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType

from distcls.data.source import ImageSource
from distcls.errors import UsageError, require
from distcls.prediction import Prediction, predictions_of
from distcls.runtime.model import Model
from distcls.runtime.pipeline import Chunk, ImageQueue, Profiler, stream
from distcls.runtime.providers import ExecutionRequest
from distcls.task import Task


class Predictor:
    """A model with the threads that feed it images. A context manager; close it after `submit`."""

    def __init__(
        self, model: Model, *, batch_size: int | None = None, workers: int | None = None
    ) -> None:
        """`batch_size` and the number of decoding threads are the model's defaults unless given.

        Raises BadValue unless they are at least 1.
        """
        for name, value in (("batch_size", batch_size), ("workers", workers)):
            require(value is None or value >= 1, name, value, "at least 1")
        self.model = model
        self.batch_size = batch_size or model.execution.batch_size
        """Maximum batch size of the model."""
        self._workers = workers
        self._queue = ImageQueue(
            model, self._predictions, batch_size=self.batch_size, workers=workers
        )

    @property
    def task(self) -> Task:
        """The task: the classes, and the meaning of the logits."""
        return self.model.card.task

    def chunks(
        self,
        source: ImageSource,
        *,
        indices: range | None = None,
        profiler: Profiler | None = None,
    ) -> Generator[Chunk, None, None]:
        """The model's output for the images of `source` at `indices` (all by default), in order.

        See `distcls.runtime.pipeline.stream`; each stream has threads of its own, which end with it
        or when it is closed. Raises IndexError for indices that the source does not have.
        """
        if indices and not (min(indices) >= 0 and max(indices) < len(source)):
            raise IndexError(f"{indices} of a source of {len(source)} images")
        return stream(
            source,
            self.model,
            indices=indices,
            batch_size=self.batch_size,
            workers=self._workers,
            profiler=profiler,
        )

    def submit(self, data: bytes) -> Future[Prediction]:
        """Predict an encoded image (JPEG, PNG, ...); returns at once, safe to call from any thread.

        A bad image is a prediction with an error, like a row of a table. The future raises
        DistclsError if the model cannot compute or the predictor is closed before the image's turn.
        There is no limit to what may wait (see `waiting`). Raises DistclsError after `close`.
        """
        return self._queue.submit(data)

    @property
    def waiting(self) -> int:
        """Submitted images that no thread has taken yet."""
        return self._queue.waiting

    def close(self) -> None:
        """Finish what is being computed; futures that still wait raise DistclsError."""
        self._queue.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _predictions(self, chunk: Chunk) -> list[Prediction]:
        return predictions_of(chunk, [None] * len(chunk.indices), self.task)


def load_model(
    path: Path,
    device: str = "auto",
    execution: ExecutionRequest | None = None,
    source: ImageSource | None = None,
) -> Model:
    """Open `best.onnx` in ONNX Runtime or `best.pth` in PyTorch, by the ending.

    `device` is PyTorch's. With `execution` an ONNX model runs on the provider that it requests, or
    on the fastest one here, measured on images of `source`; without, on the CPU. Raises UsageError
    for a file that is missing, another format or damaged, and for a provider that is not installed.
    """
    if path.suffix.lower() not in (".onnx", ".pth"):
        raise UsageError(f"model: {str(path)!r} has no known ending, expected .onnx or .pth")
    if not path.is_file():
        raise UsageError(f"model: {path} does not exist")
    if path.suffix.lower() == ".onnx":
        from distcls.runtime.autotune import open_fastest
        from distcls.runtime.model import OnnxModel

        return OnnxModel(path) if execution is None else open_fastest(path, execution, source)
    if execution is not None and execution.provider != "auto":
        raise UsageError(
            f"provider: {execution.provider} runs exported models; {path} runs in PyTorch, export "
            "it with python -m export.onnx"
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
