"""A module of a user's: all that can be plugged into a run, as `tests.own_hooks:NAME`."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2

import distcls


@distcls.register_model("own-net")
def network(classes: int) -> nn.Module:
    """Of torchvision's layers, in other clothes."""
    blocks = (Conv2dNormActivation(3 if at == 0 else 16, 16, stride=2 - at % 2) for at in range(8))
    return Clothed(
        nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))
    )


class Clothed(nn.Sequential):
    """With a layer that its forward pass leaves out."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__(inside)
        self.spare = nn.Linear(2, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self[0](pixels)
        return logits


def failing_on_one(classes: int, size: tuple[int, int]) -> nn.Module:
    """A network that one process of two cannot make, when the other waits for it."""
    if os.environ["RANK"] == "1":
        time.sleep(2)
        raise RuntimeError("the network of the user's failed")
    return Linear(classes, size)


@distcls.register_model("own-linear")
class Linear(nn.Module):
    """The smallest there is."""

    def __init__(self, classes: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * size[0] * size[1], classes))

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.layers(pixels)
        return logits


@distcls.register_loss("own-loss")
def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Of labels and of soft labels."""
    return F.cross_entropy(logits, targets, reduction="none") + 1e-3 * logits.square().mean(1)


@distcls.register_metric("brier", higher_is_better=False)
def brier(logits: Any, labels: Any) -> Any:
    """Brier's score of each image."""
    odds = np.exp(logits - logits.max(1, keepdims=True))
    odds /= odds.sum(1, keepdims=True)
    odds[np.arange(len(odds)), labels] -= 1
    return np.square(odds).sum(1)


@distcls.register_optimizer("own-optimizer", momentum=0.5)
def optimizer(groups: Any, lr: float, config: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum)


@distcls.register_schedule("own-schedule", warmup="2 steps")
def schedule(step: int, total_steps: int) -> float:
    return 1 - step / total_steps


of_torchvision = v2.Compose(
    [v2.RandomAffine(10), v2.ColorJitter(0.3, 0.3, 0.3, 0.1), v2.RandomErasing(0.5)]
)
transform: Any = of_torchvision
if importlib.util.find_spec("albumentations") is not None:
    import albumentations as A

    transform = A.Compose(
        [
            A.OneOf([A.HorizontalFlip(p=1), A.RandomBrightnessContrast(p=1)], p=0.8),
            A.Affine(rotate=(-10, 10), p=0.5),
        ]
    )


class Diary:
    """A callback that writes down its calls, and stops after the epoch before the last."""

    def on_train_start(self, run: Any) -> None:
        self._write(run.out, f"start {run.epoch} {run.epochs}")

    def on_epoch_end(self, run: Any, metrics: dict[str, float]) -> bool:
        self._write(run.out, f"epoch {run.epoch} {metrics['val_brier']} {len(run.history)}")
        return bool(run.epoch == run.epochs - 1)

    def on_train_end(self, run: Any) -> None:
        self._write(run.out, f"end {run.epoch} {run.best_epoch}")

    def _write(self, out: Path, line: str) -> None:
        with (out / "diary").open("a") as handle:
            handle.write(line + "\n")


def failing(run: Any, metrics: dict[str, float]) -> None:
    raise RuntimeError("the callback of the user's failed")
