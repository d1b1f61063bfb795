"""Sequential runs in this process, and the scores of their models on the test split."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from distcls.commands import evaluate
from distcls.training.config import TrainConfig
from distcls.training.run import train


def score(config: TrainConfig) -> float:
    """Train; top-1 of the run's `best.pth` on the test split."""
    train(config)
    return top1_on_test(config.out / "best.pth", config.data)


def top1_on_test(model: Path, data: Path) -> float:
    """Top-1 on the test split, as `distcls evaluate` prints it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        evaluate.main(["--model", str(model), "--data", str(data), "--json", "--quiet"])
    return float(json.loads(printed.getvalue())["top1"])


def spread(values: Sequence[float]) -> float:
    """Standard deviation over the seeds (of the sample); 0 of a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(scores: dict[str, list[float]], baseline: str) -> str:
    """Mean, spread and extremes over the seeds, and the mean gain over the baseline, seed by seed.

    The gain's spread is that of the differences: what both have in common (the seed's images and
    weights) cancels out.
    """
    heads = ("mean", "spread", "min", "max", "gain", "spread")
    lines = [f"{'test top-1':<28}" + "".join(f"{head:>9}" for head in heads)]
    for name, values in scores.items():
        figures = (
            *(statistics.mean(values), spread(values), min(values), max(values)),
            *gain(scores, name, baseline),
        )
        lines.append(f"{name:<28}" + "".join(f"{figure:>9.4f}" for figure in figures))
    return "\n".join(lines)


def gain(scores: dict[str, list[float]], name: str, baseline: str) -> tuple[float, float]:
    """Mean and spread of a contestant's gain over the baseline, seed by seed."""
    found = differences(scores, name, baseline)
    return statistics.mean(found), spread(found)


def differences(scores: dict[str, list[float]], name: str, baseline: str) -> list[float]:
    """A contestant's gain over the baseline, seed by seed."""
    return [own - other for own, other in zip(scores[name], scores[baseline], strict=True)]
