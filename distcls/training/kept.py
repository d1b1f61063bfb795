"""Models kept under names of their own: the best few epochs, beside the stable `best.pth`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

from distcls.log import say
from distcls.training.config import TrainConfig
from distcls.training.state import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Epoch:
    """What a file's name and its place in the ranking are made from."""

    number: int
    """Counted from 1."""
    step: int
    score: float
    """Its value of the monitored metric."""
    best: bool
    """Whether it is the best so far."""


def keep(
    config: TrainConfig, progress: Progress, epoch: Epoch, write: Callable[[Path], None]
) -> None:
    """Have `write` write this epoch's model if it is to be kept, and remove what it displaces.

    `progress.kept` remembers the files, best first, so that a resumed run goes on counting.
    """
    options, mode = config.checkpoint, config.monitor.resolved_mode
    if options.keep_best == 0 or (options.best_only and not epoch.best):
        return
    name = options.name.format(
        model=config.model.name,
        epoch=epoch.number,
        step=epoch.step,
        metric=config.monitor.metric,
        score=epoch.score,
    )
    sign = -1.0 if mode == "max" else 1.0

    def place(row: tuple[float, str]) -> float:
        return math.inf if math.isnan(row[0]) else sign * row[0]

    others = [(score, file) for score, file in progress.kept if file != name]
    ranking = sorted([*others, (epoch.score, name)], key=place)[: options.keep_best]
    progress.kept = ranking  # before writing: the file may carry the state itself
    if (epoch.score, name) in ranking:
        write(config.out / name)
        say(f"saved {config.out / name} ({config.monitor.metric} {epoch.score:.5f})")
    for _, file in others:
        if file not in {kept for _, kept in ranking}:
            (config.out / file).unlink(missing_ok=True)  # a killed run may have come so far
