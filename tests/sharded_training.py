"""Two processes that train small engines, whole ones under DDP and sharded ones, side by side."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distcls.models import factory
from distcls.models.checkpoint import load_tensors, save_tensors
from distcls.models.classifier import Classifier
from distcls.models.config import ModelConfig
from distcls.training.config import (
    OPTIMIZERS,
    AverageConfig,
    EmaConfig,
    FreezeConfig,
    InputConfig,
    OptimizerConfig,
)
from distcls.training.distributed import start, sum_over_processes
from distcls.training.engine import Engine
from distcls.training.fsdp import local_shard
from distcls.training.inputs import choose_preprocess, open_input
from distcls.training.weight_averaging import select_weights
from tests.plain import plain_config

WORLD = 2
EPOCHS = 2
STEPS = 5
"""Of an epoch."""
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    "FSDP_MIN_NUM_PARAMS": "300",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
"""What accelerate's launcher says of a config such as launch/fsdp.yaml."""
OTHERS = sorted(set(OPTIMIZERS.names()) - {"adamw", "sgd"})
IN_FULL: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": OptimizerConfig(name=name)} for name in OTHERS},
    "adamw in parts": {"accumulate": 3, "sync_batch_norm": True, "ema": EmaConfig(decay=0.9)},
    "sgd clipped": {
        "optimizer": OptimizerConfig(
            name="sgd", nesterov=True, clip_norm=0.05, layer_decay=0.5, head_lr_scale=3.0
        )
    },
    "released": {
        "freeze": FreezeConfig(backbone="4 steps"),
        "average": AverageConfig(last_epochs=2),
    },
    "frozen": {"freeze": FreezeConfig(names=("1.*", "0.0.weight"))},
    "adamw poisoned": {"ema": EmaConfig(decay=0.9)},
    "sgd poisoned": {"optimizer": OptimizerConfig(name="sgd")},
}
IN_BF16: dict[str, dict[str, Any]] = {"bf16": {"precision": "bf16", "ema": EmaConfig(decay=0.9)}}
POISON = 2
"""The step that one process meets a loss in that is not a number, where a case says so."""


class Scale(nn.Module):
    """One number: all of it lies on the first process."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same, and a view, which whatever follows may change in place."""
        return (x * self.factor).view_as(x)


def backbone() -> nn.Sequential:
    """Blocks of which two are large enough to be units, and sizes that do not divide by two."""

    def block(before: int, after: int) -> nn.Sequential:
        convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU(), Scale())

    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(15 * 4, 10))
    return nn.Sequential(block(3, 8), block(8, 15), nn.Hardswish(inplace=True), head)


@contextmanager
def sharding(on: bool) -> Iterator[None]:
    """The environment of a run that is told to shard, or not."""
    if on:
        os.environ.update(FSDP)
    try:
        yield
    finally:
        for name in FSDP:
            os.environ.pop(name, None)


def make_engine(digits: Path, changes: dict[str, Any], *, sharded: bool) -> Engine:
    """An engine over the small network or one of the libraries', the same weights each time."""
    base = plain_config(
        data=digits, out=digits / "unused", batch_size=50, limit=250, epochs=EPOCHS, threads=1
    )
    config = dataclasses.replace(base, **changes)
    with sharding(sharded):
        accelerator = start(config)
        data = open_input(config)
        preprocess = choose_preprocess(config.input, data.train, None)
        torch.manual_seed(0)
        named = "model" in changes
        small = Classifier(backbone(), preprocess)
        model = factory.build(config.model, 10, preprocess) if named else small
        engine = Engine(config, accelerator, data, model, preprocess)
    engine.micro_batching.evaluation_batch = 89  # of 90 and 89 images: two batches and one
    return engine


def poison(engine: Engine) -> None:
    """Make the losses of one step on the last process not a number."""
    losses_of, step_of = engine._losses, engine._step
    now = [0]

    def step(epoch: int, step: int, *rest: Any) -> Any:
        now[0] = step
        return step_of(epoch, step, *rest)

    def losses(epoch: int, batch: Any) -> tuple[Tensor, Tensor]:
        found, right = losses_of(epoch, batch)
        bad = now[0] == POISON and dist.get_rank() == WORLD - 1
        return found * math.nan if bad else found, right

    engine._step, engine._losses = step, losses  # type: ignore[method-assign]


def train(engine: Engine, epochs: range) -> dict[str, Any]:
    """Train and evaluate each epoch; what a run would show of it."""
    seen: dict[str, Any] = {"losses": [], "skipped": [], "scores": []}
    for epoch in epochs:
        for report in engine.train_epoch(epoch):
            seen["losses"].append(sum_over_processes(report.loss))
            seen["skipped"] += report.anomalies.skipped
        found = engine.evaluate()
        seen["evaluated"] = list(found)
        seen["scores"] += [metrics.scalars() for metrics in found.values()]
    return seen


def held(engine: Engine) -> list[tuple[str, int, int]]:
    """Each parameter, moment and averaged weight: name, bytes on this process, bytes of it all."""
    found = list(engine._model.named_parameters())
    names = {id(parameter): name for name, parameter in found}
    optimizer = engine._optimizer.optimizer
    base = getattr(optimizer, "_base_optimizer", optimizer)  # Lookahead's own state is empty
    for parameter, moments in base.state.items():
        found += [(f"{names[id(parameter)]} {key}", value) for key, value in moments.items()]
    for model in engine._averages.updated_each_step:
        found += [(f"ema {name}", value) for name, value in model.named_parameters()]
    tensors = [
        (name, tensor) for name, tensor in found if isinstance(tensor, Tensor) and tensor.ndim
    ]
    with torch.no_grad():
        return [(name, local_shard(tensor).nbytes, tensor.nbytes) for name, tensor in tensors]


def compare(digits: Path, name: str, changes: dict[str, Any], folder: Path) -> None:
    """Train a case whole and sharded; FOLDER/NAME.RANK.pth tells of both, and the state of the
    small network, where it is that one."""
    seen: dict[str, Any] = {}
    named = "model" in changes
    for how in ("whole", "sharded"):
        # as sharded weights are
        changes = {"memory_format": "contiguous", **changes}
        engine = make_engine(digits, changes, sharded=how == "sharded")
        if name.endswith("poisoned"):
            poison(engine)
        seen[how] = train(engine, range(engine._config.epochs))
        seen[how]["held"] = held(engine)  # before the state is asked for, which cuts again
        if not named:
            tensors = engine.state_dict()
            best = {name: select_weights(tensors, name) for name in seen[how]["evaluated"]}
            seen[how] |= {"tensors": tensors, "best": best}
    save_tensors(folder / f"{name}.{dist.get_rank()}.pth", seen)


def hand_on(digits: Path, folder: Path) -> None:
    """Train an epoch, save, and go on in another engine, sharded or not, for each pair of them."""
    changes = {"ema": EmaConfig(decay=0.9), "optimizer": OptimizerConfig(name="sgd")}
    seen: dict[str, Any] = {}
    for first in ("whole", "sharded"):
        engine = make_engine(digits, changes, sharded=first == "sharded")
        train(engine, range(1))
        path, tensors = folder / f"{first}.state.pth", engine.state_dict()
        if dist.get_rank() == 0:
            save_tensors(path, tensors)
        train(engine, range(1, 2))
        seen[f"{first} unbroken"] = engine.state_dict()
        dist.barrier()
        for second in ("whole", "sharded"):
            engine = make_engine(digits, changes, sharded=second == "sharded")
            engine.load_state_dict(load_tensors(path))
            train(engine, range(1, 2))
            seen[f"{first} to {second}"] = engine.state_dict()
    save_tensors(folder / f"resumed.{dist.get_rank()}.pth", seen)


@contextmanager
def joined(rank: int, place: Path) -> Iterator[None]:
    """Be one of the two processes that meet at a place of their own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    dist.init_process_group("gloo", f"file://{place}", rank=rank, world_size=WORLD)
    yield
    dist.destroy_process_group()


def work(rank: int, digits: Path, folder: Path, cases: dict[str, Any]) -> None:
    """One of the two processes: the cases, and states handed on."""
    with joined(rank, folder / f"meet {len(cases)}"):
        for name, changes in cases.items():
            compare(digits, name, changes, folder)
        if "bf16" not in cases:
            hand_on(digits, folder)


def work_on_network(rank: int, digits: Path, folder: Path, name: str) -> None:
    """One of the two processes: a step of a network of the libraries."""
    FSDP["FSDP_MIN_NUM_PARAMS"] = "100000"
    size = (224, 224) if name.startswith(("vit", "swin")) else (64, 64)
    model = ModelConfig(name=name, dropout=0.0)
    changes = {"model": model, "input": InputConfig(size=size), "epochs": 1}
    with joined(rank, folder / "meet"):
        compare(digits, name, {**changes, "batch_size": 8, "limit": 8}, folder)
