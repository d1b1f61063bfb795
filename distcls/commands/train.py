"""`accelerate launch -m distcls.train --config C`: parse, train, print."""

from __future__ import annotations

import json
from collections.abc import Sequence

from distcls import log
from distcls.cli import run
from distcls.config import parse
from distcls.training.config import TrainConfig


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = parse(
        TrainConfig,
        arguments,
        prog="distcls train",
        about="Train a model; on more than one process: accelerate launch -m distcls.train.",
        config=True,
    )
    log.set_quiet(config.quiet)
    from distcls.training.run import train  # torch loads once the config is known to be right

    result = train(config)
    if log.rank() != 0:
        return
    minutes = result.seconds / 60
    log.say(
        f"best epoch {result.best_epoch} of {result.epochs}: {config.monitor.metric} "
        f"{result.best_score:.4f}, {minutes:.1f} min; wrote {result.out}/best.pth"
    )
    if config.json:
        print(json.dumps(result.to_json()))


if __name__ == "__main__":
    run(main)
