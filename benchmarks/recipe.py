"""`python -m benchmarks.recipe SOURCE`: an ablation of FashionMNIST's recipe.

SOURCE is the folder of FashionMNIST's IDX files. `configs/fashion_mnist.yaml` trains on a subset of
the images for fewer epochs: as it is, with mixup or CutMix added, and with each of its
settings left out; each by the command, on every seed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.common import finish
from benchmarks.launching import ROOT, call, train
from benchmarks.scores import differences, spread, table
from distcls.data.prepare import PrepareOptions, prepare
from distcls.system import available_cores

WHOLE = "the recipe"
CHANGES: dict[str, tuple[object, ...]] = {
    WHOLE: (),
    "mixup too, alpha 0.2": ("--augment.mixup", 0.2),
    "CutMix too, alpha 1, half": ("--augment.cutmix", 1, "--augment.mix-probability", 0.5),
    "without EMA": ("--ema.decay", "null"),
    "without erasing": ("--augment.erase", 0),
    "without dropout": ("--model.dropout", 0),
    "without smoothing": ("--loss.label-smoothing", 0),
    "without flips and shifts": ("--augment.flip", 0, "--augment.crop-padding", 0),
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder of FashionMNIST's IDX files")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--images", type=int, default=12_000, help="for training")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the cores")
    parser.add_argument("--out", type=Path, help="file for the JSON line, too")
    given = parser.parse_args()
    began = time.monotonic()
    scores: dict[str, list[float]] = {name: [] for name in CHANGES}
    common = ["--config", ROOT / "configs/fashion_mnist.yaml"]
    common += ["--limit", given.images, "--epochs", given.epochs]
    threads = max(1, available_cores() // given.at_once)
    with (
        tempfile.TemporaryDirectory() as scratch,
        ThreadPoolExecutor(given.at_once) as pool,
    ):
        data = Path(scratch, "fashion")
        prepare(PrepareOptions(source=given.source, out=data, val_fraction=0.05, quiet=True))

        def score(run: tuple[str, int]) -> float:
            """Test top-1 of the recipe with one change, on one seed."""
            name, seed = run
            out = Path(scratch, f"{name} {seed}")
            train(data, out, *common, "--seed", seed, *CHANGES[name], threads=threads)
            model = ("--model", out / "best.pth", "--data", data)
            top1 = float(call("evaluate", *model, "--json", "--quiet")["top1"])
            print(f"seed {seed}, {name}: {top1:.4f}", flush=True)
            return top1

        runs = [(name, seed) for name in CHANGES for seed in range(given.seeds)]
        for (name, _), top1 in zip(runs, pool.map(score, runs), strict=True):
            scores[name].append(top1)
    print(table(scores, WHOLE))
    gains = {name: differences(scores, name, WHOLE) for name in CHANGES}
    finish(
        "recipe",
        out=given.out,
        images=given.images,
        epochs=given.epochs,
        scores=scores,
        gain={name: statistics.mean(values) for name, values in gains.items()},
        gain_spread={name: spread(values) for name, values in gains.items()},
        seconds=round(time.monotonic() - began),
    )


if __name__ == "__main__":
    main()
