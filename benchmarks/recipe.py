"""`python -m benchmarks.recipe SOURCE`: what each part of FashionMNIST's recipe gives.

SOURCE is the folder of FashionMNIST's IDX files. `configs/fashion_mnist.yaml` trains on a part of
the images for fewer epochs: as it is, with each of its parts left out, and with mixup or CutMix
added; each by the command, seed by seed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.common import finish
from benchmarks.launching import ROOT, train
from benchmarks.scores import differences, spread, table, top1_on_test
from distcls.data.prepare import PrepareOptions, prepare

WHOLE = "the recipe"
CHANGES: dict[str, tuple[object, ...]] = {
    WHOLE: (),
    "without EMA": ("--ema.decay", "null"),
    "without erasing": ("--augment.erase", 0),
    "without dropout": ("--model.dropout", 0),
    "without smoothing": ("--loss.label-smoothing", 0),
    "without flips and shifts": ("--augment.flip", 0, "--augment.crop-padding", 0),
    "mixup too, alpha 0.2": ("--augment.mixup", 0.2),
    "CutMix too, alpha 1, half": ("--augment.cutmix", 1, "--augment.mix-probability", 0.5),
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder of FashionMNIST's IDX files")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--images", type=int, default=12_000, help="for training")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--threads", type=int, help="of the training; all cores unless given")
    parser.add_argument("--out", type=Path, help="file for the JSON line, too")
    given = parser.parse_args()
    began = time.monotonic()
    scores: dict[str, list[float]] = {name: [] for name in CHANGES}
    common = ["--config", ROOT / "configs/fashion_mnist.yaml"]
    common += ["--limit", given.images, "--epochs", given.epochs]
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "fashion")
        prepare(PrepareOptions(source=given.source, out=data, val_fraction=0.05, quiet=True))
        for seed in range(given.seeds):
            for number, (name, change) in enumerate(CHANGES.items()):
                out = Path(scratch, f"{seed}-{number}")
                options = [*common, "--seed", seed, *change]
                train(data, out, *options, threads=given.threads)
                scores[name].append(top1_on_test(out / "best.pth", data))
                print(f"seed {seed}, {name}: {scores[name][-1]:.4f}", flush=True)
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
