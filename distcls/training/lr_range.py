"""The learning-rate range test: which learning rates a network learns with, in one short run.

Smith: Cyclical Learning Rates for Training Neural Networks, 2015, section 3.3. The learning rate
grows exponentially with each step until the loss diverges. Far below the right rate the loss stays,
above it it rises; between the two it falls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.errors import DistclsError, UsageError
from distcls.training.config import AverageConfig, EmaConfig, TrainConfig, chosen
from distcls.training.distributed import random_numbers_kept, start
from distcls.training.engine import Engine, StepReport
from distcls.training.inputs import open_input, prepared
from distcls.training.memory import (
    ENOUGH_FASTER,
    batch_speeds,
    explain_out_of_memory,
    fit_into_memory,
)
from distcls.training.recipe import BATCHES, STEPS_AN_EPOCH
from distcls.training.resolve import require_usable
from distcls.training.run import set_up
from distcls.training.schedule import Schedule

Floats = NDArray[np.float64]

MEMORY = 0.9
"""Weight of the losses before, in the moving average that tells divergence."""
FIRST = 5
"""Steps whose mean loss is the one that the test starts from."""
DIVERGED = 2.0
"""Multiple of the lowest loss at which it has diverged, if it is also above the first."""
WIDTH = 30
"""The smoothed curve has the range divided by this as the deviation of its Gaussian window."""
FALLEN = 0.05
"""Least fraction by which the loss has to fall for a suggestion."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exponential(Schedule):
    """From `lowest` to `peak` within the steps, each the same multiple of the one before."""

    lowest: float

    def rate(self, step: int) -> float:
        """See `Schedule`."""
        progress = step / max(1, self.total_steps - 1)
        return float(self.lowest * (self.peak / self.lowest) ** progress)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LrCurve:
    """The result of a range test."""

    rates: Floats
    """The learning rate of each step, [steps]."""
    losses: Floats
    """Its loss, [steps]; all finite."""
    smoothed: Floats
    """The losses smoothed over neighbouring rates, [steps]."""
    steepest: float
    """The learning rate at which the loss fell fastest."""
    minimum: float
    """That of the lowest loss."""
    diverged: float | None
    """That at which the test ended; None if the highest rate was reached."""
    suggestion: float
    """The peak learning rate to train with, rounded to two digits."""
    batch_size: int
    """The global batch that it is for."""
    batches: dict[int, float] = dataclasses.field(default_factory=dict)
    """Images a second by batch size, where the size was sought, too."""

    def marks(self) -> dict[str, float]:
        """Learning rates by what they are, the suggestion first."""
        found = {"suggestion": self.suggestion, "lowest loss": self.minimum}
        return found if self.diverged is None else {**found, "diverged": self.diverged}

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        names = ("suggestion", "steepest", "minimum", "diverged", "batch_size")
        found = {**{name: getattr(self, name) for name in names}, "steps": len(self.rates)}
        return {**found, "batches": self.batches} if self.batches else found


def find_lr(
    config: TrainConfig,
    *,
    lowest: float = 1e-6,
    highest: float = 10.0,
    steps: int = 100,
    fit_batch: bool = False,
) -> LrCurve:
    """Run a range test with a training run's config, of at most `steps` optimiser steps.

    With `fit_batch` the batch size is sought first, see `fastest_batch`. Nothing of it stays: no
    file is written, and random numbers go on as if it had not been there.
    Raises UsageError as `train` does, DistclsError if the loss fell nowhere.
    """
    require_usable(config)
    if log.world_size() > 1:
        raise UsageError("lr-find runs in one process; start it without a launcher")
    # the averages of weights are neither trained with nor needed
    config = dataclasses.replace(
        config, ema=EmaConfig(), average=AverageConfig(), max_nonfinite_steps=steps
    )
    with random_numbers_kept(), tempfile.TemporaryDirectory(prefix="distcls-lr-") as folder:
        config = prepared(config, Path(folder) / "dataset")
        accelerator = start(config)
        data, batches = open_input(config), dict[int, float]()
        schedule = Exponential(peak=highest, total_steps=steps, warmup_steps=0, lowest=lowest)

        def make_engine(config: TrainConfig) -> tuple[TrainConfig, Engine]:
            _, config, model, preprocess, _ = set_up(config, data, accelerator.mixed_precision)
            made = Engine(config, accelerator, data, model, preprocess, schedule=schedule)
            return config, made

        given = config
        config, engine = make_engine(given)
        if fit_batch:
            largest = len(data.train_samples) // STEPS_AN_EPOCH
            batches = batch_speeds(engine, BATCHES[0], largest)
            config, engine = make_engine(
                dataclasses.replace(given, batch_size=fastest_batch(batches), accumulate=1)
            )
        if config.auto_micro_batch:
            fit_into_memory(engine)
        with explain_out_of_memory(config, engine):
            # a gradient scaler begins with steps that it skips
            may_skip = 10 if config.precision == "fp16" else 1
            images = chosen(config.batch_size)
            rates, losses, diverged = _measure(engine, steps, images, may_skip)
    curve = curve_of(rates, losses, diverged, chosen(config.batch_size))
    return dataclasses.replace(curve, batches=batches)


def fastest_batch(speeds: Mapping[int, float]) -> int:
    """The smallest batch that is about as fast as the fastest: a larger one learns less from as
    many images."""
    enough = max(speeds.values()) / ENOUGH_FASTER
    return min(size for size, speed in speeds.items() if speed >= enough)


def _measure(
    engine: Engine, steps: int, images: int, may_skip: int
) -> tuple[Floats, Floats, float | None]:
    """Rates and losses, [at most `steps`], and the rate at which the loss diverged.

    `images` are those of a step, for display; `may_skip` steps in a row that are not finite mean
    divergence.
    """
    rates: list[float] = []
    losses: list[float] = []
    average, lowest = 0.0, math.inf
    skipped: list[float] = []
    with (
        log.Progress("learning rates", steps * images) as progress,
        contextlib.closing(_steps(engine)) as reports,
    ):
        for report in itertools.islice(reports, steps):
            if not report.sums[-1]:  # not finite
                skipped.append(report.lr)
                if len(skipped) == may_skip:
                    return np.array(rates), np.array(losses), skipped[0]
                continue
            skipped, loss = [], float(report.loss)
            average = MEMORY * average + (1 - MEMORY) * loss
            recent = average / (1 - MEMORY ** (len(losses) + 1))
            lowest = min(lowest, recent)
            first = float(np.mean(losses[:FIRST])) if len(losses) >= FIRST else math.inf
            if recent > max(first, DIVERGED * lowest):
                return np.array(rates), np.array(losses), report.lr
            rates.append(report.lr)
            losses.append(loss)
            progress.update(images)
    return np.array(rates), np.array(losses), None


def _steps(engine: Engine) -> Generator[StepReport]:
    """Steps over as many epochs as are asked for."""
    for epoch in itertools.count():
        with contextlib.closing(engine.train_epoch(epoch)) as reports:
            yield from reports


def curve_of(rates: Floats, losses: Floats, diverged: float | None, batch_size: int) -> LrCurve:
    """The curve of measured losses, and the learning rate that it suggests.

    That is the geometric mean of the rate at which the loss falls fastest and the one where it is
    lowest, which already is at the edge. Of five short runs (digits and FashionMNIST, AdamW and
    SGD) four ended higher with a third of it, three with three times of it; docs/choosing.md has
    the figures. Raises DistclsError if the loss fell nowhere.
    """
    if diverged is not None and len(rates) < 2 * FIRST:
        raise DistclsError(
            f"lr-find: the loss diverged after {log.counted(len(rates), 'step')}, at "
            f"{diverged:.2g}; start lower: --lowest"
        )
    smoothed = smooth(losses)
    lowest = int(smoothed.argmin())
    if smoothed[lowest] > (1 - FALLEN) * smoothed[0]:
        raise DistclsError(
            f"lr-find: the loss fell nowhere between {rates[0]:.2g} and {rates[-1]:.2g} "
            f"({smoothed[0]:.3g} at first, {smoothed[lowest]:.3g} at its lowest): give it a wider "
            "range (--lowest, --highest) or more --steps, and look at the images and their labels"
        )
    slopes = np.gradient(smoothed, np.log(rates))
    steepest = float(rates[int(slopes[: lowest + 1].argmin())])
    minimum = float(rates[lowest])
    return LrCurve(
        rates=rates,
        losses=losses,
        smoothed=smoothed,
        steepest=steepest,
        minimum=minimum,
        diverged=diverged,
        suggestion=float(f"{math.sqrt(steepest * minimum):.2g}"),
        batch_size=batch_size,
    )


def smooth(losses: Floats) -> Floats:
    """The mean of each loss, [steps], and its neighbours, by a Gaussian window.

    Unlike a moving average it does not lag behind, so no rate looks better than it is.
    """
    places = np.arange(len(losses))
    deviation = max(1.0, len(losses) / WIDTH)
    weights = np.exp(-0.5 * ((places[:, None] - places) / deviation) ** 2)
    # what follows the divergence would count in the steps before it
    capped = np.minimum(losses, losses[:FIRST].mean() * DIVERGED)
    return np.asarray(weights @ capped / weights.sum(1), np.float64)
