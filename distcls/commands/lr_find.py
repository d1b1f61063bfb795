"""`distcls lr-find`: a learning-rate range test, its curve and a suggestion."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distcls import log
from distcls.cli import run
from distcls.config import Command
from distcls.errors import UsageError, require
from distcls.training.config import GROUPS, TrainConfig, require_data

if TYPE_CHECKING:
    from distcls.training.lr_range import LrCurve

MOST_STEPS = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class LrFindConfig(TrainConfig):
    """A training run's keys, but `out` is an image file."""

    data: Path = dataclasses.field()
    """Dataset directory, as `distcls prepare` writes it, or anything that `distcls prepare` reads,
    such as a folder with one folder per class: that is prepared in a temporary folder."""
    out: Path = Path("lr-find.png")
    """PNG file to write the curve to; a CSV of its numbers lies beside it. The `out` of a config
    file is ignored."""
    overwrite: bool = False
    """Replace both files if they exist."""
    lowest: float = 1e-6
    """Learning rate of the first step."""
    highest: float = 10.0
    """Learning rate of the last step, if the loss does not diverge before."""
    steps: int = 100
    """Optimiser steps at most."""
    fit_batch: bool = False
    """Find the batch size first, in place of `batch_size`: doubled from 16 as long as it fits into
    memory, gets faster, and leaves ten steps an epoch; the smallest within 10 % of the fastest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ending = self.out.suffix.lower() == ".png"
        require(ending, "out", str(self.out), "a name that ends in .png")
        require(0 < self.lowest < self.highest, "lowest", self.lowest, "above 0, below highest")
        require(self.highest <= 1e6, "highest", self.highest, "at most 1e6")
        require(20 <= self.steps <= MOST_STEPS, "steps", self.steps, f"20 to {MOST_STEPS:,}")


COMMAND = Command(
    options=LrFindConfig,
    prog="distcls lr-find",
    about="Find a learning rate: a short run whose rate grows with each step until the loss "
    "diverges. Takes the options of distcls train, and leaves no trace of a run.",
    examples=(
        "distcls lr-find --data photos/ --fit-batch",
        "distcls lr-find --config runs/photos/config.yaml --batch-size 64 --out lr-64.png",
    ),
    groups={
        "the test": ("data", "out", "overwrite", "fit_batch", "lowest", "highest", "steps"),
        **GROUPS,
    },
    config=True,
    aside=("out", "resume"),
    resolver="distcls.training.resolve:resolved_without_data",
)


def main(arguments: Sequence[str]) -> None:
    """Parse, test, draw, print."""
    config = COMMAND.parse(arguments)
    log.set_quiet(config.quiet)
    require_data(config)
    table = config.out.with_suffix(".csv")
    check_output(config, table)
    from distcls.training.lr_range import find_lr  # torch loads for a right command only

    curve = find_lr(
        config,
        lowest=config.lowest,
        highest=config.highest,
        steps=config.steps,
        fit_batch=config.fit_batch,
    )
    if curve.batches:
        told = ", ".join(f"{size} {speed:,.0f}" for size, speed in curve.batches.items())
        log.say(f"batch size {curve.batch_size}: images a second by batch size: {told}")
    write(curve, config.out, table)
    ended = "" if curve.diverged is None else f", diverged at {curve.diverged:.2g}"
    log.say(
        f"{len(curve.rates)} steps of batch {curve.batch_size} with {config.optimizer.name}: the "
        f"loss fell fastest at {curve.steepest:.2g}, was lowest at {curve.minimum:.2g}{ended}; "
        f"wrote {config.out} and {table}"
    )
    told = (
        f"suggested learning rate: --lr {curve.suggestion:g} --batch-size {curve.batch_size} (the "
        "peak of the schedule)"
    )
    if config.json:
        log.say(told)
        log.print_json({**curve.to_json(), "out": str(config.out), "table": str(table)})
    else:  # the result, so also with --quiet
        print(told)


def check_output(config: LrFindConfig, table: Path) -> None:
    """Raise UsageError, before any work, if the curve could not be drawn or written."""
    from distcls.data.dataset import require_apart
    from distcls.files import require_writable
    from distcls.plotting import new_figure

    for path in (config.out, table):
        require_apart("out", path, config.data)
        if path.is_dir():
            raise UsageError(f"out: {path} is a folder, expected the name of a file")
        if path.exists() and not config.overwrite:
            raise UsageError(f"{path} exists already; choose another --out or add --overwrite")
    new_figure(1, 1)  # raises now if matplotlib is missing
    require_writable(config.out.parent)


def write(curve: LrCurve, picture: Path, table: Path) -> None:
    """Draw the curve, and write its numbers, a row for each step."""
    from distcls.files import csv_line, write_text
    from distcls.plotting import draw_rates

    columns = {"lr": curve.rates, "loss": curve.losses, "smoothed": curve.smoothed}
    rows = zip(*columns.values(), strict=True)
    lines = [csv_line(("step", *columns))]
    lines += [
        csv_line((number, *(f"{value:.6g}" for value in row))) for number, row in enumerate(rows, 1)
    ]
    write_text(table, "".join(lines))
    draw_rates(curve.rates, curve.losses, curve.smoothed, curve.marks(), picture)


if __name__ == "__main__":
    run(main)
