"""`distcls predict` from the command line to the file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from distcls.commands.predict import main
from distcls.data.formats.detect import open_source
from distcls.data.source import JoinedSource
from distcls.errors import UsageError
from distcls.model_card import best_model, model_choice
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
    assert "23 images, 1 error" in output.err
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
        (["--model", __file__], "expected .onnx or .pth"),
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


def test_several_inputs_are_named_as_given(
    folder: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = tiny_dataset.coloured(4)
    tiny_dataset.write(tmp_path / "data", images, labels, tiny_onnx.COLOURS)
    (tmp_path / "list.csv").write_text("path\nin/007.png\n")
    Path("link").symlink_to("in")
    inputs = ["in/003.png", "./in/002.png", f"{folder}/001.png", "in", "in/00[0-1].png", "link/."]
    flags = ["--model", str(model), "--out", "a.csv"]
    main([*inputs[:2], *flags, *inputs[2:], "list.csv"])  # before and after the flags
    rows = read(Path("a.csv"))
    names = [row["image_id"] for row in rows]
    every = [f"in/{index:03d}.png" for index in range(23)]
    assert names == [*inputs[:3], every[0], *every[4:], "list.csv/in/007.png"]
    alone = {row["image_id"]: row["probability"] for row in run("in", model, tmp_path / "b.csv")}
    for row in rows:
        assert row["probability"] == alone[row["image_id"][-7:]]
    told = "28 images are named again by another input, first in/001.png; each is taken once"
    assert f"warning: {told}\n" in capsys.readouterr().err
    main(["data", "in/003.png", *flags[:2], "--out", "c.csv"])
    assert [row["image_id"] for row in read(Path("c.csv"))] == [
        *(f"data/image {index:04d}" for index in range(4)),
        "in/003.png",
    ]


def test_several_inputs_are_images_of_one_source(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = tiny_dataset.coloured(4)
    data = tiny_dataset.write(tmp_path / "data", images, labels, tiny_onnx.COLOURS)
    parts = [("a/", open_source(str(folder))), ("", open_source(str(data)))]
    joined = JoinedSource(parts)
    assert len(joined) == 27
    assert not joined.encoded
    np.testing.assert_array_equal(joined.image(25), images[2])
    np.testing.assert_array_equal(joined.image(22), parts[0][1].image(22))
    assert joined.true_labels is not None
    assert list(joined.true_labels)[22:] == [None, *(parts[1][1].true_labels or ())]
    before = joined.fingerprint()
    (folder / "022.png").write_bytes(b"")
    assert joined.fingerprint() != before
    twice = JoinedSource([("a/", parts[0][1]), ("a/", parts[0][1])])
    assert len(twice) == 23
    assert "warning: 23 images are named again by another input" in capsys.readouterr().err


def test_a_missing_image_of_several_is_a_row(
    folder: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = ["in/003.png", "in/none.png", f"{tmp_path}/gone.jpg", "in/004.png"]
    main([*inputs, "--model", str(model), "--out", "a.csv"])
    told = "2 of the 4 inputs do not exist, first in/none.png; each is a row with an error"
    assert f"warning: {told}\n" in capsys.readouterr().err
    rows = read(Path("a.csv"))
    assert [row["image_id"] for row in rows] == inputs
    assert [bool(row["label"]) for row in rows] == [True, False, False, True]
    assert rows[1]["error"] == rows[2]["error"] == "cannot be read: No such file or directory"
    with pytest.raises(UsageError, match=r"^none of the 2 inputs exists, first in/none\.png$"):
        main([*inputs[1:3], "--model", str(model), "--out", "b.csv"])
    for other in ("folder", "list.csv", "in/9*.png"):  # which may stand for many images
        with pytest.raises(UsageError, match=r"no such file or folder|no file matches"):
            main([inputs[0], other, "--model", str(model), "--out", "b.csv"])
    assert not Path("b.csv").exists()


def test_a_split_is_of_a_dataset_directory(folder: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"split: .* is not a dataset directory"):
        run(folder / "001.png", model, tmp_path / "a.csv", str(folder), "--split", "val")
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_rows_on_standard_output_are_those_of_a_file(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    (folder / "000.png").write_bytes(b"")
    parts = ["--part-rows", "4", "--batch-size", "4"]
    run(folder, model, tmp_path / f"a.{ending}", *parts)
    capsys.readouterr()
    before = sorted(tmp_path.iterdir())
    flags = [] if ending == "csv" else ["--out-format", "jsonl"]
    main([str(folder), "--model", str(model), "--out", "-", *parts, *flags])
    printed = capsys.readouterr()
    assert printed.out == (tmp_path / f"a.{ending}").read_text()
    assert "23 images, 1 error" in printed.err
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_printed_if_no_image_is_readable(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UsageError, match="none of 23 images is readable"):
        main(
            [
                str(folder),
                "--model",
                str(model),
                "--out",
                "-",
                "--batch-size",
                "4",
                "--part-rows",
                "4",
            ]
        )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--out", "-", "--json"], "json: True is not valid, expected false with --out -"),
        (["--out", "-", "--resume"], "resume: True is not valid, expected false with --out -"),
        (["--out", "-", "--show", "3"], "show_out: None is not valid"),
        (["--out", "a.csv", "--out-format", "csv"], "out_format: 'csv' is not valid"),
    ],
)
def test_what_standard_output_excludes(
    folder: Path, model: Path, flags: list[str], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        main([str(folder), "--model", str(model), *flags])


def test_a_reader_that_leaves_ends_it(folder: Path, model: Path) -> None:
    call = [sys.executable, "-m", "distcls.cli", "predict", str(folder), "--model", str(model)]
    with subprocess.Popen(
        [*call, "--out", "-", "--batch-size", "1", "--part-rows", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 1


def test_a_run_directory_means_its_best_model(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    place.mkdir()
    with pytest.raises(UsageError, match=r"model: .*run is a folder without best.onnx or best.pth"):
        run(folder, place, tmp_path / "a.csv")
    shutil.copy(model, place / "best.onnx")
    expected = run(folder, model, tmp_path / "a.csv")
    assert run(folder, place, tmp_path / "b.csv") == expected
    assert f"model: {place / 'best.onnx'}\n" in capsys.readouterr().err
    (place / "best.pth").write_bytes(b"")
    os.utime(place / "best.onnx", (1, 1))
    for _ in range(2):
        assert best_model(place) == place / "best.pth"
    assert model_choice(place, best_model(place)) == f"model: {place / 'best.pth'}"
    said = capsys.readouterr().err
    assert said.count(f"{place}: best.pth is used, best.onnx is older; distcls export") == 1
    os.utime(place / "best.pth", (1, 1))
    assert best_model(place) == place / "best.onnx"
    assert best_model(place, exported=False) == place / "best.pth"
    assert not capsys.readouterr().err


def test_a_model_that_is_missing_is_told_before_all_else(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "pre.csv").touch()
    words = [str(tmp_path / "none"), "--out", str(tmp_path / "pre.csv")]
    with pytest.raises(UsageError, match=r"model: .*photo does not exist; did you mean '.*photos'"):
        main([*words, "--model", str(tmp_path / "photo")])
