"""`distcls evaluate`: metrics of a `.pth` or `.onnx` model on labelled images.

`accelerate launch -m distcls.evaluate` shards the images over multiple processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distcls import log
from distcls.cli import run
from distcls.config import Command
from distcls.evaluation.evaluate import EvaluateOptions, evaluate
from distcls.evaluation.overlap import training_images, warn_of_training_images

COMMAND = Command(
    options=EvaluateOptions,
    prog="distcls evaluate",
    about="Measure a model on a split: loss, accuracy, per-class precision, recall and F1.",
    examples=(
        "distcls evaluate --model runs/photos --data runs/photos/dataset",
        "distcls evaluate --model best.onnx --data datasets/photos --split val --out evaluation",
        "distcls evaluate --model best.onnx --data new_photos/ --out evaluation",
    ),
    groups={"essential options": ("model", "data", "split", "by", "bins", "out", "overwrite")},
)


def main(arguments: Sequence[str]) -> None:
    """Parse, evaluate, print."""
    options = COMMAND.parse(arguments)
    log.set_quiet(options.quiet)
    result = evaluate(options)
    if log.rank() != 0:
        return
    if options.json:
        log.print_json(result.to_json())
    else:
        print(result.to_text())
    if options.split != "train":  # of those it is no surprise; the rest may take a while
        ids = result.outputs.image_ids
        seen = training_images(Path(result.model), options.data, options.split, ids)
        warn_of_training_images(result.model, len(seen), len(ids))


if __name__ == "__main__":
    run(main)
