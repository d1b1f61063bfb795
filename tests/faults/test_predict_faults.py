"""Faults of batch prediction: rows 16, 17, 18, 20 and 35, and outputs that cannot be written."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest

from tests import tiny_dataset, tiny_onnx
from tests.test_writers import NAMES, read


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_onnx.write(tmp_path / "m.onnx")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def jpeg(side: int = 64) -> bytes:
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return bytes(cv2.imencode(".jpg", image)[1].tobytes())


def bomb() -> bytes:
    """A PNG of 60,000 by 60,000 pixels in a few bytes."""

    def part(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1_000_000)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", pixels) + part(b"IEND", b"")


BAD = {
    "bomb.png": (bomb(), "too large"),
    "cut.jpg": (jpeg()[:-600], "corrupt"),
    "empty.jpg": (b"", "empty file"),
    "eps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
    "flipped.png": (cv2.imencode(".png", np.eye(9))[1].tobytes()[:60] + b"\xff" * 40, ""),
    "text.jpg": (b"this is no image", "not an image"),
}


def predict(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distcls.commands.predict", *map(str, arguments)]
    command += ["--provider", "cpu"]  # one that does not start here has a line of its own
    return subprocess.run(command, capture_output=True, text=True, check=False)


def refused(done: subprocess.CompletedProcess[str], told: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".part")]


@pytest.mark.row(16, 17, 18)
def test_bad_images_are_rows_among_good_ones(tmp_path: Path, folder: Path, model: Path) -> None:
    for name, (data, _) in BAD.items():
        (folder / name).write_bytes(data)
    for place in range(20):
        (folder / f"good {place}.jpg").write_bytes(jpeg())
    os.mkfifo(folder / "zz.txt")  # not an image by its name: not even opened
    done = predict(folder, "--model", model, "--out", tmp_path / "pre.csv", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["errors"] == len(BAD)
    rows = {row["image_id"]: row for row in read(tmp_path / "pre.csv")}
    assert list(rows) == sorted([*BAD, *(f"good {place}.jpg" for place in range(20))])
    for name, (_, told) in BAD.items():
        assert rows[name]["error"], name
        assert told in rows[name]["error"]
        assert rows[name]["label"] is rows[name]["probability"] is None
    assert len({rows[f"good {place}.jpg"]["probability"] for place in range(20)}) == 1


@pytest.mark.row(17)
def test_a_bomb_costs_no_memory(tmp_path: Path, folder: Path, model: Path) -> None:
    (folder / "good.jpg").write_bytes(jpeg())
    predict(folder, "--model", model, "--out", tmp_path / "warm.csv")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    for place in range(8):
        (folder / f"bomb{place}.png").write_bytes(bomb())
    done = predict(folder, "--model", model, "--out", tmp_path / "pre.csv")
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert after < before + 100 * 1024  # KiB; one decoded bomb would be 10 GB


@pytest.mark.row(16, 18)
def test_no_readable_image_writes_nothing(tmp_path: Path, folder: Path, model: Path) -> None:
    (folder / "a.jpg").write_bytes(b"text")
    (folder / "b.jpg").write_bytes(b"")
    done = predict(folder, "--model", model, "--out", tmp_path / "pre.csv", "--quiet")
    refused(done, "none of 2 images is readable; a.jpg: not an image of a known format")
    assert not (tmp_path / "pre.csv").exists()
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("name", "told"), [("missing", "no such file or folder"), ("", "no images"), ("*.x", "no file")]
)
def test_no_input(tmp_path: Path, folder: Path, model: Path, name: str, told: str) -> None:
    refused(predict(folder / name, "--model", model, "--out", tmp_path / "pre.csv"), told)
    assert not (tmp_path / "pre.csv").exists()


def test_output_exists(tmp_path: Path, folder: Path, model: Path) -> None:
    (folder / "a.jpg").write_bytes(jpeg())
    out = tmp_path / "pre.csv"
    out.write_text("precious")
    refused(predict(folder, "--model", model, "--out", out), "--overwrite")
    assert out.read_text() == "precious"
    assert predict(folder, "--model", model, "--out", out, "--overwrite").returncode == 0
    assert out.read_text().startswith("image_id")


def test_a_failed_run_leaves_the_old_output(tmp_path: Path, folder: Path, model: Path) -> None:
    (folder / "a.jpg").write_bytes(b"text")
    out = tmp_path / "pre.csv"
    out.write_text("precious")
    done = predict(folder, "--model", model, "--out", out, "--overwrite")
    refused(done, "none of 1 image is")
    assert out.read_text() == "precious"


def test_picture_exists(tmp_path: Path, folder: Path, model: Path) -> None:
    (folder / "a.jpg").write_bytes(jpeg())
    (tmp_path / "pre.png").write_text("precious")
    done = predict(folder, "--model", model, "--out", tmp_path / "pre.csv", "--show", 1)
    refused(done, "pre.png exists already")
    assert not (tmp_path / "pre.csv").exists()


@pytest.mark.row(8)
def test_output_below_a_file_or_a_folder(tmp_path: Path, folder: Path, model: Path) -> None:
    (folder / "a.jpg").write_bytes(jpeg())
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "sub" / "pre.csv"
    refused(predict(folder, "--model", model, "--out", out), "file is a file, expected a folder")
    (tmp_path / "folder.csv").mkdir()
    out = tmp_path / "folder.csv"
    refused(predict(folder, "--model", model, "--out", out), "is a folder")


@pytest.mark.row(7)
def test_disk_full(tmp_path: Path, folder: Path, model: Path) -> None:
    (folder / "a.jpg").write_bytes(jpeg())
    names = "".join("in/a.jpg\n" for _ in range(20_000))
    (tmp_path / "list.csv").write_text("path\n" + names)
    program = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from distcls.cli import run\n"
        "from distcls.commands.predict import main\n"
        "run(main)\n"
    )
    out = tmp_path / "pre.csv"
    arguments = [
        str(tmp_path / "list.csv"),
        "--model",
        str(model),
        "--provider",
        "cpu",
        "--out",
        str(out),
        "--quiet",
    ]
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    refused(done, "free there", code=1)
    assert not out.exists()
    assert not leftovers(tmp_path)


def test_models_that_are_none_of_ours(tmp_path: Path, folder: Path) -> None:
    (folder / "a.jpg").write_bytes(jpeg())
    out = tmp_path / "pre.csv"
    path = tmp_path / "m.onnx"
    path.write_text("no ONNX")
    refused(predict(folder, "--model", path, "--out", out), "not an ONNX file")
    path.write_bytes(tiny_onnx.proto().SerializeToString())
    refused(predict(folder, "--model", path, "--out", out), "no distcls metadata")


@pytest.mark.row(20)
def test_weights_outside_the_model_s_folder(tmp_path: Path, folder: Path) -> None:
    (folder / "a.jpg").write_bytes(jpeg())
    (tmp_path / "secret").write_bytes(tiny_onnx.weights(3).tobytes())
    hostile = tiny_onnx.proto(tiny_onnx.card())
    tensor = next(t for t in hostile.graph.initializer if t.name == "weights")
    onnx.external_data_helper.set_external_data(tensor, "../secret")
    tensor.ClearField("raw_data")
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "m.onnx"
    path.write_bytes(hostile.SerializeToString())
    done = predict(folder, "--model", path, "--out", tmp_path / "pre.csv")
    refused(done, "'../secret', outside its folder; refused")


@pytest.mark.row(35)
@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_file_names_survive(tmp_path: Path, folder: Path, model: Path, ending: str) -> None:
    names = sorted(f"{name}.jpg" for name in NAMES)
    for name in names:
        (folder / name).write_bytes(jpeg())
    done = predict(folder, "--model", model, "--out", tmp_path / f"pre{ending}")
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / f"pre{ending}")
    assert [row["image_id"] for row in rows] == names
    assert all(row["error"] is None for row in rows)


@pytest.mark.row(16)
def test_a_pack_that_was_cut(tmp_path: Path, model: Path) -> None:
    images, labels = tiny_dataset.coloured(5)
    data = tiny_dataset.write(tmp_path / "d", list(images), labels, tiny_onnx.COLOURS)
    (data / "pack.bin").write_bytes((data / "pack.bin").read_bytes()[:-1])
    done = predict(data, "--model", model, "--out", tmp_path / "pre.csv")
    refused(done, "prepare it again")
