"""Steps whose loss stands far above those before them: noted, though the training goes on."""

from __future__ import annotations

import dataclasses
import math
import statistics

import torch
from accelerate.utils import reduce
from torch import Tensor

LOOK_EVERY = 16
"""Steps between two looks: reading a loss makes the device wait, and the processes add theirs."""
WINDOW = 64
"""Losses that a step's is held against."""
FEWEST = 10
"""Losses it takes to say what is usual."""
DEVIATIONS = 10.0
"""A spike is so many standard deviations above the median, and twice the median, and ..."""
LEAST_RISE = 0.5
"""... by so much above it: of losses near zero, one hard image makes a multiple."""
TO_DEVIATION = 1.4826
"""From the median absolute deviation to a standard deviation, if losses were normal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spike:
    """A step with a loss far above the usual."""

    step: int
    loss: float
    """Mean loss of the global batch."""
    usual: float
    """Median of the steps before."""
    first: bool
    """Whether none of the last `WINDOW` steps was one."""


class Spikes:
    """Holds each step's loss against the median of the last ones.

    A step's verdict depends on the losses before it alone, not on when somebody looks.
    """

    def __init__(self) -> None:
        self.recent = torch.empty(0, dtype=torch.float64)
        """Finite losses of the last steps that were looked at, on the host, [at most WINDOW]."""
        self._pending: list[tuple[int, Tensor]] = []
        self._last = -WINDOW

    def note(self, step: int, loss: Tensor) -> None:
        """Remember this process's part of a step's mean loss, a scalar left on its device."""
        self._pending.append((step, loss))

    def look(self, *, now: bool = False) -> list[Spike]:
        """Judge the steps since the last look, if they are many or it has to be `now`.

        All processes have to call this after the same steps: they add up their parts.
        """
        if not self._pending or not (now or len(self._pending) >= LOOK_EVERY):
            return []
        steps = [step for step, _ in self._pending]
        losses = reduce(torch.stack([loss for _, loss in self._pending]), reduction="sum")
        self._pending.clear()
        recent = self.recent.tolist()
        found = []
        for step, loss in zip(steps, losses.tolist(), strict=True):
            if not math.isfinite(loss):
                continue  # the guard's matter
            usual = _usual(recent, loss)
            if usual is not None:
                first = step - self._last >= WINDOW
                found.append(Spike(step=step, loss=loss, usual=usual, first=first))
                self._last = step
            # a spike counts as well: a loss that stays high becomes the usual one
            recent = [*recent, loss][-WINDOW:]
        self.recent = torch.tensor(recent, dtype=torch.float64)
        return found


def _usual(recent: list[float], loss: float) -> float | None:
    """The median of the recent losses if this one is a spike among them, else None."""
    if len(recent) < FEWEST:
        return None
    median = statistics.median(recent)
    spread = TO_DEVIATION * statistics.median(abs(other - median) for other in recent)
    rise = max(DEVIATIONS * spread, median, LEAST_RISE)
    return median if loss > median + rise else None
