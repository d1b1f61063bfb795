"""The stream: order, bad images, bounds, and the same numbers by every way."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from distcls.data.dataset import Dataset
from distcls.data.source import FunctionSource, ImageSource
from distcls.errors import BadImage
from distcls.model_card import ModelCard
from distcls.plotting import draw_profile
from distcls.runtime.model import OnnxModel
from distcls.runtime.pipeline import Profiler, stream
from distcls.runtime.providers import ExecutionConfig
from tests import tiny_dataset, tiny_onnx

WORKERS = ExecutionConfig(layout="workers", threads=1, streams=3, batch_size=8)
STAGES = ExecutionConfig(layout="stages", threads=1, streams=2, batch_size=8)


@pytest.fixture(params=[WORKERS, STAGES], ids=["workers", "stages"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> OnnxModel:
    return OnnxModel(tiny_onnx.write(tmp_path / "m.onnx"), request.param)


def source_of(images: NDArray[np.uint8], bad: frozenset[int] = frozenset()) -> ImageSource:
    def load(index: int) -> NDArray[np.uint8]:
        if index in bad:
            raise BadImage(f"number {index}")
        time.sleep((index * 7919 % 5) / 5000)  # so that images are ready out of order
        return images[index]

    return FunctionSource([str(index) for index in range(len(images))], load)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_order_whatever_the_batch_and_the_workers(model: OnnxModel, batch_size: int) -> None:
    images, _ = tiny_dataset.coloured(101)
    chunks = list(stream(source_of(images), model, batch_size=batch_size, workers=5))
    assert [index for chunk in chunks for index in chunk.indices] == list(range(101))
    logits = np.concatenate([chunk.logits for chunk in chunks])
    np.testing.assert_allclose(logits, tiny_onnx.expected_logits(images), rtol=1e-5)


def test_a_bad_image_changes_no_other(model: OnnxModel) -> None:
    images, _ = tiny_dataset.coloured(50)
    bad = frozenset({0, 13, 14, *range(24, 32), 49})
    chunks = list(stream(source_of(images, bad), model, batch_size=8, workers=3))
    errors = [error for chunk in chunks for error in chunk.errors]
    assert {index for index, error in enumerate(errors) if error} == bad
    assert errors[13] == "number 13"
    logits = np.concatenate([chunk.logits for chunk in chunks])
    good = [index for index in range(50) if index not in bad]
    np.testing.assert_allclose(logits[good], tiny_onnx.expected_logits(images)[good], rtol=1e-5)
    assert np.isnan(logits[sorted(bad)]).all()


@dataclasses.dataclass
class Broken(tiny_onnx.FakeModel):
    """Gives infinity for bright images, and proves that it was asked for more than one."""

    card: ModelCard
    largest: int = 0

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.largest = max(self.largest, len(images))
        logits = tiny_onnx.expected_logits(images)
        logits[images.max(axis=(1, 2, 3)) == 255, 1] = np.inf
        return logits


def test_output_that_is_not_finite_is_an_error_of_that_image() -> None:
    images, _ = tiny_dataset.coloured(10)
    images[4] = 255
    broken = Broken(tiny_onnx.card())
    (chunk,) = stream(source_of(images), broken, batch_size=16)
    assert [index for index, error in enumerate(chunk.errors) if error] == [4]
    assert chunk.errors[4] == "the model's output is not finite"
    assert broken.largest == 10


def test_only_a_few_batches_are_ahead_of_the_model() -> None:
    images, _ = tiny_dataset.coloured(400)
    loaded, answered, ahead = 0, 0, 0
    lock = threading.Lock()

    def load(index: int) -> NDArray[np.uint8]:
        nonlocal loaded
        with lock:
            loaded += 1
        return images[index]

    source = FunctionSource([""] * 400, load)
    for chunk in stream(source, Broken(tiny_onnx.card()), batch_size=8, workers=2):
        time.sleep(0.002)
        with lock:
            ahead = max(ahead, loaded - answered)
        answered += len(chunk.indices)
    assert answered == 400
    assert 16 <= ahead <= 8 * 8


def test_a_bug_in_loading_is_raised_and_leaves_no_thread(model: OnnxModel) -> None:
    def load(index: int) -> NDArray[np.uint8]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(stream(FunctionSource(["a"] * 9, load), model, batch_size=2))
    assert not working()


def working() -> list[str]:
    """Names of the pipeline's threads that live."""
    names = [thread.name for thread in threading.enumerate()]
    return [
        name for name in names if name.startswith(("distcls-decode", "distcls-infer", "predict"))
    ]


def test_a_reader_that_leaves_early_leaves_no_thread(model: OnnxModel) -> None:
    images, _ = tiny_dataset.coloured(200)
    with contextlib.closing(stream(source_of(images), model)) as chunks:
        next(chunks)
        assert working()
    assert not working()


def test_the_batch_size_is_the_plan_s_unless_given(model: OnnxModel) -> None:
    images, _ = tiny_dataset.coloured(20)
    given = [len(chunk.indices) for chunk in stream(source_of(images), model, batch_size=6)]
    assert given == [6, 6, 6, 2]
    assert [len(chunk.indices) for chunk in stream(source_of(images), model)] == [8, 8, 4]


def test_where_the_time_goes(model: OnnxModel, tmp_path: Path) -> None:
    images, _ = tiny_dataset.coloured(64)
    profiler = Profiler()

    def load(index: int) -> NDArray[np.uint8]:
        time.sleep(0.004)
        return images[index]

    source = FunctionSource([""] * 64, load)
    for _ in stream(source, model, workers=2, profiler=profiler):
        time.sleep(0.01)
    found = profiler.to_json()
    assert found["images"] == 64
    assert found["threads"] == (2 if model.execution.layout == "workers" else 4)
    assert 0.256 <= profiler.spent("decode") <= 2 * profiler.seconds
    assert 0 < profiler.spent("infer") < profiler.spent("decode")
    assert 0.08 <= profiler.spent("write") <= profiler.seconds
    whole = profiler.spent("decode") + profiler.spent("infer") + profiler.spent("wait")
    assert whole == pytest.approx(profiler.threads * profiler.seconds)
    draw_profile(found, tmp_path / "profile.png", title="8x8")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


class Names:
    """A million names that take no memory."""

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> str:
        return f"{index}.png"


def _resident() -> float:
    """This process's memory in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.slow
def test_a_million_inputs_in_little_memory(model: OnnxModel) -> None:
    image = tiny_dataset.coloured(1)[0][0]
    source = FunctionSource(Names(), lambda index: image)  # type: ignore[arg-type]
    resident, done = [_resident()], 0
    began = time.monotonic()
    for chunk in stream(source, model, batch_size=64):
        if not done:
            assert time.monotonic() - began < 2
        done += len(chunk.indices)
        if done % 100_032 == 0:
            resident.append(_resident())
    assert done == 1_000_000
    assert resident[-1] - resident[1] < 30, resident
    assert resident[-1] - resident[0] < 200, resident  # of the process, whatever it held before


@pytest.mark.parametrize("channels", [1, 3])
def test_pack_and_files_give_the_same(tmp_path: Path, model: OnnxModel, channels: int) -> None:
    images, labels = tiny_dataset.coloured(21)
    rows = list(images[..., :channels])
    folder = tiny_dataset.write(tmp_path / "d", rows, labels, tiny_onnx.COLOURS, files=True)
    dataset = Dataset.open(folder)
    answers = []
    for use_pack in (True, False):
        source = dataset.split("test", use_pack=use_pack)
        assert (source.uniform is not None) == use_pack
        chunks = list(stream(source, model, batch_size=4, indices=range(1, 21, 3)))
        assert [index for chunk in chunks for index in chunk.indices] == list(range(1, 21, 3))
        answers.append(np.concatenate([chunk.logits for chunk in chunks]))
    np.testing.assert_array_equal(answers[0], answers[1])
    expected = np.broadcast_to(np.stack(rows), (21, 8, 8, 3))[1:21:3]
    np.testing.assert_allclose(answers[0], tiny_onnx.expected_logits(expected), rtol=1e-5)


def test_a_pack_of_another_size_is_preprocessed(tmp_path: Path, model: OnnxModel) -> None:
    images, labels = tiny_dataset.coloured(9, size=16)
    folder = tiny_dataset.write(tmp_path / "d", list(images), labels, tiny_onnx.COLOURS)
    dataset = Dataset.open(folder)
    source = dataset.split("test")
    chunks = list(stream(source, model, batch_size=4))
    resized = np.stack([model.card.preprocess(image) for image in images])
    logits = np.concatenate([chunk.logits for chunk in chunks])
    np.testing.assert_allclose(logits, tiny_onnx.expected_logits(resized), rtol=1e-5)
