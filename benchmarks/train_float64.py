"""`python -m benchmarks.train_float64`: `distcls.train` with its network in double precision.

Training multiplies rounding errors from step to step. In float32 they soon reach the third digit of
the loss; in float64 the difference after some dozen steps still distinguishes noise from a bug.
"""

from __future__ import annotations

from distcls.cli import run
from distcls.commands.train import main
from distcls.imaging import Preprocess
from distcls.models import factory
from distcls.models.classifier import Classifier
from distcls.models.config import ModelConfig


def in_double_precision() -> None:
    """Have every network built from now on compute in float64."""
    build = factory.build

    def double(config: ModelConfig, classes: int, preprocess: Preprocess) -> Classifier:
        return build(config, classes, preprocess).double()

    factory.build = double


if __name__ == "__main__":
    in_double_precision()
    run(main)
