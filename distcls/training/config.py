"""The config of a training run: everything `distcls train` can be told."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from distcls.data.config import AugmentConfig, InputConfig, LoaderConfig
from distcls.errors import require
from distcls.evaluation.metrics import MONITORED, default_mode
from distcls.models.config import ModelConfig
from distcls.training.duration import require_duration
from distcls.training.losses.config import DistillConfig, LossConfig
from distcls.training.optimizer_config import OptimizerConfig
from distcls.training.schedule import ScheduleConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Exponential moving average of the weights; where on, it is evaluated beside the weights
    themselves, and the better of both is saved."""

    decay: float | None = None
    """Share of the average that a step keeps, such as 0.999; null is off."""

    def __post_init__(self) -> None:
        value = self.decay
        require(value is None or 0 < value < 1, "decay", value, "between 0 and 1, or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """What does not learn; its batch norms keep their statistics, too."""

    backbone: str | None = None
    """How long all but the head stays as it is, such as `3 epochs` or `10%`; null: not at all."""
    names: tuple[str, ...] = ()
    """Layers or parameters that never learn, as the backbone calls them: `features.0`, `layer[12]`,
    `*.bias`."""

    def __post_init__(self) -> None:
        if self.backbone is not None:
            require_duration("backbone", self.backbone)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Mean of the weights over the last epochs; it is what is evaluated and saved during them."""

    last: int | None = None
    """So many of `epochs` at the end, whose final weights are averaged; null is off. A run that
    stops early has no such mean."""

    def __post_init__(self) -> None:
        last = self.last
        require(last is None or last >= 2, "last", last, "at least 2, or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What decides which epoch is best and when to stop."""

    metric: str = "top1"
    """Validation metric that chooses the best epoch; exact counts images of whose several answers
    all are right."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Whether less or more of it is better; auto knows."""
    patience: int | None = None
    """Epochs without improvement after which training stops early; null never does."""
    min_delta: float = 0.0
    """Smallest change that counts as an improvement."""

    def __post_init__(self) -> None:
        names = ", ".join(MONITORED)
        require(self.metric in MONITORED, "metric", self.metric, f"one of {names}")
        patience = self.patience
        require(patience is None or patience >= 1, "patience", patience, "at least 1, or null")
        require(self.min_delta >= 0, "min_delta", self.min_delta, "0 or more")

    @property
    def resolved_mode(self) -> str:
        """`min` or `max`."""
        return default_mode(self.metric) if self.mode == "auto" else self.mode

    def best_of(self, scores: Mapping[str, float]) -> str:
        """The name of the best score, the first of equals; what is not a number comes last."""
        sign = 1 if self.resolved_mode == "max" else -1
        return max(scores, key=lambda name: (not math.isnan(scores[name]), sign * scores[name]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The full states in `last/`, which a resumed run starts from (each epoch ends with one), and
    the models kept under names of their own beside `best.pth`."""

    every_steps: int | None = None
    """Optimiser steps between two states within an epoch; null: none by steps."""
    every_minutes: float | None = 10.0
    """Minutes between two states within an epoch; null: none by time."""
    keep: int = 2
    """States kept; a damaged one is passed over for the one before."""
    name: str = "{model}_e{epoch}_{score:.5f}.pth"
    """Name of a kept model, made from {model}, {epoch}, {step}, {metric} and {score}."""
    keep_best: int | None = 1
    """Models kept under such names, by score; 0: none, null: all."""
    best_only: bool = True
    """Keep a model only if it is the best so far."""
    whole: bool = False
    """Keep the full state with the model; `--resume FILE` continues from it."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "a number above 0, or null")
        require(self.keep >= 1, "keep", self.keep, "at least 1")
        kept = self.keep_best
        require(kept is None or kept >= 0, "keep_best", kept, "0 or more, or null")
        self._check_name()

    def _check_name(self) -> None:
        fields = {"model": "m", "metric": "top1"}
        try:
            first = self.name.format(**fields, epoch=1, step=1, score=0.5)
            second = self.name.format(**fields, epoch=2, step=2, score=0.5)
        except (KeyError, IndexError, ValueError, AttributeError):
            first = second = ""
        plain = first == Path(first).name and first.endswith(".pth") and first != "best.pth"
        expected = "a file name ending in .pth, of {model} {epoch} {step} {metric} {score:.5f}"
        require(plain, "name", self.name, expected)
        alone = self.keep_best in (0, 1) or first != second
        require(alone, "name", self.name, "a name with {epoch} or {step}: several files are kept")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    data: Path
    """Dataset directory, as `distcls prepare` writes it."""
    out: Path
    """Run directory to write."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 128
    """Global batch: images per optimiser step, over all processes and accumulated batches."""
    lr: float = 1e-3
    """Peak learning rate."""
    seed: int = 0
    """Of the data order, the augmentation, fresh weights and dropout."""
    limit: int | None = None
    """Train and evaluate on at most this many images of each split, to try things out."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass; auto is bf16 on GPUs that have it, fp16 with gradient
    scaling on others, fp32 on CPUs (where bf16 measured slower in training)."""
    layout: Literal["channels_last", "contiguous"] = "channels_last"
    """Memory layout; channels_last trains MobileNetV3 3 times as fast on CPUs. Sharded weights
    (FSDP) are contiguous."""
    compile: bool = False
    """Compile the model with torch.compile; the start of the run says what that cost and saves (the
    bare step of MobileNetV3-Large on 2 CPU cores: 445 to 463 img/s at 28 px after 52 s, 42 to 40 at
    224 after 59 s)."""
    accumulate: int = 1
    """Batches whose gradients add up to one optimiser step; each takes less memory."""
    auto_micro_batch: bool = False
    """Try a step before the first one and double `accumulate` until it fits into memory. Off, as
    batch norm learns from each part alone: the same config shall train alike on every machine."""
    sync_norm: bool = False
    """Batch norm over the images of all processes instead of each one's own, so that the number of
    processes does not change the result; with `accumulate`, over one part at a time."""
    processes: int | None = None
    """Processes this run has to get; it stops if it gets another number. Null takes what comes."""
    threads: int | None = None
    """Compute threads per process on CPUs; null shares the cores among the processes."""
    resume: str = "none"
    """auto continues the run in `out` from its last state, if there is one; a file's name continues
    from that file, which `checkpoint.whole` has written."""
    max_bad_steps: int = 20
    """Steps in a row with a loss or gradient that is not finite, after which the run stops; each is
    skipped by all processes."""
    collective_timeout: float = 600.0
    """Seconds a process waits for the others in a collective operation before it fails; a silent
    network ends the run instead of holding it."""
    log_every: int = 50
    """Steps between two lines in metrics.jsonl."""
    tracker: str | None = None
    """Experiment tracker that gets the figures too: tensorboard, mlflow, wandb and others."""
    quiet: bool = False
    """Print warnings and errors only."""
    json: bool = False
    """Print the result as one JSON object on standard output."""
    model: ModelConfig = ModelConfig()
    input: InputConfig = InputConfig()
    loader: LoaderConfig = LoaderConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    freeze: FreezeConfig = FreezeConfig()
    ema: EmaConfig = EmaConfig()
    average: AverageConfig = AverageConfig()
    monitor: MonitorConfig = MonitorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "max_bad_steps", "log_every"):
            value = getattr(self, name)
            require(value >= 1, name, value, "at least 1")
        for name in ("limit", "processes", "threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1, or null")
        limit = self.collective_timeout
        require(limit > 0, "collective_timeout", limit, "a number of seconds above 0")
        require(self.lr > 0, "lr", self.lr, "a number above 0")
        last = self.average.last
        fits = last is None or last <= self.epochs
        require(fits, "average.last", last, f"at most epochs ({self.epochs})")
        alone = last is None or self.ema.decay is None
        require(alone, "average.last", last, "null with ema.decay: one average is saved")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 or more")
