"""Where the server's images are decoded and computed: in this process, or in one of its own.

As a program (`python -m distcls.serving.compute`) it is a compute process: it reads batches from a
socket and writes outputs there. A file that crashes a decoder ends this process and its batch,
not the server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.errors import BadImage, DistclsError, MachineError, UsageError
from distcls.imaging.decode import decode, pixel_limit
from distcls.imaging.reading import byte_limit
from distcls.model_card import ModelCard, best_model, require_model
from distcls.runtime.autotune import open_fastest
from distcls.runtime.golden import check_golden
from distcls.runtime.model import FEATURES, OnnxModel, WithFeatures
from distcls.runtime.onnx_file import OnnxFile
from distcls.runtime.pipeline import Profiler, infer
from distcls.runtime.providers import (
    AUTO,
    PROVIDERS,
    REFERENCE,
    ExecutionConfig,
    ExecutionRequest,
    installed,
)
from distcls.serving.work import (
    BatchFailed,
    Output,
    Work,
    pack_message,
    pack_outputs,
    read_batch,
)
from distcls.system import end_with_parent

Images = NDArray[np.uint8]


NICE = 10
"""By how much compute processes give way to the server, which is woken several times for each
request and works for a fraction of a millisecond. MobileNetV3-Large on two cores, 170 photographs a
second: the median of the latency 27 to 32 ms, with 0 41 to 47."""


class Computer:
    """A model file and the execution config that runs it; any number of threads may call it."""

    def __init__(self, model: OnnxModel, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size
        has = FEATURES in model.output_names
        self._with_features = WithFeatures(model) if has else None
        self._profiler = Profiler()

    @classmethod
    def open(cls, path: Path, request: dict[str, Any]) -> Computer:
        """Open a model file, or a run directory's, as `request` (provider, batch_size, workers,
        execution) asks.

        Raises UsageError for what is no exported model, and a provider that does not work here.
        """
        require_model(path)
        path = best_model(path)
        pixel_limit()  # what the environment says wrongly is said now, not of each image
        byte_limit()
        if path.suffix.lower() == ".pth":
            raise UsageError(
                f"model: {path} is a checkpoint; `distcls export --ckpt {path}` makes the "
                "best.onnx that is served"
            )
        file = OnnxFile(path, _content(request.get("file")))
        if (like := request.get("like")) is not None:
            _require_like(file, like)
        if request.get("execution") is not None:
            model = OnnxModel(file, ExecutionConfig.from_json(request["execution"]))
        else:
            model = _open(file, request)
        return cls(model, request["batch_size"] or model.execution.batch_size)

    def run(self, batch: Sequence[Work]) -> list[Output]:
        """Decode, preprocess and compute a batch. An image that is bad has an error.

        Raises BatchFailed if the model cannot compute it.
        """
        preprocess = self.model.card.preprocess
        images = np.zeros((len(batch), *preprocess.size, 3), np.uint8)
        outputs = [Output(np.zeros(0, np.float32), batch=len(batch)) for _ in batch]
        for place, (work, output) in enumerate(zip(batch, outputs, strict=True)):
            began = time.perf_counter()
            try:
                images[place] = self._load(work)
            except BadImage as error:
                output.error = str(error)
            except MachineError as error:
                output.error, output.fault = str(error), "machine"
            output.decode_s = time.perf_counter() - began
        self._infer(batch, images, outputs)
        return outputs

    def _load(self, work: Work) -> Images:
        preprocess = self.model.card.preprocess
        if work.pixels:
            return np.frombuffer(work.data, np.uint8).reshape(*preprocess.size, 3)
        return preprocess(decode(bytes(work.data), background=preprocess.background))

    def _infer(self, batch: Sequence[Work], images: Images, outputs: list[Output]) -> None:
        wide = self._with_features if any(work.features for work in batch) else None
        errors = [output.error for output in outputs]
        began = time.perf_counter()
        try:
            chunk = infer(wide or self.model, range(len(batch)), images, errors, self._profiler)
        except DistclsError as error:
            raise BatchFailed(str(error)) from error
        seconds = time.perf_counter() - began
        for place, (work, output) in enumerate(zip(batch, outputs, strict=True)):
            output.logits, output.infer_s = chunk.logits[place], seconds
            if output.error is None and errors[place] is not None:
                output.error, output.fault = errors[place], "model"
            if work.features and chunk.features is not None:
                output.features = chunk.features[place]
            if work.keep_input and output.fault != "machine":
                output.input = images[place].tobytes() if output.error is None else None

    def warm_up(self) -> tuple[float, float]:
        """Compute the largest batch, so that memory and kernels are there.

        Returns the seconds for one image, and for the largest batch.

        The golden samples of the file are compared first. Raises DistclsError if they differ,
        BatchFailed if the model cannot compute a batch.
        """
        height, width = self.model.card.preprocess.size
        blank = Work(bytes(height * width * 3), pixels=True)
        if check_golden(self.model, self.model.metadata) is False:
            log.warn(
                f"{self.model.path}: with {self.model.execution} the last digits of an image's "
                "logits depend on the images that it is computed with"
            )
        self.run([blank] * self.batch_size)
        return self._seconds(1), self._seconds(self.batch_size)

    def _seconds(self, size: int) -> float:
        """Seconds for a batch of this size, the better of two."""
        height, width = self.model.card.preprocess.size
        batch = [Work(bytes(height * width * 3), pixels=True)] * size
        taken = []
        for _ in range(2):
            began = time.perf_counter()
            self.run(batch)
            taken.append(time.perf_counter() - began)
        return min(taken)

    def describe(self) -> dict[str, Any]:
        """What the server says of the model, as plain values."""
        model, card = self.model, self.model.card
        wide = self._with_features
        return {
            "card": card.to_json(),
            "task": card.task.to_json(),
            "temperatures": card.task.temperatures,
            "sha256": model.sha256,
            "outputs": list(model.output_names),
            "features": 0 if wide is None else wide.width,
            "provider": str(model.execution),
            "execution": model.execution.to_json(),
            "batch_size": self.batch_size,
        }


def _require_like(file: OnnxFile, like: dict[str, Any]) -> None:
    """Raise UsageError unless a file takes and gives what the version before it did."""
    card = ModelCard.from_metadata(file.metadata, str(file.path))
    size = card.preprocess.size
    if list(size) != like["size"]:
        raise UsageError(
            f"{file.path}: its input is {size[0]}x{size[1]}, not {like['size'][0]}x"
            f"{like['size'][1]} as before; clients that send tensors would fail. Serve it under "
            "another name, or start the server again"
        )
    if dataclasses.replace(card.task, thresholds=None).to_json() != like["task"]:
        raise UsageError(
            f"{file.path}: its classes are not those of before; serve it under another name, or "
            "start the server again"
        )


def _content(descriptor: int | None) -> bytes | None:
    """The bytes of the file that the server has open; None if it has none."""
    if descriptor is None:
        return None
    size, parts, at = os.fstat(descriptor).st_size, [], 0
    while at < size and (part := os.pread(descriptor, size - at, at)):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def _open(file: OnnxFile, request: dict[str, Any]) -> OnnxModel:
    """The model with the provider that runs it fastest, which is measured where there are several.

    On a CPU each worker decodes and computes by itself, with one thread: nothing is handed over,
    and as many as there are cores keep them all busy.
    """
    asked = ExecutionRequest(
        provider=request["provider"], batch_size=request["batch_size"], workers=request["workers"]
    )
    if asked.provider == AUTO and installed() == [REFERENCE]:
        asked = dataclasses.replace(asked, provider=REFERENCE)
    if asked.provider == AUTO:
        model = open_fastest(file, asked)
    else:
        fallback = PROVIDERS[asked.provider].default_execution(asked.cores, (1, 1))
        model = OnnxModel(file, fallback)
    size, found = model.card.preprocess.size, model.execution
    default = PROVIDERS[found.provider].default_execution(asked.cores, size, asked.batch_size)
    execution = dataclasses.replace(default, precision=found.precision)
    return model.with_execution(execution) or OnnxModel(file, execution)


def main(arguments: Sequence[str]) -> None:
    """A compute process: the path of the model, the request as JSON, and a socket's descriptor."""
    path, request, descriptor = Path(arguments[0]), json.loads(arguments[1]), int(arguments[2])
    end_with_parent()
    os.nice(NICE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's, which drains
    for name in (signal.SIGTERM, signal.SIGHUP):  # so are those of a whole process group
        signal.signal(name, signal.SIG_IGN)
    server = socket.socket(fileno=descriptor)
    log.set_quiet(request["execution"] is not None)  # the first one has said it
    try:
        computer = Computer.open(path, request)
        single, largest = computer.warm_up()
    except (DistclsError, BatchFailed) as error:
        usage = isinstance(error, UsageError)
        with contextlib.suppress(BrokenPipeError):  # the server has ended meanwhile
            _send(server, pack_message({"error": str(error), "usage": usage}))
        return
    facts = {"seconds": single, "batch_seconds": largest, "memory": memory()}
    with contextlib.suppress(BrokenPipeError):
        _send(server, pack_message({**computer.describe(), **facts}))
    serve(server, computer)


def serve(server: socket.socket, computer: Computer) -> None:
    """Answer batches until the server closes its end."""
    stream = server.makefile("rb", buffering=1 << 16)

    def read(size: int) -> bytes:
        data: bytes = stream.read(size)
        if len(data) < size:
            raise EOFError
        return data

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while (batch := read_batch(read)) is not None:
            try:
                _send(server, pack_outputs(computer.run(batch)))
            except BatchFailed as error:
                _send(server, pack_message({"failed": str(error)}))


def _send(server: socket.socket, buffers: Sequence[Any]) -> None:
    server.sendall(b"".join(buffers))


def memory() -> int:
    """Resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main(sys.argv[1:])
