"""Files written by version 0.2 (commit 076daf9): they are read, resumed and evaluated for good.

`tests/fixtures/v076daf9` holds three dataset directories and what was trained on them: `run` was
stopped after step 7 of 8, `whole` is the same run to its end.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distcls.commands import evaluate as evaluate_command
from distcls.commands import train as train_command
from distcls.config import parse
from distcls.models.checkpoint import open_checkpoint, read_checkpoint
from distcls.training.checkpointing import CheckpointManager, states
from distcls.training.config import TrainConfig
from distcls.training.run import train

FIXTURES = Path(__file__).parent / "fixtures" / "v076daf9"
EVALUATED: dict[tuple[str, str], dict[str, float]] = {
    ("digits", "whole"): {"count": 40, "loss": 1.941403, "top1": 0.475, "macro_f1": 0.410163},
    ("heads", "run_heads"): {"count": 6, "loss": 0.580347, "top1": 5 / 6, "exact": 2 / 3},
    ("labels", "run_labels"): {"count": 6, "loss": 0.750197, "top1": 5 / 6, "macro_f1": 0.844444},
}
"""By dataset and run directory (single-label, multi-head, multi-label): what that version's own
`distcls evaluate` printed of the val split."""


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, which is also the working folder: the old config names `digits`."""
    folder = tmp_path / "old"
    shutil.copytree(FIXTURES, folder)
    monkeypatch.chdir(folder)
    return folder


def old_config(*options: str) -> TrainConfig:
    """The config that the old run has written, read by this version, and other options."""
    arguments = ["--config", "run/config.yaml", "--quiet", *options]
    return parse(TrainConfig, arguments, prog="distcls train", about="", config=True)


def history(run_directory: Path) -> list[dict[str, str]]:
    with (run_directory / "history.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_an_old_run_goes_on_to_the_same_weights(old: Path) -> None:
    before = states(old / "run" / "last")
    train_command.main(["--config", "run/config.yaml", "--quiet", "--resume", "auto"])
    expected_card, expected = read_checkpoint(old / "whole" / "best.pth")
    card, weights = read_checkpoint(old / "run" / "best.pth")
    assert card.training["epoch"] == expected_card.training["epoch"] == 4
    assert list(weights) == list(expected)
    for name, value in expected.items():
        # not bit by bit: another processor sums in another order
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)
    after = states(old / "run" / "last")
    assert len(after) == len(before) == 1  # checkpoint.keep of the old config
    assert after[0].name.startswith("step_00000008.")
    lines = (old / "run" / "metrics.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["epoch"] * 4
    was, now = (history(folder / "run") for folder in (FIXTURES, old))
    assert len(now) == 4
    added = {"train_top1": ""}  # which that version did not measure
    assert now[:3] == [row | added for row in was]
    assert 0 < float(now[3]["train_top1"]) < 1


def test_an_old_state_keeps_its_config(old: Path) -> None:
    """It is compared key by key, and each key that was renamed with the new one."""
    with contextlib.closing(CheckpointManager(old_config("--resume", "auto"))) as manager:
        found = manager.resume()
    assert found is not None
    state, tensors = found.state, found.tensors
    assert state.data is None
    assert (state.epoch, state.step, state.epoch_step) == (3, 7, 1)
    assert state.top_models == [(pytest.approx(0.425), "simple_cnn_e1_0.42500.pth")]
    assert tensors["ema_updates"] == 7


def test_an_old_model_file_with_its_state_is_resumed(old: Path) -> None:
    source = old / "whole" / "simple_cnn_e4_0.47500.pth"
    config = old_config("--resume", str(source), "--out", "again")
    result = train(config)
    assert (result.epochs, result.best_epoch) == (4, 4)  # it was at its end
    assert result.best_score == pytest.approx(0.475)
    assert dataclasses.asdict(open_checkpoint(source).card) == dataclasses.asdict(
        open_checkpoint(old / "whole" / "best.pth").card
    )


@pytest.mark.parametrize("name", ["best.pth", "best.onnx"])
@pytest.mark.parametrize(("data", "run"), EVALUATED)
@pytest.mark.usefixtures("old")
def test_an_old_model_is_evaluated_as_it_was(
    data: str, run: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", data, "--split", "val", "--json", "--quiet"]
    evaluate_command.main(["--model", f"{run}/{name}", *options])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    for metric, value in EVALUATED[data, run].items():
        assert found[metric] == pytest.approx(value, rel=1e-3), metric
