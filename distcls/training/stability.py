"""Steps that go wrong: gradients that are not finite, and spikes of the loss."""

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

LOOK_EVERY_ON_GPU = 16
"""Steps between two looks at the flags: reading one makes the GPU wait for the host."""
NAMED = 8
"""Images that a message names at most."""


@dataclasses.dataclass(frozen=True)
class _Flag:
    step: int
    bad: Tensor
    losses: Tensor
    samples: Sequence[int]


class Guard:
    """Watches the gradient norm. Gradients are summed over the processes before it is taken, so a
    bad one anywhere is a bad one everywhere, and all processes draw the same conclusion."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        device: torch.device,
        most: int,
        image_ids: Sequence[str],
    ) -> None:
        self._image_ids = image_ids
        self._buffers = [b for m in modules for b in m.buffers() if b.is_floating_point()]
        self._backup = [buffer.clone() for buffer in self._buffers]
        self._flags: list[_Flag] = []
        self._look_every = 1 if device.type == "cpu" else LOOK_EVERY_ON_GPU
        self._most = most
        self._in_a_row = 0

    def step(self, norm: Tensor, optimizer: AcceleratedOptimizer, *, scaled: bool) -> Tensor:
        """Step the optimiser if the gradient norm is finite; returns whether it is not.

        The fused optimisers look at `found_inf` on the device, where a gradient scaler puts it; so
        nothing has to be read back. With a scaler the scaler does it. For all others the norm is
        read before the step, which a GPU has to be waited for: of their state nothing may change,
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

    def note(self, step: int, bad: Tensor, losses: Tensor, samples: Sequence[int]) -> list[int]:
        """Remember a step (`losses` of its `samples` on this process) and look, now and then.

        Returns the steps found bad. Raises DistclsError, naming step and images, after too many in
        a row.
        """
        self._flags.append(_Flag(step, bad, losses, samples))
        if len(self._flags) < self._look_every:
            return []
        return self.look()

    def look(self) -> list[int]:
        """Read the flags of the steps since the last look."""
        found = []
        for flag in self._flags:
            if not bool(flag.bad):
                self._in_a_row = 0
                continue
            found.append(flag.step)
            self._in_a_row += 1
            if rank() == 0 or self._culprits(flag):
                fail(self._message(flag) + "; skipped")
            if self._in_a_row >= self._most:
                raise DistclsError(
                    f"{self._in_a_row} steps in a row without a finite gradient, the last: "
                    f"{self._message(flag)}; lower --lr, or look at these images"
                )
        self._flags.clear()
        if found:  # the forward passes have spoilt batch norm's running statistics
            torch._foreach_copy_(self._buffers, self._backup)
        else:
            torch._foreach_copy_(self._backup, self._buffers)
        return found

    def _message(self, flag: _Flag) -> str:
        culprits = self._culprits(flag)
        names = ", ".join(culprits[:NAMED]) + (", ..." if len(culprits) > NAMED else "")
        where = f"images {names}" if culprits else "the loss of every image here is finite"
        return f"step {flag.step}: loss or gradient is not finite ({where})"

    def _culprits(self, flag: _Flag) -> list[str]:
        places = (~torch.isfinite(flag.losses)).nonzero().flatten().tolist()
        return [self._image_ids[flag.samples[place]] for place in places]


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
