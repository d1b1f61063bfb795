"""Top-1 of training: what counts as right, and that an epoch counts every image once."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from distcls.evaluation.metrics import metric_state
from distcls.models.config import ModelConfig
from distcls.task import Head, Task
from distcls.training import run
from distcls.training.config import CheckpointConfig, TrainConfig
from distcls.training.losses import multi_hot, right_decisions
from distcls.training.mixup import Mixed
from tests.plain import plain_config

TASKS = {
    "single": Task(classes=("a", "b", "c")),
    "heads": Task.of_heads([Head("x", ("a", "b")), Head("y", ("c", "d", "e"))]),
    "labels": Task(kind="multi_label", classes=("a", "b", "c", "d")),
}
SIZES = {"single": (3,), "heads": (2, 3), "labels": (2, 2, 2, 2)}
COUNT = 41


def drawn(name: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of random images."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(COUNT, len(TASKS[name].classes))).astype(np.float32)
    labels = np.stack([rng.integers(0, size, COUNT) for size in SIZES[name]], axis=1)
    shaped = labels[:, 0] if name == "single" else labels
    return torch.from_numpy(logits), torch.from_numpy(shaped)


@pytest.mark.parametrize("name", TASKS)
def test_it_is_the_top1_of_an_evaluation(name: str) -> None:
    logits, labels = drawn(name)
    state = metric_state(TASKS[name])
    state.update(logits.numpy(), labels.numpy())
    right = right_decisions(logits, labels, TASKS[name])
    assert right.shape == (COUNT,)
    decisions = COUNT * len(SIZES[name])
    assert float(right.sum()) / decisions == pytest.approx(state.compute().top1, rel=1e-12)


@pytest.mark.parametrize("name", TASKS)
def test_a_mixed_image_counts_by_the_weights_of_both_labels(name: str) -> None:
    logits, labels = drawn(name)
    task = TASKS[name]
    partner = torch.arange(COUNT).flip(0)
    own = torch.rand(COUNT, generator=torch.Generator().manual_seed(0))
    targets = Mixed(torch.empty(0), own, partner).soft_labels(multi_hot(labels, task))
    alone, other = (right_decisions(logits, each, task) for each in (labels, labels[partner]))
    expected = own * alone + (1 - own) * other
    torch.testing.assert_close(right_decisions(logits, targets, task), expected)


class Interrupted(BaseException):
    """Stands for whatever ends a process."""


def settings(data: Path, out: Path) -> TrainConfig:
    return plain_config(
        data=data,
        out=out,
        epochs=2,
        batch_size=32,
        limit=96,
        model=ModelConfig(name="simple_cnn"),
        quiet=True,
        threads=1,
        resume="auto",
        checkpoint=CheckpointConfig(every_steps=1),
    )


def figures(out: Path) -> list[tuple[str, str]]:
    with (out / "history.csv").open(newline="") as handle:
        return [(row["train_loss"], row["train_top1"]) for row in csv.DictReader(handle)]


def test_a_run_resumed_within_an_epoch_counts_all_of_its_images(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = settings(digits, tmp_path / "whole"), settings(digits, tmp_path / "parts")
    run.train(whole)
    save = run._save_or_stop

    def interrupted(now: run.Run, sums: torch.Tensor) -> None:
        save(now, sums)
        if now.state.step == 5:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(run, "_save_or_stop", interrupted)
        with pytest.raises(Interrupted):
            run.train(parts)
    run.train(parts)
    assert figures(parts.out) == figures(whole.out)
    for _, top1 in figures(whole.out):
        assert float(top1) * 96 == pytest.approx(round(float(top1) * 96), abs=1e-9)
        assert 0 < float(top1) < 1
