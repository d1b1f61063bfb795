"""The config of a training run: everything `distcls train` can be told."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Literal

from distcls.data.config import AugmentConfig, InputConfig, LoaderConfig
from distcls.errors import BadValue, require
from distcls.evaluation.metrics import HIGHER_IS_BETTER, default_mode
from distcls.models.config import ModelConfig

DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(%|epochs?|steps?)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov, Hutter: Decoupled Weight Decay Regularization, 2017)."""

    weight_decay: float = 0.05
    """Decoupled weight decay; norms and biases are spared."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.999
    """Decay of the mean of squared gradients."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this norm, after unscaling; null leaves them."""

    def __post_init__(self) -> None:
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, name, value, "a number from 0 to below 1")
        clip = self.clip_norm
        require(clip is None or clip > 0, "clip_norm", clip, "a number above 0, or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate: linear warm-up, then half a cosine."""

    warmup: str = "5%"
    """How long the rate rises to `lr`: steps, epochs or percent of the run, such as `5%`."""
    final: float = 0.01
    """Rate at the end, as a share of `lr`."""

    def __post_init__(self) -> None:
        known = DURATION.fullmatch(self.warmup.strip()) is not None
        require(known, "warmup", self.warmup, "a duration: '100 steps', '2 epochs' or '5%'")
        require(0 <= self.final <= 1, "final", self.final, "a share from 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Cross-entropy."""

    label_smoothing: float = 0.0
    """Share of each label's weight that is spread over all classes."""

    def __post_init__(self) -> None:
        value = self.label_smoothing
        require(0 <= value < 1, "label_smoothing", value, "a number from 0 to below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Exponential moving average of the weights; where on, it is what is evaluated and saved."""

    decay: float | None = None
    """Share of the average that a step keeps, such as 0.999; null is off."""

    def __post_init__(self) -> None:
        value = self.decay
        require(value is None or 0 < value < 1, "decay", value, "between 0 and 1, or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What decides which epoch is best and when to stop."""

    metric: str = "top1"
    """Validation metric that chooses the best epoch."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Whether less or more of it is better; auto knows."""
    patience: int | None = None
    """Epochs without improvement after which training stops early; null never does."""
    min_delta: float = 0.0
    """Smallest change that counts as an improvement."""

    def __post_init__(self) -> None:
        names = ", ".join(HIGHER_IS_BETTER)
        require(self.metric in HIGHER_IS_BETTER, "metric", self.metric, f"one of {names}")
        patience = self.patience
        require(patience is None or patience >= 1, "patience", patience, "at least 1, or null")
        require(self.min_delta >= 0, "min_delta", self.min_delta, "0 or more")

    @property
    def resolved_mode(self) -> str:
        """`min` or `max`."""
        return default_mode(self.metric) if self.mode == "auto" else self.mode


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The full states in `last/`, which a resumed run starts from; each epoch ends with one."""

    every_steps: int | None = None
    """Optimiser steps between two states within an epoch; null: none by steps."""
    every_minutes: float | None = 10.0
    """Minutes between two states within an epoch; null: none by time."""
    keep: int = 2
    """States kept; a damaged one is passed over for the one before."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "a number above 0, or null")
        require(self.keep >= 1, "keep", self.keep, "at least 1")


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
    """Memory layout; channels_last trains MobileNetV3 3 times as fast on CPUs."""
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
    resume: Literal["none", "auto"] = "none"
    """auto continues the run in `out` from its last state, if there is one."""
    max_bad_steps: int = 20
    """Steps in a row with a loss or gradient that is not finite, after which the run stops; each is
    skipped by all processes."""
    collective_timeout: float = 600.0
    """Seconds a process waits for the others in a collective operation before it fails; a silent
    network ends the run instead of holding it."""
    log_every: int = 50
    """Steps between two lines in metrics.jsonl."""
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
    ema: EmaConfig = EmaConfig()
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
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 or more")


def duration_in_steps(text: str, steps_per_epoch: int, total_steps: int) -> int:
    """'100 steps', '2 epochs' or '5%' in optimiser steps. Every duration comes through here."""
    match = DURATION.fullmatch(text.strip())
    if match is None:
        raise BadValue("duration", text, "'100 steps', '2 epochs' or '5%'")
    amount, unit = float(match[1]), match[2]
    scale = {"%": total_steps / 100, "e": steps_per_epoch, "s": 1}[unit[0]]
    return round(amount * scale)
