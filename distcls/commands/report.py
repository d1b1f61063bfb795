"""`distcls report`: a page about a run, as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence

from distcls import log
from distcls.cli import packages_for, run
from distcls.config import Command
from distcls.errors import UsageError
from distcls.report.options import ReportOptions

COMMAND = Command(
    options=ReportOptions,
    prog="distcls report",
    about="Write one HTML page about a run: data, curves, figures with intervals, mistakes, model.",
    examples=(
        "distcls report runs/photos",
        "distcls report runs/photos --data datasets/photos --split test --out report.html",
        "distcls report searches/lr",
    ),
    groups={"essential options": ("runs", "data", "split", "out", "overwrite")},
)


def main(arguments: Sequence[str]) -> None:
    """Parse, measure, write; prints the path of the page."""
    options = COMMAND.parse(arguments)
    log.set_quiet(options.quiet)
    if log.world_size() > 1:
        raise UsageError("report runs in one process; start it without a launcher")
    with packages_for("distcls report"):
        from distcls.report.report import report
    print(report(options))


if __name__ == "__main__":
    run(main)
