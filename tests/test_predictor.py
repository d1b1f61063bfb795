"""`Predictor.submit`: the same bits as `chunks`, neighbours undisturbed, nothing ever hangs."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from distcls.commands.predict import main
from distcls.data.formats import objects
from distcls.data.source import FunctionSource
from distcls.errors import BadValue, DistclsError
from distcls.predictor import Prediction, Predictor
from distcls.runtime.model import Model, OnnxModel, WithFeatures
from distcls.runtime.providers import ExecutionConfig
from tests import tiny_dataset, tiny_onnx
from tests.e2e.commands import ROOT
from tests.pictures import encode, smooth
from tests.test_pipeline import working
from tests.test_predict_rows import with_features
from tests.test_writers import read

WORKERS = ExecutionConfig(layout="workers", threads=1, streams=3, batch_size=8)
STAGES = ExecutionConfig(layout="stages", threads=2, streams=2, batch_size=8)
LAYOUTS = pytest.mark.parametrize("execution", [WORKERS, STAGES], ids=["workers", "stages"])
EXPORTED = ROOT / "tests" / "fixtures" / "v076daf9"
"""Real networks, exported."""


def images() -> list[bytes]:
    """Image files as users have them, some of them bad."""
    files = [encode(smooth(40 + 9 * n, 90 - 7 * n, n), "JPEG", quality=90) for n in range(9)]
    files += [encode(smooth(28, 28, n), "PNG") for n in range(8)]
    files += [encode(Image.fromarray(smooth(31, 17, n)).convert("L"), "PNG") for n in range(4)]
    files += [encode(Image.fromarray(smooth(20, 20)).convert("RGBA"), "PNG")]
    files += [encode(np.full((1, 1, 3), value, np.uint8), "PNG") for value in (0, 200)]
    files += [files[0][:-200], b"", b"no image", encode(smooth(), "WEBP"), encode(smooth(), "GIF")]
    return files


def streamed(predictor: Predictor, files: list[bytes]) -> tuple[NDArray[np.float32], list[object]]:
    source = FunctionSource([str(index) for index in range(len(files))], read=files.__getitem__)
    chunks = list(predictor.chunks(source))
    logits = np.concatenate([chunk.logits for chunk in chunks])
    return logits, [error for chunk in chunks for error in chunk.errors]


@pytest.fixture(params=["whole", "run_heads", "run_labels"])
def path(request: pytest.FixtureRequest) -> Path:
    return EXPORTED / str(request.param) / "best.onnx"


@LAYOUTS
def test_submit_gives_the_bits_of_stream_and_the_rows_of_predict(
    path: Path, execution: ExecutionConfig, tmp_path: Path
) -> None:
    files = images()
    with Predictor(OnnxModel(path, execution)) as predictor:
        logits, errors = streamed(predictor, files)
        found = [future.result(30) for future in map(predictor.submit, files)]
        one_by_one = [predictor.submit(data).result(30) for data in files]
    for predictions in (found, one_by_one):
        submitted = np.stack([prediction.logits for prediction in predictions])
        assert submitted.tobytes() == logits.tobytes()
        assert [prediction.error for prediction in predictions] == errors
    assert [index for index, error in enumerate(errors) if error] == [24, 25, 26]
    (tmp_path / "in").mkdir()
    for index, data in enumerate(files):
        (tmp_path / "in" / f"{index:03d}.png").write_bytes(data)
    out = tmp_path / "pre.jsonl"
    main([str(tmp_path / "in"), "--model", str(path), "--out", str(out), "--provider", "cpu"])
    for row, prediction in zip(read(out), found, strict=True):
        assert (row["label"], row["error"]) == (prediction.label, prediction.error)
        if prediction.error is None:
            assert np.float32(row["probability"]) == np.float32(prediction.probability)
        else:
            assert prediction.probability is None
            assert np.isnan(prediction.probabilities).all()


@LAYOUTS
def test_many_threads_submit_good_and_bad_images(
    execution: ExecutionConfig, tmp_path: Path
) -> None:
    pictures = tiny_dataset.coloured(200)[0]
    expected = tiny_onnx.expected_logits(pictures)
    files = [encode(picture, "PNG") for picture in pictures]
    for index in range(0, 200, 7):
        files[index] = files[index][: index % 50]
    predictor = Predictor(OnnxModel(tiny_onnx.write(tmp_path / "m.onnx"), execution))
    with predictor, ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda data: predictor.submit(data).result(30), files))
    assert predictor.waiting == 0
    for index, prediction in enumerate(found):
        if index % 7 == 0:
            assert prediction.error
            assert np.isnan(prediction.logits).all()
        else:
            assert prediction.error is None
            np.testing.assert_allclose(prediction.logits, expected[index], rtol=1e-5)
            assert prediction.label == tiny_onnx.COLOURS[int(expected[index].argmax())]
            assert prediction.features is None
    assert not working()


class Gated(tiny_onnx.FakeModel):
    """A model that waits for `gate` and remembers its batches."""

    def __init__(self, execution: ExecutionConfig) -> None:
        self.card = tiny_onnx.card()
        self.execution = execution
        self.gate = threading.Event()
        self.started = threading.Event()
        self.batches: list[int] = []

    def logits(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.started.set()
        assert self.gate.wait(30)
        self.batches.append(len(pictures))
        if (pictures == 13).all(axis=(1, 2, 3)).any():
            raise DistclsError("out of memory")
        return tiny_onnx.expected_logits(pictures)


ALONE = ExecutionConfig(layout="workers", threads=1, streams=1, batch_size=8)
ALONE_STAGED = ExecutionConfig(layout="stages", threads=1, streams=1, batch_size=8)
ONE_STREAM = pytest.mark.parametrize("execution", [ALONE, ALONE_STAGED], ids=["workers", "stages"])


@pytest.fixture
def gated(execution: ExecutionConfig) -> Iterator[Gated]:
    model = Gated(execution)
    yield model
    model.gate.set()  # whatever failed, no thread waits on


def picture(value: int = 7) -> bytes:
    return encode(np.full((8, 8, 3), value, np.uint8), "PNG")


def first_under_way(predictor: Predictor, model: Gated) -> Future[Prediction]:
    future = predictor.submit(picture())
    assert model.started.wait(30)
    return future


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(3000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError


@ONE_STREAM
def test_what_waits_is_one_batch(gated: Gated) -> None:
    with Predictor(gated) as predictor:
        futures = [first_under_way(predictor, gated)]
        futures += [predictor.submit(picture()) for _ in range(11)]
        if gated.execution.layout == "stages":  # decoded while the first is computed
            wait_until(lambda: predictor._queue._batchers[0].waiting == 0)
        assert predictor.waiting >= 10
        gated.gate.set()
        assert all(future.result(30).error is None for future in futures)
    assert gated.batches[:2] == [1, 8]
    assert sum(gated.batches) == 12


def test_a_burst_is_divided_among_the_threads() -> None:
    model = Gated(ExecutionConfig(layout="workers", threads=1, streams=2, batch_size=64))
    with Predictor(model) as predictor:
        futures = [predictor.submit(picture()) for _ in range(2)]
        wait_until(lambda: predictor.waiting == 0)  # both threads have one
        futures += [predictor.submit(picture()) for _ in range(30)]
        model.gate.set()
        for future in futures:
            future.result(30)
    assert max(model.batches) <= 15


@ONE_STREAM
def test_closed_while_futures_wait(gated: Gated) -> None:
    predictor = Predictor(gated)
    computed = first_under_way(predictor, gated)
    waiting = [predictor.submit(picture()) for _ in range(20)]
    closing = threading.Thread(target=predictor.close)
    closing.start()
    for future in waiting:  # they end at once, not with the batch under way
        with pytest.raises(DistclsError, match="the predictor is closed"):
            future.result(30)
    gated.gate.set()
    closing.join(30)
    assert not closing.is_alive()
    assert computed.result(0).error is None
    with pytest.raises(DistclsError, match="the predictor is closed"):
        predictor.submit(picture())
    predictor.close()
    assert not working()


@ONE_STREAM
def test_a_model_that_fails_ends_its_batch_alone(gated: Gated) -> None:
    gated.gate.set()
    with Predictor(gated) as predictor:
        with pytest.raises(DistclsError, match="out of memory"):
            predictor.submit(picture(13)).result(30)
        assert predictor.submit(picture()).result(30).error is None


@ONE_STREAM
def test_a_bug_is_raised_for_its_image_alone(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(data: bytes, background: object) -> NDArray[np.uint8]:
        if data == b"bug":
            raise ZeroDivisionError
        return pictures[int(data)]

    pictures = tiny_dataset.coloured(3)[0]
    monkeypatch.setattr(objects, "decode", decode)
    with Predictor(gated) as predictor:
        futures = [predictor.submit(data) for data in (b"0", b"1", b"bug", b"2")]
        gated.gate.set()
        with pytest.raises(ZeroDivisionError):
            futures.pop(2).result(30)
        logits = np.stack([future.result(30).logits for future in futures])
    np.testing.assert_allclose(logits, tiny_onnx.expected_logits(pictures), rtol=1e-5)


@pytest.mark.parametrize("execution", [ALONE])
def test_a_cancelled_image_is_left_out(gated: Gated) -> None:
    with Predictor(gated) as predictor:
        first = first_under_way(predictor, gated)
        futures = [predictor.submit(picture()) for _ in range(3)]
        assert futures[1].cancel()
        gated.gate.set()
        assert [f.result(30).error for f in (first, futures[0], futures[2])] == [None] * 3
    assert gated.batches == [1, 2]


@LAYOUTS
def test_features_and_output_that_is_not_finite(execution: ExecutionConfig, tmp_path: Path) -> None:
    class Infinite(Gated):
        def logits(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
            logits = tiny_onnx.expected_logits(pictures)
            logits[pictures.max(axis=(1, 2, 3)) == 255] = np.inf
            return logits

    values = (255, 7)
    with Predictor(Infinite(execution)) as predictor:
        bad, good = [predictor.submit(picture(value)).result(30) for value in values]
    assert (bad.error, good.error) == ("the model's output is not finite", None)
    assert np.isnan(bad.logits).all()
    model: Model = WithFeatures(OnnxModel(with_features(tmp_path / "f.onnx"), execution))
    with Predictor(model) as predictor:
        found = predictor.submit(picture(7)).result(30)
    assert found.features is not None
    np.testing.assert_allclose(found.features, [7, 7, 7], rtol=1e-5)
    assert found.logits.shape == (3,)


def test_a_process_ends_though_nobody_closes(tmp_path: Path) -> None:
    path = tiny_onnx.write(tmp_path / "m.onnx")
    (tmp_path / "a.png").write_bytes(picture())
    program = (
        "from pathlib import Path\n"
        "from distcls.predictor import Predictor, load_model\n"
        f"folder = Path({str(tmp_path)!r})\n"
        f"predictor = Predictor(load_model(Path({str(path)!r})))\n"
        "futures = [predictor.submit((folder / 'a.png').read_bytes()) for _ in range(9)]\n"
        "print(futures[0].result().label)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() in tiny_onnx.COLOURS


def test_sizes_and_indices_that_cannot_be() -> None:
    model = OnnxModel(EXPORTED / "whole" / "best.onnx")
    for wrong in ({"batch_size": 0}, {"batch_size": -1}, {"workers": 0}):
        with pytest.raises(BadValue, match="at least 1"):
            Predictor(model, **wrong)
    images = np.zeros((4, *model.card.preprocess.size, 3), np.uint8)
    images[:, 0, 0] = np.arange(4)[:, None] * 60
    source = FunctionSource(list("abcd"), lambda index: images[index], uniform=images)
    with Predictor(model, batch_size=3) as predictor:
        for indices in (range(3, 5), range(-1, 2)):
            with pytest.raises(IndexError, match="of a source of 4 images"):
                predictor.chunks(source, indices=indices)
        forwards = np.concatenate([chunk.logits for chunk in predictor.chunks(source)])
        down = predictor.chunks(source, indices=range(3, -1, -1))
        backwards = np.concatenate([chunk.logits for chunk in down])
    np.testing.assert_array_equal(backwards, forwards[::-1])
