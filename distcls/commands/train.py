"""`accelerate launch -m distcls.train --config C`: parse, train, print."""

from __future__ import annotations

from collections.abc import Sequence

from distcls import log
from distcls.cli import run
from distcls.config import Command
from distcls.training.config import GROUPS, TrainConfig, require_places

COMMAND = Command(
    options=TrainConfig,
    prog="distcls train",
    about="Train a model; on more than one process: accelerate launch -m distcls.train.",
    examples=(
        "distcls train --data photos/ --out runs/photos",
        "distcls train --data photos/ --model mobilenet_v3_large --optimizer sgd --print-config",
    ),
    groups=GROUPS,
    config=True,
    resolver="distcls.training.resolve:resolved_without_data",
)


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = COMMAND.parse(arguments)
    log.set_quiet(config.quiet)
    require_places(config)
    from distcls.models.registry import import_settings, own_module
    from distcls.plotting import metric_title
    from distcls.training.run import train  # torch loads once the config is known to be right

    result = train(config)
    if log.rank() != 0:
        return
    minutes, best = result.seconds / 60, result.out / "best.pth"
    where = f"; best model: {best}" if best.exists() else ""  # none where a finished file went on
    log.say(
        f"best epoch {result.best_epoch} of {result.epochs}: {metric_title(config.monitor.figure)} "
        f"{result.best_score:.4f}, {minutes:.1f} min{where}"
    )
    data = result.out / "dataset"
    # another process imports the code of a network of one's own only where it is told to
    module = own_module(config.model.name)
    command = f"{import_settings(module, path_stays=False)} distcls" if module else "distcls"
    tested = f"; {command} evaluate --model {result.out} --data {data}" if data.exists() else ""
    log.say(
        f"next: {command} predict --model {result.out} IMAGES; "
        f"{command} export --ckpt {result.out}{tested}"
    )
    if config.json:
        log.print_json(result.to_json())


if __name__ == "__main__":
    run(main)
