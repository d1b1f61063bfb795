"""`--provider auto`: measured, compared, remembered, told."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from distcls.data.source import ImageSource
from distcls.errors import BadImage, DistclsError, UsageError
from distcls.predictor import load_model
from distcls.runtime import autotune
from distcls.runtime.autotune import (
    WORTH_MEASURING,
    Measurement,
    explain,
    measure,
    open_fastest,
    pick,
)
from distcls.runtime.benchmark import Benchmark
from distcls.runtime.model import OnnxModel
from distcls.runtime.providers import PLUGIN, ExecutionConfig, ExecutionRequest
from tests import pictures, tiny_dataset, tiny_onnx

HERE = ExecutionConfig(layout="workers", threads=1, streams=2, batch_size=4)
THERE = dataclasses.replace(HERE, provider="openvino", precision="reduced")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny_onnx.write(tmp_path / "m.onnx")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(autotune.FOLDER, str(tmp_path / "cache"))


def source(count: int = 40) -> ImageSource:
    images, _ = tiny_dataset.coloured(count)
    return ImageSource(image_ids=[""] * count, load=lambda index: images[index])


class Elsewhere(OnnxModel):
    """The CPU under another provider's name, with what that one does to the answers."""

    def __init__(self, path: Path, plan: ExecutionConfig, noise: float) -> None:
        super().__init__(path, dataclasses.replace(plan, provider="cpu"))
        self.plan = plan
        self.noise = noise

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits = super().logits(images)
        return logits + np.float32(self.noise) * np.arange(logits.shape[1], dtype=np.float32)


def tried(
    path: Path, noise: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> list[Measurement]:
    """What comes of a machine with an OpenVINO of this noise in each precision."""
    monkeypatch.setattr(autotune, "installed", lambda: ["openvino", "cpu"])

    def open_plan(plan: ExecutionConfig) -> OnnxModel:
        if plan.provider == "cpu":
            return OnnxModel(path, plan)
        return Elsewhere(path, plan, noise[plan.precision])

    asked = ExecutionRequest(workers=2, images=10_000)
    return measure(OnnxModel(path, HERE), asked, Benchmark.of(source()), open_plan)


def test_what_agrees_is_measured_with_decoding(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(path, {"reduced": 0.0}, monkeypatch)  # fp32 would be a KeyError
    assert all(trial.problem is None and trial.rate > 0 for trial in found)
    assert {trial.plan.provider for trial in found} == {"openvino", "cpu"}
    assert {trial.plan.layout for trial in found if trial.plan.provider == "cpu"} == {
        "workers",
        "stages",
    }
    (kept,) = [trial for trial in found if trial.model is not None]
    assert kept is pick(found)
    assert kept.model is not None
    assert kept.model.plan == kept.plan


def test_reduced_precision_may_differ_but_not_change_classes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tried(path, {"reduced": 0.01}, monkeypatch)
    assert all(trial.problem is None for trial in found)
    found = tried(path, {"reduced": 50.0, "fp32": 0.0}, monkeypatch)
    own = {t.plan.precision: t.problem for t in found if t.plan.provider == "openvino"}
    assert "same answer on" in str(own["reduced"])
    assert own["fp32"] is None
    assert pick(found).problem is None


def test_who_disagrees_is_never_chosen(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tried(path, {"reduced": 50.0, "fp32": 0.01}, monkeypatch)
    problems = [trial.problem for trial in found if trial.plan.provider == "openvino"]
    assert len(problems) == 2  # neither other batch sizes nor layouts of what disagrees
    assert None not in problems
    boosted = [dataclasses.replace(trial, rate=1e9) if trial.problem else trial for trial in found]
    assert pick(boosted).plan.provider == "cpu"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: openvino is not used: its answers are not the CPU's")


class Broken(OnnxModel):
    """A model of which nothing finite comes."""

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return super().logits(images) * np.float32(np.nan)


def test_a_model_that_is_broken_everywhere_runs_on_the_cpu(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "installed", lambda: ["openvino", "cpu"])
    asked = ExecutionRequest(workers=2, images=10_000)

    found = measure(
        Broken(path, HERE), asked, Benchmark.of(source()), lambda plan: Broken(path, plan)
    )
    assert pick(found).plan.provider == "cpu"


def test_the_fastest_is_picked_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = Measurement(plan=HERE, rate=100.0), Measurement(plan=THERE, rate=250.4)
    wider = Measurement(plan=dataclasses.replace(HERE, batch_size=16), rate=120.0)
    failed = Measurement(plan=ExecutionConfig(provider="cuda"), problem="no driver")
    assert pick([slow, failed, fast, wider]) is fast
    assert capsys.readouterr().err == "warning: cuda is not used: no driver\n"
    told = explain(fast, [slow, failed, fast, wider])
    assert told == "250 images/s here, 120 with CPU (workers)"
    with pytest.raises(DistclsError, match="provider: cuda is not used: no driver"):
        pick([failed])


def test_measured_once_and_remembered(
    path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = ExecutionRequest(images=WORTH_MEASURING)
    first = open_fastest(path, asked, source())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"provider: {first.plan}; ")
    assert "images/s here" in line
    assert "(measured in" in line
    (file,) = (tmp_path / "cache" / "providers").iterdir()
    again = open_fastest(path, asked, source())
    assert again.plan == first.plan
    assert capsys.readouterr().err.endswith("(remembered)\n")
    few = open_fastest(path, ExecutionRequest(images=1), source())  # remembered is as good for one
    assert few.plan == first.plan
    capsys.readouterr()
    file.write_bytes(b'{"format": 1, "plan": {"provider": "abacus"}, "why": ""}')
    open_fastest(path, asked, source())
    assert "(measured in" in capsys.readouterr().err


def test_what_was_remembered_and_does_not_open_is_chosen_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(autotune, "recall", lambda key: {"plan": gone, "why": "fast"})
    gone = ExecutionConfig(provider="tensorrt").to_json()
    assert (
        open_fastest(path, ExecutionRequest(images=WORTH_MEASURING), source()).plan.provider
        != "tensorrt"
    )
    assert "remembered" not in capsys.readouterr().err


def test_few_images_are_not_worth_measuring(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_fastest(path, ExecutionRequest(images=WORTH_MEASURING - 1, workers=3), source())
    assert model.plan == ExecutionConfig(layout="workers", threads=1, streams=3, batch_size=64)
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "cache").exists()


def test_a_batch_size_that_is_given_is_kept(path: Path) -> None:
    for images in (10, None):
        assert (
            open_fastest(
                path, ExecutionRequest(images=images, batch_size=5), source()
            ).plan.batch_size
            == 5
        )


def test_bad_images_and_none_at_all_to_measure_with(path: Path) -> None:
    images, _ = tiny_dataset.coloured(20)

    def load(index: int) -> NDArray[np.uint8]:
        if index % 2:
            raise BadImage("broken")
        return images[index]

    half = Benchmark.of(ImageSource(image_ids=[""] * 20, load=load))
    assert len(half.images) == 10
    for nothing in (None, ImageSource(image_ids=[], load=load)):
        made_up = Benchmark.of(nothing)
        assert {image.shape for image in made_up.images} == {(375, 500, 3)}
        assert made_up.encoded is not None
        rate, logits = made_up.run(OnnxModel(path, HERE), HERE, 16, None)
        assert rate > 0
        assert logits.shape == (8, 3)


def test_a_pack_is_rehearsed_without_decoding(path: Path) -> None:
    images, _ = tiny_dataset.coloured(20)
    pack = ImageSource(image_ids=[""] * 20, load=lambda index: images[index], uniform=images)
    rehearsal = Benchmark.of(pack)
    assert rehearsal.encoded is None
    _, logits = rehearsal.run(OnnxModel(path, HERE), HERE, 48, None)
    np.testing.assert_allclose(logits, tiny_onnx.expected_logits(images), rtol=1e-5)


def test_slow_reading_does_not_hold_up_the_choice() -> None:
    import time

    def load(index: int) -> NDArray[np.uint8]:
        time.sleep(0.1)
        return pictures.smooth(seed=index)

    began = time.monotonic()
    rehearsal = Benchmark.of(ImageSource(image_ids=[""] * 100, load=load))
    assert time.monotonic() - began < 1.5
    assert 1 <= len(rehearsal.images) <= 4


def test_a_provider_that_is_not_installed_is_refused(path: Path) -> None:
    for name in ("cuda", "tensorrt"):
        with pytest.raises(UsageError, match=f"provider: {name} is"):
            open_fastest(path, ExecutionRequest(provider=name, images=1))  # type: ignore[arg-type]


def test_checkpoints_run_in_pytorch(tmp_path: Path) -> None:
    (tmp_path / "best.pth").write_bytes(b"never read")
    with pytest.raises(UsageError, match=r"provider: openvino runs exported models; .*best\.pth"):
        load_model(tmp_path / "best.pth", asked=ExecutionRequest(provider="openvino"))


@pytest.mark.skipif(importlib.util.find_spec(PLUGIN) is None, reason="OpenVINO is not installed")
@pytest.mark.parametrize("images", [8, WORTH_MEASURING])
def test_openvino_answers_as_the_cpu(path: Path, images: int) -> None:
    model = open_fastest(path, ExecutionRequest(provider="openvino", images=images), source())
    assert model.provider == "OpenVINOExecutionProvider"
    batch, _ = tiny_dataset.coloured(40)
    expected = tiny_onnx.expected_logits(batch)
    exact = OnnxModel(path, dataclasses.replace(model.plan, precision="fp32"))
    np.testing.assert_allclose(exact.logits(batch), expected, atol=1e-3)
    assert (model.logits(batch).argmax(1) == expected.argmax(1)).all()
