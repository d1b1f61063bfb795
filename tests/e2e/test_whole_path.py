"""prepare, train, export, evaluate, predict in one process: they fit, and no key is dead."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import distcls.commands.evaluate
import distcls.commands.export
import distcls.commands.models
import distcls.commands.predict
import distcls.commands.prepare
import distcls.commands.train
import distcls.commands.triton
from distcls.batch.options import PredictOptions
from distcls.commands.models import ModelsOptions
from distcls.config import leaves
from distcls.data.prepare import PrepareOptions
from distcls.evaluation.evaluate import EvaluateOptions
from distcls.export.onnx import ExportOptions
from distcls.export.triton import TritonOptions
from distcls.imaging import Preprocess
from distcls.models.config import ModelConfig
from distcls.models.factory import build
from distcls.training.config import OPTIMIZERS, DistillConfig, OptimizerConfig, TrainConfig
from distcls.training.distillation import Teacher
from distcls.training.inputs import place
from distcls.training.optim import make_optimizer
from distcls.training.schedule import SCHEDULES, ScheduleConfig, make_schedule

OPTIONS = (
    *(PrepareOptions, ModelsOptions, TrainConfig, ExportOptions, TritonOptions),
    *(EvaluateOptions, PredictOptions),
)
BOOKKEEPING = ("dataclasses.py", "load.py", "schema.py", "distcls/registry.py")
"""Files that read every field, whatever it is for: writing the config down is no use of a key."""


def sections(cls: type) -> Iterator[type]:
    """A config dataclass and those nested in it."""
    yield cls
    for kind in typing.get_type_hints(cls).values():
        if dataclasses.is_dataclass(kind):
            yield from sections(typing.cast(type, kind))


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[tuple[type, str]]]:
    """The folder of a whole path through all commands, and the fields that were read on it."""
    read: set[tuple[type, str]] = set()

    def recorder(cls: type) -> Any:
        def getattribute(self: Any, name: str) -> Any:
            caller = sys._getframe(1).f_code
            counts = not caller.co_name.startswith(("__post_init__", "_check_"))
            if counts and not caller.co_filename.endswith(BOOKKEEPING):
                read.add((cls, name))
            return object.__getattribute__(self, name)

        return getattribute

    with pytest.MonkeyPatch.context() as patch:
        for options in OPTIONS:
            for cls in sections(options):
                patch.setattr(cls, "__getattribute__", recorder(cls), raising=False)
        folder = tmp_path_factory.mktemp("path")
        whole_path(folder)
        every_choice()
    return folder, read


def whole_path(folder: Path) -> None:
    """What `make demo` does, smaller."""
    data, out = folder / "digits", folder / "run"
    distcls.commands.prepare.main(
        ["digits", "--out", str(data), "--limit", "300", "--write-images"]
    )
    distcls.commands.models.main(["simple_nn"])
    weights = build(ModelConfig(name="simple_cnn"), 10, Preprocess(size=(28, 28)))
    torch.save(weights.backbone.state_dict(), folder / "weights.pth")
    distcls.commands.train.main(
        [
            *("--data", str(data), "--out", str(out), "--epochs", "2", "--batch-size", "32"),
            *("--model.name", "simple_cnn", "--model.pretrained", str(folder / "weights.pth")),
            *("--augment.erase", "0.5", "--augment.rotate", "5", "--augment.crop-padding", "2"),
            *("--augment.policy", "randaugment", "--augment.mixup", "0.2", "--augment.cutmix", "1"),
            *("--loss.name", "focal", "--monitor.patience", "3"),
        ]
    )
    teacher = DistillConfig(teacher=out / "best.pth")
    Teacher(teacher, tuple("0123456789"), torch.device("cpu"))
    (out / "best.onnx").write_text("of an earlier export")
    distcls.commands.export.main(["--ckpt", str(out / "best.pth"), "--quiet", "--overwrite"])
    half = ["--precision", "fp16", "--max-accuracy-drop", "10", "--min-agreement", "90"]
    distcls.commands.export.main(["--ckpt", str(out / "best.pth"), *half])
    distcls.commands.triton.main(
        ["--model", str(out / "best.onnx"), "--out", str(folder / "models")]
    )
    for ending in ("pth", "onnx"):
        model = str(out / f"best.{ending}")
        evaluation = str(folder / f"evaluation_{ending}")
        distcls.commands.evaluate.main(["--model", model, "--data", str(data), "--out", evaluation])
        predictions = folder / f"{ending}.csv"
        predictions.write_text("of an earlier prediction")
        more = ["--overwrite", *(["--show", "4"] if ending == "onnx" else [])]
        distcls.commands.predict.main(
            ["--model", model, str(data), "--out", str(predictions), *more]
        )
    distcls.commands.predict.main(["--model", str(out), str(data), "--out", "-", "--limit", "2"])
    place(TrainConfig(data=folder / "gone", source="digits", out=folder / "again"))


def every_choice() -> None:
    """Keys that only some optimisers and schedules read."""
    for name in OPTIMIZERS.names():
        make_optimizer(OptimizerConfig(name=name), torch.nn.Linear(2, 2), 0.1)
    for name in SCHEDULES.names():
        make_schedule(ScheduleConfig(name=name), 0.1, 10, 10)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda cls: cls.__name__)
def test_every_key_is_read(options: type, used: tuple[Path, set[tuple[type, str]]]) -> None:
    dead = {
        f"{cls.__name__}.{field.name}"
        for cls in sections(options)
        for field in dataclasses.fields(cls)
        if (cls, field.name) not in used[1]
    }
    assert not dead


@pytest.mark.parametrize("options", OPTIONS, ids=lambda cls: cls.__name__)
def test_every_key_is_explained(options: type) -> None:
    assert [leaf.key for leaf in leaves(options) if not leaf.doc] == []


@pytest.mark.parametrize("ending", ["pth", "onnx"])
def test_accuracy_of_the_predictions_is_that_of_the_evaluation(
    ending: str, used: tuple[Path, set[tuple[type, str]]]
) -> None:
    import pyarrow.parquet as pq

    folder = used[0]
    classes = json.loads((folder / "digits/classes.json").read_text())
    manifest = pq.read_table(folder / "digits/manifest.parquet").to_pylist()
    truth = {row["image_id"]: classes[row["label"]] for row in manifest if row["split"] == "test"}
    with (folder / f"{ending}.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["image_id"] for row in rows] == list(truth)
    correct = sum(row["label"] == truth[row["image_id"]] for row in rows)
    metrics = json.loads((folder / f"evaluation_{ending}/metrics.json").read_text())
    assert metrics["top1"] == correct / len(rows)


def test_the_lines_of_the_readme_run_without_distcls_and_torch(
    used: tuple[Path, set[tuple[type, str]]], tmp_path: Path
) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (lines,) = [part for part in text.split("```python\n")[1:] if "onnxruntime" in part]
    folder = used[0]
    name = next(path for path in sorted((folder / "digits/images/test").rglob("*.png")))
    shutil.copy(name, tmp_path / "photo.jpg")
    shutil.copy(folder / "run/best.onnx", tmp_path)
    program = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'distcls', 'onnx'):\n"
        "    sys.modules[name] = None\n"
        f"{lines.partition('```')[0]}\n"
        "print(float(probabilities.max()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "pre.csv"
    distcls.commands.predict.main(
        [str(name), "--model", str(folder / "run/best.onnx"), "--out", str(out)]
    )
    with out.open(newline="") as handle:
        (row,) = csv.DictReader(handle)
    assert float(done.stdout) == pytest.approx(float(row["probability"]), rel=1e-4)


def test_the_model_file_runs_without_distcls(used: tuple[Path, set[tuple[type, str]]]) -> None:
    path = used[0] / "run/best.onnx"
    session = onnxruntime.InferenceSession(str(path))
    metadata = session.get_modelmeta().custom_metadata_map
    images = np.zeros((3, *json.loads(metadata["distcls.preprocess"])["size"], 3), np.uint8)
    logits, probabilities = session.run(["logits", "probabilities"], {"images": images})
    assert logits.shape == (3, len(json.loads(metadata["distcls.classes"])))
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    certificate = json.loads(metadata["distcls.certificate"])
    assert [result["batch_size"] for result in certificate["results"]] == [1, 7, 32]
    assert all(result["top1_agreement"] == 1 for result in certificate["results"])
    onnx.checker.check_model(str(path), full_check=True)
