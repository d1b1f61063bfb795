"""Training, its tools and answers on a real GPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import distcls
from distcls.data.dataset import Dataset
from distcls.models.classifier import Classifier
from distcls.training.checkpointing import states
from distcls.training.config import TrainConfig
from distcls.training.run import fit
from tests.e2e.commands import run, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trains_on_a_gpu_and_answers_the_same_on_the_cpu(
    precision: str, digits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    more = ("--precision", precision, "--epochs", "8", "--limit", "1000", "--accumulate", "2")
    said = train(digits, out, *more)
    assert precision in said
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    best = max(row["val_top1"] for row in rows if row["kind"] == "epoch")
    assert best > 0.8
    if precision == "fp16":
        state = torch.load(states(out / "last")[0], weights_only=True)
        assert state["tensors"]["scaler"]["scale"] > 0
    run("export", "--ckpt", out / "best.pth")  # parity of the GPU's checkpoint on the CPU
    model = ["--model", out / "best.onnx", "--data", digits, "--split", "val", "--json"]
    done = run("evaluate", *model)
    assert json.loads(done.stdout)["top1"] == pytest.approx(best, abs=0.02)


def test_resumes_with_the_scaler(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(digits, out, "--precision", "fp16")
    first = torch.load(states(out / "last")[0], weights_only=True)
    said = train(digits, out, "--precision", "fp16", "--resume", "auto")
    assert "resumed" in said
    again = torch.load(states(out / "last")[0], weights_only=True)
    assert again["tensors"]["scaler"] == first["tensors"]["scaler"]


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train(digits, out, "--epochs", "4", "--limit", "600")
    return out


def test_answers_and_explains_as_on_the_cpu(trained: Path, digits: Path) -> None:
    split = Dataset.open(digits).split("val")
    image = np.asarray(split.image(0))
    heats, results = [], []
    for device in ("cpu", "cuda"):
        with distcls.load(trained / "best.pth", device=device) as predictor:
            heats.append(distcls.explain(predictor, image, method="gradcam"))
            results.append(distcls.evaluate_model(predictor, digits, split="val", quiet=True))
    assert heats[1] == pytest.approx(heats[0], abs=0.05)
    assert results[1].top1 == pytest.approx(results[0].top1, abs=0.006)
    assert results[1].loss == pytest.approx(results[0].loss, rel=0.01)


def test_finds_a_learning_rate(digits: Path, tmp_path: Path) -> None:
    data = ["--data", digits, "--batch-size", "64", "--out", tmp_path / "lr.png", "--json"]
    found = json.loads(run("lr-find", *data).stdout)
    assert 1e-5 < found["suggestion"] < 1


def test_calibrates_and_merges(trained: Path, digits: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(
        digits, other, "--epochs", "4", "--limit", "600", "--model.pretrained", trained / "best.pth"
    )
    merged = tmp_path / "merged"
    run("merge", trained, other, "--out", merged)
    said = run("calibrate", merged / "best.pth", "--data", digits)
    assert "temperature" in said.stdout + said.stderr


def test_cross_validates(digits: Path, tmp_path: Path) -> None:
    folds = ["--folds", "2", "--epochs", "1", "--limit", "300", "--batch-size", "32"]
    run("cv", "--data", digits, "--out", tmp_path / "cv", *folds)
    assert (tmp_path / "cv").is_dir()


@pytest.mark.parametrize(
    "more",
    [
        (),
        # recorded anew once the backbone is freed
        ("--freeze.backbone", "1 epoch"),
        ("--precision", "fp16"),
        ("--precision", "fp32", "--augment.mixup", "0.2", "--optimizer", "sgd"),
    ],
)
def test_recorded_passes_train_the_same(
    more: tuple[str, ...], digits: Path, tmp_path: Path
) -> None:
    shared = ("--epochs", "3", "--limit", "500", "--log-every", "1", "--seed", "3", *more)
    losses, weights = [], []
    for graphs in ("true", "false"):
        out = tmp_path / graphs
        said = train(digits, out, *shared, "--cuda-graphs", graphs)
        assert ("CUDA graphs: forward and backward pass are recorded" in said) == (graphs == "true")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if row["kind"] == "step"])
        weights.append(torch.load(states(out / "last")[0], weights_only=True)["tensors"]["model"])
    assert len(losses[0]) > 30
    assert losses[0][:24] == pytest.approx(losses[1][:24], rel=0.05)
    assert np.mean(losses[0][-10:]) == pytest.approx(np.mean(losses[1][-10:]), rel=0.2)
    counts = [value for key, value in weights[0].items() if key.endswith("num_batches_tracked")]
    assert all(bool(count == counts[0]) and int(count) > 30 for count in counts)


def test_a_network_that_reads_a_value_trains_without_graphs(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forward = Classifier.forward

    def reads(self: Classifier, images: Tensor) -> Tensor:
        logits = forward(self, images)
        return logits if float(logits.detach().sum()) < 1e30 else logits + 1

    monkeypatch.setattr(Classifier, "forward", reads)
    fit(TrainConfig(data=digits, out=tmp_path / "run", epochs=2, limit=500, batch_size=32))
    assert "CUDA graphs: off; recording failed: " in capsys.readouterr().err
