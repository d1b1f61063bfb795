"""Figures in an experiment tracker: those of metrics.jsonl, once each, also after a resume."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from distcls.errors import UsageError
from distcls.training.config import TrainConfig
from distcls.training.logging import require_tracker
from distcls.training.run import train


def test_tensorboard_shows_what_metrics_jsonl_holds(digits: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = TrainConfig(
        data=digits,
        out=tmp_path / "run",
        epochs=2,
        limit=60,
        batch_size=20,
        log_every=1,
        tracker="tensorboard",
        quiet=True,
    )
    train(config)
    seen = events.EventAccumulator(str(config.out / "distcls"))
    seen.Reload()
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    for kind, name in (("step", "loss"), ("step", "lr"), ("epoch", "val_top1")):
        shown = [(event.step, event.value) for event in seen.Scalars(f"{kind}/{name}")]
        own = [(line["step"], line[name]) for line in lines if line["kind"] == kind]
        assert len(own) == (6 if kind == "step" else 2)
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in own]


@pytest.mark.parametrize(
    ("name", "message"),
    [("tensorbord", "did you mean 'tensorboard'"), ("comet_ml", "comet_ml is not installed")],
)
def test_a_tracker_that_cannot_be_is_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        require_tracker(name)
    config = TrainConfig(data=Path("digits"), out=tmp_path / "run")
    with pytest.raises(UsageError, match=message):
        train(dataclasses.replace(config, tracker=name))
    assert not (tmp_path / "run").exists()
