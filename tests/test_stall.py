"""Training that waits for data says which stage of loading is slow, from what was measured."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distcls.imaging import reading
from distcls.training import stall
from distcls.training.config import LoaderConfig, TrainConfig
from distcls.training.run import fit
from distcls.training.stall import StageTimes, StallAdvice
from tests import tiny_dataset
from tests.pictures import smooth

FEW: dict[str, Any] = {"model": "simple_cnn", "epochs": 1, "batch_size": 4}


@pytest.fixture(autouse=True)
def _said_of_short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "LEAST_WAIT", 0.1)


def images(folder: Path, side: int, *, packed: bool = False, count: int = 24) -> Path:
    """A dataset directory of noisy images, which take their time to decode."""
    pictures = [smooth(side, side, seed=index) for index in range(count)]
    labels = [index % 2 for index in range(count)]
    splits = ["val" if index % 6 < 2 else "train" for index in range(count)]
    return tiny_dataset.write(
        folder, pictures, labels, ("a", "b"), splits=splits, packed=packed, files=not packed
    )


def slowed(call: Callable[..., bytes]) -> Callable[..., bytes]:
    def slow(*arguments: Any) -> bytes:
        time.sleep(0.04)
        return call(*arguments)

    return slow


def warning(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of advice of a run."""
    said = capsys.readouterr().err.replace("\n", " ")
    found = re.findall(r"warning: (training waits for data .*?)(?=epoch|best|$)", said)
    assert len(found) == 1, said
    return str(found[0])


def test_slow_storage_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reading, "_read_once", slowed(reading._read_once))
    data = images(tmp_path / "data", 32)
    fit(data=data, out=tmp_path / "run", loader={"workers": 2}, **FEW)
    said = warning(capsys)
    assert re.search(r"waits for data \d+% of the time", said)
    assert share(said, "storage") > 50
    assert "(slow: reading files)" in said
    assert "--loader.workers 8 (now 2)" in said
    assert f"copy {data} to a faster disk" in said


def test_slow_decoding_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = images(tmp_path / "data", 1000)
    fit(data=data, out=tmp_path / "run", input={"size": (16, 16)}, **FEW)
    said = warning(capsys)
    assert share(said, "decode") > 50
    assert "(slow: decoding files)" in said
    assert "distcls prepare --pack on" in said


def share(said: str, stage: str) -> int:
    found = re.search(rf"{stage} (\d+)%", said)
    assert found
    return int(found[1])


def test_your_own_transform_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def pause(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        time.sleep(0.04)
        return image

    data = images(tmp_path / "data", 32, packed=True)
    fit(data=data, out=tmp_path / "run", transform=pause, loader={"workers": 1}, **FEW)
    said = warning(capsys)
    assert share(said, "augment") > 50
    assert "(slow: your augment.transform" in said


def test_a_fast_loader_says_nothing(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(data=digits, out=tmp_path / "run", limit=200, **{**FEW, "batch_size": 20})
    assert "waits for data" not in capsys.readouterr().err


def advised(times: StageTimes, seconds: float, **loader: Any) -> list[str]:
    advice = StallAdvice(times, TrainConfig(data="photos", loader=LoaderConfig(**loader)))
    advice.count(seconds)
    return advice.problems() + advice.problems()


@pytest.mark.parametrize("wait", [0.5, 2.0])
def test_a_tenth_of_the_time_is_enough(wait: float) -> None:
    times = StageTimes(2, packed=True)
    times.wait(wait, first=False)
    times.spent["storage"] = 3.0
    found = advised(times, 10.0)
    assert len(found) == (wait > 1)  # and it is said once
    assert all(
        "slow: reading the pack" in text and "--loader.workers" not in text for text in found
    )


def test_a_loader_that_is_fast_but_uneven_takes_a_longer_queue() -> None:
    times = StageTimes(2, packed=False)
    times.wait(3.0, first=False)
    times.spent["storage"], times.idle = 4.0, 4.0
    [said] = advised(times, 10.0, prefetch=2)
    assert "stood still for 4 s" in said
    assert "--loader.prefetch 8 (now 2)" in said
    times.wait(9.0, first=True)  # a longer queue does not shorten the start of an epoch
    assert "--loader.prefetch" not in advised(times, 30.0)[0]
