"""`distcls compare`: parse, compare, print."""

from __future__ import annotations

from collections.abc import Sequence

from distcls import log
from distcls.cli import run
from distcls.config import Command
from distcls.evaluation.compare import CompareOptions, compare

COMMAND = Command(
    options=CompareOptions,
    prog="distcls compare",
    about="Compare models on the same images: the difference, its 95 % interval, and whether it "
    "may be chance.",
    examples=(
        "distcls compare runs/a runs/b",
        "distcls compare evaluation_a evaluation_b/predictions.parquet",
        "distcls compare runs/a1,runs/a2,runs/a3 runs/b1,runs/b2,runs/b3 --data datasets/photos",
    ),
    groups={"essential options": ("runs", "data", "split", "intersect")},
)


def main(arguments: Sequence[str]) -> None:
    """Parse, compare, print."""
    options = COMMAND.parse(arguments)
    log.set_quiet(options.quiet)
    result = compare(options)
    if options.json:
        log.print_json(result.to_json())
    else:
        print(result.to_text())


if __name__ == "__main__":
    run(main)
