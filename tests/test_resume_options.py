"""A run with all that has a state besides weights and moments, interrupted and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distcls.training import run
from distcls.training.checkpointing import newest_intact
from distcls.training.config import MonitorConfig, OptimizerConfig, TrainConfig
from distcls.training.schedule import ScheduleConfig
from tests.plain import plain_config


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def settings(data: Path, out: Path) -> TrainConfig:
    """Every epoch after the first counts as no improvement, so the rate falls each time."""
    return plain_config(
        data=data,
        out=out,
        epochs=4,
        batch_size=32,
        limit=96,
        quiet=True,
        threads=1,
        resume="auto",
        optimizer=OptimizerConfig(name="ranger", layer_decay=0.8, head_lr_scale=2.0),
        schedule=ScheduleConfig(name="plateau", warmup="1 epoch", patience=1, factor=0.5),
        monitor=MonitorConfig(min_delta=1.0),
    )


def last_state(out: Path) -> dict[str, Any]:
    found = newest_intact(out / "last")
    assert found is not None
    return found[1]


def test_plateau_and_ranger_go_on_as_if_nothing_had_happened(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = settings(digits, tmp_path / "whole"), settings(digits, tmp_path / "parts")
    run.train(whole)
    train_steps = run.train_steps

    def two_epochs(now: run.Run) -> dict[str, float]:
        if now.state.epoch == 2:
            raise Interrupted
        return train_steps(now)

    with monkeypatch.context() as patch:
        patch.setattr(run, "train_steps", two_epochs)
        with pytest.raises(Interrupted):
            run.train(parts)
    assert last_state(parts.out)["tensors"]["schedule"] == {"falls": 1, "waited": 0}
    run.train(parts)
    one, other = last_state(whole.out), last_state(parts.out)
    rates = [row["lr"] for row in one["progress"]["history"]]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 2.5e-4])
    assert rates == [row["lr"] for row in other["progress"]["history"]]
    assert one["tensors"]["schedule"] == other["tensors"]["schedule"] == {"falls": 3, "waited": 0}
    for name, tensor in one["tensors"]["model"].items():
        assert torch.equal(tensor, other["tensors"]["model"][name]), name
    moments = one["tensors"]["optimizer"]["state"]
    assert len(moments) > 100
    for index, values in other["tensors"]["optimizer"]["state"].items():
        assert set(values) == {"step", "exp_avg", "exp_avg_sq", "lookahead_slow_buff"}
        assert all(torch.equal(value, moments[index][key]) for key, value in values.items())
