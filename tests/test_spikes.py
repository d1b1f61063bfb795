"""Loss spikes: which losses are one, whenever they are read, and what a run writes of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distcls.training.stability import FEWEST, POLL_EVERY, WINDOW, LossSpike, LossSpikeDetector
from tests.faults.survival import finish, start

FALLING = [2.3 * 0.99**step for step in range(200)]


def judged(losses: list[float], every: int = 1, batch_size: int = 128) -> list[LossSpike]:
    """What is found when the losses are read every so many steps."""
    spikes, found = LossSpikeDetector(batch_size), []
    for step, loss in enumerate(losses, start=1):
        spikes.record(step, torch.tensor(loss))
        found += spikes.poll(flush=step % every == 0)
    return found + spikes.poll(flush=True)


def with_spike(place: int, loss: float) -> list[float]:
    return [*FALLING[:place], loss, *FALLING[place + 1 :]]


def test_a_spike_is_found_and_held_against_the_median() -> None:
    (spike,) = judged(with_spike(150, 8.0))
    assert (spike.step, spike.loss, spike.first) == (151, 8.0, True)
    assert spike.usual == pytest.approx(np.median(FALLING[150 - WINDOW : 150]), rel=1e-6)


@pytest.mark.parametrize("every", [1, 3, POLL_EVERY, 1000])
def test_when_the_losses_are_read_makes_no_difference(every: int) -> None:
    losses = with_spike(100, 9.0)
    losses[120] = 7.0
    assert judged(losses, every) == judged(losses)
    assert [spike.step for spike in judged(losses)] == [101, 121]
    assert [spike.first for spike in judged(losses)] == [True, False]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("level", [2.3, 0.3, 0.01])
def test_noise_is_no_spike(level: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert not judged((level * rng.gamma(8, 1 / 8, 300)).tolist())


def test_one_hard_image_after_a_long_training_is_no_spike() -> None:
    losses = [0.001] * 100
    losses[50] = 0.25  # 8 nats for one image of 32
    assert not judged(losses)


def test_a_few_hard_images_of_a_small_batch_are_no_spike() -> None:
    losses = [0.05] * 100
    losses[50] = 2.22
    assert not judged(losses, batch_size=16)
    assert judged(losses, batch_size=128)
    losses[50] = 8.0
    assert judged(losses, batch_size=16)


def test_numbers_that_are_none_are_left_to_the_guard() -> None:
    losses = with_spike(100, math.nan)
    losses[101] = math.inf
    losses[102] = 50.0
    assert [spike.step for spike in judged(losses)] == [103]


def test_too_few_losses_say_nothing_and_a_lasting_rise_becomes_usual() -> None:
    assert not judged([2.3] * (FEWEST - 1) + [50.0])
    found = judged([2.3] * 100 + [10.0] * 200)
    assert [spike.step for spike in found] == list(range(101, 101 + len(found)))
    assert len(found) <= WINDOW // 2 + 1
    assert [spike.step for spike in found if spike.first] == [101]


def test_a_resumed_run_judges_as_an_unbroken_one() -> None:
    losses = with_spike(100, 8.0)
    first, second = LossSpikeDetector(128), LossSpikeDetector(128)
    for step in range(95):
        first.record(step + 1, torch.tensor(losses[step]))
    assert not first.poll(flush=True)
    second.recent = first.recent
    for step in range(95, 200):
        second.record(step + 1, torch.tensor(losses[step]))
    assert second.poll(flush=True) == judged(losses)


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_notes_the_spike_of_any_rank(processes: int, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    spike = f"14:{processes - 1}"
    more = ("--limit", "576", "--epochs", "1", "--checkpoint.every-steps", "7")
    said = finish(start(digits, out, *more, processes=processes, SPIKE=spike))
    (row,) = lines(out, "spike")
    assert (row["step"], row["epoch"]) == (15, 1)
    (step,) = [line for line in lines(out, "step") if line["step"] == 15]
    assert row["loss"] == pytest.approx(step["loss"], rel=1e-6)
    assert row["loss"] > 10 * row["usual"] > 0
    (warning,) = [line for line in said.splitlines() if "recent median" in line]
    assert warning.startswith("warning: step 15: loss ")


@pytest.mark.slow
def test_an_ordinary_run_notes_none(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = finish(start(digits, out, "--limit", "640", "--checkpoint.every-steps", "50"))
    assert not lines(out, "spike")
    assert "recent median" not in said
    assert len(lines(out, "step")) == 40
