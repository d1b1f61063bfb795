"""What goes wrong: gradients that are not finite, spikes of the loss, runs that learn nothing.

Reading a value of a step synchronises a GPU with the host, so steps are recorded as tensors and
read in groups (`poll`).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import reduce
from torch import Tensor, nn

from distcls.errors import DistclsError
from distcls.evaluation.metrics import Metrics
from distcls.log import fail, rank

POLL_EVERY_ON_GPU = 16
"""Steps between two readings of the non-finite flags on a GPU."""
NAMED = 8
"""Images that a message names at most."""
POLL_EVERY = 16
"""Steps between two readings of the losses, which the processes add up; fewer at the start."""
WINDOW = 64
"""Number of previous losses that a step's is compared with."""
FEWEST = 10
"""Fewest previous losses for a comparison."""
DEVIATIONS = 10.0
"""A spike is this many standard deviations above the median, and twice the median, and ..."""
LEAST_RISE = 0.5
"""... by this much above it: for losses near zero, one hard image makes a multiple; ..."""
HARD_IMAGES = 48.0
"""... and by this much in the sum over the images: a few that are confidently wrong, of a small
batch, say nothing of the run."""
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
        # a count of batches goes back with the statistics
        buffers = [buffer for module in modules for buffer in module.buffers()]
        self._buffers = [b for b in buffers if b.is_floating_point() or b.ndim == 0]
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

    def __init__(self, batch_size: int, poll_every: int = POLL_EVERY) -> None:
        """`batch_size` is of a step, over all processes; `poll_every` 1 where reading is free."""
        self._least_rise = max(LEAST_RISE, HARD_IMAGES / batch_size)
        # after steps 1, 2, 4, 8, ...: the first losses are shown at once
        self._poll_every, self._poll_next = poll_every, 1
        self.recent = torch.empty(0, dtype=torch.float64)
        """Finite losses of the last steps that were read, on the host, [at most WINDOW]."""
        self._pending: list[tuple[int, Tensor]] = []
        self._last = -WINDOW

    def record(self, step: int, loss: Tensor) -> None:
        """Record this process's term of a step's mean loss, [], left on its device."""
        self._pending.append((step, loss))

    def recent_mean(self, most: int) -> float | None:
        """Mean of the losses of the last steps, at most `most`; None unless all were just read."""
        if self._pending or not len(self.recent):
            return None
        return float(self.recent[-most:].mean())

    def poll(self, *, flush: bool = False) -> list[LossSpike]:
        """The spikes of the steps recorded since the last reading, if they are enough of them or
        `flush` is set.

        All processes have to call this after the same steps: they add up their terms.
        """
        if not self._pending or not (flush or len(self._pending) >= self._poll_next):
            return []
        self._poll_next = min(2 * self._poll_next, self._poll_every)
        steps = [step for step, _ in self._pending]
        losses = reduce(torch.stack([loss for _, loss in self._pending]), reduction="sum")
        self._pending.clear()
        recent = self.recent.tolist()
        spikes = []
        for step, loss in zip(steps, losses.tolist(), strict=True):
            if not math.isfinite(loss):
                continue  # handled by the guard
            usual = _usual(recent, loss, self._least_rise)
            if usual is not None:
                first = step - self._last >= WINDOW
                spikes.append(LossSpike(step=step, loss=loss, usual=usual, first=first))
                self._last = step
            # a spike counts as well: a loss that stays high becomes the baseline
            recent = [*recent, loss][-WINDOW:]
        self.recent = torch.tensor(recent, dtype=torch.float64)
        return spikes


def _usual(recent: list[float], loss: float, least_rise: float) -> float | None:
    """The median of the recent losses if this one is a spike among them, else None."""
    if len(recent) < FEWEST:
        return None
    median = statistics.median(recent)
    spread = TO_DEVIATION * statistics.median(abs(other - median) for other in recent)
    rise = max(DEVIATIONS * spread, median, least_rise)
    return median if loss > median + rise else None


CHECKED_EPOCHS = 5
"""Epochs in a row for which a run has to look wrong before it is said."""
MEMORISED = 0.25
"""Training loss, as a fraction of the first epoch's, at which the training images are learnt."""
ONE_CLASS = 0.95
"""Fraction of the predictions that one class takes where a model ignores its images."""
LEARNT = 0.1
"""Training top-1 above that of the first epoch by which something is learnt, whatever the loss."""
STILL = 0.95
"""Training loss, as a fraction of the first epoch's, above which nothing was learnt."""
INFORMED = 0.9
"""Validation loss, as a fraction of that of guessing by the classes' frequencies, below which a
model is better than guessing."""
RISEN = 1.25
"""Training loss, as a multiple of the first epoch's, that tells of divergence."""


class EpochChecks:
    """Compares each epoch's figures with what a run that learns would show.

    Each problem is returned once, in words.
    """

    def __init__(self, classes: Sequence[str], monitored: str = "top1") -> None:
        """`classes` are the names of the one output's classes, empty for multi-output tasks;
        `monitored` is the metric that finds the best epoch."""
        self._classes = classes
        self._monitored = f"val_{monitored}"
        self._said: set[str] = set()

    def problems(
        self, history: Sequence[Mapping[str, float]], metrics: Metrics, lr: float
    ) -> list[str]:
        """The problems that were not returned before.

        `history` has the epochs' rows so far, `metrics` are those of the last, `lr` is the peak.
        """
        found = {"loss": _loss_rises(history, lr), "still": _loss_stays(history, lr)}
        found["not finite"] = _not_finite(history[-1], ("train_loss", "val_loss", self._monitored))
        if self._classes:
            found["one class"] = self._one_class(history, metrics)
            found["chance"] = "" if found["one class"] else _at_chance(history, metrics)
        new = {name: text for name, text in found.items() if text and name not in self._said}
        self._said.update(new)
        return list(new.values())

    def _one_class(self, history: Sequence[Mapping[str, float]], metrics: Metrics) -> str:
        predicted = metrics.confusion.sum(0)
        top = int(predicted.argmax())
        share, actual = predicted[top] / metrics.count, metrics.support[top] / metrics.count
        if len(history) < CHECKED_EPOCHS or share < ONE_CLASS or actual > ONE_CLASS - 0.1:
            return ""
        return (
            f"{share:.0%} of the validation images are predicted as {self._classes[top]!r}, which "
            f"{actual:.0%} are: the predictions hardly depend on the image; train longer, or lower "
            "--lr, and look at the images and their labels"
        )


def _not_finite(row: Mapping[str, float], names: Sequence[str]) -> str:
    bad = [name for name in dict.fromkeys(names) if not math.isfinite(row.get(name, 0.0))]
    if not bad:
        return ""
    values = ", ".join(f"{name} is {row[name]:g}" for name in bad)
    never = "; such an epoch is never the best, and without another there is no best.pth"
    return f"epoch {row['epoch']:.0f}: {values}{never if bad[-1] == names[-1] else ''}"


def _loss_rises(history: Sequence[Mapping[str, float]], lr: float) -> str:
    first, last = history[0]["train_loss"], history[-1]["train_loss"]
    if len(history) < 2 or last < RISEN * first:
        return ""
    return (
        f"the training loss rose from {first:.3g} in epoch 1 to {last:.3g} in epoch "
        f"{history[-1]['epoch']:.0f}: the learning rate ({lr:g}) is too high, lower --lr"
    )


def _loss_stays(history: Sequence[Mapping[str, float]], lr: float) -> str:
    recent = [row["train_loss"] for row in history[-CHECKED_EPOCHS:]]
    if len(history) < CHECKED_EPOCHS or min(recent) < STILL * history[0]["train_loss"]:
        return ""
    # with strong augmentation the answers get better before the loss does
    scores = [row.get("train_top1", 0.0) for row in history]
    if max(scores[-CHECKED_EPOCHS:]) > scores[0] + LEARNT:
        return ""
    return (
        f"the training loss stays at {recent[-1]:.3g} after {len(history)} epochs: nothing is "
        f"learnt; the learning rate ({lr:g}) may be too low or much too high, the epochs too few, "
        "or the labels say nothing about the images"
    )


def _at_chance(history: Sequence[Mapping[str, float]], metrics: Metrics) -> str:
    """Whether validation is no better than always the most frequent class, but training is."""
    recent = history[-CHECKED_EPOCHS:]
    chance = int(metrics.support.max()) / metrics.count
    # what guessing reaches by luck in one of forty evaluations of so many images
    luck = chance + 2 * math.sqrt(chance * (1 - chance) / metrics.count)
    best = max(row["val_top1"] for row in recent)
    learnt = history[-1]["train_loss"] < MEMORISED * history[0]["train_loss"]
    shares = metrics.support[metrics.support > 0] / metrics.count
    guessing = -float(np.sum(shares * np.log(shares)))
    # of a few images luck reaches all of them; the loss tells knowing from guessing then
    informed = min(row["val_loss"] for row in recent) < INFORMED * guessing
    # a better epoch of before is kept as best
    better = max(row["val_top1"] for row in history) > luck
    if len(recent) < CHECKED_EPOCHS or better or not learnt or informed:
        return ""
    return (
        f"validation top-1 stays at {best:.2f}, the level of guessing ({chance:.2f} for the most "
        f"frequent class), while the training loss fell to {history[-1]['train_loss']:.2g}: the "
        "model overfits; more images, more augmentation or pretrained "
        "weights help, and labels may be wrong"
    )
