"""Optimisers that skip a step, stop and go on: nothing of it may show in the weights."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from distcls.errors import UsageError
from distcls.training.checkpointing import _copied
from distcls.training.config import OPTIMIZERS, OptimizerConfig
from distcls.training.optim import require_usable
from distcls.training.stability import NonFiniteGuard
from tests.optimizing import OURS, equal, gradients, made, network, train

ours = pytest.mark.parametrize("config", OURS, ids=lambda config: config.name)


class Prepared:
    """What accelerate makes of an optimiser, as far as the guard looks at it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


def guarded(model: nn.Module, one: torch.optim.Optimizer, steps: range, bad: set[int]) -> None:
    """Train with a guard; the gradients of `bad` steps are not finite."""
    guard: Any = NonFiniteGuard([model], torch.device("cpu"), 9, [])
    for step in steps:
        for gradient in gradients(model, step):
            if step in bad:
                gradient.fill_(math.nan)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        before = copy.deepcopy(model)
        skipped = guard.step(norm, Prepared(one), scaled=False)
        assert bool(skipped) == (step in bad)
        assert equal(model, before) == (step in bad)


@ours
def test_a_skipped_step_leaves_no_trace(config: OptimizerConfig) -> None:
    """Nor does it in the momentum, the counts of steps, and where it is the very first."""
    one, other = network(), network()
    guarded(one, made(config, one), range(16), bad={0, 1, 5, 11})
    reference = made(config, other)
    for step in sorted(set(range(16)) - {0, 1, 5, 11}):
        train(other, reference, range(step, step + 1))
    assert equal(one, other)


@pytest.mark.parametrize(("device", "polls"), [("cpu", 1), ("cuda", 16)])
def test_flags_are_read_one_by_one_on_a_cpu_and_together_on_a_gpu(device: str, polls: int) -> None:
    """Where reading a flag is cheap at once; and all that wait before a state is saved."""
    norm = nn.BatchNorm1d(3)
    guard: Any = NonFiniteGuard([norm], torch.device(device), 99, ["a.png", "b.png"])
    good, bad = torch.tensor(False), torch.tensor(True)
    losses = torch.tensor([1.0, math.nan])
    found = []
    for step in range(1, 17):
        guard.record(step, bad if step == 3 else good, losses, [0, 1])
        assert isinstance(norm.running_mean, torch.Tensor)
        norm.running_mean.add_(1)
        found.append(guard.poll())
        if step == 3:
            seen = float(norm.running_mean[0])
    assert [bool(each) for each in found] == [number == max(3, polls) for number in range(1, 17)]
    assert seen == (2 if device == "cpu" else 3)  # statistics of a skipped step are not kept
    guard.record(17, bad, losses, [0, 1])
    assert guard.poll(flush=True) == [17]
    assert guard.poll(flush=True) == []


def saved_and_loaded(content: Any) -> Any:
    """Through the state's own copy and a file, as a resumed run reads it."""
    buffer = io.BytesIO()
    torch.save(_copied(content), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resumes_exactly(config: OptimizerConfig, cut: int = 8, steps: int = 15) -> bool:
    whole = network()
    train(whole, made(config, whole), range(steps))
    first = network()
    one = made(config, first)
    train(first, one, range(cut))
    saved = saved_and_loaded({"model": first.state_dict(), "optimizer": one.state_dict()})
    second = network()
    other = made(config, second)
    second.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(second, other, range(cut, steps))
    return equal(second, whole) and not equal(second, network())


@ours
@pytest.mark.parametrize("cut", [1, 6, 8])
def test_a_resumed_run_ends_with_the_same_weights(config: OptimizerConfig, cut: int) -> None:
    assert resumes_exactly(config, cut)


def usable_from_timm() -> Iterator[str]:
    from timm.optim import list_optimizers

    for name in list_optimizers():
        try:
            require_usable(OptimizerConfig(name=f"timm:{name}"))
        except UsageError:
            continue
        yield name


def test_all_of_timms_that_are_not_refused_resume_exactly() -> None:
    names = list(usable_from_timm())
    assert len(names) > 50
    inexact = [name for name in names if not resumes_exactly(OptimizerConfig(name=f"timm:{name}"))]
    assert not inexact


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_groups_carry_their_scale_through_a_state(name: str) -> None:
    config = OptimizerConfig(name=name, layer_decay=0.5, head_lr_scale=3.0)
    model = network()
    one = made(config, model)
    train(model, one, range(2))
    other = made(config, network())
    other.load_state_dict(saved_and_loaded(one.state_dict()))
    scales = [group["lr_scale"] for group in other.param_groups]
    assert scales == [group["lr_scale"] for group in one.param_groups]
    assert set(scales) == {0.5, 3.0}


def test_frozen_parameters_stay_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    one = made(OptimizerConfig(), model)
    assert sum(len(group["params"]) for group in one.param_groups) == 4
    train(model, one, range(3))
    assert torch.equal(model[0].weight, network()[0].weight)


def test_the_state_of_another_ranger_is_refused() -> None:
    """distcls 0.1.0 had a Lookahead of its own, whose slow weights were called `slow`."""
    model = network()
    one = made(OptimizerConfig(name="ranger"), model)
    train(model, one, range(7))
    saved = one.state_dict()
    for values in saved["state"].values():
        values["slow"] = values.pop("lookahead_slow_buff")
    with pytest.raises(UsageError, match=r"the ranger of distcls 0\.1\.0"):
        made(OptimizerConfig(name="ranger"), network()).load_state_dict(saved)
