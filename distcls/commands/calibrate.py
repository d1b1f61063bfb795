"""`distcls calibrate`: parse, calibrate, print."""

from __future__ import annotations

from collections.abc import Sequence

from distcls import log
from distcls.cli import run
from distcls.config import Command
from distcls.export.calibrate import CalibrateOptions, calibrate

COMMAND = Command(
    options=CalibrateOptions,
    prog="distcls calibrate",
    about="Fit temperatures to a split, so that of the predictions with a probability of 0.9 about "
    "nine in ten are right, and keep them in the model file.",
    examples=(
        "distcls calibrate runs/photos",
        "distcls calibrate best.onnx --data datasets/photos --coverage 0.9,0.95 --precision 0.99",
    ),
    groups={
        "essential options": ("model", "data", "split"),
        "sets and thresholds": ("coverage", "precision", "answered"),
    },
)


def main(arguments: Sequence[str]) -> None:
    """Parse, calibrate, print."""
    options = COMMAND.parse(arguments)
    log.set_quiet(options.quiet)
    result = calibrate(options)
    for path in result.files:
        log.say(f"calibrated: {path}")
    if options.json:
        log.print_json(result.to_json())
    else:
        print(result.to_text())


if __name__ == "__main__":
    run(main)
