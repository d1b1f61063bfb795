"""`distcls merge`: the mean of the weights of several runs, as one best.pth."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from distcls import log
from distcls.cli import run
from distcls.config import Command, positional
from distcls.errors import UsageError
from distcls.training.config import MonitorConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Options of `distcls merge`."""

    runs: tuple[Path, ...] = positional()
    """Two or more run directories, each of which stands for its best.pth, or .pth files; of the
    same architecture, classes and preprocessing."""
    out: Path
    """Folder to write best.pth to."""
    data: Path | None = None
    """Dataset directory, whose validation images measure the mean and whose training images batch
    norm's statistics are counted on; default: that of the first run."""
    greedy: bool = False
    """Greedy soup: begin with the best model, and add each next one only if the mean is no worse on
    validation."""
    metric: str = "top1"
    """Validation metric, as `monitor.metric` of a training run; ties are broken by the loss."""
    quiet: bool = False
    """Print warnings and errors only."""
    json: bool = False
    """Print the result as one JSON object on standard output."""

    def __post_init__(self) -> None:
        MonitorConfig(metric=self.metric)  # raises for an unknown one


COMMAND = Command(
    options=MergeOptions,
    prog="distcls merge",
    about="Average the weights of several runs into one model, and measure it on validation.",
    examples=(
        "distcls merge runs/a runs/b runs/c --out runs/merged",
        "distcls merge runs/sweep/*/ --greedy --data datasets/photos --out runs/soup",
    ),
    groups={"essential options": ("runs", "out", "data", "greedy", "metric")},
)


def main(arguments: Sequence[str]) -> None:
    """Parse, merge, print."""
    options = COMMAND.parse(arguments)
    log.set_quiet(options.quiet)
    if log.world_size() > 1:
        raise UsageError("merge runs in one process; start it without a launcher")
    from distcls.training.merge import merge  # torch loads for right options only

    found = merge(
        options.runs,
        options.out,
        data=options.data,
        greedy=options.greedy,
        monitor=MonitorConfig(metric=options.metric),
    )
    log.say(
        f"next: distcls evaluate --model {options.out} --data {found.data}; "
        f"distcls export --ckpt {options.out}"
    )
    if options.json:
        log.print_json(found.to_json())


if __name__ == "__main__":
    run(main)
