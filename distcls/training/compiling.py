"""`torch.compile` for the training step, with what it costs and saves measured and said."""

from __future__ import annotations

import statistics
import time

import torch
from torch._inductor.exc import InductorError

from distcls.errors import DistclsError
from distcls.log import say
from distcls.training.engine import Engine
from distcls.training.memory import try_pass, unchanged

PASSES = 5
"""Passes timed before and after; their median counts."""


def compile_step(engine: Engine) -> None:
    """Compile the model in place, and say how long that took and how long a step takes now.

    The passes that are timed see random pixels and leave no trace, so a run that is resumed
    computes as one that never stopped. Raises DistclsError if there is no compiler.
    """
    with unchanged(engine):
        before = _seconds(engine)
        engine.model.compile()
        began = time.perf_counter()
        try:
            _pass(engine)
        except InductorError as error:
            reason = str(error).strip().splitlines()[0]
            raise DistclsError(f"compile: torch.compile failed: {reason}") from error
        cost = time.perf_counter() - began
        after = _seconds(engine)
    say(f"compiled   {cost:.0f} s; {_verdict(before, after, cost)}")


def _verdict(before: float, after: float, cost: float) -> str:
    passes = f"forward and backward {1000 * before:.0f} ms before, {1000 * after:.0f} ms now"
    if after >= before:
        return f"{passes}: it does not pay here, leave --compile off"
    return f"{passes}: it pays after {cost / (before - after):,.0f} steps"


def _seconds(engine: Engine) -> float:
    """Median time of a pass over the largest part of a step, after one that warms up."""
    times = []
    for _ in range(1 + PASSES):
        began = time.perf_counter()
        _pass(engine)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _pass(engine: Engine) -> None:
    try_pass(engine, engine.micro_batch)
    if engine.accelerator.device.type == "cuda":
        torch.cuda.synchronize(engine.accelerator.device)
