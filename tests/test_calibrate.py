"""`distcls calibrate`: temperatures in every file and every answer, prediction sets, thresholds."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss

import distcls
from distcls.commands.calibrate import main
from distcls.commands.predict import main as predict_main
from distcls.data.dataset import Dataset
from distcls.errors import BadValue, UsageError
from distcls.evaluation.calibration import (
    _with_temperatures,
    abstain_for_accuracy,
    abstain_for_answers,
    fit_temperatures,
    prediction_sets,
    spread_of_coverage,
)
from distcls.evaluation.outputs import Outputs
from distcls.evaluation.scores import calibration_bins
from distcls.export.calibrate import CalibrationResult, write_card
from distcls.export.graph import SCALED, set_temperatures
from distcls.model_card import ModelCard
from distcls.prediction import prediction_sets as set_members
from distcls.runtime.model import OnnxModel
from distcls.runtime.onnx_file import OnnxFile
from distcls.serving.compute import _require_like
from distcls.task import Head, Task
from tests import tiny_dataset, tiny_onnx
from tests.pictures import encode
from tests.serving import EXPORTED, Server, serving

PAIRS = {"whole": "digits", "run_heads": "heads", "run_labels": "labels"}
HEADS = Task.of_heads([Head("shape", ("a", "b", "c")), Head("colour", ("x", "y"))])
LABELS = Task(kind="multi_label", classes=("sea", "sky", "sun"), thresholds=(0.3, 0.5, 0.9))
Floats = NDArray[np.float32]


def simulated(task: Task, count: int, sharper: float, seed: int = 0) -> tuple[Floats, Any]:
    """Logits of perfectly calibrated predictions times a factor, and labels drawn from them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, len(task.classes)), scale=2).astype(np.float32)
    chances = task.probabilities(logits)
    if task.kind == "multi_label":
        return logits * np.float32(sharper), (rng.random(chances.shape) < chances).astype(np.int64)
    drawn = [
        (rng.random((count, 1)) > np.cumsum(chances[:, span], axis=1)[:, :-1]).sum(axis=1)
        for span in task.slices
    ]
    labels = np.stack(drawn, axis=1)
    return logits * np.float32(sharper), labels[:, 0] if task.single else labels


def outputs_of(task: Task, logits: Floats, labels: Any) -> Outputs:
    return Outputs.of(task, logits, labels, [str(number) for number in range(len(logits))])


@pytest.mark.parametrize("task", [Task(classes=("a", "b", "c", "d")), HEADS, LABELS])
@pytest.mark.parametrize("sharper", [0.4, 2.5])
def test_the_temperature_is_found_and_no_prediction_changes(task: Task, sharper: float) -> None:
    logits, labels = simulated(task, 20_000, sharper)
    fitted, unknown = fit_temperatures(task, logits, labels)
    assert unknown == []
    assert fitted.temperatures == pytest.approx(
        [sharper] * len(fitted.temperatures or ()), rel=0.06
    )
    before, after = outputs_of(task, logits, labels), outputs_of(fitted, logits, labels)
    np.testing.assert_array_equal(before.decided, after.decided)
    assert calibration_bins(after).error < 0.01 < calibration_bins(before).error
    again, _ = fit_temperatures(fitted, logits, labels)
    assert again.temperatures == fitted.temperatures
    assert again.thresholds == pytest.approx(fitted.thresholds)


def test_the_temperature_is_that_of_scipy() -> None:
    task = Task(classes=("a", "b", "c"))
    logits, labels = simulated(task, 500, 1.7)

    def loss(logarithm: float) -> float:
        scaled = logits.astype(np.float64) / np.exp(logarithm)
        chances = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
        prior = (np.exp(-logarithm) + logarithm - 1) / len(labels)
        return float(log_loss(labels, chances) + prior)

    known = np.exp(minimize_scalar(loss, bounds=(-3, 3), options={"xatol": 1e-9}).x)
    assert fit_temperatures(task, logits, labels)[0].temperatures == pytest.approx(
        [known], rel=1e-4
    )


def test_without_a_best_temperature_it_stays_one() -> None:
    logits, labels = simulated(LABELS, 200, 3)
    labels[:, 1] = 1  # no image without it
    labels[:, 2] = logits[:, 2] > 0  # always right
    fitted, unknown = fit_temperatures(LABELS, logits, labels)
    assert fitted.temperatures is not None
    assert fitted.temperatures[1:] == (1, 1)
    assert (fitted.thresholds or ())[1:] == pytest.approx((0.5, 0.9))
    assert unknown == ["sky", "sun"]
    one = Task(classes=("a", "b"))
    assert fit_temperatures(one, *(logits[:, :2], logits[:, :2].argmax(axis=1)))[1] == [""]


# --- files


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of real run directories, each calibrated on its test set."""
    folder = tmp_path_factory.mktemp("runs")
    for run, data in PAIRS.items():
        shutil.copytree(EXPORTED / run, folder / run)
        (folder / run / "best.onnx").touch()  # is the newer one
        result = distcls.calibrate_model(
            folder / run,
            EXPORTED / data,
            split="test",
            coverage=[0.5],
            quiet=True,
            batch_size=7,
        )
        assert [path.name for path in result.files] == ["best.pth", "best.onnx"]
        if run == "run_labels":  # its few images say nothing of a temperature: given ones
            assert result.temperatures == (1, 1)
            card = OnnxModel(result.files[1]).card
            task = _with_temperatures(card.task, (0.6, 1.7))
            kept = {**(card.calibration or {}), "temperatures": [0.6, 1.7]}
            for path in result.files:
                write_card(path, dataclasses.replace(card, task=task, calibration=kept))
            continue
        assert any(abs(np.log(value)) > 0.03 for value in result.temperatures), result
        assert result.loss[1] < result.loss[0]
    return folder


def test_every_answer_has_the_same_calibrated_probabilities(
    calibrated: Path, tmp_path: Path
) -> None:
    """PyTorch, ONNX Runtime alone, Python, a table, and over HTTP."""
    (tmp_path / "models").mkdir()
    for run in PAIRS:
        shutil.copy(calibrated / run / "best.onnx", tmp_path / "models" / f"{run}.onnx")
    with serving(tmp_path, "--models", tmp_path / "models", model=None) as server:
        for run, data in PAIRS.items():
            images = Dataset.open(EXPORTED / data).split("test")
            pixels = [images.image(place) for place in range(6)]
            plain = OnnxModel(EXPORTED / run / "best.onnx")
            with (
                distcls.load(calibrated / run / "best.pth") as torch,
                distcls.load(calibrated / run / "best.onnx") as onnx,
            ):
                expected = np.stack([each.probabilities for each in onnx(pixels)])
                logits = np.stack([each.logits for each in onnx(pixels)])
                by_torch = np.stack([each.probabilities for each in torch(pixels)])
                prepared = np.stack([onnx.card.preprocess(image) for image in pixels])
            np.testing.assert_array_equal(plain.logits(prepared), logits)
            task = plain.card.task
            assert np.abs(task.probabilities(logits) - expected).max() > 1e-3
            np.testing.assert_allclose(by_torch, expected, atol=1e-5)
            session = onnxruntime.InferenceSession(calibrated / run / "best.onnx")
            by_graph, raw = session.run(["probabilities", "logits"], {"images": prepared})
            np.testing.assert_allclose(by_graph, expected, atol=1e-6)
            np.testing.assert_array_equal(raw, logits)
            for place, image in enumerate(pixels):
                answer = server.post(
                    f"/predict?model={run}&probabilities=true", encode(image, "PNG")
                )
                given = list(answer.json["predictions"][0]["probabilities"].values())
                np.testing.assert_allclose(given, expected[place], atol=1e-6)
                tensor: dict[str, Any] = {"name": "images", "datatype": "UINT8"}
                tensor["shape"] = [1, *prepared[place].shape]
                tensor["data"] = prepared[place].ravel().tolist()
                body = {"inputs": [tensor], "outputs": [{"name": "probabilities"}]}
                outputs = server.post(f"/v2/models/{run}/infer", body).json["outputs"]
                np.testing.assert_allclose(outputs[0]["data"], expected[place], atol=1e-6)
            check_sets(server, run, onnx.card, [encode(image, "PNG") for image in pixels])
        check_calibration_error(server, calibrated)


def check_sets(server: Server, run: str, card: ModelCard, files: list[bytes]) -> None:
    """Prediction sets over HTTP are those of the probabilities there."""
    assert card.calibration is not None
    least = card.calibration["sets"][0]["least_probability"]
    sizes = set()
    for data in files:
        query = f"/predict?model={run}&probabilities=true&coverage=0.50"
        found = server.post(query, data).json["predictions"][0]
        chances = np.array([list(found["probabilities"].values())], np.float32)
        known = [names[0] for names in set_members(card.task, chances, least)]
        if card.task.heads:
            assert [head["set"] for head in found["heads"].values()] == known
        else:
            assert [found[name] for name in ("set", "unsure") if name in found] == known
        sizes.update(map(len, known))
    assert len(sizes) > 1
    for text, told in {
        "0.9": "has prediction sets of 0.5",
        "x": "expected a number",
        "2": "coverage: 2.0 is not valid, expected between 0 and 1, as in 0.9",
        "nan": "coverage: nan is not valid",
    }.items():
        refused = server.post(f"/predict?model={run}&coverage={text}", files[0])
        assert refused.status == 400
        assert told in refused.error
    bad = server.post(f"/predict?model={run}&coverage=0.5", b"hello")
    assert bad.status == 400


def check_calibration_error(server: Server, calibrated: Path) -> None:
    """ECE from the checkpoint, from the export, and of what the server says of all images."""
    data = EXPORTED / "digits"
    results = [
        distcls.evaluate_model(calibrated / "whole" / name, data, quiet=True)
        for name in ("best.pth", "best.onnx")
    ]
    images = Dataset.open(data).split("test")
    files = (encode(images.image(place), "PNG") for place in range(len(images)))
    answers = (server.post("/predict?model=whole&probabilities=true", data) for data in files)
    given = [answer.json["predictions"][0]["probabilities"].values() for answer in answers]
    logits = np.log(np.array([list(row) for row in given], np.float32))
    over_http = calibration_bins(
        outputs_of(Task(classes=images.task.classes), logits, images.labels)
    )
    errors = [*(result.scores["ece"] for result in results), over_http.error]
    assert errors == pytest.approx([errors[0]] * 3, abs=1e-5)
    before = distcls.evaluate_model(EXPORTED / "whole" / "best.onnx", data, quiet=True)
    assert abs(before.scores["ece"] - errors[0]) > 1e-3


def test_a_table_and_an_evaluation_use_them(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = calibrated / "whole", EXPORTED / "digits"
    before = distcls.evaluate_model(EXPORTED / "whole" / "best.onnx", data, quiet=True)
    results = [
        distcls.evaluate_model(run / name, data, quiet=True) for name in ("best.pth", "best.onnx")
    ]
    kept = ModelCard.from_metadata(OnnxModel(run / "best.onnx").metadata, "best.onnx").calibration
    assert kept is not None
    for result in results:
        assert result.top1 == before.top1
        assert result.loss == pytest.approx(kept["loss"][1], rel=1e-5)
        assert before.loss == pytest.approx(kept["loss"][0], rel=1e-5)
        assert result.scores["ece"] == pytest.approx(kept["ece"][1], abs=1e-5)
    flags = ["--model", str(run), "--out", str(tmp_path / "pre.csv"), "--probabilities"]
    predict_main([str(data), *flags])
    with (tmp_path / "pre.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    given = [[float(row[f"p:{name}"]) for name in results[1].classes] for row in rows]
    np.testing.assert_allclose(given, results[1].outputs.probabilities, atol=1e-6)


def test_what_else_is_in_the_files_stays(calibrated: Path, tmp_path: Path) -> None:
    import torch

    for run in PAIRS:
        old, new = (OnnxModel(folder / run / "best.onnx") for folder in (EXPORTED, calibrated))
        assert old.card.certificate == new.card.certificate
        assert old.metadata.get("distcls.golden") == new.metadata.get("distcls.golden")
        old_file, new_file = (
            torch.load(folder / run / "best.pth", weights_only=True)
            for folder in (EXPORTED, calibrated)
        )
        assert old_file.keys() <= new_file.keys()
        for name, tensor in old_file["model"].items():
            assert torch.equal(tensor, new_file["model"][name])


def test_a_server_takes_a_calibrated_file_for_the_one_before(calibrated: Path) -> None:
    """Its thresholds are others, its labels the same."""
    old, new = (OnnxFile(f / "run_labels" / "best.onnx") for f in (EXPORTED, calibrated))
    card = ModelCard.from_metadata(old.metadata, "old")
    assert ModelCard.from_metadata(new.metadata, "new").task.thresholds != card.task.thresholds
    like: dict[str, Any] = {
        "size": list(card.preprocess.size),
        "task": {"kind": "multi_label", "classes": []},
    }
    like["task"]["classes"] = list(card.classes)
    _require_like(new, like)
    with pytest.raises(UsageError, match="its classes are not those of before"):
        _require_like(new, like | {"task": ["big", "round"]})


def test_means_of_models_apply_a_temperature_once(calibrated: Path) -> None:
    run = calibrated / "whole" / "best.onnx"
    image = Dataset.open(EXPORTED / "digits").split("test").image(0)
    with distcls.load([run, run]) as twice, distcls.load(run) as once:
        np.testing.assert_allclose(twice(image).probabilities, once(image).probabilities, atol=1e-6)
        assert twice.card.calibration is None


def test_no_torch_is_needed_for_an_onnx(calibrated: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(EXPORTED / "whole" / "best.onnx", tmp_path / "best.onnx"))
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from distcls.cli import run\nfrom distcls.commands.calibrate import main\nrun(main)"
    )
    flags = ["--data", str(EXPORTED / "digits"), "--split", "test", "--json"]
    command = [sys.executable, "-c", program, str(path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    kept = OnnxModel(calibrated / "whole" / "best.onnx").card.calibration
    assert kept is not None
    assert found["temperatures"] == pytest.approx(kept["temperatures"], rel=1e-4)
    assert OnnxModel(path).card.task.temperatures == tuple(found["temperatures"])


def test_a_graph_gets_a_new_temperature_and_loses_it_again() -> None:
    card = tiny_onnx.card()
    model = tiny_onnx.proto(card)
    plain = model.SerializeToString()
    for temperature in (2.0, 0.5):
        set_temperatures(model, dataclasses.replace(card.task, temperatures=(temperature,)))
        assert [node.op_type for node in model.graph.node].count("Mul") == 1
        session = onnxruntime.InferenceSession(model.SerializeToString())
        images = tiny_dataset.coloured(5)[0]
        logits, chances = session.run(["logits", "probabilities"], {"images": images})
        expected = card.task.probabilities(logits / np.float32(temperature))
        np.testing.assert_allclose(chances, expected, rtol=1e-5)
    set_temperatures(model, card.task)
    assert model.SerializeToString() == plain
    model.graph.node[-1].input[0] = "means"
    with pytest.raises(ValueError, match="not computed from its logits"):
        set_temperatures(model, dataclasses.replace(card.task, temperatures=(2.0,)))
    assert SCALED not in str(model.graph)


# --- prediction sets and thresholds


@pytest.mark.parametrize("task", [Task(classes=tuple("abcdefgh")), HEADS])
@pytest.mark.parametrize("coverage", [0.9, 0.95])
def test_prediction_sets_hold_the_truth_as_often_as_they_say(task: Task, coverage: float) -> None:
    """Also of probabilities that are wrong: nothing is assumed of the model."""
    logits, labels = simulated(task, 20_000, 3.0)
    half = len(logits) // 2
    least = prediction_sets(outputs_of(task, logits[:half], labels[:half]), coverage)
    held_out = outputs_of(task, logits[half:], labels[half:])
    own = task.of_answers(held_out.probabilities, held_out.labels)
    inside = (own >= np.float32(least)).mean(axis=0)
    np.testing.assert_allclose(inside, coverage, atol=0.01)
    columns = set_members(task, held_out.probabilities, least)
    heads = [head.classes for head in task.heads] or [task.classes]
    for place, (texts, classes) in enumerate(zip(columns, heads, strict=True)):
        found = [
            classes[label] in names
            for names, label in zip(texts, held_out.labels[:, place], strict=True)
        ]
        assert np.mean(found) == inside[place]


def test_prediction_sets_of_few_images_hold_on_average() -> None:
    """The mean over many fits of 99 images is the promise itself, not only close to it."""
    task = Task(classes=("a", "b", "c", "d"))
    logits, labels = simulated(task, 120_000, 1)
    outputs = outputs_of(task, logits, labels)
    rng = np.random.default_rng(0)
    own = task.of_answers(outputs.probabilities, outputs.labels)
    inside = []
    for _ in range(500):
        some = outputs.take(rng.choice(len(own), 99, replace=False))
        inside.append(np.mean(own >= np.float32(prediction_sets(some, 0.9))))
    assert np.mean(inside) == pytest.approx(0.9, abs=0.005)
    with pytest.raises(UsageError, match=r"0.9 needs at least 9 images, there are 5"):
        prediction_sets(outputs.take(np.arange(5)), 0.9)
    assert len(prediction_sets(outputs.take(np.arange(9)), 0.9)) == 1


@pytest.mark.parametrize("sharper", [0.3, 3.0])
def test_sets_of_labels_hold_yes_and_no_as_often_as_they_say(sharper: float) -> None:
    """Also of a label that one image in thirty has, and of probabilities that are wrong."""
    logits, labels = simulated(LABELS, 60_000, sharper)
    kept = (labels[:, 1] == 0) | (np.arange(len(labels)) % 30 == 0)
    logits, labels = logits[kept], labels[kept]
    half = len(logits) // 2
    least = prediction_sets(outputs_of(LABELS, logits[:half], labels[:half]), 0.9)
    chances = LABELS.probabilities(logits[half:])
    sets, unsure = set_members(LABELS, chances, least)
    truth = labels[half:]
    for place, name in enumerate(LABELS.classes):
        said = np.array([name in names for names in sets])
        open_ = np.array([name in names for names in unsure])
        both = chances[:, place] >= np.float32(least[place])
        both &= 1 - chances[:, place] >= np.float32(least[3 + place])
        for has, wrong in ((1, ~said & ~open_), (0, said)):
            own = truth[:, place] == has
            missed = wrong | (open_ & ~both)  # an empty set holds nothing
            assert 1 - missed[own].mean() == pytest.approx(0.9, abs=0.02), (name, has)


def test_the_coverage_of_a_fit_to_few_images_varies_as_is_said() -> None:
    task, held = Task(classes=("a", "b", "c")), []
    for seed in range(400):
        logits, labels = simulated(task, 220, 1.0, seed)
        both = outputs_of(task, logits, labels)
        few, others = both.take(np.arange(20)), both.take(np.arange(20, 220))
        (least,) = prediction_sets(few, 0.8)
        chances = others.task.of_answers(others.probabilities, others.labels)
        held.append(float((chances >= least).mean()))
    count, mean, deviation = spread_of_coverage(few, 0.8)
    assert (count, mean) == (20, 17 / 21)
    assert np.mean(held) == pytest.approx(mean, abs=0.02)
    assert np.var(held) - mean * (1 - mean) / 200 == pytest.approx(deviation**2, rel=0.3)


def test_a_rare_label_is_never_excluded() -> None:
    logits, labels = simulated(LABELS, 400, 1)
    labels[:, 2] = np.arange(400) < 8  # 9 are needed
    least = prediction_sets(outputs_of(LABELS, logits, labels), 0.9)
    assert (least[2], least[5] > 0) == (0, True)
    sets, unsure = set_members(LABELS, LABELS.probabilities(logits), least)
    assert all(
        ("sun" in names) != ("sun" in open_) for names, open_ in zip(sets, unsure, strict=True)
    )
    few = outputs_of(LABELS, logits[:5], labels[:5])
    with pytest.raises(UsageError, match=r"0.9 needs at least 9 images with a label, or without"):
        prediction_sets(few, 0.9)


def test_thresholds_do_what_they_say() -> None:
    task = Task(classes=("a", "b", "c"))
    outputs = outputs_of(task, *simulated(task, 5000, 1))
    for found in (abstain_for_accuracy(outputs, 0.9), abstain_for_answers(outputs, 0.6)):
        kept = outputs.probabilities.max(axis=1) >= np.float32(found.threshold)
        assert found.answered == kept.mean()
        assert found.accuracy == pytest.approx(outputs.right[kept].mean())
    assert abstain_for_accuracy(outputs, 0.9).accuracy >= 0.9
    assert 0.6 <= abstain_for_answers(outputs, 0.6).answered < 0.601
    assert outputs.right.mean() < 0.85
    with pytest.raises(UsageError, match=r"precision: 1 is not reached"):
        abstain_for_accuracy(outputs_of(task, -np.eye(3, dtype=np.float32), np.arange(3)), 1.0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Colours, an eleventh of them named wrong; 400 to fit to and 400 to test."""
    images, labels = tiny_dataset.coloured(800)
    truth = np.array(labels)
    truth[::11] = (truth[::11] + 1) % 3
    splits = ["val", "test"] * 400
    return tiny_dataset.write(
        tmp_path / "d", list(images), truth.tolist(), tiny_onnx.COLOURS, splits=splits
    )


def test_from_the_command_line_to_a_column(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_onnx.write(tmp_path / "m.onnx")
    sets = ["--coverage", "0.8,0.95", "--precision", "0.92", "--answered", "0.5"]
    main([str(model), "--data", str(data), *sets])
    printed = capsys.readouterr().out
    for word in (
        "temperature",
        "before",
        "0.95 of the images",
        "are answered",
        "400 images of val",
    ):
        assert word in printed
    kept = OnnxModel(model).card.calibration
    assert kept is not None
    assert [entry["coverage"] for entry in kept["sets"]] == [0.8, 0.95]
    assert kept["thresholds"][0]["accuracy"] >= 0.92
    out = tmp_path / "pre.csv"
    flags = [str(data), "--model", str(model), "--out", str(out), "--overwrite"]
    predict_main([*flags, "--coverage", "0.95"])
    with out.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    truth = Dataset.open(data).split("test").true_labels
    pairs = list(zip(rows, truth, strict=True))
    assert np.mean([true in row["set"].split("|") for row, true in pairs]) == pytest.approx(
        0.95, abs=0.03
    )
    assert all(row["label"] == row["set"].split("|")[0] for row in rows if row["set"])
    with pytest.raises(UsageError, match=r"has prediction sets of 0.8, 0.95; distcls cal"):
        predict_main([*flags, "--coverage", "0.9"])
    with pytest.raises(UsageError, match="of one model, and --tta flip has others"):
        predict_main([*flags, "--coverage", "0.95", "--tta", "flip"])
    with pytest.raises(UsageError, match="of one model, and an ensemble has others"):
        predict_main([str(data), "--model", f"{model},{model}", *flags[3:], "--coverage", "0.95"])


def test_a_run_is_calibrated_on_what_its_config_names(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    (tmp_path / "run").mkdir()
    tiny_onnx.write(tmp_path / "run" / "best.onnx")
    (tmp_path / "run" / "config.yaml").write_text(f"data: {data.name}\n")
    main([str(tmp_path / "run"), "--coverage", "0.8", "--limit", "20", "--quiet"])
    told = "coverage: sets that are fitted to 20 images hold the truth of 0.81 ± 0.08 of others"
    assert told in capsys.readouterr().err


def test_sets_of_heads_have_their_names() -> None:
    result = CalibrationResult(
        **{"files": (), "data": "", "split": "val", "images": 20, "names": ("hue", "odd")},
        **{"temperatures": (1.0, 2.0), "ece": (0.2, 0.1), "loss": (0.2, 0.1)},
        sets=({"coverage": 0.8, "least_probability": [0.25, 0.5], "size": 1.2},),
    )
    told = "hold the true class of each head for 0.8 of the images, 1.20 classes a head on average"
    assert (
        f"sets         {told}: those of probability hue 0.25, odd 0.5 and more" in result.to_text()
    )


def test_the_content_says_whether_two_files_are_one_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(EXPORTED / "whole", run)
    os.utime(run / "best.onnx", (1, 1))  # as a copy, or a calibration that was killed, leaves it
    options: Any = {"split": "test", "quiet": True}
    result = distcls.calibrate_model(run, EXPORTED / "digits", **options)
    assert [path.name for path in result.files] == ["best.pth", "best.onnx"]
    shutil.copy(EXPORTED / "run_heads/best.onnx", run / "best.onnx")
    with pytest.raises(UsageError, match=r"are different models; distcls export --ckpt .*run"):
        distcls.calibrate_model(run, EXPORTED / "digits", **options)


def test_what_cannot_be_calibrated(data: Path, tmp_path: Path) -> None:
    model = tiny_onnx.write(tmp_path / "m.onnx")
    before = model.read_bytes()
    few = ["--data", str(data), "--limit", "4"]
    wrong: list[tuple[list[str], str]] = [
        ([], r"data: .*m.onnx has no dataset directory; name one with --data"),
        (["--data", str(data), "--split", "dev"], "no split 'dev'"),
        (["--data", str(data), "--coverage", "90"], "coverage: 90.0 is not valid"),
        (["--data", str(data), "--coverage", "0.9,0.9"], "each one once"),
        (["--data", str(data), "--precision", "0"], "precision: 0.0 is not valid"),
        ([*few, "--coverage", "0.9"], "0.9 needs at least 9 images, there are 4"),
    ]
    for flags, told in wrong:
        with pytest.raises((UsageError, BadValue), match=told):
            main([str(model), *flags])
    (data / "files" / "red").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"prepare .*d/files --out .* --test-fraction 1, and --sp"):
        main([str(model), "--data", str(data / "files")])
    assert model.read_bytes() == before


def test_chance_is_no_reason_to_change_the_temperature() -> None:
    """Calibrated logits of 60 images: without a test their temperature is 0.6 to 1.7."""
    task = Task(classes=("a", "b", "c"))
    changed = 0
    for seed in range(100):
        fitted, unknown = fit_temperatures(task, *simulated(task, 60, 1, seed))
        assert (unknown == [""]) == (fitted.temperatures == (1.0,))
        changed += not unknown
    assert changed <= 8
    found = [fit_temperatures(task, *simulated(task, 200, 4, seed))[1] for seed in range(20)]
    assert found.count([]) >= 19


def test_what_was_fitted_before_is_kept_while_it_holds(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_onnx.write(tmp_path / "m.onnx")
    flags = [str(model), "--data", str(data)]
    main([*flags, "--coverage", "0.9", "--precision", "1", "--answered", "0.5"])
    captured = capsys.readouterr()
    assert "are answered (200)" in captured.out
    assert "of others it may be" in captured.err or "1 is not reached" in captured.err
    first = OnnxModel(model).card.calibration
    assert first is not None
    main(flags)
    assert "prediction sets of the calibration before are kept" in capsys.readouterr().err
    second = OnnxModel(model).card.calibration
    assert second is not None
    assert [second[name] for name in ("sets", "thresholds")] == [
        first[name] for name in ("sets", "thresholds")
    ]
    main([*flags, "--limit", "150"])
    said = capsys.readouterr().err
    assert "prediction sets of the calibration before are dropped" in said
    assert "thresholds of the calibration before are dropped" in said
    third = OnnxModel(model).card.calibration
    assert third is not None
    assert third["sets"] == third["thresholds"] == []


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"temperatures": [0]}, "temperatures"),
        ({"temperatures": [1.0, 1.0]}, "one for each task"),
        ({}, "temperatures"),
        ({"temperatures": [1.0], "sets": [{"coverage": 2, "least_probability": [0.1]}]}, "sets"),
        (
            {
                "temperatures": [1],
                "sets": [{"coverage": 0.9, "least_probability": [0, 1], "size": 1}],
            },
            "calibration.sets: .*, expected 1 numbers",
        ),
    ],
)
def test_a_card_with_another_calibration_is_refused(values: dict[str, Any], told: str) -> None:
    card = tiny_onnx.card().to_json() | {"calibration": values}
    with pytest.raises(UsageError, match=told):
        ModelCard.from_json(card, "here")
