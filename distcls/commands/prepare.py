"""`distcls prepare`: parse, call, print."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from distcls import log
from distcls.config import Command
from distcls.data.prepare import PrepareOptions, prepare

COMMAND = Command(
    options=PrepareOptions,
    prog="distcls prepare",
    about="Turn images into a dataset directory: splits, checks, and a pack of decoded images.",
    examples=(
        "distcls prepare photos/ --out datasets/photos",
        "distcls prepare digits --out datasets/digits --val-fraction 0.2",
    ),
    groups={
        "essential options": (
            "source",
            "out",
            "format",
            "val_fraction",
            "test_fraction",
            "max_bad",
        ),
        "splits": ("splits", "split_by", "folds", "fold", "bootstrap", "seed", "limit"),
        "manifests": ("path_column", "label_column", "weight_column", "keep_columns", "root"),
        "several outputs per image": (
            *("label_columns", "text_column", "labels_column", "separator"),
        ),
    },
)


def main(arguments: Sequence[str]) -> None:
    """Run `distcls prepare` with these arguments. Raises DistclsError."""
    options = COMMAND.parse(arguments)
    log.set_quiet(options.quiet)
    prepared = prepare(options)
    if options.json:
        log.print_json(dataclasses.asdict(prepared))


if __name__ == "__main__":
    from distcls.cli import run

    run(main)
