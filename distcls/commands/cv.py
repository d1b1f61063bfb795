"""`distcls cv`: cross-validation, a training run for each fold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from distcls import log
from distcls.cli import run
from distcls.config import Command
from distcls.errors import require
from distcls.training.config import GROUPS, TrainConfig, require_data

MOST_FOLDS = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class CvConfig(TrainConfig):
    """The keys of a training run, common to all folds."""

    data: Path = dataclasses.field()
    """Dataset directory, as `distcls prepare` writes it, or anything that `distcls prepare` reads,
    such as a folder with one folder per class: that is prepared into `out`. Its training and
    validation images are divided into folds."""
    out: Path = dataclasses.field()
    """Folder with a run directory for each fold, cv.json and out_of_fold.parquet. The same command
    once more continues where it was stopped."""
    folds: int = 5
    """Number of folds that the training and validation images are divided into; each is validated
    on by a run that trains on the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(2 <= self.folds <= MOST_FOLDS, "folds", self.folds, f"2 to {MOST_FOLDS}")
        require(self.resume in ("none", "auto"), "resume", self.resume, "none or auto")


COMMAND = Command(
    options=CvConfig,
    prog="distcls cv",
    about="Cross-validate: train a run for each fold, with the options of distcls train; print "
    "mean and 95 % interval of their scores, and write the predictions for the images left out.",
    examples=(
        "distcls cv --data photos/ --out cv/photos",
        "distcls cv --data datasets/photos --folds 10 --out cv/sgd --optimizer sgd --lr 0.05",
    ),
    groups={"essential options": ("data", "out", "folds", *GROUPS["essential options"][2:])},
    config=True,
    aside=("out",),
    resolver="distcls.training.resolve:resolved_without_data",
)


def main(arguments: Sequence[str]) -> None:
    """Parse, train, print."""
    config = COMMAND.parse(arguments)
    log.set_quiet(config.quiet)
    require_data(dataclasses.replace(config, resume="auto"))  # the source may be gone by now
    from distcls.training.cross_validation import cross_validate, lines  # torch loads

    found = cross_validate(config, config.folds)
    if config.json:
        log.print_json(found.to_json())
    else:
        with log.writing_output():
            print("\n".join(lines(found)))


if __name__ == "__main__":
    run(main)
