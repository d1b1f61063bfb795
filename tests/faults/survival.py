"""Training runs that are made to suffer, and what is asked of them afterwards."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.invariance import teacher
from distcls.training.checkpointing import states
from tests.e2e import commands
from tests.e2e.commands import Process, command

OPTIONS = [
    *("--epochs", "2", "--batch-size", "32", "--limit", "200", "--log-every", "1"),
    *("--augment.crop-padding", "2", "--augment.rotate", "5", "--augment.erase", "0.3"),
    *("--ema.decay", "0.9", "--accumulate", "2", "--schedule.warmup", "30%"),
    *("--loader.workers", "3", "--resume", "auto", "--checkpoint.every-steps", "3"),
    *("--optimizer.clip-norm", "0.5", "--loss.label-smoothing", "0.1"),
    *("--augment.policy", "randaugment", "--augment.mixup", "0.2", "--augment.cutmix", "1"),
]
"""All that moves: workers, augmentation, mixing, accumulation, warm-up, averaging, states within
epochs. A teacher joins them, whose file lies beside the data."""
STEPS = 14
PLATEAU = [
    *("--epochs", "3", "--lr", "0.001", "--schedule.name", "plateau", "--schedule.patience", "1"),
    *("--schedule.factor", "0.5", "--monitor.min-delta", "1"),
    *("--ema.decay", "null", "--average.last_epochs", "2"),
]
"""Beside `OPTIONS`, 7 steps per epoch: none is better than the first, so that the rate falls after
the second; and the mean of the last two epochs' weights in place of the moving one."""
ONE_AND_TWO = [pytest.param(1, marks=pytest.mark.slow), 2]
"""Processes of a test's run; two show what one does and more."""
_started: list[Process] = []


def all_options(data: Path) -> list[object]:
    """`OPTIONS` and the teacher."""
    return [*OPTIONS, "--distill.teacher", teacher(data)]


def start(data: Path, out: Path, *more: object, processes: int = 1, **variables: str) -> Process:
    """Start a run in a process group of its own."""
    arguments = ["--data", data, "--out", out, *all_options(data), *more]
    call = command(*arguments, module="tests.faults.traced_train", processes=processes)
    environment = commands.environment(processes, **variables)
    process = commands.start(call, environment, new_session=True)
    _started.append(process)
    return process


def end_all() -> None:
    """Kill the runs that a failed test has left behind."""
    while _started:
        process = _started.pop()
        if process.returncode is None:
            kill_all(process)


def finish(process: Process, code: int = 0, timeout: float = 300) -> str:
    """Wait for its end; what it said."""
    try:
        _, said = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise
    assert process.returncode == code, f"exit code {process.returncode}\n{said}"
    return said


def kill_all(process: Process) -> None:
    """`kill -9` for the launcher and all below it; torchrun gives each worker its own group."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        for victim in [*launcher.children(recursive=True), launcher]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
    process.communicate()


def workers(process: Process) -> list[psutil.Process]:
    """The training processes below a launcher, by rank; at least one."""
    found: dict[int, psutil.Process] = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name().startswith("rank "):  # forked, so its command line is the tests' own
                found[int(child.name().split()[1])] = child
            elif any("traced_train" in word for word in child.cmdline()):
                found[int(child.environ()["RANK"])] = child
    assert found
    return [found[rank] for rank in sorted(found)]


def steps_done(out: Path) -> int:
    """Optimiser steps that the run has recorded so far."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def half_written(out: Path) -> list[Path]:
    """The states that are being written, or were when their process died."""
    return list((out / "last").glob(".step_*.part"))


def wait_for(condition: Callable[[], bool], process: Process) -> bool:
    """Wait until the condition holds (True) or the process has ended (False)."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    raise TimeoutError


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Everything that the last state of a run holds as tensors, by name."""
    tensors = torch.load(states(out / "last")[0], weights_only=True)["tensors"]
    return dict(_named_tensors(tensors, ""))


def _named_tensors(value: object, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _named_tensors(item, f"{name}/{key}")


def assert_bit_equal(one: Path, other: Path) -> None:
    """The whole state: weights, averages, moments of the optimiser, and whatever joins them."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert len(first) > 100
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def global_batches(trace: Path) -> dict[tuple[int, int], list[int]]:
    """Samples of each (epoch, step), over all processes and parts.

    A step that was taken again after a kill has to have taken the same samples each time.
    """
    taken: dict[tuple[int, int], set[int]] = defaultdict(set)
    for path in trace.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            if not line.endswith("}"):
                continue  # the kill came while it was written
            row = json.loads(line)
            taken[row["epoch"], row["step"]].update(row["samples"])
    return {key: sorted(samples) for key, samples in sorted(taken.items())}


def assert_every_sample_once_an_epoch(trace: Path, epochs: int = 2) -> None:
    """Of all steps together, each sample stands in one step of each epoch."""
    batches = global_batches(trace)
    assert len(batches) == STEPS
    for epoch in range(epochs):
        samples = [s for (e, _), batch in batches.items() if e == epoch for s in batch]
        assert len(samples) == len(set(samples)) == 200
