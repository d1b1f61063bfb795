"""`python -m benchmarks.train_step`: training throughput against the plain tutorial loop.

Both train the same MobileNetV3-Large with AdamW on the same images from real photographs. The
tutorial's way: PNG files opened with Pillow in `Dataset.__getitem__`, torchvision's transforms, a
DataLoader with a worker per core, contiguous (NCHW) fp32. Ours: the defaults of `distcls train`,
with a GPU mixed precision among them, and beside it `--precision fp32` and without CUDA graphs.
Each runs in a separate process: settings of one (the allocator, threads) do not
affect another.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision import datasets, models, transforms

from benchmarks.common import Apart, Contestant, alternate, finish, ratio, table
from distcls.data.prepare import PrepareOptions, prepare
from distcls.models import factory
from distcls.models.config import ModelConfig
from distcls.system import available_cores
from distcls.training.config import AugmentConfig, TrainConfig
from distcls.training.distributed import start
from distcls.training.engine import Engine
from distcls.training.inputs import choose_preprocess, open_input

MODEL = "mobilenet_v3_large"
CLASSES = 4
GPU = torch.cuda.is_available()
SETTINGS = {32: (256, 40), 224: (64, 30)} if GPU else {32: (128, 10), 224: (32, 4)}
"""Side of the images: batch size, and steps of a round."""


def write_photographs(folder: Path, side: int, count: int) -> None:
    """Crops of scikit-learn's two photographs as PNGs, class by class."""
    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        edge = int(rng.integers(side, min(photograph.shape[:2])))
        top = int(rng.integers(photograph.shape[0] - edge + 1))
        left = int(rng.integers(photograph.shape[1] - edge + 1))
        crop = Image.fromarray(photograph[top : top + edge, left : left + edge])
        place = folder / f"class{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        crop.resize((side, side)).save(place / f"{number:05d}.png")


def tutorial(folder: Path, side: int, batch: int, steps: int) -> Contestant:
    """The training loop of most tutorials."""
    pipeline = transforms.Compose(
        [
            transforms.Resize((side, side)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(str(folder), pipeline),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=available_cores(),
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    device = torch.device("cuda" if GPU else "cpu")
    model = models.get_model(MODEL, weights=None, num_classes=CLASSES).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    criterion = nn.CrossEntropyLoss()
    batches: Iterator[list[Tensor]] = itertools.chain.from_iterable(itertools.repeat(loader))

    def run() -> float:
        model.train()
        began = time.perf_counter()
        for images, labels in itertools.islice(batches, steps):
            optimizer.zero_grad()
            criterion(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
        _wait()
        return steps * batch / (time.perf_counter() - began)

    return run


def _wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def ours(
    folder: Path, side: int, batch: int, steps: int, changes: dict[str, Any] | None = None
) -> Contestant:
    """`distcls train` with its defaults, on the dataset directory that `prepare` made."""
    config = TrainConfig(
        data=folder,
        out=folder / "unused",
        epochs=10_000,
        batch_size=batch,
        lr=1e-3,
        **(changes or {}),
        # torchvision's own stem, as in the tutorial's model
        model=ModelConfig(name=MODEL, stem_stride=2),
        augment=AugmentConfig(flip=0.5),
    )
    accelerator = start(config)
    data = open_input(config)
    preprocess = choose_preprocess(config.input, data.train, None)
    model = factory.build(config.model, len(data.classes), preprocess)
    engine = Engine(config, accelerator, data, model, preprocess)
    reports = itertools.chain.from_iterable(engine.train_epoch(e) for e in itertools.count())

    def run() -> float:
        began = time.perf_counter()
        images = sum(report.images for report in itertools.islice(reports, steps))
        _wait()
        return images / (time.perf_counter() - began)

    return run


def compare(side: int, rounds: int) -> dict[str, list[float]]:
    """Images per second of both ways at one size."""
    batch, steps = SETTINGS[side]
    with tempfile.TemporaryDirectory() as scratch:
        images, prepared = Path(scratch, "images"), Path(scratch, "prepared")
        write_photographs(images, side, 2 * batch * steps)
        prepare(PrepareOptions(source=str(images), out=prepared, quiet=True))
        ways: dict[str, tuple[Any, ...]] = {
            "tutorial": (tutorial, images, side, batch, steps),
            "distcls": (ours, prepared, side, batch, steps),
        }
        if GPU:
            ways["distcls, fp32"] = (ours, prepared, side, batch, steps, {"precision": "fp32"})
            ways["distcls, no graphs"] = (
                ours,
                prepared,
                side,
                batch,
                steps,
                {"cuda_graphs": False},
            )
        with contextlib.ExitStack() as stack:
            started = {name: stack.enter_context(Apart(*way)) for name, way in ways.items()}
            return alternate(started, rounds)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--side", type=int, choices=SETTINGS, help="images of this size only")
    given = parser.parse_args()
    figures: dict[str, Any] = {}
    for side in [given.side] if given.side else SETTINGS:
        rates = compare(side, given.rounds)
        print(f"training {MODEL}, {side}x{side}, batch {SETTINGS[side][0]}")
        print(table(rates, "tutorial"), end="\n\n", flush=True)
        figures[f"ratio_{side}"] = round(ratio(rates, "distcls", "tutorial"), 2)
        figures[f"images_per_s_{side}"] = {k: [round(r, 1) for r in v] for k, v in rates.items()}
    finish("train_step", model=MODEL, **figures)


if __name__ == "__main__":
    main()
