"""The learning rate against torch's own schedulers, and durations."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from distcls.errors import BadValue
from distcls.training.config import ScheduleConfig, duration_in_steps
from distcls.training.schedule import Schedule


def optimizer(rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def reference(peak: float, total: int, warmup: int, final: float) -> list[float]:
    """Rates of `total` steps by torch: LinearLR up to the peak, then CosineAnnealingLR."""
    rates = []
    if warmup > 1:
        one = optimizer(peak)
        linear = LinearLR(one, start_factor=1 / warmup, total_iters=warmup - 1)
        for _ in range(warmup):
            rates.append(linear.get_last_lr()[0])
            one.step()
            linear.step()
    elif warmup == 1:
        rates.append(peak)
    other = optimizer(peak)
    cosine = CosineAnnealingLR(other, T_max=total - warmup, eta_min=peak * final)
    for _ in range(total - warmup):
        rates.append(cosine.get_last_lr()[0])
        other.step()
        cosine.step()
    return rates


@pytest.mark.parametrize(("total", "warmup"), [(50, 5), (7, 0), (40, 1), (30, 29), (3, 2)])
@pytest.mark.parametrize("final", [0.0, 0.01, 1.0])
def test_every_step_equals_torchs_schedulers(total: int, warmup: int, final: float) -> None:
    schedule = Schedule(peak=0.3, total_steps=total, warmup_steps=warmup, final=final)
    rates = [schedule.rate(step) for step in range(total)]
    assert rates == pytest.approx(reference(0.3, total, warmup, final), rel=1e-9, abs=1e-12)


def test_the_shape_of_a_run() -> None:
    config = ScheduleConfig(warmup="10%", final=0.02)
    schedule = Schedule.make(config, peak=1e-3, steps_per_epoch=20, epochs=5)
    assert (schedule.total_steps, schedule.warmup_steps) == (100, 10)
    assert schedule.rate(0) == pytest.approx(1e-4)
    assert schedule.rate(9) == schedule.rate(10) == pytest.approx(1e-3)
    assert schedule.rate(55) == pytest.approx(1e-3 * 0.51)
    assert schedule.rate(100) == schedule.rate(1000) == pytest.approx(2e-5)


def test_a_warmup_longer_than_the_run_is_cut() -> None:
    config = ScheduleConfig(warmup="9 epochs")
    schedule = Schedule.make(config, peak=1.0, steps_per_epoch=4, epochs=2)
    assert schedule.warmup_steps == 8
    assert [schedule.rate(step) for step in (0, 7)] == [1 / 8, 1.0]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("5%", 50),
        ("2.5 %", 25),
        ("0%", 0),
        ("100 steps", 100),
        ("1 step", 1),
        ("2 epochs", 80),
        ("1 epoch", 40),
        ("0.5epochs", 20),
        (" 3 steps ", 3),
    ],
)
def test_durations(text: str, steps: int) -> None:
    assert duration_in_steps(text, steps_per_epoch=40, total_steps=1000) == steps
    ScheduleConfig(warmup=text)


@pytest.mark.parametrize("text", ["", "5", "five steps", "-1 steps", "5 % of it", "1e2 steps"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(BadValue, match="5%"):
        duration_in_steps(text, steps_per_epoch=40, total_steps=1000)
    with pytest.raises(BadValue, match="warmup"):
        ScheduleConfig(warmup=text)
