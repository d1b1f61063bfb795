"""`--provider auto`: measured, compared, cached, explained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from distcls import system
from distcls.data.source import FunctionSource, ImageSource
from distcls.errors import BadImage, DistclsError, UsageError
from distcls.predictor import load_model
from distcls.runtime import autotune
from distcls.runtime.autotune import (
    FORMAT,
    MIN_IMAGES,
    Measurement,
    cache_key,
    choose,
    explain,
    measure,
    open_fastest,
    read_cache,
    write_cache,
)
from distcls.runtime.benchmark import Benchmark
from distcls.runtime.model import OnnxModel
from distcls.runtime.providers import PROVIDERS, ExecutionConfig, ExecutionRequest
from tests import pictures, tiny_dataset, tiny_onnx

HERE = ExecutionConfig(layout="workers", threads=1, streams=2, batch_size=4)
THERE = dataclasses.replace(HERE, provider="openvino", precision="reduced")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny_onnx.write(tmp_path / "m.onnx")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(system.CACHE_VARIABLE, str(tmp_path / "cache"))


def source(count: int = 40) -> ImageSource:
    images, _ = tiny_dataset.coloured(count)
    return FunctionSource([""] * count, lambda index: images[index])


class Elsewhere(OnnxModel):
    """The CPU under another provider's name, with that one's numerical error."""

    def __init__(self, path: Path, execution: ExecutionConfig, noise: float) -> None:
        super().__init__(path, dataclasses.replace(execution, provider="cpu"))
        self.execution = execution
        self.noise = noise

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits = super().logits(images)
        return logits + np.float32(self.noise) * np.arange(logits.shape[1], dtype=np.float32)


def measured_with(
    path: Path, noise: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> list[Measurement]:
    """The measurements on a machine with an OpenVINO of this noise in each precision."""
    monkeypatch.setattr(autotune, "installed", lambda: ["openvino", "cpu"])

    def open_model(execution: ExecutionConfig) -> OnnxModel:
        if execution.provider == "cpu":
            return OnnxModel(path, execution)
        return Elsewhere(path, execution, noise[execution.precision])

    request = ExecutionRequest(workers=2, images=10_000)
    return measure(OnnxModel(path, HERE), request, Benchmark.of(source()), open_model)


def test_what_agrees_is_measured_with_decoding(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured_with(path, {"reduced": 0.0}, monkeypatch)  # fp32 would be a KeyError
    assert all(each.problem is None and each.rate > 0 for each in found)
    assert {each.execution.provider for each in found} == {"openvino", "cpu"}
    assert {each.execution.layout for each in found if each.execution.provider == "cpu"} == {
        "workers",
        "stages",
    }
    (best,) = [each for each in found if each.model is not None]
    assert best is choose(found)
    assert best.model is not None
    assert best.model.execution == best.execution


def test_reduced_precision_may_differ_but_not_change_classes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measured_with(path, {"reduced": 0.01}, monkeypatch)
    assert all(each.problem is None for each in found)
    found = measured_with(path, {"reduced": 50.0, "fp32": 0.0}, monkeypatch)
    own = {t.execution.precision: t.problem for t in found if t.execution.provider == "openvino"}
    assert "same prediction for" in str(own["reduced"])
    assert own["fp32"] is None
    assert choose(found).problem is None


def test_what_disagrees_is_never_chosen(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured_with(path, {"reduced": 50.0, "fp32": 0.01}, monkeypatch)
    problems = [each.problem for each in found if each.execution.provider == "openvino"]
    assert len(problems) == 2  # neither other batch sizes nor layouts of what disagrees
    assert None not in problems
    boosted = [dataclasses.replace(each, rate=1e9) if each.problem else each for each in found]
    assert choose(boosted).execution.provider == "cpu"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: openvino is not used: it disagrees with the CPU")


class Broken(OnnxModel):
    """A model of which nothing finite comes."""

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return super().logits(images) * np.float32(np.nan)


def test_a_model_that_is_broken_everywhere_runs_on_the_cpu(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "installed", lambda: ["openvino", "cpu"])
    request = ExecutionRequest(workers=2, images=10_000)

    found = measure(
        Broken(path, HERE),
        request,
        Benchmark.of(source()),
        lambda execution: Broken(path, execution),
    )
    assert choose(found).execution.provider == "cpu"


def test_the_fastest_is_picked_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = Measurement(execution=HERE, rate=100.0), Measurement(execution=THERE, rate=250.4)
    wider = Measurement(execution=dataclasses.replace(HERE, batch_size=16), rate=120.0)
    failed = Measurement(execution=ExecutionConfig(provider="cuda"), problem="no driver")
    assert choose([slow, failed, fast, wider]) is fast
    assert capsys.readouterr().err == "warning: cuda is not used: no driver\n"
    reason = explain(fast, [slow, failed, fast, wider])
    assert reason == "250 images/s here, 120 with CPU (workers)"
    with pytest.raises(DistclsError, match="provider: cuda is not used: no driver"):
        choose([failed])


def test_measured_once_and_cached(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(autotune, "installed", lambda: ["cpu"])
    request = ExecutionRequest(images=MIN_IMAGES)
    first = open_fastest(path, request, source())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"provider: {first.execution}; ")
    assert "images/s here" in line
    assert "(measured in" in line
    (file,) = (tmp_path / "cache" / "providers").iterdir()
    again = open_fastest(path, request, source())
    assert again.execution == first.execution
    assert capsys.readouterr().err.endswith("(cached)\n")
    few = open_fastest(path, ExecutionRequest(images=1), source())  # as good for one as for many
    assert few.execution == first.execution
    capsys.readouterr()
    file.write_bytes(b"{}")
    open_fastest(path, request, source())
    assert "(measured in" in capsys.readouterr().err


def test_a_cached_choice_that_does_not_open_is_measured_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = ExecutionConfig(provider="tensorrt")
    monkeypatch.setattr(autotune, "read_cache", lambda key, request: (gone, "fast"))
    model = open_fastest(path, ExecutionRequest(images=MIN_IMAGES), source())
    assert model.execution.provider != "tensorrt"
    assert "cached" not in capsys.readouterr().err


REQUEST = ExecutionRequest(workers=2)


def entry(tmp_path: Path) -> Path:
    """The file of a sound entry under the key `k`."""
    assert read_cache("k", REQUEST) is None
    assert write_cache("k", HERE, "fast")
    assert read_cache("k", REQUEST) == (HERE, "fast")
    (file,) = (tmp_path / "cache" / "providers").iterdir()
    return file


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 10_000])
def test_a_damaged_cache_is_as_good_as_none(tmp_path: Path, damaged: bytes) -> None:
    entry(tmp_path).write_bytes(damaged)
    assert read_cache("k", REQUEST) is None


@pytest.mark.parametrize(
    "poison",
    [
        {"format": FORMAT - 1},
        {"format": str(FORMAT)},
        {"reason": None},
        {"reason": ["fast"]},
        {"reason": "fast\n\x1b[2J"},
        {"reason": "x" * 5000},
        {"execution": None},
        {"execution": [1]},
        {"execution": {"provider": "abacus"}},
        {"provider": "cuda", "layout": "workers"},
        {"provider": ["cpu"]},
        {"precision": "reduced"},
        {"layout": "elsewhere"},
        {"threads": 1000},
        {"threads": True},
        {"streams": 10**9},
        {"streams": 1e400},
        {"batch_size": 3},
        {"batch_size": 2**40},
        {"batch_size": "4"},
        {"more": 1},
    ],
)
def test_a_poisoned_cache_is_as_good_as_none(tmp_path: Path, poison: dict[str, Any]) -> None:
    file = entry(tmp_path)
    values = json.loads(file.read_text())
    whole = poison.keys() <= values.keys()
    values = {**values, **poison} if whole else values
    if not whole:
        values["execution"] |= poison
    file.write_text(json.dumps(values))
    assert read_cache("k", REQUEST) is None


def test_the_cache_gives_nothing_but_what_was_requested(tmp_path: Path) -> None:
    entry(tmp_path)
    for other in (
        ExecutionRequest(workers=3),
        ExecutionRequest(workers=2, batch_size=5),
        ExecutionRequest(workers=2, provider="openvino"),
    ):
        assert read_cache("k", other) is None
    exactly = ExecutionRequest(workers=2, batch_size=HERE.batch_size, provider="cpu")
    assert read_cache("k", exactly) == (HERE, "fast")


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(system.CACHE_VARIABLE, str(entry(tmp_path)))  # a file in the folder's place
    assert not write_cache("k", HERE, "fast")
    assert read_cache("k", REQUEST) is None


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(system.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert system.cache_folder() == tmp_path / "distcls"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert system.cache_folder() == tmp_path / ".cache" / "distcls"


def test_a_choice_depends_on_model_machine_versions_and_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def key(sha256: str = "a", **request: Any) -> str:
        return cache_key(sha256, ExecutionRequest(**request))

    assert key() == key()
    assert key(images=5) == key()
    keys = [key(), key("b"), key(provider="cpu"), key(batch_size=3), key(workers=77)]
    monkeypatch.setattr(autotune, "versions", lambda: {"onnxruntime": "9.9"})
    keys.append(key())
    monkeypatch.setattr(autotune, "cpu_name", lambda: "another")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_few_images_are_not_worth_measuring(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_fastest(path, ExecutionRequest(images=MIN_IMAGES - 1, workers=3), source())
    assert model.execution == ExecutionConfig(layout="workers", threads=1, streams=3, batch_size=64)
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "cache").exists()


def test_a_batch_size_that_is_given_stays(path: Path) -> None:
    for images in (10, None):
        assert (
            open_fastest(
                path, ExecutionRequest(images=images, batch_size=5), source()
            ).execution.batch_size
            == 5
        )


def test_bad_images_and_none_at_all_to_measure_with(path: Path) -> None:
    images, _ = tiny_dataset.coloured(20)

    def load(index: int) -> NDArray[np.uint8]:
        if index % 2:
            raise BadImage("broken")
        return images[index]

    half = Benchmark.of(FunctionSource([""] * 20, load))
    assert len(half.images) == 10
    for nothing in (None, FunctionSource([], load)):
        synthetic = Benchmark.of(nothing)
        assert {image.shape for image in synthetic.images} == {(375, 500, 3)}
        assert synthetic.encoded is not None
        rate, logits = synthetic.run(OnnxModel(path, HERE), HERE, 16, None)
        assert rate > 0
        assert logits.shape == (8, 3)


def test_a_pack_is_measured_without_decoding(path: Path) -> None:
    images, _ = tiny_dataset.coloured(20)
    pack = FunctionSource([""] * 20, lambda index: images[index], uniform=images)
    benchmark = Benchmark.of(pack)
    assert benchmark.encoded is None
    _, logits = benchmark.run(OnnxModel(path, HERE), HERE, 48, None)
    np.testing.assert_allclose(logits, tiny_onnx.expected_logits(images), rtol=1e-5)


def test_slow_reading_does_not_hold_up_the_choice() -> None:
    import time

    def load(index: int) -> NDArray[np.uint8]:
        time.sleep(0.1)
        return pictures.smooth(seed=index)

    began = time.monotonic()
    benchmark = Benchmark.of(FunctionSource([""] * 100, load))
    assert time.monotonic() - began < 1.5
    assert 1 <= len(benchmark.images) <= 4


def test_a_provider_that_is_not_installed_is_refused(path: Path) -> None:
    for name in ("cuda", "tensorrt"):
        with pytest.raises(UsageError, match=f"provider: {name} is"):
            open_fastest(path, ExecutionRequest(provider=name, images=1))


def test_checkpoints_run_in_pytorch(tmp_path: Path) -> None:
    (tmp_path / "best.pth").write_bytes(b"never read")
    with pytest.raises(UsageError, match=r"provider: openvino runs exported models; .*best\.pth"):
        load_model(tmp_path / "best.pth", "auto", ExecutionRequest(provider="openvino"))


@pytest.mark.skipif(PROVIDERS["openvino"].missing() is not None, reason="OpenVINO is not installed")
@pytest.mark.parametrize("images", [8, MIN_IMAGES])
def test_openvino_answers_as_the_cpu(path: Path, images: int) -> None:
    try:
        OnnxModel(path, ExecutionConfig(provider="openvino"))
    except UsageError as error:
        if "finds no CPU that it supports" in str(error):
            pytest.skip("OpenVINO does not support this CPU")
        raise
    model = open_fastest(path, ExecutionRequest(provider="openvino", images=images), source())
    assert model.provider == "OpenVINOExecutionProvider"
    batch, _ = tiny_dataset.coloured(40)
    expected = tiny_onnx.expected_logits(batch)
    exact = OnnxModel(path, dataclasses.replace(model.execution, precision="fp32"))
    np.testing.assert_allclose(exact.logits(batch), expected, atol=1e-3)
    assert (model.logits(batch).argmax(1) == expected.argmax(1)).all()
