"""The real training loop on real digits, on one process and on two."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from distcls.training.checkpointing import states
from tests.e2e.commands import ROOT, SMALL, command, run, train

FILES = ["best.pth", "config.yaml", "curves.png", "history.csv", "last", "metrics.jsonl", "named"]
"""What a run leaves; `named` is the best model under a name that tells its epoch and score."""
NAMED = re.compile(r"simple_cnn_e\d+_\d\.\d{5}\.pth")
NETWORK = ("--model.name", "simple_cnn")
"""Nothing here depends on it, and much larger ones train in tests/faults/."""


def files_of(run_directory: Path) -> list[str]:
    """Names in a run directory, sorted."""
    return sorted(NAMED.sub("named", path.name) for path in run_directory.iterdir())


def weights(run_directory: Path) -> dict[str, torch.Tensor]:
    """The state dict of a run's last state: what training itself moved."""
    state = torch.load(states(run_directory / "last")[0], weights_only=True)
    average = {f"ema.{name}": value for name, value in state["tensors"]["ema"].items()}
    return {**state["tensors"]["model"], **average}


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def history(run_directory: Path) -> list[dict[str, float]]:
    with (run_directory / "history.csv").open() as handle:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(handle)]


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs on one process."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(digits, out, *NETWORK)
    return out


def test_a_run_leaves_its_files_and_learns(trained: Path) -> None:
    assert files_of(trained) == FILES
    rows = history(trained)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "epoch"] == [7, 14]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [2, 4, 6, 8, 10, 12, 14]


def test_the_written_config_reproduces_the_run(trained: Path, digits: Path, tmp_path: Path) -> None:
    run("--config", trained / "config.yaml", "--out", tmp_path / "again", module="distcls.train")
    assert_same_weights(trained, tmp_path / "again")
    again = history(tmp_path / "again")
    for row, other in zip(history(trained), again, strict=True):
        assert row["val_loss"] == other["val_loss"]


@pytest.mark.slow
def test_the_number_of_decoding_threads_changes_nothing(
    trained: Path, digits: Path, tmp_path: Path
) -> None:
    train(digits, tmp_path / "run", *NETWORK, "--loader.workers", "5", "--loader.prefetch", "1")
    assert_same_weights(trained, tmp_path / "run")


@pytest.mark.slow
def test_another_seed_is_another_run(trained: Path, digits: Path, tmp_path: Path) -> None:
    train(digits, tmp_path / "run", *NETWORK, "--seed", "1")
    with pytest.raises(AssertionError):
        assert_same_weights(trained, tmp_path / "run")


def test_killed_and_resumed_ends_with_the_same_weights(
    trained: Path, digits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    call = command("--data", digits, "--out", out, *SMALL, *NETWORK, module="distcls.train")
    with subprocess.Popen(call, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not states(out / "last"):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert len(history(out)) == 1
    said = train(digits, out, *NETWORK, "--resume", "auto")
    assert "resumed" in said
    assert_same_weights(trained, out)
    assert [row["epoch"] for row in history(out)] == [1, 2]
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert len([step for step in steps if step == 14]) == 2  # a step line and an epoch line


def test_a_resumed_run_keeps_its_config(trained: Path, digits: Path) -> None:
    said = train(digits, trained, *NETWORK, "--resume", "auto", "--lr", "0.5", code=2)
    assert "lr: 0.5 given" in said
    assert "Traceback" not in said


def test_a_run_is_not_overwritten(trained: Path, digits: Path) -> None:
    before = (trained / "best.pth").stat().st_mtime_ns
    assert "already contains a run" in train(digits, trained, code=2)
    assert (trained / "best.pth").stat().st_mtime_ns == before


def test_patience_stops_early(digits: Path, tmp_path: Path) -> None:
    # no epoch can improve by more than 1, so the second one is the first without improvement
    more = ("--monitor.patience", "1", "--monitor.min-delta", "1", "--epochs", "9")
    said = train(digits, tmp_path / "run", *NETWORK, *more)
    assert "stopped early" in said
    assert len(history(tmp_path / "run")) == 2


def test_two_processes_train_together(digits: Path, tmp_path: Path) -> None:
    more = ("--processes", "2", "--monitor.patience", "1", "--monitor.min-delta", "1", *NETWORK)
    said = train(digits, tmp_path / "run", *more, "--epochs", "5", "--accumulate", "2", processes=2)
    assert "2 processes" in said
    assert said.count("epoch 1/5") == 1  # one of them speaks
    assert files_of(tmp_path / "run") == FILES
    rows = history(tmp_path / "run")
    assert len(rows) == 2  # both stopped early, at the same epoch
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert [row["step"] for row in rows] == [7, 14]  # steps count global batches


def test_two_processes_evaluate_as_one(trained: Path, digits: Path, tmp_path: Path) -> None:
    checkpoint = ["--model", trained / "best.pth", "--data", digits, "--split", "test", "--json"]
    answers = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        more = ("--out", out, "--batch-size", "50")
        done = run(*checkpoint, *more, module="distcls.evaluate", processes=processes)
        answers.append(json.loads(done.stdout))
    one, two = ((tmp_path / name / "confusion.csv").read_bytes() for name in "12")
    assert one == two
    assert answers[0]["count"] == answers[1]["count"] == 359
    assert answers[0]["top1"] == answers[1]["top1"]


@pytest.mark.slow
def test_fewer_processes_than_asked_for_is_an_error(digits: Path, tmp_path: Path) -> None:
    said = train(digits, tmp_path / "run", "--processes", "2", code=2)
    assert "2 requested, 1 running" in said
    call = command("--data", digits, "--out", tmp_path / "run", module="distcls.train")
    launcher = [call[0], "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    fixed = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*launcher, *fixed, *call[1:]], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode != 0
    assert "told to start several processes but started one" in done.stderr
    assert not (tmp_path / "run").exists()
