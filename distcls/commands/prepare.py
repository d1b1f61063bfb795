"""`distcls prepare`: parse, call, print."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from distcls import log
from distcls.config import parse
from distcls.data.prepare import PrepareOptions, prepare

ABOUT = "Turn images into a dataset directory: splits, checks, and a pack of decoded images."


def main(arguments: Sequence[str]) -> None:
    """Run `distcls prepare` with these arguments. Raises DistclsError."""
    options = parse(PrepareOptions, arguments, prog="distcls prepare", about=ABOUT)
    log.set_quiet(options.quiet)
    prepared = prepare(options)
    if options.json:
        log.print_json(dataclasses.asdict(prepared))


if __name__ == "__main__":
    from distcls.cli import run

    run(main)
