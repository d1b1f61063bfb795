"""torch.compile in a run: the same losses, and what it cost is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from distcls.models.checkpoint import open_checkpoint
from distcls.training.config import TrainConfig
from distcls.training.run import train


def losses(config: TrainConfig) -> list[float]:
    train(config)
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


@pytest.mark.slow
def test_a_compiled_run_takes_the_same_losses(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = TrainConfig(
        data=digits, out=tmp_path / "plain", epochs=1, limit=96, batch_size=16, log_every=1
    )
    compiled = dataclasses.replace(plain, out=tmp_path / "compiled", compile=True)
    expected = losses(plain)
    capsys.readouterr()
    assert losses(compiled)[:3] == pytest.approx(expected[:3], rel=1e-3)
    said = capsys.readouterr().err
    assert said.count("compiled ") == 1
    assert "ms before" in said
    # no trace of the compiler in the names of the weights
    assert open_checkpoint(tmp_path / "compiled" / "best.pth").card.classes
