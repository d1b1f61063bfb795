"""A user's mistakes: one clear line, a non-zero code, no traceback, nothing half-written."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distcls.imaging import Preprocess
from distcls.model_card import ModelCard
from distcls.models import factory
from distcls.models.checkpoint import save_checkpoint
from distcls.models.config import ModelConfig
from distcls.task import Task
from tests import tiny_dataset
from tests.e2e.commands import run


def refused(*arguments: object, module: str = "distcls.cli") -> str:
    """Run a command that must fail with code 2; returns its one line."""
    done = run(*arguments, module=module, code=2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert done.stdout == ""
    return lines[0]


def refused_training(tmp_path: Path, data: Path, *more: object) -> str:
    """A training run that must be refused before it writes anything."""
    out = tmp_path / "run"
    line = refused("--data", data, "--out", out, *more, module="distcls.train")
    assert not out.exists()
    return line


def test_missing_dataset(tmp_path: Path) -> None:
    line = refused_training(tmp_path, tmp_path / "nowhere")
    assert f"data: {tmp_path / 'nowhere'}: no such file or folder" in line


def test_a_folder_that_is_no_dataset_directory(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    assert "no images in this folder" in refused_training(tmp_path, tmp_path / "pictures")


def test_unknown_config_key_names_key_file_and_the_nearest(tmp_path: Path, digits: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("epochs: 3\noptimizer:\n  weight_decai: 0.1\n")
    line = refused_training(tmp_path, digits, "--config", config)
    assert str(config) in line
    assert "'optimizer.weight_decai'" in line
    assert "did you mean 'optimizer.weight_decay'?" in line


def test_unknown_flag_names_the_nearest(tmp_path: Path, digits: Path) -> None:
    line = refused_training(tmp_path, digits, "--augment.flop", "0.5")
    assert "'--augment.flop'" in line
    assert "'--augment.flip'" in line


def test_wrong_type_in_file_and_flag(tmp_path: Path, digits: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("epochs: many\n")
    line = refused_training(tmp_path, digits, "--config", config)
    assert f"{config}: epochs: 'many' is not valid, expected an integer" in line
    line = refused_training(tmp_path, digits, "--precision", "fp8")
    assert "precision: 'fp8' is not valid, expected one of auto, fp32, bf16, fp16" in line


def test_value_out_of_range(tmp_path: Path, digits: Path) -> None:
    line = refused_training(tmp_path, digits, "--augment.erase", "1.5")
    assert "augment.erase: 1.5 is not valid, expected a probability from 0 to 1" in line


def test_unknown_model(tmp_path: Path, digits: Path) -> None:
    line = refused_training(tmp_path, digits, "--model.name", "mobilenet_v3_smal")
    assert "did you mean 'mobilenet_v3_small'?" in line


def test_no_gpu_for_fp16(tmp_path: Path, digits: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine can do fp16")
    assert "fp16 needs a GPU" in refused_training(tmp_path, digits, "--precision", "fp16")


def edited(
    digits: Path, folder: Path, keep: list[int], splits_edited: tuple[str, ...] = ("train",)
) -> Path:
    """A copy of the digits in which the images of the other classes are gone, from training alone
    by default."""
    shutil.copytree(digits, folder)
    table = pq.read_table(folder / "manifest.parquet")
    labels, splits = table.column("label").to_pylist(), table.column("split").to_pylist()
    rows = [i for i, label in enumerate(labels) if label in keep or splits[i] not in splits_edited]
    pq.write_table(table.take(pa.array(rows)), folder / "manifest.parquet")
    tiny_dataset.sign(folder)
    return folder


@pytest.mark.row(34)
def test_class_without_training_images(tmp_path: Path, digits: Path) -> None:
    data = edited(digits, tmp_path / "data", [0, 1, 2, 3, 4, 5, 7, 8, 9])
    assert "class '6' has no training images" in refused_training(tmp_path, data)


@pytest.mark.row(34)
def test_one_class_only(tmp_path: Path, digits: Path) -> None:
    data = edited(digits, tmp_path / "data", [0], ("train", "val", "test"))
    (data / "classes.json").write_text(json.dumps(["0"]))
    tiny_dataset.sign(data)
    assert "one class only" in refused_training(tmp_path, data)


def test_batch_too_small_to_share(tmp_path: Path, digits: Path) -> None:
    line = refused_training(tmp_path, digits, "--batch-size", "4", "--accumulate", "4")
    assert "batch_size: 4 is too small" in line


@pytest.mark.row(8)
def test_output_folder_that_cannot_be_written(tmp_path: Path, digits: Path) -> None:
    # the tests may run as root, whom no permission stops: a file in the way does
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    line = refused("--data", digits, "--out", out, "--limit", "64", module="distcls.train")
    assert str(tmp_path / "file") in line
    assert "epoch" not in line


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of three classes."""
    preprocess = Preprocess(size=(32, 32))
    model = factory.build(ModelConfig(), 3, preprocess)
    architecture = {"name": "mobilenet_v3_small"}
    card = ModelCard(
        architecture=architecture, task=Task(classes=("a", "b", "c")), preprocess=preprocess
    )
    save_checkpoint(tmp_path / "best.pth", model, card)
    return tmp_path / "best.pth"


def test_classes_of_checkpoint_and_data_differ(checkpoint: Path, digits: Path) -> None:
    line = refused("evaluate", "--model", checkpoint, "--data", digits)
    assert "it predicts a, b, c, the data has 0, 1, 2" in line


class Payload:
    """A pickle that leaves a trace if it is ever executed."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.trace)!r}, 'w').close()",)


@pytest.mark.row(19)
@pytest.mark.parametrize("use", ["evaluate", "predict", "export", "pretrained", "resume"])
def test_malicious_pickle_does_not_run(use: str, tmp_path: Path, digits: Path) -> None:
    trace, evil = tmp_path / "trace", tmp_path / "evil.pth"
    torch.save({"card": {}, "model": Payload(trace)}, evil)
    if use == "pretrained":
        line = refused_training(tmp_path, digits, "--model.pretrained", evil)
    elif use == "resume":
        last = tmp_path / "run" / "last"
        last.mkdir(parents=True)
        checksum = hashlib.sha256(evil.read_bytes()).hexdigest()[:32]
        evil.rename(last / f"step_00000001.{checksum}.pth")
        arguments = ["--data", digits, "--out", tmp_path / "run", "--resume", "auto"]
        line = refused(*arguments, module="distcls.train")
    elif use == "evaluate":
        line = refused("evaluate", "--model", evil, "--data", digits)
    elif use == "predict":
        line = refused("predict", "--model", evil, digits, "--out", tmp_path / "pre.csv")
    else:
        line = refused("export", "--ckpt", evil)
    assert "none of it was executed" in line
    assert not trace.exists()


@pytest.mark.row(19)
def test_the_payload_would_leave_a_trace(tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "trace"), tmp_path / "evil.pth")
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "trace").exists()


def test_unknown_command() -> None:
    assert "did you mean 'train'?" in refused("trian")
