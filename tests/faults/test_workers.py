"""Data that stalls, goes away or whose readers die: rows 14 and 15."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits

from distcls.data.dataset import PACK
from distcls.data.prepare import PrepareOptions, prepare
from distcls.training.checkpointing import newest_intact
from tests.faults.survival import ONE_AND_TWO, finish, start, steps_done, wait_for, workers


def loose_files(folder: Path) -> Path:
    """A dataset directory without a pack, whose images lie in `folder`/images."""
    digits, labels = load_digits(return_X_y=True)
    for number, (pixels, label) in enumerate(zip(digits[:200], labels[:200], strict=True)):
        place = folder / "images" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place / f"{number:03d}.png"), (pixels.reshape(8, 8) * 15).astype(np.uint8))
    data = folder / "data"
    source = str(folder / "images")
    prepare(PrepareOptions(source=source, out=data, pack="off", val_fraction=0.3, quiet=True))
    return data


def ended(said: str, code: int, processes: int) -> None:
    """The run has failed and told why, in lines of its own."""
    assert code == 1
    assert "Fatal Python error" not in said
    if processes == 1:  # a launcher adds its own traceback
        assert "Traceback" not in said


@pytest.mark.row(14)
@pytest.mark.parametrize("processes", ONE_AND_TWO)
def test_a_folder_that_goes_away_is_named(processes: int, tmp_path: Path) -> None:
    data, out = loose_files(tmp_path), tmp_path / "run"
    process = start(data, out, "--epochs", "50", processes=processes, SLOW="0.1")
    wait_for(lambda: steps_done(out) >= 2, process)
    family = [] if processes == 1 else workers(process)
    shutil.rmtree(tmp_path / "images")
    began = time.monotonic()
    said = finish(process, code=1, timeout=60)
    assert time.monotonic() - began < 30
    ended(said, 1, processes)
    assert f"error: {tmp_path / 'images'}/" in said
    assert "No such file" in said
    assert not [worker for worker in family if worker.is_running()]


@pytest.mark.row(14)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_pack_that_is_cut_while_it_is_read_is_named(
    processes: int, digits: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(digits, data)
    process = start(data, out, "--epochs", "50", processes=processes, SLOW="0.1")
    wait_for(lambda: steps_done(out) >= 2, process)
    size = (data / PACK).stat().st_size
    os.truncate(data / PACK, 4096)
    began = time.monotonic()
    said = finish(process, code=1, timeout=60)
    assert time.monotonic() - began < 30
    ended(said, 1, processes)
    assert f"{data / PACK} was truncated from {size:,} to 4,096 bytes" in said


@pytest.mark.row(14)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["distcls-loader", pytest.param("distcls-decode", marks=pytest.mark.slow)]
)
def test_reading_threads_that_die_end_the_run(
    name: str, processes: int, digits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    more = ("--epochs", "50", "--loader.prefetch", "1", "--loader.timeout", "5")
    where = f"4:{processes - 1}:{name}"
    process = start(digits, out, *more, processes=processes, SLOW="0.1", DIE=where)
    wait_for(lambda: steps_done(out) >= 4, process)
    began = time.monotonic()
    said = finish(process, code=1, timeout=60)
    assert time.monotonic() - began < 40
    told = ("a reader thread ended early", "has died", "no batch arrived for 5 s; still reading: ")
    assert any(words in said for words in told), said
    # the state is that of a step before, and whole
    found = newest_intact(out / "last")
    assert found is None or found[1]["progress"]["step"] <= 4


@pytest.mark.row(15)
def test_a_file_that_hangs_is_named(tmp_path: Path) -> None:
    data = loose_files(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # opens for reading when somebody opens it for writing: never
    hang = f"{tmp_path / 'pipe'}:/images/3/"
    began = time.monotonic()
    said = finish(start(data, tmp_path / "run", "--loader.timeout", "3", HANG=hang), code=1)
    assert time.monotonic() - began < 60
    assert "no batch arrived for 3 s; still reading: 3/" in said
    assert "Traceback" not in said


@pytest.mark.row(10, 15)
def test_a_signal_is_heard_while_a_file_hangs(tmp_path: Path) -> None:
    """What is read ahead hangs, the step before it does not: it is the last."""
    data, out = loose_files(tmp_path), tmp_path / "run"
    more = ("--epochs", "50", "--loader.prefetch", "8", "--loader.timeout", "100")
    process = start(data, out, *more, SLOW="0.4", HANG=f"{tmp_path / 'pipe'}:/images/")
    wait_for(lambda: steps_done(out) >= 1, process)
    os.mkfifo(tmp_path / "pipe")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    said = finish(process, code=75, timeout=60)
    assert time.monotonic() - began < 30
    assert "--resume auto continues" in said
