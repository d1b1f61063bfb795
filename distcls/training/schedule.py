"""The learning rate of each step, a pure function of the step."""

from __future__ import annotations

import dataclasses
import math

from distcls.training.config import ScheduleConfig, duration_in_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then half a cosine (Loshchilov, Hutter: SGDR, 2016, without restarts)."""

    peak: float
    total_steps: int
    warmup_steps: int
    final: float

    @classmethod
    def make(
        cls, config: ScheduleConfig, peak: float, steps_per_epoch: int, epochs: int
    ) -> Schedule:
        """The schedule of a run of `epochs` times `steps_per_epoch` steps."""
        total = steps_per_epoch * epochs
        warmup = min(total, duration_in_steps(config.warmup, steps_per_epoch, total))
        return cls(peak=peak, total_steps=total, warmup_steps=warmup, final=config.final)

    def rate(self, step: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return self.peak * (self.final + (1 - self.final) * cosine)
