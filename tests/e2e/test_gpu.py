"""Mixed precision with gradient scaling on a real GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distcls.training.checkpointing import states
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
