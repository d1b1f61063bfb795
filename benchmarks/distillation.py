"""`python -m benchmarks.distillation`: a small network alone, and taught by a larger one.

On scikit-learn's digits. The teacher (MobileNetV3-Small, 1.5 M parameters) learns from all 1,259
training images. The student (`simple_cnn`, 35 thousand) gets 100 of them, and learns once from
their labels alone and once from the teacher's logits as well, with the same images, fresh weights,
augmentation and number of steps; so for five seeds, each with other images and weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import finish
from benchmarks.scores import gain, score, table
from distcls import log
from distcls.data.prepare import PrepareOptions, prepare
from distcls.models.config import ModelConfig
from distcls.training.config import AugmentConfig, DistillConfig, MonitorConfig, TrainConfig

ALONE, TAUGHT = "alone", "taught"
AUGMENT = AugmentConfig(crop_padding=2, rotate=10)
MONITOR = MonitorConfig(metric="loss")
"""With few validation images top-1 is too coarse to compare epochs."""


def teacher(data: Path, out: Path, epochs: int) -> float:
    """Train the teacher; its top-1 on the test split."""
    config = TrainConfig(
        data=data,
        out=out,
        epochs=epochs,
        batch_size=64,
        lr=3e-3,
        quiet=True,
        model=ModelConfig(name="mobilenet_v3_small"),
        augment=AUGMENT,
        monitor=MONITOR,
    )
    return score(config)


def student(data: Path, out: Path, seed: int, given: argparse.Namespace) -> TrainConfig:
    """Options of both students."""
    return TrainConfig(
        data=data,
        out=out,
        epochs=given.epochs,
        batch_size=50,
        lr=given.lr,
        seed=seed,
        limit=given.images,
        quiet=True,
        model=ModelConfig(name="simple_cnn"),
        augment=AUGMENT,
        monitor=MONITOR,
    )


def compare(
    data: Path, scratch: Path, distill: DistillConfig, given: argparse.Namespace
) -> dict[str, list[float]]:
    """Top-1 of both students, seed by seed."""
    scores: dict[str, list[float]] = {ALONE: [], TAUGHT: []}
    for seed in range(given.seeds):
        config = student(data, scratch / f"{ALONE}{seed}", seed, given)
        scores[ALONE].append(score(config))
        taught = dataclasses.replace(config, out=scratch / f"{TAUGHT}{seed}", distill=distill)
        scores[TAUGHT].append(score(taught))
    return scores


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=100, help="that the students learn from")
    parser.add_argument("--epochs", type=int, default=100, help="of the students")
    parser.add_argument("--lr", type=float, default=4e-3, help="of the students")
    parser.add_argument("--teacher-epochs", type=int, default=20)
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--share", type=float, default=0.9, help="the teacher's, of the loss")
    parser.add_argument("--out", type=Path, help="file for the JSON line, too")
    given = parser.parse_args()
    log.set_quiet(True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data = scratch / "digits"
        prepare(PrepareOptions(source="digits", out=data, quiet=True))
        best = teacher(data, scratch / "teacher", given.teacher_epochs)
        distill = DistillConfig(
            teacher=scratch / "teacher" / "best.pth",
            temperature=given.temperature,
            weight=given.share,
        )
        scores = compare(data, scratch, distill, given)
    gained, gain_spread = gain(scores, TAUGHT, ALONE)
    print(f"digits, students of {given.images} images, {given.seeds} seeds; teacher {best:.4f}")
    print(table(scores, ALONE))
    figures: dict[str, Any] = {
        key: value for key, value in vars(given).items() if key not in ("out", "seeds")
    }
    finish(
        "distillation",
        out=given.out,
        **figures,
        teacher=best,
        scores=scores,
        gain=gained,
        gain_spread=gain_spread,
        seconds=round(time.monotonic() - began),
    )


if __name__ == "__main__":
    main()
