"""Batch prediction that is killed, or whose input changes before it goes on: rows 7, 32 and 33.

KILLS=20 python -m pytest tests/faults/test_predict_kills.py -s     the large number of repetitions
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests import tiny_dataset
from tests.test_predict_rows import with_features
from tests.test_writers import read

KILLS = int(os.environ.get("KILLS", "2"))
"""Times a run is killed before it may finish, for each format."""

COUNT = 300
PARTS = -(-COUNT // 32)

PROGRAM = """
import os, resource, signal, sys, time
from distcls.cli import run
from distcls.data.formats import folder as files
from distcls.commands.predict import main

slow, most, decode = float(os.environ["SLOW"]), int(os.environ["MOST_BYTES"]), files.read_file

def slower(path):
    time.sleep(slow)
    return decode(path)

files.read_file = slower
if most:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
run(main)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a few of them bad."""
    place = tmp_path_factory.mktemp("in")
    for index, image in enumerate(tiny_dataset.coloured(COUNT)[0]):
        assert cv2.imwrite(str(place / f"{index:04d}.png"), image[..., ::-1])
    for index in (0, 31, 32, 200):
        (place / f"{index:04d}.png").write_bytes(b"no image")
    return place


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_features(tmp_path_factory.mktemp("m") / "m.onnx")


def start(
    folder: Path, model: Path, out: Path, *more: str, slow: float = 0, most_bytes: int = 0
) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-c", PROGRAM, str(folder), "--model", str(model), "--out", str(out)),
        *("--features", str(out) + ".f.parquet", "--top-k", "2", "--provider", "cpu", "--quiet"),
        *("--workers", "2", "--batch-size", "8", "--part-rows", "32", *more),
    ]
    return subprocess.Popen(
        command,
        env={**os.environ, "SLOW": str(slow), "MOST_BYTES": str(most_bytes)},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    return said


def finished_parts(out: Path) -> int:
    return len(list(Path(f"{out}.parts").glob("0*.json")))


def kill_somewhere(process: subprocess.Popen[str], out: Path, rng: random.Random) -> None:
    """Kill it after a random number of further parts, at a random moment; it may be over before."""
    target = rng.randint(finished_parts(out) + 1, PARTS)
    while process.poll() is None and finished_parts(out) < target:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05))
    process.kill()
    process.communicate(timeout=60)


@pytest.mark.row(32)
@pytest.mark.parametrize(
    "ending", [".csv", pytest.param(".jsonl", marks=pytest.mark.slow), ".parquet"]
)
def test_killed_at_random_moments_the_bytes_are_the_same(
    folder: Path, model: Path, tmp_path: Path, ending: str
) -> None:
    rng = random.Random(ending)
    whole, out = tmp_path / f"whole{ending}", tmp_path / f"pre{ending}"
    finish(start(folder, model, whole))
    for number in range(KILLS):
        if out.exists() or finished_parts(out) == PARTS:  # the next life
            if Path(f"{out}.parts").exists():
                finish(start(folder, model, out, "--resume"))
            assert out.read_bytes() == whole.read_bytes()
            out.unlink()
            Path(f"{out}.f.parquet").unlink()
        process = start(folder, model, out, "--resume", slow=0.005)
        kill_somewhere(process, out, rng)
        print(f"{ending} kill {number + 1}: {finished_parts(out)} of {PARTS} parts, {out.exists()}")
    if out.exists() and not Path(f"{out}.parts").exists():  # over before it was killed
        out.unlink()
        Path(f"{out}.f.parquet").unlink()
    finish(start(folder, model, out, "--resume"))
    assert out.read_bytes() == whole.read_bytes()
    names = [f"{name}.f.parquet" for name in (out, whole)]
    assert Path(names[0]).read_bytes() == Path(names[1]).read_bytes()
    rows = read(out)
    assert [row["image_id"] for row in rows] == [f"{index:04d}.png" for index in range(COUNT)]
    assert sum(row["error"] is not None for row in rows) == 4
    assert len(list(tmp_path.iterdir())) == 4  # the two outputs of each: nothing is left behind


@pytest.mark.row(33)
def test_a_changed_input_is_refused(folder: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "pre.csv"
    process = start(folder, model, out, slow=0.005)
    while process.poll() is None and finished_parts(out) < 3:
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=60)
    last = folder / f"{COUNT - 1:04d}.png"
    before, times = last.read_bytes(), last.stat()
    assert cv2.imwrite(str(last), np.full((8, 8, 3), 7, np.uint8))
    said = finish(start(folder, model, out, "--resume"), code=2)
    assert said.count("\n") == 1
    assert "was started with inputs" in said
    assert not out.exists()
    last.write_bytes(before)
    os.utime(last, ns=(times.st_atime_ns, times.st_mtime_ns))
    finish(start(folder, model, out, "--resume"))
    assert len(read(out)) == COUNT


@pytest.mark.row(33)
def test_new_content_at_the_same_size_and_time_is_predicted_again(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    own, whole, out = tmp_path / "in", tmp_path / "whole.csv", tmp_path / "pre.csv"
    shutil.copytree(folder, own)
    red, blue = (np.full((8, 8, 3), color, np.uint8) for color in ((0, 0, 200), (200, 0, 0)))
    first = own / "0001.png"
    first.write_bytes(cv2.imencode(".bmp", red)[1].tobytes())  # of one size, whatever it shows
    times = first.stat()
    process = start(own, model, out, slow=0.005)
    while process.poll() is None and finished_parts(out) < 3:
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=60)
    first.write_bytes(cv2.imencode(".bmp", blue)[1].tobytes())
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    said = finish(start(own, model, out, "--resume"))
    assert "images have changed since they were predicted, at unchanged sizes and times" in said
    finish(start(own, model, whole))
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.row(7)
def test_a_disk_that_was_full_is_continued(folder: Path, model: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.csv", tmp_path / "pre.csv"
    finish(start(folder, model, whole))
    most = whole.stat().st_size - 100  # the parts fit, the whole does not
    said = finish(start(folder, model, out, most_bytes=most), code=1)
    assert said.count("\n") == 1
    assert "free there" in said
    assert f"{COUNT} rows are kept in {out}.parts, --resume continues them" in said
    assert not out.exists()
    assert {path.name.rpartition(".")[2] for path in Path(f"{out}.parts").iterdir()} <= {
        *("csv", "json", "parquet")
    }
    finish(start(folder, model, out, "--resume"))
    assert out.read_bytes() == whole.read_bytes()
