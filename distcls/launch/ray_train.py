"""`python -m distcls.launch.ray_train --processes N ...`: `train(config)` on a Ray cluster.

All other options are those of `distcls train`. If a worker dies, all are restarted and the run
resumes from its last state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distcls import log
from distcls.cli import run
from distcls.config import Command
from distcls.errors import DistclsError, UsageError
from distcls.training.config import GROUPS, NEW_OUT, TrainConfig, require_free

MAX_FAILURES = 3
"""Restarts of the workers before the job counts as failed."""


COMMAND = Command(
    options=TrainConfig,
    prog="python -m distcls.launch.ray_train",
    about="Train on a Ray cluster; --processes says on how many workers.",
    examples=("python -m distcls.launch.ray_train --processes 4 --data photos/ --out runs/photos",),
    groups=GROUPS,
    config=True,
    resolver="distcls.training.resolve:resolved_without_data",
)


def main(arguments: Sequence[str]) -> None:
    """Parse, train, print."""
    config = COMMAND.parse(arguments)
    log.set_quiet(config.quiet)
    train_on_ray(config)
    log.say(f"wrote {config.out}/best.pth")


def train_on_ray(config: TrainConfig) -> None:
    """Run `train(config)` on `config.processes` workers of the Ray cluster of RAY_ADDRESS.

    Without such a cluster Ray starts one on this machine. Raises UsageError if Ray is missing or
    the config is not valid, DistclsError if the workers failed too often.
    """
    if config.processes is None:
        raise UsageError("processes is missing; give it as --processes: the workers to start")
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "ray":
            raise
        raise UsageError('Ray is not installed; pip install "distcls[ray,train]"') from error
    from distcls.training.inputs import place

    if config.out == NEW_OUT:
        raise UsageError("out is missing; give it as --out: a folder that all workers see")
    require_free(config.out, config.resume)
    config = absolute(place(config))
    # from here on a worker that finds a state is a restarted one
    config = dataclasses.replace(config, resume="auto")
    ray.init(ignore_reinit_error=True, log_to_driver=not config.quiet)
    use_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"config": config},
        scaling_config=ScalingConfig(num_workers=config.processes, use_gpu=use_gpu),
        run_config=RunConfig(
            storage_path=str(config.out / "ray"),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    try:
        trainer.fit()
    except RuntimeError as error:  # what TrainingFailedError derives from, in Ray's old API and new
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DistclsError(f"training on Ray failed: {lines[-1]}") from error


def absolute(config: Any) -> Any:
    """The same config (a dataclass) with absolute paths: workers run in other directories."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Path):
            changes[field.name] = value.resolve()
        elif dataclasses.is_dataclass(value):
            changes[field.name] = absolute(value)
    return dataclasses.replace(config, **changes)


def _train_worker(values: dict[str, Any]) -> None:
    """On a worker; Ray has set RANK, WORLD_SIZE, MASTER_ADDR and the like as torchrun does."""
    from distcls.training.run import train

    train(values["config"])


if __name__ == "__main__":
    run(main)
