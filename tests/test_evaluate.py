"""`distcls evaluate` from the command line to the figures, in one process and in several."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss

import distcls
from distcls import log
from distcls.cli import dispatch
from distcls.commands.evaluate import main
from distcls.commands.predict import main as predict_main
from distcls.errors import BadValue, DistclsError, UsageError
from distcls.evaluation.intervals import wilson
from distcls.evaluation.overlap import dataset_of
from distcls.evaluation.plots import PICTURES
from distcls.task import softmax
from tests import tiny_dataset, tiny_onnx
from tests.e2e.commands import run
from tests.sources import put, tree

COUNT = 101
"""No batch and no number of processes divides it."""


@pytest.fixture
def labels() -> list[int]:
    """True classes, a fifth of them unlike the images."""
    truth = np.array(tiny_dataset.coloured(COUNT)[1])
    truth[::5] = (truth[::5] + 1) % 3
    return truth.tolist()


@pytest.fixture
def data(tmp_path: Path, labels: list[int]) -> Path:
    images = tiny_dataset.coloured(COUNT)[0]
    return tiny_dataset.write(tmp_path / "d", list(images), labels, tiny_onnx.COLOURS, files=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_onnx.write(tmp_path / "m.onnx")


def logits() -> NDArray[np.float32]:
    return tiny_onnx.expected_logits(tiny_dataset.coloured(COUNT)[0])


def figures(
    capsys: pytest.CaptureFixture[str], model: Path, data: Path, *more: str
) -> dict[str, Any]:
    main(["--model", str(model), "--data", str(data), "--json", *more])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize("batch_size", ["7", "256"])
def test_equals_scikit_learn(
    capsys: pytest.CaptureFixture[str], model: Path, data: Path, labels: list[int], batch_size: str
) -> None:
    result = figures(capsys, model, data, "--batch-size", batch_size)
    predicted = logits().argmax(axis=1)
    exact = np.exp(logits().astype(np.float64))
    probabilities = exact / exact.sum(axis=1, keepdims=True)
    assert result["count"] == COUNT
    assert result["top1"] == accuracy_score(labels, predicted)
    assert result["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert result["loss"] == pytest.approx(log_loss(labels, probabilities), rel=1e-5)
    per_class = [result["per_class"][name]["f1"] for name in tiny_onnx.COLOURS]
    np.testing.assert_allclose(per_class, f1_score(labels, predicted, average=None))


def test_equals_what_predict_s_table_gives(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, data: Path, labels: list[int]
) -> None:
    top1 = figures(capsys, model, data)["top1"]
    predict_main([str(data), "--model", str(model), "--out", str(tmp_path / "pre.csv")])
    with (tmp_path / "pre.csv").open(newline="") as handle:
        given = [row["label"] for row in csv.DictReader(handle)]
    truth = [tiny_onnx.COLOURS[label] for label in labels]
    assert top1 == accuracy_score(truth, given)


def test_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, data: Path, labels: list[int]
) -> None:
    out = tmp_path / "results"
    result = figures(capsys, model, data, "--out", str(out))
    table = pq.read_table(out / "predictions.parquet")
    rows = table.to_pylist()
    assert [row["truth"] for row in rows] == [tiny_onnx.COLOURS[label] for label in labels]
    np.testing.assert_array_equal(
        [row["label"] for row in rows], np.array(tiny_onnx.COLOURS)[logits().argmax(axis=1)]
    )
    chances = softmax(logits())
    np.testing.assert_allclose([row["probabilities"] for row in rows], chances, rtol=1e-6)
    own = np.log(chances[np.arange(COUNT), labels])
    np.testing.assert_allclose([row["loss"] for row in rows], -own, atol=1e-5)
    assert np.mean([row["right"] for row in rows]) == result["top1"]
    top = np.sort(chances, axis=1)
    np.testing.assert_allclose([row["margin"] for row in rows], top[:, 2] - top[:, 1], atol=1e-6)
    about = json.loads(table.schema.metadata[b"distcls"])
    assert about["task"] == list(tiny_onnx.COLOURS)
    assert {path.name for path in out.iterdir()} == {
        "metrics.json",
        "per_class.csv",
        "confusion.csv",
        "confusion.png",
        "predictions.parquet",
        *PICTURES,
    }
    assert json.loads((out / "metrics.json").read_text()) == result
    with (out / "confusion.csv").open(newline="") as handle:
        rows = list(csv.reader(handle))
    assert rows[0] == ["truth", *tiny_onnx.COLOURS]
    matrix = [[int(cell) for cell in row[1:]] for row in rows[1:]]
    np.testing.assert_array_equal(matrix, confusion_matrix(labels, logits().argmax(axis=1)))
    with (out / "per_class.csv").open(newline="") as handle:
        per_class = list(csv.DictReader(handle))
    assert [row["class"] for row in per_class] == list(tiny_onnx.COLOURS)
    assert sum(int(row["support"]) for row in per_class) == COUNT
    assert float(per_class[0]["f1"]) == result["per_class"]["red"]["f1"]


def test_table_for_people(
    capsys: pytest.CaptureFixture[str], model: Path, data: Path, labels: list[int]
) -> None:
    main(["--model", str(model), "--data", str(data), "--limit", "50"])
    text = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert lines["images"] == ["50"]
    assert lines["weighted"][-1] == "50"
    right = accuracy_score(labels[:50], logits()[:50].argmax(axis=1))
    low, high = wilson(right * 50, 50)
    assert lines["top-1"] == [f"{right:.4f}", f"({low:.4f}", "to", f"{high:.4f})"]


@pytest.mark.parametrize("command", ["evaluate", "compare", "calibrate"])
def test_quiet_leaves_the_result(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, data: Path, command: str
) -> None:
    """And says so in its help."""
    given = {
        "evaluate": ["--model", str(model), "--data", str(data)],
        "compare": [str(model), str(model), "--data", str(data)],
        "calibrate": [str(model), "--data", str(data), "--split", "test"],
    }[command]
    printed = []
    for more in ([], ["--quiet"]):
        if command == "calibrate":
            tiny_onnx.write(tmp_path / "m.onnx")
        dispatch([command, *given, *more])
        printed.append(capsys.readouterr())
    assert printed[1].out == printed[0].out != ""
    lines = printed[1].err.splitlines()
    assert all(line.startswith("warning: ") for line in lines), lines
    assert len(printed[0].err.splitlines()) > len(lines)
    with pytest.raises(SystemExit):
        dispatch([command, "--help"])
    assert "Print the result, warnings and errors only." in capsys.readouterr().out


def test_without_matplotlib_the_rest_is_written(tmp_path: Path, model: Path, data: Path) -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from distcls.cli import run\nfrom distcls.evaluate import main\nrun(main)"
    )
    flags = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "o")]
    command = [sys.executable, "-c", program, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 'pip install "distcls[plot]"' in done.stderr
    names = {"metrics.json", "per_class.csv", "confusion.csv", "predictions.parquet"}
    assert {path.name for path in (tmp_path / "o").iterdir()} == names


def test_a_bad_image_is_named_and_nothing_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, labels: list[int]
) -> None:
    images = tiny_dataset.coloured(COUNT)[0]
    data = tiny_dataset.write(
        tmp_path / "files", list(images), labels, tiny_onnx.COLOURS, packed=False, files=True
    )
    for name in ("image 0007", "image 0070"):
        (data / "files" / f"{name}.png").write_bytes(b"spoilt")
    flags = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "o")]
    with pytest.raises(DistclsError, match="2 images cannot be read") as caught:
        main(flags)
    assert caught.value.exit_code == 1
    told = capsys.readouterr().err
    assert "image 0007" in told
    assert "image 0070" in told
    assert not (tmp_path / "o").exists()


def test_an_evaluation_is_never_replaced_silently(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, data: Path
) -> None:
    out = tmp_path / "results"
    first = figures(capsys, model, data, "--out", str(out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(
        UsageError, match=r"metrics.json exists already; .* add --overwrite"
    ) as told:
        main(["--model", str(model), "--data", str(data), "--limit", "9", "--out", str(out)])
    assert told.value.exit_code == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    second = figures(capsys, model, data, "--limit", "9", "--out", str(out), "--overwrite")
    assert (first["count"], second["count"]) == (COUNT, 9)
    assert json.loads((out / "metrics.json").read_text()) == second
    (out / "confusion.csv").unlink()
    (out / "confusion.csv").mkdir()
    with pytest.raises(
        UsageError, match=r"confusion\.csv is a folder, expected the name of a file"
    ):
        main(["--model", str(model), "--data", str(data), "--out", str(out), "--overwrite"])
    assert json.loads((out / "metrics.json").read_text()) == second


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--split", "dev"], "no split 'dev'"),
        (["--data", "missing"], "missing: no such dataset directory"),
        (["--limit", "0"], "limit: 0 is not valid"),
        (["--out", "/dev/null/sub"], "/dev/null"),
        (["--out", "/proc/none"], "writing below /proc/none failed: No such file or directory$"),
    ],
)
def test_wrong_usage(model: Path, data: Path, flags: list[str], told: str) -> None:
    with pytest.raises(DistclsError, match=told):
        main(["--model", str(model), "--data", str(data), *flags])


def test_a_checkpoint_says_what_it_was_trained_on(tmp_path: Path, data: Path) -> None:
    from distcls.models import factory
    from distcls.models.checkpoint import save_checkpoint
    from distcls.models.config import ModelConfig

    config = ModelConfig(name="simple_cnn")
    card = dataclasses.replace(
        tiny_onnx.card(size=(32, 32)),
        architecture=dataclasses.asdict(config),
        training={"dataset": str(data)},
    )
    run = tmp_path / "run"
    run.mkdir()
    save_checkpoint(run / "best.pth", factory.build(config, 3, card.preprocess), card)
    tiny_onnx.write(run / "best.onnx")
    for place in (run, run / "best.pth"):
        assert dataset_of(place) == data
    with pytest.raises(UsageError, match=r"data: .*best.onnx has no dataset directory; name one"):
        dataset_of(run / "best.onnx")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A real network with random weights, as training writes it."""
    import torch

    from distcls.models import factory
    from distcls.models.checkpoint import save_checkpoint
    from distcls.models.config import ModelConfig

    torch.manual_seed(0)
    config = ModelConfig(name="mobilenet_v3_small")
    card = dataclasses.replace(
        tiny_onnx.card(size=(32, 32)), architecture=dataclasses.asdict(config)
    )
    network = factory.build(config, 3, card.preprocess)
    save_checkpoint(tmp_path / "best.pth", network, card)
    return tmp_path / "best.pth"


def test_two_processes_count_each_image_once(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    results = []
    for processes in (1, 2):
        out = tmp_path / f"results{processes}"
        flags = ["--model", checkpoint, "--data", data, "--batch-size", 8, "--out", out, "--json"]
        done = run(*flags, module="distcls.evaluate", processes=processes)
        result = json.loads(done.stdout)
        assert result["count"] == COUNT
        figures = {name: result.pop(name) for name in ("loss", "ece", "brier")}
        figures |= {
            f"{name} {at}": end
            for name, pair in result.pop("intervals").items()
            for at, end in enumerate(pair)
        }
        table = pq.read_table(out / "predictions.parquet")
        chances = np.array(table.column("probabilities").to_pylist())
        rows = table.drop_columns(["probability", "margin", "loss", "probabilities"]).to_pylist()
        results.append((figures, chances, rows, result, (out / "confusion.csv").read_text()))
    assert results[0][2:] == results[1][2:]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)


def test_onnx_on_two_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, model: Path, data: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="runs in one process, but 2 were started"):
        main(["--model", str(model), "--data", str(data)])


def test_bad_images_stop_both_processes(checkpoint: Path, tmp_path: Path) -> None:
    images, labels = tiny_dataset.coloured(9)
    data = tiny_dataset.write(
        tmp_path / "files", list(images), labels, tiny_onnx.COLOURS, packed=False, files=True
    )
    assert cv2.imread(str(data / "files" / "image 0003.png")) is not None
    (data / "files" / "image 0003.png").write_bytes(b"spoilt")
    flags = ["--model", checkpoint, "--data", data]
    done = run(*flags, module="distcls.evaluate", processes=2, code=1)
    assert "[rank 1] error: image 0003" in done.stderr
    assert "error: 1 image cannot be read" in done.stderr


def test_groups_of_a_column(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, labels: list[int]
) -> None:
    images = tmp_path / "images"
    rows = [("path", "label", "group", "split")]
    tiny_dataset.write_images(images, tiny_dataset.coloured(COUNT)[0])
    for number, label in enumerate(labels):
        place = ("lab", "field", "field")[number % 3]
        rows.append((f"images/{number:03d}.png", tiny_onnx.COLOURS[label], place, "test"))
    (tmp_path / "list.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    out = tmp_path / "out"
    by = ["--by", "group"]
    result = figures(capsys, model, tmp_path / "list.csv", *by, "--out", str(out))
    right = logits().argmax(axis=1) == labels
    places = np.arange(COUNT) % 3 > 0
    expected = {"field": right[places], "lab": right[~places]}
    found = {group["value"]: group for group in result["groups"]}
    assert found.keys() == expected.keys()
    for name, own in expected.items():
        assert (found[name]["count"], found[name]["top1"]) == (len(own), own.mean())
        assert (found[name]["low"], found[name]["high"]) == wilson(own.sum(), len(own))
    with (out / "groups.csv").open(newline="") as handle:
        table = list(csv.DictReader(handle))
    assert [row["group"] for row in table] == [group["value"] for group in result["groups"]]
    main(["--model", str(model), "--data", str(tmp_path / "list.csv"), *by])
    assert "\ngroup " in capsys.readouterr().out
    figures(capsys, model, tmp_path / "list.csv", "--out", str(out), "--overwrite")
    assert not (out / "groups.csv").exists()


# --- from Python


def test_from_python_it_is_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, data: Path
) -> None:
    expected = figures(capsys, model, data)
    by_path = distcls.evaluate_model(model, data, quiet=True, out=tmp_path / "out")
    assert by_path.to_json() == expected
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == expected
    with distcls.load(model) as predictor:
        opened = distcls.open_dataset(data)
        for images in (data, str(data), opened, opened.split("test")):
            assert distcls.evaluate_model(predictor, images).to_json() == expected
        first = distcls.evaluate_model(predictor, opened[:20])
        assert first.to_json() == figures(capsys, model, data, "--limit", "20")
        assert distcls.evaluate_model(model, data, limit=20).to_json() == first.to_json()
        last = distcls.evaluate_model(predictor, opened[::-1][: COUNT - 20])
    assert first.count + last.count == COUNT
    np.testing.assert_array_equal(first.confusion + last.confusion, by_path.confusion)


def test_the_result(model: Path, data: Path, labels: list[int]) -> None:
    found = distcls.evaluate_model(model, data, quiet=True)
    predicted = logits().argmax(axis=1)
    assert (found.top1, found.count) == (accuracy_score(labels, predicted), COUNT)
    np.testing.assert_array_equal(found.confusion, confusion_matrix(labels, predicted))
    frame = found.to_dataframe()
    assert (list(frame.index), frame.index.name) == (list(found.classes), "class")
    for name, figures_of in found.per_class.items():
        assert frame.loc[name].to_dict() == figures_of
    assert str(found) == found.to_text()
    assert repr(found).startswith(f"EvaluationResult({str(model)!r}, {str(data)!r}, 'test', 101 im")


def test_an_ensemble_is_evaluated(tmp_path: Path, model: Path, data: Path) -> None:
    with distcls.load([model, model]) as predictor:
        found = distcls.evaluate_model(predictor, data, quiet=True)
        alone = distcls.evaluate_model(model, data, quiet=True)
    assert found.model == f"{model},{model}"
    assert found.figures == pytest.approx(alone.figures, rel=1e-5)
    assert found.per_class == alone.per_class


def test_what_cannot_be_evaluated(tmp_path: Path, model: Path, data: Path) -> None:
    photos = tree(tmp_path / "photos", 30)
    predictor = distcls.load(model)
    wrong: list[tuple[Any, Any, dict[str, Any], str]] = [
        (None, data, {}, "model: None is not a path"),
        (model, 3, {}, "data: 3 is not a path"),
        (tmp_path / "none.onnx", data, {}, r"none\.onnx does not exist"),
        (model, tmp_path / "none", {}, "no such dataset directory"),
        (model, photos, {}, "photos: no image of test has a class of the model; it predicts red"),
        (model, photos, {"split": "val"}, "photos: no split 'val'"),
        (
            model,
            data,
            {"by": "weather"},
            r"by: the manifest has no column 'weather' that makes groups \(choices: label",
        ),
        (model, distcls.open_dataset(photos), {}, r"prepare_dataset\('.*', OUT, test_fraction=1"),
        (model, data, {"split": "tset"}, "no split 'tset'; did you mean 'test'"),
        (model, distcls.open_dataset(data), {"split": "val"}, "no split 'val'"),
        (model, data, {"limit": "many"}, "limit: 'many' is not valid, expected an integer"),
        (model, data, {"provider": "cpus"}, "did you mean 'cpu'"),
        (predictor, data, {"batch_size": 3}, "batch_size: 3 is for distcls.load, not a predictor"),
        (predictor, data, {"provider": "cpu"}, "provider: 'cpu' is for distcls.load"),
    ]
    for one, images, options, told in wrong:
        with pytest.raises(UsageError, match=told):
            distcls.evaluate_model(one, images, out=tmp_path / "ev" / "lab", **options)
    assert not (tmp_path / "ev").exists()
    predictor.close()
    with pytest.raises(DistclsError, match="the predictor is closed"):
        distcls.evaluate_model(predictor, data)


def pictures(root: Path, *names: str) -> Path:
    for name in names:
        put(root / name, tiny_dataset.coloured(1)[0][0])
    return root


def test_a_folder_of_something_else_gets_no_evaluation(
    tmp_path: Path, model: Path, data: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/best.pth").write_bytes(b"")
    photos = pictures(tmp_path / "photos", "red/1.png")
    for out, told in (
        (data, "a place outside of"),
        (data / "results", "a place outside of"),
        (tmp_path / "run", "best.pth is in this one"),
        (photos / "red", "1.png is in this one"),
    ):
        before = sorted(out.parent.rglob("*"))
        with pytest.raises(BadValue, match=told):
            distcls.evaluate_model(model, data, out=out, overwrite=True)
        assert sorted(out.parent.rglob("*")) == before


def test_an_evaluation_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, model: Path, data: Path
) -> None:
    out = tmp_path / "results"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for before in (False, True):
        if before:
            distcls.evaluate_model(model, data, out=out, quiet=True)
        found = {path.name: path.read_bytes() for path in out.glob("*")}
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, limits[1]))
        try:
            with pytest.raises(DistclsError, match="File too large"):
                distcls.evaluate_model(model, data, out=out, overwrite=True, quiet=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {path.name: path.read_bytes() for path in out.glob("*")} == found


def test_names_that_cannot_be_printed_or_written(tmp_path: Path, model: Path) -> None:
    photos = pictures(tmp_path / "photos", "red/1.png", "x\x1b[31m\u202e/2.png")
    text = distcls.evaluate_model(model, photos, quiet=True).to_text()
    assert "x\\x1b[31m\\u202e (1)" in text
    (photos / "red/1.png").rename(os.fsdecode(os.fsencode(photos) + b"/red/w\xff.png"))
    with pytest.raises(UsageError, match=r"1 image with a name that is not UTF-8, first red/w.xff"):
        distcls.evaluate_model(model, photos, quiet=True)


def test_columns_stand_below_each_other_whatever_the_script(tmp_path: Path) -> None:
    names = ("猫", "한국어이름", "e\u0301te\u0301")
    images, truth = tiny_dataset.coloured(30)
    data = tiny_dataset.write(tmp_path / "data", list(images), truth, names, splits=["test"] * 30)
    model = tiny_onnx.write(tmp_path / "m.onnx", tiny_onnx.card(names))
    text = distcls.evaluate_model(model, data, by="label", quiet=True).to_text()
    rows = [line for line in text.splitlines() if line.startswith(names)]
    assert len(rows) == 6
    for table in (rows[:3], rows[3:]):  # the classes, the groups
        assert len({log.width(row) for row in table}) == 1
    assert [log.width(name) for name in names] == [2, 10, 3]
    assert log.aligned([["猫", "1"], ["ab c", "2"]]) == ["猫    1", "ab c  2"]
