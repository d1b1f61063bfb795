"""Steps that go wrong: gradients that are not finite, and spikes of the loss.

Reading a value of a step synchronises a GPU with the host, so steps are recorded as tensors and
read in groups (`poll`).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import reduce
from torch import Tensor, nn

from distcls.errors import DistclsError
from distcls.log import fail, rank

POLL_EVERY_ON_GPU = 16
"""Steps between two readings of the non-finite flags on a GPU."""
NAMED = 8
"""Images that a message names at most."""
POLL_EVERY = 16
"""Steps between two readings of the losses, which the processes add up."""
WINDOW = 64
"""Number of previous losses that a step's is compared with."""
FEWEST = 10
"""Fewest previous losses for a comparison."""
DEVIATIONS = 10.0
"""A spike is this many standard deviations above the median, and twice the median, and ..."""
LEAST_RISE = 0.5
"""... by this much above it: for losses near zero, one hard image makes a multiple."""
TO_DEVIATION = 1.4826
"""From the median absolute deviation to a standard deviation, if losses were normal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSpike:
    """A step with a loss far above the median."""

    step: int
    loss: float
    """Mean loss of the global batch."""
    usual: float
    """Median of the steps before."""
    first: bool
    """Whether none of the last `WINDOW` steps was one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anomalies:
    """What was found in the steps that were read."""

    skipped: list[int]
    """Steps whose gradients were not finite."""
    spikes: list[LossSpike]


class NonFiniteGuard:
    """Skips the steps whose gradient norm is not finite.

    Gradients are summed over the processes before the norm is taken, so a bad one anywhere is a bad
    one everywhere, and all processes draw the same conclusion.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        device: torch.device,
        max_in_a_row: int,
        image_ids: Sequence[str],
    ) -> None:
        self._image_ids = image_ids
        self._buffers = [b for m in modules for b in m.buffers() if b.is_floating_point()]
        self._backup = [buffer.clone() for buffer in self._buffers]
        self._flags: list[_Flag] = []
        self._poll_every = 1 if device.type == "cpu" else POLL_EVERY_ON_GPU
        self._max_in_a_row = max_in_a_row
        self._in_a_row = 0

    def step(self, norm: Tensor, optimizer: AcceleratedOptimizer, *, scaled: bool) -> Tensor:
        """Step the optimiser if the gradient norm is finite; returns whether it is not, bool [].

        The fused optimisers read `found_inf` on the device, where a gradient scaler puts it; so
        nothing has to be read back. With a scaler the scaler does it. For all others the norm is
        read before the step, which synchronises with a GPU: nothing of their state may change,
        neither the momentum nor a count of steps.
        """
        bad = ~torch.isfinite(norm)
        bare = optimizer.optimizer
        if not scaled and getattr(bare, "_step_supports_amp_scaling", False):
            bare.found_inf = bad.float()
        elif not scaled and bool(bad):
            return bad
        optimizer.step()
        return bad

    def record(self, step: int, bad: Tensor, losses: Tensor, samples: Sequence[int]) -> None:
        """Record a step: `losses` [B] of its `samples` on this process, left on the device."""
        self._flags.append(_Flag(step, bad, losses, samples))

    def poll(self, *, flush: bool = False) -> list[int]:
        """The skipped ones of the steps recorded since the last reading, if they are enough of
        them or `flush` is set.

        Raises DistclsError, naming step and images, after too many in a row.
        """
        if not flush and len(self._flags) < self._poll_every:
            return []
        skipped = []
        for flag in self._flags:
            if not bool(flag.bad):
                self._in_a_row = 0
                continue
            skipped.append(flag.step)
            self._in_a_row += 1
            if rank() == 0 or self._culprits(flag):
                fail(self._message(flag) + "; skipped")
            if self._in_a_row >= self._max_in_a_row:
                raise DistclsError(
                    f"{self._in_a_row} steps in a row without a finite gradient, the last: "
                    f"{self._message(flag)}; lower --lr, or look at these images"
                )
        self._flags.clear()
        if skipped:  # the forward passes have corrupted batch norm's running statistics
            torch._foreach_copy_(self._buffers, self._backup)
        else:
            self.back_up()
        return skipped

    def back_up(self) -> None:
        """Take batch norm's running statistics as they are for those to go back to."""
        torch._foreach_copy_(self._backup, self._buffers)

    def _message(self, flag: _Flag) -> str:
        culprits = self._culprits(flag)
        names = ", ".join(culprits[:NAMED]) + (", ..." if len(culprits) > NAMED else "")
        where = f"images {names}" if culprits else "the loss of every image here is finite"
        return f"step {flag.step}: loss or gradient is not finite ({where})"

    def _culprits(self, flag: _Flag) -> list[str]:
        places = (~torch.isfinite(flag.losses)).nonzero().flatten().tolist()
        return [self._image_ids[flag.samples[place]] for place in places]


@dataclasses.dataclass(frozen=True)
class _Flag:
    step: int
    bad: Tensor
    losses: Tensor
    samples: Sequence[int]


class LossSpikeDetector:
    """Compares each step's loss with the median of the last ones.

    Whether a step is a spike depends on the losses before it alone, not on when they are read.
    """

    def __init__(self) -> None:
        self.recent = torch.empty(0, dtype=torch.float64)
        """Finite losses of the last steps that were read, on the host, [at most WINDOW]."""
        self._pending: list[tuple[int, Tensor]] = []
        self._last = -WINDOW

    def record(self, step: int, loss: Tensor) -> None:
        """Record this process's term of a step's mean loss, [], left on its device."""
        self._pending.append((step, loss))

    def poll(self, *, flush: bool = False) -> list[LossSpike]:
        """The spikes of the steps recorded since the last reading, if they are enough of them or
        `flush` is set.

        All processes have to call this after the same steps: they add up their terms.
        """
        if not self._pending or not (flush or len(self._pending) >= POLL_EVERY):
            return []
        steps = [step for step, _ in self._pending]
        losses = reduce(torch.stack([loss for _, loss in self._pending]), reduction="sum")
        self._pending.clear()
        recent = self.recent.tolist()
        spikes = []
        for step, loss in zip(steps, losses.tolist(), strict=True):
            if not math.isfinite(loss):
                continue  # handled by the guard
            usual = _usual(recent, loss)
            if usual is not None:
                first = step - self._last >= WINDOW
                spikes.append(LossSpike(step=step, loss=loss, usual=usual, first=first))
                self._last = step
            # a spike counts as well: a loss that stays high becomes the baseline
            recent = [*recent, loss][-WINDOW:]
        self.recent = torch.tensor(recent, dtype=torch.float64)
        return spikes


def _usual(recent: list[float], loss: float) -> float | None:
    """The median of the recent losses if this one is a spike among them, else None."""
    if len(recent) < FEWEST:
        return None
    median = statistics.median(recent)
    spread = TO_DEVIATION * statistics.median(abs(other - median) for other in recent)
    rise = max(DEVIATIONS * spread, median, LEAST_RISE)
    return median if loss > median + rise else None
