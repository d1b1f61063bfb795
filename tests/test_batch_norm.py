"""Batch norm's running statistics: those of the batches seen, from the first on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from distcls.data.prepare import PrepareOptions, prepare
from distcls.models.config import ModelConfig
from distcls.training.batch_norm import BatchNorm, RunningStatistics
from distcls.training.config import InputConfig
from distcls.training.engine import Engine
from distcls.training.run import train
from tests.plain import plain_config
from tests.test_engine import make_norm_engine


def batches(count: int) -> torch.Tensor:
    return torch.randn(count, 6, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 3 + 5


def test_a_plain_mean_first_and_a_moving_average_from_then_on() -> None:
    norm, images = nn.BatchNorm2d(3, momentum=0.2), batches(9)
    statistics = RunningStatistics(norm)
    expected_mean, expected_var = torch.zeros(3), torch.zeros(3)
    for number, batch in enumerate(images, 1):
        assert statistics.before_batch() == (number < 5)
        norm(batch)
        weight = max(0.2, 1 / number)
        expected_mean.lerp_(batch.mean((0, 2, 3)), weight)
        expected_var.lerp_(batch.var((0, 2, 3)), weight)
        torch.testing.assert_close(norm.running_mean, expected_mean)
        torch.testing.assert_close(norm.running_var, expected_var)
        if number == 5:
            torch.testing.assert_close(norm.running_mean, images[:5].mean((0, 1, 3, 4)))
    assert norm.momentum == 0.2


def test_a_frozen_norm_begins_when_it_first_learns() -> None:
    frozen, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    statistics = RunningStatistics(nn.Sequential(frozen, other))
    frozen.eval()
    for _ in range(20):
        statistics.before_batch()
    assert (frozen.momentum, other.momentum) == (0.1, 0.1)
    frozen.train()
    assert statistics.before_batch()
    assert (frozen.momentum, other.momentum) == (1.0, 0.1)


def test_statistics_that_were_learnt_before_count() -> None:
    norm = nn.BatchNorm2d(3)
    norm.num_batches_tracked.fill_(4)
    statistics = RunningStatistics(norm)
    statistics.before_batch()
    assert norm.momentum == 1 / 5
    norm.num_batches_tracked.fill_(10_000)
    statistics.recount()
    assert not statistics.before_batch()
    assert norm.momentum == 0.1


def test_left_alone_on_request() -> None:
    norm = nn.BatchNorm2d(3)
    assert not RunningStatistics(norm, correct_bias=False).before_batch()
    assert norm.momentum == 0.1


def norms(engine: Engine) -> dict[str, torch.Tensor]:
    return {
        name: value.clone()
        for name, value in engine._model.state_dict().items()
        if "running" in name or "tracked" in name
    }


def test_resumed_within_the_first_batches_it_goes_on_as_before(digits: Path) -> None:
    whole, first, second = (make_norm_engine(digits) for _ in range(3))
    list(whole.train_epoch(0))
    for report in first.train_epoch(0):
        if report.step == 2:
            first.poll_anomalies()
            state = first.state_dict()
            break
    second.load_state_dict(state)
    list(second.train_epoch(0, 2))
    for name, value in norms(whole).items():
        assert torch.equal(value, norms(second)[name]), name


def test_a_skipped_first_step_leaves_nothing_in_the_statistics(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a gradient scaler skips its first steps."""
    engine, plain = make_norm_engine(digits), make_norm_engine(digits)
    losses = engine._objective.losses
    calls = iter(range(100))

    def broken(logits: torch.Tensor, examples: Any) -> torch.Tensor:
        found = losses(logits, examples)
        return found * (float("nan") if next(calls) == 0 else 1.0)

    monkeypatch.setattr(engine._objective, "losses", broken)
    reports = engine.train_epoch(0)
    next(reports)
    assert all(norm.num_batches_tracked == 0 for norm in engine._model.modules() if is_norm(norm))
    next(reports)
    mean = next(norm.running_mean for norm in engine._model.modules() if is_norm(norm))
    begin, end = plain._sampler.bounds(1)
    samples = plain._data.train_samples[plain._sampler.permutation(0)[begin:end]]
    pixels = np.stack([plain._preprocess(plain._data.train.image(i)) for i in samples])
    fresh = plain._model.train()
    fresh(torch.from_numpy(pixels))
    expected = next(norm.running_mean for norm in fresh.modules() if is_norm(norm))
    torch.testing.assert_close(mean, expected / 0.1)  # of the second batch alone


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, BatchNorm)


def small_folder(folder: Path) -> Path:
    """Sixty pictures of three textures, as JPEGs of a stranger."""
    rng = np.random.default_rng(0)
    for number in range(60):
        label = number % 3
        grid = np.indices((72, 96)).sum(0) if label else rng.integers(0, 9, (72, 96))
        wave = np.sin(grid / (1.5 if label == 1 else 5) + rng.uniform(0, 6))
        noise = rng.normal(0, 20, (72, 96, 3))
        image = (120 + 80 * wave[..., None] + noise).clip(0, 255).astype(np.uint8)
        path = folder / ("noise", "fine", "wide")[label] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image)
    return folder


@pytest.mark.parametrize("correct", [True, False])
def test_a_few_steps_on_a_small_set_are_enough(correct: bool, tmp_path: Path) -> None:
    data = tmp_path / "data"
    pictures = str(small_folder(tmp_path / "pictures"))
    halves = {"val_fraction": 0.3, "test_fraction": 0.0, "split_by": "draw"}
    prepare(PrepareOptions(source=pictures, out=data, **halves))
    result = train(
        plain_config(
            data=data,
            out=tmp_path / "run",
            epochs=10,
            batch_size=16,
            input=InputConfig(size=(72, 96)),
            model=ModelConfig(pretrained=None, batch_norm_bias_correction=correct),
            quiet=True,
        )
    )
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["train_loss"] for row in rows if row["kind"] == "epoch"]
    assert losses[-1] < 0.3  # it learns in either case
    if correct:
        assert result.best_score > 0.9
    else:
        assert result.best_score < 0.5
