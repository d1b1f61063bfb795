"""`distcls predict` from the command line to the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from distcls.commands.predict import main
from distcls.errors import UsageError
from tests import tiny_dataset, tiny_onnx
from tests.test_writers import read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images, _ = tiny_dataset.coloured(23)
    (tmp_path / "in").mkdir()
    for index, image in enumerate(images):
        assert cv2.imwrite(str(tmp_path / "in" / f"{index:03d}.png"), image[..., ::-1])
    return tmp_path / "in"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_onnx.write(tmp_path / "m.onnx")


def probabilities(count: int) -> np.ndarray:
    logits = tiny_onnx.expected_logits(tiny_dataset.coloured(count)[0]).astype(np.float64)
    exact = np.exp(logits)
    return np.asarray(exact / exact.sum(axis=1, keepdims=True))


def run(folder: Path | str, model: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    main([str(folder), "--model", str(model), "--out", str(out), *more])
    return read(out)


def test_one_row_for_each_image_in_order(folder: Path, model: Path, tmp_path: Path) -> None:
    rows = run(folder, model, tmp_path / "pre.csv", "--batch-size", "5", "--workers", "3")
    expected = probabilities(23)
    assert list(rows[0]) == ["image_id", "label", "probability", "error"]
    assert [row["image_id"] for row in rows] == [f"{index:03d}.png" for index in range(23)]
    names = [tiny_onnx.COLOURS[index] for index in expected.argmax(axis=1)]
    assert [row["label"] for row in rows] == names
    given = [float(row["probability"]) for row in rows]
    np.testing.assert_allclose(given, expected.max(axis=1), rtol=1e-5)
    assert all(row["error"] is None for row in rows)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_top_k_and_probabilities(folder: Path, model: Path, tmp_path: Path, ending: str) -> None:
    (folder / "005.png").write_bytes(b"")
    flags = ["--top-k", "2", "--probabilities", "--batch-size", "4"]
    rows = run(folder, model, tmp_path / f"pre{ending}", *flags)
    header = ["image_id", "label", "probability", "label_2", "probability_2"]
    assert list(rows[0]) == [*header, "p:red", "p:green", "p:blue", "error"]
    bad = rows.pop(5)
    assert bad["error"] == "empty file"
    assert {value for key, value in bad.items() if key not in ("image_id", "error")} == {None}
    expected = np.delete(probabilities(23), 5, axis=0)
    order = np.argsort(-expected, axis=1)
    for place, key in enumerate(("label", "label_2")):
        assert [row[key] for row in rows] == [tiny_onnx.COLOURS[i] for i in order[:, place]]
    columns = [[float(row[f"p:{name}"]) for name in tiny_onnx.COLOURS] for row in rows]
    np.testing.assert_allclose(columns, expected, rtol=1e-5)
    second = [float(row["probability_2"]) for row in rows]
    np.testing.assert_allclose(second, np.sort(expected, axis=1)[:, 1], rtol=1e-5)


def test_all_formats_hold_the_same(folder: Path, model: Path, tmp_path: Path) -> None:
    tables = [
        run(folder, model, tmp_path / f"pre{ending}") for ending in (".csv", ".jsonl", ".parquet")
    ]
    numbers = [[np.float32(row["probability"]) for row in table] for table in tables]
    assert numbers[0] == numbers[1] == numbers[2]
    assert pq.read_schema(tmp_path / "pre.parquet").field("probability").type == "float"


def test_the_same_bytes_again(folder: Path, model: Path, tmp_path: Path) -> None:
    written = []
    for workers in ("1", "4"):
        out = tmp_path / f"pre{workers}.csv"
        run(folder, model, out, "--workers", workers, "--probabilities")
        written.append(out.read_bytes())
    assert written[0] == written[1]


def test_dataset_directory_and_limit(tmp_path: Path, model: Path) -> None:
    images, labels = tiny_dataset.coloured(30)
    splits = ["train", "val", "test"] * 10
    data = tiny_dataset.write(
        tmp_path / "d", list(images), labels, tiny_onnx.COLOURS, splits=splits
    )
    rows = run(data, model, tmp_path / "pre.csv", "--limit", "4")
    assert [row["image_id"] for row in rows] == [f"image {index:04d}" for index in (2, 5, 8, 11)]
    rows = run(data, model, tmp_path / "val.csv", "--split", "val")
    assert len(rows) == 10
    expected = tiny_onnx.expected_logits(images[1::3]).argmax(axis=1)
    assert [row["label"] for row in rows] == [tiny_onnx.COLOURS[index] for index in expected]


def test_summary_and_json(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "000.png").write_bytes(b"text")
    run(folder, model, tmp_path / "pre.csv", "--json")
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert (result["images"], result["errors"]) == (23, 1)
    assert result["provider"].endswith("ExecutionProvider")
    assert "23 images, 1 errors" in output.err
    run(folder, model, tmp_path / "pre2.csv", "--quiet")
    output = capsys.readouterr()
    assert output.out == output.err == ""


def red_pixels(path: Path) -> int:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB).astype(int)
    return int((np.abs(image - np.array([0xC6, 0x28, 0x28])).max(axis=-1) < 10).sum())


def test_show_marks_what_is_wrong(tmp_path: Path, model: Path) -> None:
    images = tiny_dataset.coloured(12)[0] // 2  # too dark to hold the red that marks
    right = tiny_onnx.expected_logits(images).argmax(axis=1)
    wrong = right.copy()
    wrong[:6] = (wrong[:6] + 1) % 3
    red = []
    for name, labels in (("right", right), ("wrong", wrong)):
        data = tiny_dataset.write(tmp_path / name, list(images), labels.tolist(), tiny_onnx.COLOURS)
        run(data, model, tmp_path / f"{name}.csv", "--show", "12")
        red.append(red_pixels(tmp_path / f"{name}.png"))
    assert red[0] < 20
    assert red[1] > 500


def test_show_is_chosen_by_the_seed(folder: Path, model: Path, tmp_path: Path) -> None:
    (folder / "007.png").write_bytes(b"bad images are never shown")
    pictures = []
    for place, seed in enumerate(("1", "1", "2")):
        picture = tmp_path / f"{place}.png"
        flags = ["--show", "5", "--seed", seed, "--show-out", str(picture)]
        run(folder, model, tmp_path / f"{place}.csv", *flags)
        pictures.append(picture.read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]
    run(folder, model, tmp_path / "all.csv", "--show", "100")
    assert (tmp_path / "all.png").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--top-k", "4"], "top_k: 4 is more than the model's 3 classes"),
        (["--top-k", "0"], "top_k: 0 is not valid, expected at least 1"),
        (["--batch-size", "many"], "batch_size: 'many' is not valid, expected an integer"),
        (["--out", "pre.xlsx"], "expected one of .csv, .jsonl, .parquet"),
        (["--model", "m.pt"], "expected .onnx or .pth"),
        (["--model", "missing.onnx"], "missing.onnx does not exist"),
        (["--split", "test"], "is not a dataset directory"),
        (["--limt", "3"], "did you mean '--limit'"),
    ],
)
def test_wrong_usage_is_told(
    folder: Path, model: Path, tmp_path: Path, flags: list[str], told: str
) -> None:
    defaults = [str(folder), "--model", str(model), "--out", str(tmp_path / "pre.csv")]
    with pytest.raises(UsageError) as caught:
        main([*defaults, *flags])
    assert told in str(caught.value)
    assert not (tmp_path / "pre.csv").exists()
