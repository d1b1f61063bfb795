"""Heads, texts and labels from the manifest to the predictions, trained on one process and two."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import distcls.commands.evaluate
import distcls.commands.export
import distcls.commands.predict
import distcls.commands.train
from distcls.data.dataset import Dataset
from distcls.errors import UsageError
from distcls.export import onnx
from distcls.export.certificate import load_images
from distcls.export.reduced_precision import Reduction, reduce_precision
from distcls.models.checkpoint import open_checkpoint, read_checkpoint
from distcls.runtime.model import OnnxModel
from tests import multi_output
from tests.e2e.commands import run
from tests.e2e.test_training import history

RECIPE = [
    *("--model.name", "simple_cnn", "--epochs", "3", "--batch-size", "32", "--lr", "0.003"),
    *("--augment.crop-padding", "1", "--augment.mixup", "0.1", "--checkpoint.save-top-k", "0"),
]
KINDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "texts": (multi_output.TEXT, ["--monitor.metric", "exact"]),
    "heads": (multi_output.HEADS, ["--monitor.metric", "exact", "--loss.label-smoothing", "0.05"]),
    "tags": (multi_output.TAGGED, ["--monitor.metric", "macro_f1"]),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return multi_output.manifest(tmp_path_factory.mktemp("pairs"), 450)


def trained(source: Path, kind: str, processes: int = 1) -> tuple[Path, Path]:
    """Dataset and run directory of a kind, made when first asked for."""
    options, more = KINDS[kind]
    data, out = source.parent / kind, source.parent / f"{kind}-run-{processes}"
    if not data.exists():
        multi_output.dataset(source, data, **options)
    if not out.exists():
        flags = ["--data", str(data), "--out", str(out), *RECIPE, *more]
        if processes == 1:
            distcls.commands.train.main(flags)
        else:
            run(*flags, module="distcls.train", processes=processes)
    return data, out


def evaluated(capsys: pytest.CaptureFixture[str], *flags: object) -> dict[str, Any]:
    distcls.commands.evaluate.main([*map(str, flags), "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def truths(source: Path, kind: str) -> list[str]:
    columns = {"texts": ("text",), "heads": ("left", "right"), "tags": ("tags",)}[kind]
    with source.open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["split"] == "test"]
    return ["|".join(row[name] for name in columns) for row in rows]


def labels(path: Path) -> list[str]:
    with path.open(newline="") as handle:
        return [row["label"] for row in csv.DictReader(handle)]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_and_onnx_answer_as_evaluate_says(
    kind: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = trained(source, kind)
    rows = history(out)
    assert all(0 <= row["val_exact"] <= row["val_top1"] <= 1 for row in rows)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    distcls.commands.export.main(
        ["--ckpt", str(out / "best.pth"), "--out", str(tmp_path / "best.onnx")]
    )
    capsys.readouterr()
    figures = []
    for model in (out / "best.pth", tmp_path / "best.onnx"):
        folder, table = tmp_path / model.suffix[1:], tmp_path / f"{model.suffix[1:]}.csv"
        found = evaluated(capsys, "--model", model, "--data", data, "--out", folder)
        distcls.commands.predict.main([str(data), "--model", str(model), "--out", str(table)])
        right = np.mean([a == b for a, b in zip(labels(table), truths(source, kind), strict=True)])
        assert found["exact"] == pytest.approx(right, abs=1e-12)
        assert found["count"] == 75
        figures.append({key: found[key] for key in ("exact", "top1", "macro_f1", "loss")})
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    assert labels(tmp_path / "pth.csv") == labels(tmp_path / "onnx.csv")
    most = max(truths(source, kind).count(text) for text in truths(source, kind)) / 75
    assert figures[0]["exact"] > max(0.5, 2 * most)  # always the same answer would give `most`


def test_probabilities_in_the_file_are_those_of_each_head(source: Path, tmp_path: Path) -> None:
    for kind in ("texts", "tags"):
        data, out = trained(source, kind)
        path = tmp_path / f"{kind}.onnx"
        distcls.commands.export.main(["--ckpt", str(out / "best.pth"), "--out", str(path)])
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        targets = Dataset.open(data).task
        metadata = session.get_modelmeta().custom_metadata_map
        on_disk = {"multi_head": "heads", "multi_label": "multi_label"}[targets.kind]
        assert json.loads(metadata["distcls.targets"])["kind"] == on_disk
        shape = session.get_inputs()[0].shape[1:]
        images = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
        logits, probabilities = session.run(["logits", "probabilities"], {"images": images})
        np.testing.assert_allclose(probabilities, targets.probabilities(logits), atol=1e-6)


@pytest.mark.parametrize("kind", ["texts", "tags"])
def test_reduced_precision_is_certified_head_by_head(
    kind: str, source: Path, tmp_path: Path
) -> None:
    data, out = trained(source, kind)
    reference = open_checkpoint(out / "best.pth", device="cpu")
    split = Dataset.open(data).split("val")
    reduction = Reduction(
        precision="fp16",
        reference=reference,
        graph=onnx.to_onnx(reference.model, reference.card, 18),
        split=split,
        images=load_images(split, reference.card.preprocess, 64),
        max_accuracy_drop=10,
        min_agreement=80,
    )
    for precision in ("fp16", "int8"):
        path = tmp_path / f"{precision}.onnx"
        certificate = reduce_precision(dataclasses.replace(reduction, precision=precision), path)
        names = ["1", "2"] if kind == "texts" else ["labels"]
        assert [part.name for part in certificate.heads] == names
        assert certificate.images == 75
        model = OnnxModel(path)
        assert model.card.task == reference.card.task
        logits, probabilities = model.run(["logits", "probabilities"], reduction.images)
        expected = reference.card.task.probabilities(logits)
        np.testing.assert_allclose(probabilities, expected, atol=1e-6)


def test_thresholds_are_chosen_on_validation_and_used(source: Path) -> None:
    _, out = trained(source, "tags")
    card, _ = read_checkpoint(out / "best.pth")
    assert card.task is not None
    thresholds = card.task.thresholds
    assert thresholds is not None
    assert len(thresholds) == len(card.classes) == 4
    assert len(set(thresholds)) > 1
    heads, _ = read_checkpoint(trained(source, "texts")[1] / "best.pth")
    assert heads.task is not None
    assert heads.task.alphabet == (*multi_output.TAGS, "")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["texts", "tags"])
def test_two_processes_train_and_evaluate_as_one(
    kind: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = trained(source, kind, processes=2)
    assert history(out)[-1]["val_exact"] > 0.5
    flags = ["--model", out / "best.pth", "--data", data, "--split", "val", "--batch-size", "16"]
    answers = [evaluated(capsys, *flags)]
    done = run(*flags, "--json", module="distcls.evaluate", processes=2)
    answers.append(json.loads(done.stdout))
    assert answers[0]["count"] == 75
    assert answers[0].keys() == answers[1].keys()
    for key in ("top1", "exact", "macro_f1"):
        assert answers[0][key] == pytest.approx(answers[1][key], abs=1e-12)
    if kind == "texts":  # without thresholds the training's own figures are evaluate's
        best = max(history(out), key=lambda row: row["val_exact"])
        assert answers[0]["exact"] == pytest.approx(best["val_exact"], abs=1e-9)


def test_early_stopping_on_the_whole_answer(source: Path, tmp_path: Path) -> None:
    data, _ = trained(source, "texts")
    flags = ["--monitor.metric", "exact", "--monitor.patience", "1", "--monitor.min-delta", "1"]
    call = ["--data", str(data), "--out", str(tmp_path / "run"), "--limit", "64"]
    distcls.commands.train.main([*call, *RECIPE, *flags])
    assert len(history(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("kind", "flags", "told"),
    [
        ("texts", ["--augment.cutmix", "1"], r"^augment\.cutmix: "),
        ("texts", ["--loss.name", "bce"], r"^loss\.name: "),
        ("tags", ["--loss", "cross_entropy"], r"^loss\.name: .*choose bce or focal"),
    ],
)
def test_contradictions_leave_no_run(
    kind: str, flags: list[str], told: str, source: Path, tmp_path: Path
) -> None:
    data, _ = trained(source, kind)
    with pytest.raises(UsageError, match=told):
        distcls.commands.train.main(["--data", str(data), "--out", str(tmp_path / "run"), *flags])
    assert not (tmp_path / "run").exists()
