"""From image files to a CSV of labels: the common ways, ours, and the two limits."""

from __future__ import annotations

import csv
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import Contestant
from benchmarks.photographs import CROP, pixels
from distcls.imaging import decode_file
from distcls.system import available_cores

BATCH, WORKERS = 64, 2
"""Of the DataLoaders."""
WARM_UP = 300
"""Photographs of the first round of ours, which does not count; enough for `auto` to measure."""


def tutorial(folder: Path) -> Contestant:
    """The loop that most tutorials show."""
    import torch
    from PIL import Image

    network, transform = _network(), _transforms()

    def classify(files: list[Path]) -> Iterable[int]:
        with torch.no_grad():
            for path in files:
                image = transform(Image.open(path).convert("RGB"))
                yield int(network(image[None]).argmax(1))

    return _round(folder, classify, 16)


def loader(folder: Path, channels_last: bool) -> Contestant:
    """A Dataset and a DataLoader with workers, a batch at a time."""
    import torch

    network = _network()
    if channels_last:
        network = network.to(memory_format=torch.channels_last)

    def classify(files: list[Path]) -> Iterable[int]:
        batches = torch.utils.data.DataLoader(
            _Files(files, _transforms()), batch_size=BATCH, num_workers=WORKERS
        )
        with torch.no_grad():
            for batch in batches:
                if channels_last:
                    batch = batch.to(memory_format=torch.channels_last)  # noqa: PLW2901
                yield from network(batch).argmax(1).tolist()

    return _round(folder, classify, 2 * BATCH)


def timm_way(folder: Path) -> Contestant:
    """As timm's own inference script does it."""
    import timm
    import timm.data
    import torch

    network = timm.create_model("mobilenetv3_large_100", num_classes=1000).eval()
    config = timm.data.resolve_data_config({}, model=network)

    def classify(files: list[Path]) -> Iterable[int]:
        dataset = timm.data.create_dataset("", root=str(folder))
        dataset.reader.samples = dataset.reader.samples[: len(files)]
        batches = timm.data.create_loader(
            dataset,
            input_size=config["input_size"],
            batch_size=BATCH,
            use_prefetcher=False,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            crop_pct=config["crop_pct"],
            num_workers=WORKERS,
        )
        with torch.no_grad():
            for batch, _ in batches:
                yield from network(batch).argmax(1).tolist()

    return _round(folder, classify, 2 * BATCH)


def ours(folder: Path, model: Path, provider: str) -> Contestant:
    """`distcls predict`, from its arguments to the finished file."""
    from distcls.commands.predict import main

    rounds = 0

    def run() -> float:
        nonlocal rounds
        count = WARM_UP if rounds == 0 else len(list(folder.glob("*.jpg")))
        rounds += 1
        with tempfile.TemporaryDirectory() as scratch:
            arguments = [str(folder), "--model", str(model), "--out", f"{scratch}/pre.csv"]
            arguments += ["--provider", provider, "--limit", str(count), "--overwrite"]
            began = time.perf_counter()
            main(arguments)
            return count / (time.perf_counter() - began)

    return run


def draw_stages(folder: Path, model: Path, picture: Path) -> None:
    """One more run of ours, not timed, that draws where its time goes."""
    from distcls.commands.predict import main

    with tempfile.TemporaryDirectory() as scratch:
        arguments = [str(folder), "--model", str(model), "--out", f"{scratch}/pre.csv"]
        main([*arguments, "--profile", str(picture)])


def decode_only(folder: Path) -> Contestant:
    """Reading, decoding and resizing on all cores; the first limit."""
    files = sorted(folder.glob("*.jpg"))

    def decode_share(share: list[Path]) -> None:
        for path in share:
            CROP(decode_file(path))

    def run() -> float:
        shares = [files[start : start + 8] for start in range(0, len(files), 8)]
        with ThreadPoolExecutor(available_cores()) as pool:
            began = time.perf_counter()
            list(pool.map(decode_share, shares))
            return len(files) / (time.perf_counter() - began)

    return run


def infer_only(folder: Path, model: Path, provider: str) -> Contestant:
    """The model alone, with the execution config of `distcls predict`; the second limit."""
    from distcls.data.source import FunctionSource
    from distcls.runtime.autotune import open_fastest
    from distcls.runtime.pipeline import stream
    from distcls.runtime.providers import ExecutionRequest

    images = pixels(folder, 512)
    source = FunctionSource([""] * len(images), lambda index: images[index], uniform=images)
    opened: list[Any] = []

    def run() -> float:
        if not opened:  # after the contestants of the same provider have measured and cached
            asked = ExecutionRequest(provider=provider, images=len(images))
            opened.append(open_fastest(model, asked, source))
        began = time.perf_counter()
        for _ in stream(source, opened[0]):
            pass
        return len(images) / (time.perf_counter() - began)

    return run


class _Files:
    """A Dataset of image files, opened as the tutorials do."""

    def __init__(self, files: list[Path], transform: Callable[..., Any]) -> None:
        self._files = files
        self._transform = transform

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        return self._transform(Image.open(self._files[index]).convert("RGB"))


def _network() -> Any:
    from torchvision import models

    return models.mobilenet_v3_large(weights=None).eval()


def _transforms() -> Any:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def _round(
    folder: Path, classify: Callable[[list[Path]], Iterable[int]], warm_up: int
) -> Contestant:
    """A round of theirs: classify all files and write the CSV; the first round takes a few."""
    files = sorted(folder.glob("*.jpg"))
    rounds = 0

    def run() -> float:
        nonlocal rounds
        chosen = files[:warm_up] if rounds == 0 else files
        rounds += 1
        began = time.perf_counter()
        labels = list(classify(chosen))
        with tempfile.TemporaryFile("w", newline="") as handle:
            rows = csv.writer(handle)
            rows.writerow(["image_id", "label"])
            rows.writerows([path.name, label] for path, label in zip(chosen, labels, strict=True))
        return len(chosen) / (time.perf_counter() - began)

    return run
