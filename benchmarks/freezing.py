"""`python -m benchmarks.freezing SOURCE`: from a checkpoint of other classes, and from scratch.

SOURCE is the folder of FashionMNIST's IDX files. A network is trained on 8 of the 10 classes of
clothes (bags and ankle boots left out, first half of the training images). Then all 10 are learned
from 1,000 images of the other half (100 of them validate), for equal epochs and with one recipe:
from scratch; from that checkpoint; and from it with the backbone frozen for the first epochs, then
released. The head, of another number of classes, is fresh in all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import finish
from benchmarks.scores import gain, score, table
from distcls import log
from distcls.data.formats.idx import find_idx, read_idx
from distcls.data.prepare import PrepareOptions, prepare
from distcls.models.config import ModelConfig
from distcls.training.config import AugmentConfig, FreezeConfig, TrainConfig

KNOWN = 8
"""Classes of the checkpoint: labels 0 to 7, T-shirt to sneaker."""
SCRATCH, TUNED, FROZEN = "from scratch", "from the checkpoint", "frozen, then released"

Images = NDArray[np.uint8]


def split_source(source: Path, folder: Path, images: int, seed: int) -> tuple[Path, Path]:
    """Two sources of IDX files: 8 classes of the first half, and 10 of `images` of the second."""
    paths = find_idx(source)
    read = {name: read_idx(path, 3 if "images" in name else 1) for name, path in paths.items()}
    pixels, labels = read["train-images"].values, read["train-labels"].values
    test = read["t10k-images"].values, read["t10k-labels"].values
    half = len(labels) // 2
    known = np.flatnonzero(labels[:half] < KNOWN)
    some = half + np.random.default_rng(seed).choice(len(labels) - half, images, replace=False)
    seen = np.flatnonzero(test[1] < KNOWN)
    first = write_idx(folder / "first", pixels[known], labels[known], test[0][seen], test[1][seen])
    return first, write_idx(folder / "second", pixels[some], labels[some], *test)


def write_idx(
    folder: Path, train: Images, train_labels: Images, test: Images, test_labels: Images
) -> Path:
    """Write the four IDX files."""
    folder.mkdir(parents=True)
    values = {
        "train-images-idx3-ubyte": train,
        "train-labels-idx1-ubyte": train_labels,
        "t10k-images-idx3-ubyte": test,
        "t10k-labels-idx1-ubyte": test_labels,
    }
    for name, array in values.items():
        header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
        (folder / name).write_bytes(header + array.tobytes())
    return folder


def recipe(data: Path, out: Path, epochs: int, seed: int = 0) -> TrainConfig:
    """Options common to all runs."""
    return TrainConfig(
        data=data,
        out=out,
        epochs=epochs,
        batch_size=64,
        lr=2e-3,
        seed=seed,
        quiet=True,
        model=ModelConfig(name="mobilenet_v3_small"),
        augment=AugmentConfig(flip=0.5, crop_padding=2),
    )


def compare(
    data: Path, scratch: Path, checkpoint: Path, given: argparse.Namespace
) -> dict[str, list[float]]:
    """Top-1 of the three ways, seed by seed."""
    scores: dict[str, list[float]] = {SCRATCH: [], TUNED: [], FROZEN: []}
    for seed in range(given.seeds):
        config = recipe(data, scratch / f"scratch{seed}", given.epochs, seed)
        scores[SCRATCH].append(score(config))
        model = dataclasses.replace(config.model, pretrained=str(checkpoint))
        tuned = dataclasses.replace(config, out=scratch / f"tuned{seed}", model=model)
        scores[TUNED].append(score(tuned))
        freeze = FreezeConfig(backbone=f"{given.frozen_epochs} epochs")
        frozen = dataclasses.replace(tuned, out=scratch / f"frozen{seed}", freeze=freeze)
        scores[FROZEN].append(score(frozen))
    return scores


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of FashionMNIST's IDX files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1_000, help="of the 10 classes")
    parser.add_argument("--epochs", type=int, default=10, help="on the 10 classes")
    parser.add_argument("--frozen-epochs", type=int, default=3, help="the first of them")
    parser.add_argument("--first-epochs", type=int, default=3, help="on the 8 classes")
    parser.add_argument("--out", type=Path, help="file for the JSON line, too")
    given = parser.parse_args()
    log.set_quiet(True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sources = split_source(given.source, scratch / "idx", given.images, seed=0)
        first, second = scratch / "first", scratch / "second"
        for source, data in zip(sources, (first, second), strict=True):
            prepare(PrepareOptions(source=str(source), out=data, format="idx", quiet=True))
        known = score(recipe(first, scratch / "known", given.first_epochs))
        scores = compare(second, scratch, scratch / "known" / "best.pth", given)
    print(f"{given.images} images of 10 classes, {given.epochs} epochs, {given.seeds} seeds")
    print(f"checkpoint: {KNOWN} classes, {given.first_epochs} epochs, test top-1 {known:.4f}")
    print(table(scores, SCRATCH))
    gains = {name: gain(scores, name, SCRATCH) for name in (TUNED, FROZEN)}
    finish(
        "freezing",
        out=given.out,
        images=given.images,
        epochs=given.epochs,
        frozen_epochs=given.frozen_epochs,
        first_epochs=given.first_epochs,
        checkpoint_top1=known,
        scores=scores,
        gain={name: mean for name, (mean, _) in gains.items()},
        gain_spread={name: spread for name, (_, spread) in gains.items()},
        seconds=round(time.monotonic() - began),
    )


if __name__ == "__main__":
    main()
