"""`distcls evaluate`: metrics of a `.pth` or `.onnx` model on a split of a dataset directory.

`accelerate launch -m distcls.evaluate` shards the images over multiple processes.
"""

from __future__ import annotations

from collections.abc import Sequence

from distcls import log
from distcls.cli import run
from distcls.config import parse
from distcls.evaluation.evaluate import EvaluateOptions, evaluate_model

ABOUT = "Measure a model on a split: loss, top-1, top-5, per-class precision, recall and F1."


def main(arguments: Sequence[str]) -> None:
    """Parse, evaluate, print."""
    options = parse(EvaluateOptions, arguments, prog="distcls evaluate", about=ABOUT)
    log.set_quiet(options.quiet)
    result = evaluate_model(options)
    if log.rank() != 0:
        return
    if options.json:
        log.print_json(result.to_json())
    else:
        print(result.to_text())


if __name__ == "__main__":
    run(main)
