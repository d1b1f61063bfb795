"""Sharded runs as a user starts them: by the template, stopped, resumed, on other processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distcls.models.checkpoint import load_tensors, open_checkpoint
from tests.e2e.commands import ROOT, run
from tests.faults.survival import (
    assert_bit_equal,
    finish,
    global_batches,
    start,
    steps_done,
    wait_for,
    weights,
    workers,
)
from tests.sharded_training import FSDP

SMALL_UNITS = {**FSDP, "FSDP_MIN_NUM_PARAMS": "20000"}


@pytest.fixture(scope="module")
def unbroken(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sharded run that nothing happened to, and which samples its steps took."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "trace").mkdir()
    trace = str(folder / "trace")
    said = finish(start(digits, folder / "run", processes=2, TRACE=trace, **SMALL_UNITS))
    assert "2 processes, fp32, contiguous, weights sharded (FSDP)" in said
    return folder / "run", folder / "trace"


@pytest.mark.slow
def test_stopped_and_resumed_it_ends_as_the_unbroken_run(
    unbroken: tuple[Path, Path], digits: Path, tmp_path: Path
) -> None:
    out, trace = tmp_path / "run", tmp_path / "trace"
    trace.mkdir()
    process = start(digits, out, processes=2, TRACE=str(trace), SLOW="0.1", **SMALL_UNITS)
    assert wait_for(lambda: steps_done(out) >= 2, process)
    workers(process)[1].send_signal(signal.SIGUSR1)  # the one that writes nothing
    _, said = process.communicate(timeout=60)
    assert "state saved" in said
    assert steps_done(out) < 14
    finish(start(digits, out, processes=2, TRACE=str(trace), **SMALL_UNITS))
    assert_bit_equal(unbroken[0], out)
    assert global_batches(trace) == global_batches(unbroken[1])


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "environment"), [(1, {}), (3, SMALL_UNITS)])
def test_another_number_of_processes_goes_on(
    processes: int,
    environment: dict[str, str],
    unbroken: tuple[Path, Path],
    digits: Path,
    tmp_path: Path,
) -> None:
    """A state of two sharded processes, resumed by one that is not and by three that are."""
    out, trace = tmp_path / "run", tmp_path / "trace"
    trace.mkdir()
    process = start(digits, out, processes=2, TRACE=str(trace), SLOW="0.1", **SMALL_UNITS)
    assert wait_for(lambda: steps_done(out) >= 2, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    finish(start(digits, out, processes=processes, TRACE=str(trace), **environment))
    assert global_batches(trace) == global_batches(unbroken[1])
    assert weights(out).keys() == weights(unbroken[0]).keys()


def accelerate(config: Path, *arguments: object) -> list[str]:
    """The command line of docs/launch.md, for two processes."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launcher, "--num_processes", "2", "-m", "distcls.train", *map(str, arguments)]


@pytest.mark.slow
def test_the_template_trains_and_its_model_opens(digits: Path, tmp_path: Path) -> None:
    template = yaml.safe_load((ROOT / "launch" / "fsdp.yaml").read_text())
    template["fsdp_config"]["fsdp_min_num_params"] = 20_000  # the network is a small one
    path, out = tmp_path / "fsdp.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(template))
    options = ["--epochs", 2, "--batch-size", 32, "--limit", 200, "--processes", 2]
    options += ["--checkpoint.save_training_state", "true", "--average.last_epochs", 2]
    done = subprocess.run(
        accelerate(path, "--data", digits, "--out", out, *options),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "weights sharded (FSDP)" in done.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scores = [row["val_top1"] for row in rows if row["kind"] == "epoch"]
    best = open_checkpoint(out / "best.pth")
    assert best.card.training["validation"]["top1"] == max(scores)
    model = ["--model", out / "best.pth", "--data", digits, "--split", "val"]
    answer = json.loads(run("evaluate", *model, "--json").stdout)
    assert answer["top1"] == pytest.approx(max(scores), abs=1e-9)
    [kept] = out.glob("mobilenet*.pth")
    assert load_tensors(kept)["state"]["tensors"]["optimizer"]["state"]
