"""The learning rate against torch's own schedulers, step by step, and durations."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

from distcls.config.schema import duration_in_steps
from distcls.errors import BadValue, UsageError
from distcls.training.checkpointing import TrainingState
from distcls.training.config import MonitorConfig
from distcls.training.schedule import SCHEDULES, Schedule, ScheduleConfig, make_schedule
from tests.conftest import registered_here

PEAK = 0.3


def optimizer(rate: float = PEAK) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def schedule(steps_per_epoch: int = 1, epochs: int = 60, **options: Any) -> Schedule:
    return make_schedule(ScheduleConfig(**options), PEAK, steps_per_epoch, epochs)


def rates(one: Schedule, steps: int) -> list[float]:
    return [one.rate(step) for step in range(steps)]


def torchs(kind: type[LRScheduler], steps: int, **options: Any) -> list[float]:
    """Rates of `steps` steps by a scheduler of torch."""
    one = optimizer()
    scheduler = kind(one, **options)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        one.step()
        scheduler.step()
    return found


def warmed(steps: int) -> list[float]:
    """Rates of torch's warm-up."""
    if steps < 2:
        return [PEAK] * steps
    return torchs(LinearLR, steps, start_factor=1 / steps, total_iters=steps - 1)


def same(found: list[float], expected: list[float]) -> None:
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("total", "warmup"), [(50, 5), (7, 0), (40, 1), (30, 29), (3, 2)])
@pytest.mark.parametrize("final", [0.0, 0.01, 1.0])
def test_cosine(total: int, warmup: int, final: float) -> None:
    one = schedule(1, total, warmup=f"{warmup} steps", final=final)
    after = torchs(CosineAnnealingLR, total - warmup, T_max=total - warmup, eta_min=PEAK * final)
    same(rates(one, total), warmed(warmup) + after)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(("period", "multiplier"), [(10, 1), (4, 2), (1, 1), (3, 3), (200, 1)])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_restarts(warmup: int, period: int, multiplier: int, final: float) -> None:
    texts = {"warmup": f"{warmup} steps", "period": f"{period} steps"}
    one = schedule(name="restarts", multiplier=multiplier, final=final, **texts)
    options = {"T_0": period, "T_mult": multiplier, "eta_min": PEAK * final}
    after = torchs(CosineAnnealingWarmRestarts, 60 - warmup, **options)
    same(rates(one, 60), warmed(warmup) + after)


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(("every", "factor"), [(7, 0.5), (1, 0.9), (100, 0.1)])
def test_step(warmup: int, every: int, factor: float) -> None:
    texts = {"warmup": f"{warmup} steps", "every": f"{every} steps"}
    one = schedule(name="step", factor=factor, **texts)
    # the falls are counted from the start of the run, whatever the warm-up
    after = torchs(StepLR, 60, step_size=every, gamma=factor)[warmup:]
    same(rates(one, 60), warmed(warmup) + after)


@pytest.mark.parametrize("milestones", [(30, 45), (45, 30), (1,), (59, 60, 99), (10, 10)])
def test_multistep(milestones: tuple[int, ...]) -> None:
    texts = tuple(f"{milestone} steps" for milestone in milestones)
    one = schedule(name="multistep", warmup="0%", milestones=texts, factor=0.2)
    same(rates(one, 60), torchs(MultiStepLR, 60, milestones=list(milestones), gamma=0.2))


@pytest.mark.parametrize("rise", [0.0, 0.2, 0.3, 0.5])
@pytest.mark.parametrize(("start", "final"), [(0.04, 4e-6), (0.5, 0.1), (1.0, 1.0)])
def test_onecycle(rise: float, start: float, final: float) -> None:
    one = schedule(name="onecycle", warmup=f"{rise:.0%}", start=start, final=final)
    options = {"max_lr": PEAK, "pct_start": rise, "div_factor": 1 / start}
    options |= {"final_div_factor": start / final, "cycle_momentum": False}
    # torch raises when it is stepped past the end, so the last of its rates is taken by hand
    one_by_torch = optimizer()
    scheduler = OneCycleLR(one_by_torch, total_steps=60, **options)
    expected = [scheduler.get_last_lr()[0]]
    for _ in range(59):
        one_by_torch.step()
        scheduler.step()
        expected.append(scheduler.get_last_lr()[0])
    same(rates(one, 60), expected)


def test_onecycle_as_usual_is_torchs() -> None:
    one = schedule(name="onecycle")
    reference = OneCycleLR(optimizer(), max_lr=PEAK, total_steps=60, cycle_momentum=False)
    assert one.rate(0) == pytest.approx(reference.get_last_lr()[0])
    assert max(rates(one, 60)) == one.rate(17) == PEAK  # 30 % of 60 steps
    assert one.rate(59) == one.rate(1000) == pytest.approx(PEAK / 25 / 1e4)


def test_a_onecycle_of_one_step_of_warmup() -> None:
    assert rates(schedule(1, 3, name="onecycle", warmup="1 step"), 2)[0] == PEAK
    assert schedule(1, 1, name="onecycle", warmup="1 step").rate(0) == PEAK


def test_constant() -> None:
    one = schedule(name="constant", warmup="6 steps")
    same(rates(one, 60), warmed(6) + [PEAK] * 54)


SCORES = [0.1, 0.3, 0.2, 0.3, 0.25, 0.4, math.nan, 0.4, 0.3, 0.35, 0.2, 0.39, 0.5, 0.1, 0.1, 0.1]


def judge(
    one: Schedule, scores: list[float], monitor: MonitorConfig
) -> tuple[list[float], list[bool]]:
    """The rate after each evaluation, one a step, and whether it fell."""
    progress, found, falls = TrainingState(), [], []
    for epoch, score in enumerate(scores, start=1):
        progress.epoch = epoch
        falls.append(one.after_evaluation(epoch, progress.judge(score, monitor)))
        found.append(one.rate(epoch))
    return found, falls


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("min_delta", [0.0, 0.05])
@pytest.mark.parametrize(("metric", "mode"), [("top1", "max"), ("loss", "min")])
@pytest.mark.parametrize("final", [0.0, 0.2])
def test_plateau(patience: int, min_delta: float, metric: str, mode: Any, final: float) -> None:
    sign = 1 if mode == "max" else -1
    scores = [sign * score for score in SCORES]
    one = schedule(name="plateau", warmup="0%", patience=patience, factor=0.5, final=final)
    found, falls = judge(one, scores, MonitorConfig(metric=metric, min_delta=min_delta))
    reference = optimizer()
    scheduler = ReduceLROnPlateau(
        reference,
        mode=mode,
        factor=0.5,
        patience=patience - 1,  # torch falls after one more than that
        threshold=min_delta,
        threshold_mode="abs",
        min_lr=PEAK * final,
    )
    expected = []
    for score in scores:
        scheduler.step(score)
        expected.append(reference.param_groups[0]["lr"])
    same(found, expected)
    before = [PEAK, *expected[:-1]]
    assert falls == [new < old for old, new in zip(before, expected, strict=True)]
    assert any(falls)


def test_plateau_falls_on_the_epoch_it_must() -> None:
    """Best in epoch 2; two epochs without improvement, 3 and 4: epoch 5 takes the lower rate."""
    one = schedule(name="plateau", warmup="0%", patience=2)
    found, falls = judge(one, [0.5, 0.6, 0.6, 0.55, 0.5, 0.5], MonitorConfig())
    assert falls == [False, False, False, True, False, True]
    same(found, [PEAK, PEAK, PEAK, PEAK / 10, PEAK / 10, PEAK / 100])


def test_plateau_does_not_count_the_warmup() -> None:
    one = schedule(name="plateau", warmup="4 steps", patience=1)
    _, falls = judge(one, [0.5] * 6, MonitorConfig())
    assert falls == [False, False, False, False, True, True]


def test_plateau_goes_on_from_its_state() -> None:
    monitor = MonitorConfig()
    whole = schedule(name="plateau", warmup="0%", patience=3)
    expected = judge(whole, [0.5] * 12, monitor)[0]
    for cut in range(1, 12):
        first = schedule(name="plateau", warmup="0%", patience=3)
        judge(first, [0.5] * cut, monitor)
        second = schedule(name="plateau", warmup="0%", patience=3)
        second.load_state_dict(first.state_dict())
        for epoch in range(cut, 12):
            second.after_evaluation(epoch + 1, improved=False)
        assert second.rate(12) == expected[-1] < PEAK
        assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("name", sorted(set(SCHEDULES.names()) - {"plateau"}))
def test_all_others_are_functions_of_the_step(name: str) -> None:
    one = schedule(name=name)
    before = rates(one, 60)
    assert one.state_dict() == {}
    assert not any(one.after_evaluation(step, improved=False) for step in range(60))
    one.load_state_dict({})
    assert rates(one, 60) == before


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_as_usual_no_rate_is_above_the_peak_or_below_zero(name: str) -> None:
    found = rates(schedule(7, 9, name=name), 80)  # some steps beyond the end too
    assert max(found) == pytest.approx(PEAK)
    assert min(found) >= 0
    assert found[0] < PEAK


def test_options_are_fields() -> None:
    """Each option of a schedule is a field, and each field that may be null is an option."""
    fields = {f.name for f in dataclasses.fields(ScheduleConfig) if f.default is None}
    assert {key for name in SCHEDULES.names() for key in SCHEDULES.find(name).defaults} == fields


def test_the_shape_of_a_run() -> None:
    config = ScheduleConfig(warmup="10%", final=0.02)
    one = make_schedule(config, peak=1e-3, steps_per_epoch=20, epochs=5)
    assert (one.total_steps, one.warmup_steps) == (100, 10)
    assert one.rate(0) == pytest.approx(1e-4)
    assert one.rate(9) == one.rate(10) == pytest.approx(1e-3)
    assert one.rate(55) == pytest.approx(1e-3 * 0.51)
    assert one.rate(100) == one.rate(1000) == pytest.approx(2e-5)


def test_durations_in_epochs_and_percent() -> None:
    one = schedule(10, 6, name="multistep", warmup="0%", milestones=("2 epochs", "50%"))
    same(rates(one, 60), [PEAK] * 20 + [PEAK * 0.1] * 10 + [PEAK * 0.01] * 30)
    one = schedule(10, 6, name="step", warmup="0%", every="1.5 epochs", factor=0.5)
    assert [one.rate(step) / PEAK for step in (14, 15, 30, 45)] == [1, 0.5, 0.25, 0.125]


def test_a_duration_of_less_than_a_step_is_one() -> None:
    assert schedule(1, 2, name="step", every="1%", warmup="0%").rate(1) == pytest.approx(PEAK / 10)


def test_a_warmup_longer_than_the_run_is_cut() -> None:
    config = ScheduleConfig(warmup="9 epochs")
    one = make_schedule(config, peak=1.0, steps_per_epoch=4, epochs=2)
    assert one.warmup_steps == 8
    assert [one.rate(step) for step in (0, 7)] == [1 / 8, 1.0]


@pytest.mark.parametrize("number", [1, np.float32(0.5), np.float64(0.5), torch.tensor(0.5)])
def test_numbers_that_a_schedule_of_ones_own_may_return(number: Any) -> None:
    with registered_here():
        SCHEDULES.register("own")(lambda step, total: number)
        made = schedule(2, 2, name="own")
        assert (made.checked_rate(3), type(made.checked_rate(3))) == (PEAK * float(number), float)

        class Own(Schedule):
            def rate(self, step: int) -> float:
                return number if step < 3 else -1.0

        SCHEDULES.register("of-a-class")(Own)
        with pytest.raises(UsageError, match=r"Own\.rate returned -1\.0 for step 3, expected a"):
            schedule(2, 2, name="of-a-class")


@pytest.mark.parametrize(
    ("options", "field", "why"),
    [
        ({"patience": 3}, "patience", "cosine does not read it"),
        ({"name": "cosine", "every": "3 epochs"}, "every", r"it reads warmup, final\)"),
        ({"name": "restarts", "milestones": ("50%",)}, "milestones", "restarts does not read it"),
        ({"name": "step", "final": 0.1}, "final", "step does not read it"),
        ({"name": "multistep", "every": "3 epochs"}, "every", "milestones"),
        ({"name": "plateau", "period": "3 epochs"}, "period", "plateau does not read it"),
        ({"name": "onecycle", "factor": 0.5}, "factor", "onecycle does not read it"),
        ({"name": "constant", "final": 0.5}, "final", "constant does not read it"),
        ({"name": "cosin"}, "name", "did you mean 'cosine'"),
        ({"name": "poly"}, "name", "choices: cosine, restarts, step"),
        ({"name": "restarts", "period": "0 epochs"}, "period", "above 0"),
        ({"name": "restarts", "multiplier": 0}, "multiplier", "at least 1"),
        ({"name": "step", "every": "often"}, "every", "5%"),
        ({"name": "step", "factor": 1.0}, "factor", "between 0 and 1"),
        ({"name": "multistep", "milestones": ()}, "milestones", "at least one"),
        ({"name": "multistep", "milestones": ("5%", "5")}, "milestones", "2 epochs"),
        ({"name": "plateau", "patience": 0}, "patience", "at least 1"),
        ({"name": "onecycle", "start": 0.0}, "start", "above 0"),
        ({"final": 1.5}, "final", "from 0 to 1"),
        ({"warmup": "200%"}, "warmup", "a duration of at most 100%"),
        ({"name": "step", "every": "101 %"}, "every", "a duration of at most 100%"),
        ({"warmup": "9" * 400 + " epochs"}, "warmup", "at most 1,000,000,000 epochs"),
    ],
)
def test_what_is_refused(options: dict[str, Any], field: str, why: str) -> None:
    with pytest.raises(BadValue, match=why) as caught:
        ScheduleConfig(**options)
    assert caught.value.field == field


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
