"""`distcls lr-find`: the range test, its suggestion, and that nothing of it stays."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from distcls.cli import dispatch
from distcls.errors import BadValue, DistclsError, UsageError
from distcls.training.config import TrainConfig
from distcls.training.lr_range import curve_of, fastest_batch, find_lr, smooth
from distcls.training.memory import batch_speeds
from distcls.training.run import fit
from tests import tiny_dataset
from tests.test_fit import random_states

SMALL = ("--model", "simple_cnn", "--batch-size", "32", "--steps", "60")


def test_the_command(
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    fit(data=digits, out=run, model="simple_cnn", batch_size=32, epochs=1, limit=64)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    states = random_states()
    out = tmp_path / "lr.png"
    call = ["lr-find", "--config", str(run / "config.yaml"), "--out", str(out), "--json"]
    dispatch([*call, "--limit", "2000", *SMALL])
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert f"--lr {found['suggestion']:g} --batch-size 32" in captured.err
    rows = list(csv.DictReader((tmp_path / "lr.csv").read_text().splitlines()))
    rates = np.array([float(row["lr"]) for row in rows])
    assert np.allclose(np.diff(np.log(rates)), np.log(1e7) / 59, atol=1e-4)
    assert [int(row["step"]) for row in rows] == list(range(1, found["steps"] + 1))
    assert rates[-1] < found["diverged"] < 10
    assert found["steepest"] <= found["suggestion"] <= found["minimum"] < found["diverged"]
    picture = cv2.imread(str(out))
    assert picture is not None
    assert picture.std() > 10
    # it leaves no trace: in the run, in the temporary folder, in the random numbers
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert random_states() == states
    assert not list(scratch.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "lr.csv",
        "lr.png",
        "run",
        "scratch",
    ]


def test_the_suggestion_trains_better_than_rates_far_from_it(digits: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": digits, "model": "simple_cnn", "limit": 400}
    options |= {"batch_size": 32, "epochs": 2, "quiet": True}
    suggestion = find_lr(TrainConfig(**options)).suggestion
    losses = {
        factor: fit(**options, out=tmp_path / f"{factor}", lr=suggestion * factor).history[-1]
        for factor in (0.02, 1.0, 100.0)
    }
    assert losses[1.0]["val_loss"] < 0.5 * losses[0.02]["val_loss"]
    assert losses[1.0]["val_loss"] < 0.5 * losses[100.0]["val_loss"]


def test_a_folder_of_images_is_prepared_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = tiny_dataset.coloured(30)
    (tmp_path / "photos").mkdir()
    for label, name in enumerate("ab"):
        tiny_dataset.write_images(tmp_path / "photos" / name, images[label::2])
    monkeypatch.chdir(tmp_path)
    dispatch(
        ["lr-find", "--data", "photos", "--model", "simple_cnn", "--lowest", "1e-4", "--quiet"]
    )
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == ["lr-find.csv", "lr-find.png", "photos"]
    assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == ["a", "b"]


def test_the_batch_size_is_found_with_it(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(digits), "--model", "simple_nn", "--limit", "700", "--steps", "40"]
    out = ["--out", str(tmp_path / "lr.png"), "--json", "--batch-size", "2"]
    dispatch(["lr-find", *words, *out, "--fit-batch"])
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    sizes = [int(size) for size in found["batches"]]
    # ten steps an epoch of 700 images have no more than 70
    assert sizes == [16, 32, 64][: len(sizes)]
    assert found["batch_size"] == fastest_batch({int(k): v for k, v in found["batches"].items()})
    assert f"batch size {found['batch_size']}: images a second by batch size: 16 " in captured.err
    assert f"--batch-size {found['batch_size']}" in captured.err


@pytest.mark.parametrize(
    ("seconds", "sizes", "best"),
    [
        ({16: 1, 32: 1, 64: 1, 128: 1, 256: 1}, [16, 32, 64, 128, 256], 256),
        ({16: 1, 32: 2, 64: 4, 128: 8}, [16, 32, 64], 16),  # twice no faster
        ({16: 1, 32: 1, 64: 1.95}, [16, 32, 64], 32),
        ({16: 1, 32: 1, 64: None}, [16, 32], 32),  # does not fit
        ({16: None}, [], None),
    ],
)
def test_which_batch_is_taken(
    seconds: dict[int, float | None], sizes: list[int], best: int | None
) -> None:
    class Engine:
        def trial_step(self, images: int) -> float:
            took = next(value for size, value in seconds.items() if images <= 1.25 * size)
            if took is None:
                raise MemoryError
            return took

    if best is None:
        with pytest.raises(DistclsError, match="out of memory with 16 images at a time"):
            batch_speeds(Engine(), 16, 16)
        return
    found = batch_speeds(Engine(), 16, max(seconds))
    assert (list(found), fastest_batch(found)) == (sizes, best)


def made(losses: Any, **options: Any) -> Any:
    rates = np.geomspace(1e-6, 10, len(losses))
    return curve_of(rates, np.array(losses, float), options.pop("diverged", None), 8)


def test_the_suggestion_lies_between_the_steepest_and_the_lowest() -> None:
    places = np.linspace(-6, 1, 100)
    falling = 2.3 - 1.8 / (1 + np.exp(-6 * (places + 3)))  # steepest at 1e-3
    found = made(falling + np.where(places > -1, 3 * (places + 1), 0))  # rises from 0.1 on
    assert found.steepest == pytest.approx(1e-3, rel=0.2)
    assert 0.01 < found.minimum < 0.15
    assert found.suggestion == pytest.approx(np.sqrt(found.steepest * found.minimum), rel=0.05)
    assert list(found.marks()) == ["suggestion", "lowest loss"]


def test_noise_does_not_pull_the_suggestion_away() -> None:
    places, rng = np.linspace(-6, 1, 100), np.random.default_rng(0)
    falling = 2.3 - 1.8 / (1 + np.exp(-6 * (places + 3)))
    rising = np.where(places > -1, 3 * (places + 1), 0)
    clean = made(falling + rising).suggestion
    for _ in range(20):
        noisy = made(falling + rising + rng.normal(0, 0.1, 100)).suggestion
        assert clean / 3 < noisy < clean * 3


def test_smoothing_does_not_lag() -> None:
    step = np.where(np.arange(101) < 50, 2.0, 1.0)
    middle = int(np.abs(smooth(step) - 1.5).argmin())
    assert abs(middle - 49.5) <= 1


def test_without_a_fall_there_is_no_suggestion() -> None:
    with pytest.raises(DistclsError, match=r"fell nowhere between 1e-06 and 10 \(2\.3"):
        made(np.full(60, 2.3))
    with pytest.raises(DistclsError, match=r"diverged after 6 steps, at 0\.5; start lower"):
        made([2.3] * 6, diverged=0.5)


def test_a_rate_too_high_from_the_start(digits: Path) -> None:
    config = TrainConfig(data=digits, model="simple_cnn", batch_size=32)
    with pytest.raises(DistclsError, match=r"diverged after .* start lower: --lowest"):
        find_lr(config, lowest=1e3, highest=1e6, steps=40)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out", "lr.jpg"], "lr.jpg"),
        (["--lowest", "1", "--highest", "0.1"], "lowest"),
        (["--steps", "3"], "steps"),
        (["--lr-lowest", "1"], "--lr-lowest"),
        (["--model", "simple_cn"], "simple_cnn"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], words: str, digits: Path) -> None:
    with pytest.raises((BadValue, UsageError), match=words) as caught:
        dispatch(["lr-find", "--data", str(digits), *flags])
    assert "\n" not in str(caught.value)


def test_nothing_is_replaced_unasked(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "lr.csv").write_text("mine")
    with pytest.raises(UsageError, match=r"lr\.csv exists already"):
        dispatch(["lr-find", "--data", str(digits), "--out", str(tmp_path / "lr.png")])
    assert not (tmp_path / "lr.png").exists()


def test_no_input_is_replaced(digits: Path, tmp_path: Path) -> None:
    table = tmp_path / "photos.csv"
    table.write_text("path,label\n")
    for data, out, told in (
        (table, tmp_path / "photos.png", "a file other than data"),
        (digits, digits / "lr.png", "a place outside of"),
    ):
        with pytest.raises(BadValue, match=told):
            dispatch(["lr-find", "--data", str(data), "--out", str(out), "--overwrite"])
    assert table.read_text() == "path,label\n"
