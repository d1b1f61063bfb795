"""`load` and `Predictor`: a model file, and images through it, from Python and for the commands.

Decode, preprocess, logits, finite?, task. A program calls a predictor with images in any form
(`Predictor.__call__`), streams any number of them (`Predictor.stream`), or pushes them one by one
(`Predictor.submit`), as a server does; batch prediction and evaluation pull the chunks of a source
(`Predictor.chunks`).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
from collections.abc import Generator, Iterable, Mapping, Sequence, Sized
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, overload

import numpy as np
from PIL import Image

from distcls import log
from distcls.cli import packages_for
from distcls.data.formats.detect import open_source
from distcls.data.formats.objects import (
    ImageInput,
    ObjectSource,
    bytes_in_memory,
    check,
    load_image,
    name_of,
    snapshot,
)
from distcls.data.source import ImageSource
from distcls.errors import BadImage, BadValue, DistclsError, UsageError, is_count, require
from distcls.model_card import ModelCard, best_model, model_paths, require_model
from distcls.prediction import Prediction, Predictions, predictions_of
from distcls.runtime.ensemble import Ensemble
from distcls.runtime.model import Model, WithFeatures
from distcls.runtime.pipeline import (
    CLOSED,
    Chunk,
    ImageQueue,
    Profiler,
    stream,
    stream_batches,
)
from distcls.runtime.providers import ExecutionRequest
from distcls.task import Floats, Task

BATCH_BYTES = 1 << 26
"""Memory of images in one batch of a stream that arrive in memory, after which it is full."""

_Named = tuple[str | None, ImageInput]


class Predictor:
    """A model with the threads that feed it images, as `distcls.load` opens it.

        with distcls.load("runs/photos") as predictor:
            print(predictor("photo.jpg"))

    May be used by any number of threads. A context manager: close it after the last image; a
    program also ends without that. It cannot be pickled, nor used in a forked process.

    An image (`ImageInput`) is a path or a URL (http://, https://, s3://, gs://), the bytes of an
    image file, a PIL image, or a uint8 array [height, width, 3] in RGB, [height, width] in grey or
    [height, width, 4] with alpha. UsageError is raised for anything else (a float array, channels
    first, ...), in a list as well, as only the caller can say what is meant.

    Paths, URLs, bytes, arrays of the same pixels and PIL images that were opened and not decoded
    yet give equal predictions, those of `distcls predict`. A PIL image that Pillow has decoded is
    equal for lossless files and near for JPEG and lossy WebP, as decoders differ in single pixel
    values. It is turned by the EXIF orientation that it still carries.

    In a Jupyter notebook a list or a stream shows its progress, unless quiet.
    """

    def __init__(
        self,
        model: Model,
        *,
        batch_size: int | None = None,
        workers: int | None = None,
        paths: Sequence[Path] = (),
        quiet: bool = False,
    ) -> None:
        """Made by `distcls.load`.

        `batch_size` and the number of decoding threads are the model's defaults unless given;
        `paths` are the model's files, for display; `quiet` shows no progress in a notebook. Raises
        BadValue for numbers below 1.
        """
        if isinstance(model, str | os.PathLike):
            raise UsageError(f"model: {model!r} is a path; distcls.load opens it")
        _check_counts(batch_size, workers)
        self.model = model
        self.paths = tuple(paths)
        """The model's file; those of an ensemble."""
        self.batch_size = batch_size or model.execution.batch_size
        """Maximum batch size of the model."""
        self._workers = workers
        self._quiet = quiet
        self._closed = False
        self._process = os.getpid()
        self._queue = ImageQueue(
            model, self._predictions, batch_size=self.batch_size, workers=workers
        )

    @property
    def task(self) -> Task:
        """The task: the classes, and the meaning of the logits."""
        return self.model.card.task

    @property
    def path(self) -> Path | None:
        """The model's file; None for an ensemble."""
        return self.paths[0] if len(self.paths) == 1 else None

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the probabilities; of heads as HEAD:CLASS."""
        return self.task.classes

    @property
    def card(self) -> ModelCard:
        """What the model file says of itself: task, preprocessing, training, certificate."""
        return self.model.card

    @overload  # a str is a sequence of str as well; the first of the two that fits is taken
    def __call__(self, images: ImageInput) -> Prediction: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, images: Sequence[ImageInput]) -> Predictions: ...
    def __call__(self, images: ImageInput | Sequence[ImageInput]) -> Prediction | Predictions:
        """Predict one image, or a list or tuple of images.

        Args:
            images: an image, or a list or tuple of at least one.

        Returns:
            The prediction; of a list one for each image, in order. In a list an image that cannot
            be read or decoded is a prediction with an `error`, like a row of `distcls predict`.

        Raises:
            BadImage: for one image, alone, that cannot be read or decoded.
            UsageError: for what is no image, in a list as well, and for an empty list.
            DistclsError: if the model cannot compute, or the predictor is closed.
        """
        if not isinstance(images, list | tuple):
            prediction = self.submit(images).result()  # type: ignore[arg-type]  # checked there
            prediction.raise_error()
            return prediction
        found = Predictions()
        for names, chunk in self._chunks_of(_checked_list(images), self.model, len(images)):
            found += predictions_of(chunk, names, self.task)
        return found

    def stream(
        self, source: str | os.PathLike[str] | Iterable[ImageInput]
    ) -> Generator[Prediction, None, None]:
        """Predict any number of images, a few batches in memory at a time.

        Args:
            source: what `distcls predict` takes as INPUT (a folder, glob, image, manifest, dataset
                directory, tar shards, URL), or any iterable of images, which is consumed a few
                batches ahead.

        Returns:
            A generator of predictions in the order of the images. Their `image_id` is that of the
            rows of `distcls predict`, or the image's name if it has one. A bad image is a
            prediction with an `error`.

        Raises:
            UsageError: for an input that is not there, for what is no image, and for an iterable
                without any.
            DistclsError: if the model cannot compute, or the predictor is closed.
        """
        self._require_open()
        _check_source(source)
        if isinstance(source, str | os.PathLike):
            return self._stream_source(_open(os.fspath(source)))
        return self._stream_images(source)

    def submit(self, image: ImageInput) -> Future[Prediction]:
        """Predict an image in another thread, in a batch with what is waiting at the same time.

        Args:
            image: the image. It may be changed after the call, but for a PIL image that is not
                decoded yet.

        Returns:
            At once, a future of the prediction, which has an `error` if the image is bad. The
            future raises DistclsError if the model cannot compute, or the predictor is closed
            before the image's turn. There is no limit to what may wait (see `waiting`).

        Raises:
            UsageError: for what is no image.
            DistclsError: if the predictor is closed.
        """
        self._require_open()
        check(image)
        background = self.card.preprocess.background
        kept = snapshot(image, background)
        return self._queue.submit(lambda: load_image(kept, background), name_of(image))

    def features(self, images: ImageInput | Sequence[ImageInput]) -> Floats:
        """The features of images: the input of the network's last layer.

        Args:
            images: an image, or a list or tuple of at least one.

        Returns:
            float32 [N, D], of one image [1, D]: the numbers of `distcls predict --features`.

        Raises:
            BadImage: if one of the images cannot be read or decoded, saying which.
            UsageError: for a checkpoint, an ensemble, and a file that was exported without
                features; for what is no image, and for an empty list.
            DistclsError: if the model cannot compute, or the predictor is closed.
        """
        self._require_open()
        several: Any = images if isinstance(images, list | tuple) else [images]
        found: list[Floats] = []
        count = 0
        chunks = self._chunks_of(_checked_list(several), self._with_features, len(several))
        for names, chunk in chunks:
            for place, error in enumerate(chunk.errors):
                if error is not None:
                    name = "" if names[place] is None else f" ({names[place]})"
                    raise BadImage(f"images[{count + place}]{name}: {error}")
            assert chunk.features is not None
            found.append(chunk.features)
            count += len(names)
        return np.concatenate(found)

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
        self._require_open()
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

    @property
    def waiting(self) -> int:
        """Submitted images that no thread has taken yet."""
        return self._queue.waiting

    def close(self) -> None:
        """Finish what is being computed; futures that still wait raise DistclsError.

        So does whatever uses the predictor afterwards. Closing it again does nothing.
        """
        self._closed = True
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

    def __repr__(self) -> str:
        name = "".join(f"{str(path)!r}, " for path in self.paths)
        closed = ", closed" if self._closed else ""
        return f"Predictor({name}{self.task.summary()}, {self.model.provider}{closed})"

    @functools.cached_property
    def _with_features(self) -> WithFeatures:
        if isinstance(self.model, Ensemble):
            number = len(self.model.models)
            raise UsageError(f"features: an ensemble of {number} models has none; load one of them")
        return self.model if isinstance(self.model, WithFeatures) else WithFeatures(self.model)

    def _require_open(self) -> None:
        if self._closed:
            raise DistclsError(CLOSED)
        if os.getpid() != self._process:
            raise DistclsError(
                f"the predictor was loaded in process {self._process}, and its threads are not in "
                f"this one ({os.getpid()}); distcls.load the model in each process, after the fork"
            )

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            f"{self!r} cannot be pickled or copied; distcls.load the model in each process"
        )

    def _predictions(self, chunk: Chunk, names: Sequence[str | None]) -> list[Prediction]:
        return predictions_of(chunk, names, self.task)

    def _stream_source(self, source: ImageSource) -> Generator[Prediction, None, None]:
        with (
            contextlib.closing(self.chunks(source)) as chunks,
            self._progress(len(source)) as progress,
        ):
            for chunk in chunks:
                progress.update(len(chunk.indices))
                image_ids = [source.image_ids[index] for index in chunk.indices]
                for prediction in predictions_of(chunk, image_ids, self.task):
                    self._require_open()
                    yield prediction

    def _stream_images(self, images: Iterable[ImageInput]) -> Generator[Prediction, None, None]:
        empty = True
        total = len(images) if isinstance(images, Sized) else None
        chunks = self._chunks_of(self._checked(images), self.model, total)
        with contextlib.closing(chunks):
            for names, chunk in chunks:
                empty = False
                for prediction in predictions_of(chunk, names, self.task):
                    self._require_open()
                    yield prediction
        if empty:
            raise UsageError(f"source: no image came out of this {type(images).__name__}")

    def _checked(self, images: Iterable[ImageInput]) -> Generator[_Named, None, None]:
        for index, image in enumerate(images):
            check(image, f"image {index} of the stream")
            # as it is now: whoever yields it may fill it anew for the next
            yield name_of(image), snapshot(image, self.card.preprocess.background)

    def _chunks_of(
        self, images: Iterable[_Named], model: Model, total: int | None
    ) -> Generator[tuple[list[str | None], Chunk], None, None]:
        """The output of `model` for `total` images, a chunk for each batch, with their names."""
        self._require_open()
        waiting: collections.deque[list[str | None]] = collections.deque()

        def sources() -> Generator[ImageSource, None, None]:
            for batch in _batches(images, self.batch_size):
                names = [name for name, _ in batch]
                waiting.append(names)
                background = model.card.preprocess.background
                yield ObjectSource([image for _, image in batch], background, names)

        chunks = stream_batches(sources(), model, batch_size=self.batch_size, workers=self._workers)
        with contextlib.closing(chunks), self._progress(total) as progress:
            for chunk in chunks:
                progress.update(len(chunk.indices))
                yield waiting.popleft(), chunk

    def _progress(self, total: int | None) -> log.Progress:
        """Of a stream or a list, in a notebook; a script's own output would run into it."""
        return log.Progress("predicting", total, shown=not self._quiet and log.in_notebook())


def _open(location: str) -> ImageSource:
    with packages_for(location):  # dataset directories and Parquet need pyarrow
        return open_source(location)


def _check_counts(batch_size: object, workers: object) -> None:
    for name, value in (("batch_size", batch_size), ("workers", workers)):
        require(value is None or is_count(value), name, value, "an integer of at least 1")


def _check_source(source: object) -> None:
    """Raise UsageError for what is no source, or one whose items are no images."""
    single = (np.ndarray, Image.Image, bytes, bytearray, memoryview, Mapping)
    what, advice = type(source).__name__, ""
    if isinstance(source, single) or not isinstance(source, Iterable | str | os.PathLike):
        advice = (
            "neither a folder nor an iterable of images; predict one image with predictor(image)"
        )
    elif callable(getattr(source, "read", None)):
        advice = "an open file; predict an image with predictor(file.read())"
    elif hasattr(source, "columns"):
        advice = "a table; pass its column of paths or URLs, as in frame['path']"
    if advice:
        raise UsageError(f"source: {what} is {advice}")


def _checked_list(images: Sequence[ImageInput]) -> list[_Named]:
    if not images:
        raise UsageError(f"images: {images!r} is empty, expected at least one image")
    for index, image in enumerate(images):
        check(image, f"images[{index}]")
    return [(name_of(image), image) for image in images]


def _batches(images: Iterable[_Named], size: int) -> Generator[list[_Named], None, None]:
    """At most `size` images at a time, fewer where they are large in memory."""
    batch: list[_Named] = []
    held = 0
    for name, image in images:
        batch.append((name, image))
        held += bytes_in_memory(image)
        if len(batch) == size or held >= BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def load(
    model: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    provider: str = "auto",
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> Predictor:
    """Open a model for prediction: a `best.onnx`, a `best.pth` or a run directory.

        predictor = distcls.load("runs/photos")
        print(predictor("photo.jpg").top_k(3))

    A run directory means its best.onnx, or its best.pth where that is newer. A list of models is an
    ensemble (as `distcls predict --model a.onnx,b.onnx`), which predicts the mean of their
    probabilities; they have the same classes and the same preprocessing.

    Args:
        model: path of the model, or paths of the models of an ensemble.
        provider: execution provider of an exported model: auto, cpu, openvino, cuda or tensorrt;
            auto is what `distcls predict` has measured for this file on this machine, and the CPU
            where it has not.
        device: PyTorch's device for a best.pth, as in cuda:1; auto is the GPU if there is one.
        batch_size: the most images that are computed together; by default chosen with the provider.
        workers: decoding threads; by default one per core.
        quiet: show no progress in a Jupyter notebook.

    Returns:
        The predictor.

    Raises:
        UsageError: for a file that is missing, damaged or no model of distcls, for a provider
            or device that is not there, for models that make no ensemble, and for a best.pth
            without PyTorch.
    """
    paths = _model_files(model)
    _check_counts(batch_size, workers)
    if not isinstance(device, str):
        raise BadValue("device", device, "auto or a device of PyTorch, as in cuda:1")
    if device != "auto" and all(path.suffix.lower() == ".onnx" for path in paths):
        raise UsageError(
            f"device: {device!r} is for a .pth; {paths[0]} runs on a provider, as in cuda"
        )
    # as for one image: measuring takes seconds, and how many images will come is not known
    request = ExecutionRequest(provider=provider, batch_size=batch_size, workers=workers, images=1)
    with log.hushed():
        models = [load_model(path, device, request) for path in paths]
    opened = models[0] if len(models) == 1 else Ensemble(models, [str(path) for path in paths])
    return Predictor(opened, batch_size=batch_size, workers=workers, paths=paths, quiet=quiet)


def _model_files(model: object) -> list[Path]:
    """The files of the models that `load` was given. Raises UsageError for what is not a path."""
    given: list[Any] = [model]
    if isinstance(model, list | tuple):
        given = list(model)
    elif isinstance(model, str):
        given = [*model_paths(model)]
    if not given:
        raise UsageError(f"model: {model!r} is empty, expected at least one model")
    for path in given:
        if not isinstance(path, str | os.PathLike):
            raise UsageError(
                f"model: {path!r} is not a path, expected best.onnx, best.pth or a run"
            )
    # Path's `expanduser` raises for users it does not know
    return [best_model(Path(os.path.expanduser(path))) for path in given]  # noqa: PTH111


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
    require_model(path)
    if path.suffix.lower() not in (".onnx", ".pth"):
        raise UsageError(f"model: {str(path)!r} has no known ending, expected .onnx or .pth")
    if not path.is_file():
        raise UsageError(f"model: {path} is not a file")
    if path.suffix.lower() == ".onnx":
        from distcls.runtime.autotune import open_fastest
        from distcls.runtime.model import OnnxModel

        return OnnxModel(path) if execution is None else open_fastest(path, execution, source)
    if execution is not None and execution.provider != "auto":
        raise UsageError(
            f"provider: {execution.provider} runs exported models; {path} runs in PyTorch; export "
            "it with distcls export"
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
