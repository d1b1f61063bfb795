"""The same global batch on one process and on two: the same losses, to floating-point noise.

In float64: training multiplies rounding errors so fast that in float32 a process of one thread and
one of two threads differ by a thousandth after ten steps.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.invariance import apart, average, teacher
from distcls.models.checkpoint import open_checkpoint
from tests.e2e.commands import run

STEPS = 10
NOISE = 1e-10
"""Largest relative difference of a step's loss; 1.4e-13 was seen."""
WEIGHT_NOISE = 1e-8
"""Largest difference of any averaged weight."""
OPTIONS = [
    *("--epochs", "1", "--batch-size", "30", "--limit", "300", "--log-every", "1"),
    *("--augment.crop-padding", "2", "--augment.rotate", "5", "--augment.erase", "0.25"),
    *("--augment.policy", "randaugment", "--augment.mixup", "0.2", "--augment.cutmix", "1"),
    *("--loss.name", "focal", "--loss.class-weights", "balanced"),
    *("--model.dropout", "0", "--ema.decay", "0.9", "--threads", "1", "--accumulate", "4"),
]


def losses(data: Path, out: Path, *more: object, processes: int) -> list[float]:
    """Train; the mean loss of each step's global batch."""
    arguments = ["--data", data, "--out", out, *OPTIONS, "--distill.teacher", teacher(data), *more]
    run(*arguments, module="benchmarks.train_float64", processes=processes)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


def train_top1(out: Path) -> float:
    """Of the one epoch, in whose mixed images a part may be right."""
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return float(last["train_top1"])


def largest_difference(one: list[float], other: list[float]) -> float:
    """Of all steps, relative."""
    assert len(one) == len(other) == STEPS
    worst = max(abs(a - b) / a for a, b in zip(one, other, strict=True))
    print(f"largest relative difference {worst:.1e}")
    return worst


@pytest.fixture(scope="module")
def alone(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    """Losses and run directory of one process, whose batch is the global batch."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    return losses(digits, out, processes=1), out


def test_two_processes_with_synchronised_norm_take_the_same_losses(
    alone: tuple[list[float], Path], digits: Path, tmp_path: Path
) -> None:
    two = losses(digits, tmp_path / "two", "--sync-batch-norm", processes=2)
    assert largest_difference(alone[0], two) < NOISE
    assert train_top1(tmp_path / "two") == pytest.approx(train_top1(alone[1]), rel=1e-6)
    # evaluated and saved is the average of the weights, which no loss tells of
    assert apart(average(alone[1]), average(tmp_path / "two")) < WEIGHT_NOISE
    # how it was trained is nothing that the model file has to know
    assert "sync_batch_norm" not in open_checkpoint(tmp_path / "two" / "best.pth").card.architecture


@pytest.mark.slow
def test_the_bound_tells_norms_of_each_process_alone(
    alone: tuple[list[float], Path], digits: Path, tmp_path: Path
) -> None:
    two = losses(digits, tmp_path / "two", processes=2)
    assert largest_difference(alone[0], two) > 1e6 * NOISE
    assert apart(average(alone[1]), average(tmp_path / "two")) > 1e3 * WEIGHT_NOISE
