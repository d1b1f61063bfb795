"""`python -m benchmarks.invariance`: the loss of each step on 1, 2 and 4 processes, side by side.

Real runs on scikit-learn's digits, all with the same global batch, augmentation and mixup on, a
teacher, dropout off (its randomness belongs to the process); the loss of every step is recorded,
and the moving average of the weights at the end. With `--sync-batch-norm` in float32 and float64,
where rounding error is small enough to distinguish it from a bug; and without, for contrast: each
process then normalises by its own shard of the batch. The yardstick is one process that computes
with two threads: the very same run, sums taken in another order.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import finish
from benchmarks.launching import train
from distcls.data.prepare import PrepareOptions, prepare
from distcls.imaging import Preprocess
from distcls.model_card import ModelCard
from distcls.models import factory
from distcls.models.checkpoint import load_tensors, save_checkpoint
from distcls.models.config import ModelConfig
from distcls.task import Task
from distcls.training.checkpointing import states

CONTESTANTS = {"1": (1, 1), "2": (2, 1), "4": (4, 1), "1x2 threads": (1, 2)}
"""Processes and the threads of each."""
YARDSTICK = "1x2 threads"
VARIANTS = {
    "sync_batch_norm_float32": ("distcls.train", ["--sync-batch-norm"]),
    "sync_batch_norm_float64": ("benchmarks.train_float64", ["--sync-batch-norm"]),
    "own_norm_float32": ("distcls.train", []),
}
OPTIONS = [
    *("--precision", "fp32", "--model.dropout", "0", "--log-every", "1"),
    *("--augment.crop-padding", "2", "--augment.rotate", "10", "--augment.erase", "0.25"),
    *("--augment.mixup", "0.2", "--ema.decay", "0.9"),
]
SHOWN = 8
"""Rows of the printed table, evenly spread over the steps."""
BEGINNING = 10
"""Steps before training has multiplied the rounding errors much."""

Losses = dict[str, list[float]]
"""Contestant: the loss of each step."""


def teacher(data: Path) -> Path:
    """A model of the digits' classes beside their dataset: fresh weights, always the same.

    Its predictions are not right, but differ from a student's as much as a trained teacher's do.
    """
    path = data.parent / "teacher.pth"
    if not path.exists():
        preprocess, name = Preprocess(size=(28, 28)), "simple_nn"
        torch.manual_seed(0)
        model = factory.build(ModelConfig(name=name), 10, preprocess)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)  # predictions of fresh weights hardly differ between classes
        classes = tuple("0123456789")
        card = ModelCard(
            architecture={"name": name}, task=Task(classes=classes), preprocess=preprocess
        )
        save_checkpoint(path, model, card)
    return path


def average(out: Path) -> dict[str, Tensor]:
    """The moving average of the weights at the end of a run, in float64."""
    tensors: dict[str, Tensor] = load_tensors(states(out / "last")[0])["tensors"]["ema"]
    return {name: value.double() for name, value in tensors.items() if value.is_floating_point()}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest absolute difference of any value."""
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


def run(
    data: Path, scratch: Path, variant: str, options: list[object]
) -> tuple[Losses, dict[str, float]]:
    """The losses of the same recipe on each number of processes, and how far each one's average of
    the weights is from that of one process."""
    module, norm = VARIANTS[variant]
    found: Losses = {}
    averages: dict[str, dict[str, Tensor]] = {}
    for name, (processes, threads) in CONTESTANTS.items():
        out = scratch / f"{variant} {name}"
        steps = train(
            data,
            out,
            *OPTIONS,
            *("--distill.teacher", teacher(data)),
            *options,
            *norm,
            processes=processes,
            threads=threads,
            module=module,
        )
        found[name] = [float(step["loss"]) for step in steps]
        averages[name] = average(out)
    return found, {name: apart(averages["1"], other) for name, other in averages.items()}


def differences(losses: Losses, *, yardstick: bool = False) -> list[float]:
    """The largest absolute difference to one process, step by step, of many or of the yardstick."""
    others = [v for name, v in losses.items() if (name == YARDSTICK) == yardstick]
    return [
        max(abs(loss - alone) for loss in row)
        for alone, *row in zip(losses["1"], *others, strict=True)
    ]


def table(losses: Losses) -> str:
    """Some steps, the first and the last among them."""
    off, usual = differences(losses), differences(losses, yardstick=True)
    count = min(SHOWN, len(off))
    shown = sorted({round(i * (len(off) - 1) / max(1, count - 1)) for i in range(count)})
    heads = [*losses, "difference", "yardstick"]
    lines = [f"{'step':>6}" + "".join(f"{head:>14}" for head in heads)]
    for step in shown:
        row = "".join(f"{values[step]:>14.8f}" for values in losses.values())
        lines.append(f"{step + 1:>6}{row}{off[step]:>14.1e}{usual[step]:>14.1e}")
    return "\n".join(lines)


def summary(losses: Losses) -> dict[str, Any]:
    """The entry of a variant in the JSON line."""
    off, usual = differences(losses), differences(losses, yardstick=True)
    return {
        "largest_difference": max(off),
        f"largest_difference_first_{BEGINNING}_steps": max(off[:BEGINNING]),
        "yardstick": max(usual),
        f"yardstick_first_{BEGINNING}_steps": max(usual[:BEGINNING]),
        "losses": losses,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64, help="global")
    parser.add_argument("--limit", type=int, help="images, for a first look")
    parser.add_argument("--model", default="mobilenet_v3_small")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    given = parser.parse_args()
    options: list[object] = ["--epochs", given.epochs, "--batch-size", given.batch_size]
    options += ["--model.name", given.model]
    options += [] if given.limit is None else ["--limit", given.limit]
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "digits")
        prepare(PrepareOptions(source="digits", out=data, quiet=True))
        for variant in given.variants:
            losses, weights = run(data, Path(scratch), variant, options)
            figures[variant] = summary(losses) | {"averaged_weights": weights}
            off, usual = differences(losses), differences(losses, yardstick=True)
            print(f"{given.model}, {variant}, global batch {given.batch_size}; by processes")
            print(table(losses))
            print(
                f"largest difference over {len(off)} steps: {max(off):.1e} between 1, 2 and 4 "
                f"processes, {max(usual):.1e} between 1 and 2 threads; of the averaged weights "
                f"{max(weights['2'], weights['4']):.1e} and {weights[YARDSTICK]:.1e}\n",
                flush=True,
            )
    finish("invariance", model=given.model, batch_size=given.batch_size, **figures)


if __name__ == "__main__":
    main()
