"""Photographs of about 500x375 as JPEGs, cut out of large images, and a model trained on them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distcls import log
from distcls.errors import UsageError
from distcls.files import atomic_folder, atomic_path
from distcls.imaging import Preprocess, decode_file
from distcls.model_card import ModelCard
from distcls.system import cache_folder
from distcls.task import Task

WIDTH, HEIGHT, QUALITY = 500, 375, 90
SMALLEST = 1000
"""Least length of the shorter side of a source image, in pixels."""
CROP = Preprocess(size=(224, 224), crop_fraction=0.875)
TAUGHT, BATCH = 1024, 32
"""Photographs that the model learns from, and how many at a time."""
EPOCHS_AT_HALF, EPOCHS = 10, 4
"""How often: first at half the size, which is four times as fast, then as it will see them."""


def photographs(pictures: Path, count: int) -> Path:
    """A folder of `count` JPEGs cut out of the large images below `pictures`; made once.

    Of each folder the largest image is used (the others are often smaller copies). Each
    photograph is a region of 1 to 4 times its size, so that fine and coarse detail come as in
    photos; the first part of its name is the source image. Raises UsageError if there is
    no image.
    """
    log.say(f"looking for pictures of at least {SMALLEST} pixels a side in {pictures}")
    sources = large_pictures(pictures)
    if not sources:
        raise UsageError(
            f"{pictures}: no pictures of at least {SMALLEST} pixels a side; photographs as in "
            "Debian's package plasma-workspace-wallpapers are meant"
        )
    told = [f"{path.relative_to(pictures)} {path.stat().st_size}" for path in sources]
    name = hashlib.sha256("\n".join([*told, str(count)]).encode()).hexdigest()[:16]
    folder = cache_folder() / "benchmarks" / name / "photographs"
    if not folder.is_dir():
        log.say(f"cutting {count:,} photographs out of {len(sources)} pictures into {folder}")
        with atomic_folder(folder) as part:
            for place, path in enumerate(sources):
                numbers = range(place, count, len(sources))
                _cut(path, [part / f"{place:03d}_{number:05d}.jpg" for number in numbers], place)
    return folder


def model_for(folder: Path, name: str = "mobilenet_v3_large") -> Path:
    """The network as `best.onnx` beside the photographs' folder, with `best.pth`; made once.

    It was trained for three minutes to classify photographs by their source image. So its
    predictions are confident, as a random network's are not, and agreement between two
    implementations is meaningful.
    """
    target = folder.parent / f"{name}.onnx"
    if target.is_file():
        return target
    import onnx
    import torch

    from distcls.export.onnx import to_onnx
    from distcls.models import factory
    from distcls.models.checkpoint import save_checkpoint
    from distcls.models.config import ModelConfig

    torch.manual_seed(0)
    files = sorted(folder.glob("*.jpg"))
    classes = tuple(sorted({path.name.partition("_")[0] for path in files}))
    config = ModelConfig(name=name, stem_stride=2)
    model = factory.build(config, len(classes), CROP)
    log.say(f"training {name} on them, once: three minutes on 2 cores, more on a slow machine")
    _teach(model, files[:: -(-len(files) // TAUGHT)], classes)
    architecture = {"name": name, "stem_stride": 2}
    card = ModelCard(architecture=architecture, task=Task(classes=classes), preprocess=CROP)
    save_checkpoint(target.with_suffix(".pth"), model, card)
    graph = to_onnx(model, card, 18)
    onnx.helper.set_model_props(graph, card.to_metadata())
    with atomic_path(target) as part:
        part.write_bytes(graph.SerializeToString())
    return target


def large_pictures(pictures: Path, smallest: int = SMALLEST) -> list[Path]:
    """The largest image of each folder that has one with sides of at least `smallest` pixels."""
    found: dict[Path, tuple[int, Path]] = {}
    for path in sorted(pictures.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and path.is_file():
            with Image.open(path) as header:
                width, height = header.size
            known, _ = found.get(path.parent, (0, path))
            if min(width, height) >= smallest and width * height > known:
                found[path.parent] = (width * height, path)
    return [path for _, path in found.values()]


def _cut(path: Path, targets: list[Path], seed: int) -> None:
    rng = np.random.default_rng(seed)
    picture = decode_file(path)
    for target in targets:
        width, height = (round(side * rng.uniform(0.9, 1.1)) for side in (WIDTH, HEIGHT))
        largest = min(4.0, picture.shape[1] / width, picture.shape[0] / height)
        scale = rng.uniform(1.0, largest)
        wide, high = int(width * scale), int(height * scale)
        left = int(rng.integers(picture.shape[1] - wide + 1))
        top = int(rng.integers(picture.shape[0] - high + 1))
        region = picture[top : top + high, left : left + wide]
        photo = cv2.resize(region, (width, height), interpolation=cv2.INTER_AREA)
        quality = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
        if not cv2.imwrite(str(target), photo[..., ::-1], quality):
            raise UsageError(f"{target} cannot be written")


def _teach(model: Any, files: list[Path], classes: tuple[str, ...]) -> None:
    """Train at half the size, then at the full one; then fit the statistics of batch norm."""
    import torch
    from torch.nn import functional

    images = torch.from_numpy(np.stack([CROP(decode_file(path)) for path in files]))
    labels = torch.tensor([classes.index(path.name.partition("_")[0]) for path in files])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    steps = (EPOCHS_AT_HALF + EPOCHS) * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train().to(memory_format=torch.channels_last)
    for epoch in range(EPOCHS_AT_HALF + EPOCHS):
        log.say(f"epoch {epoch + 1} of {EPOCHS_AT_HALF + EPOCHS}")
        step = 2 if epoch < EPOCHS_AT_HALF else 1
        for rows in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            answers = model(images[rows][:, ::step, ::step])
            functional.cross_entropy(answers, labels[rows]).backward()
            optimizer.step()
            schedule.step()
    _fit_norms(model, images)


def _fit_norms(model: Any, images: Any) -> None:
    """Statistics of batch norm as the plain mean over all images; few steps leave them behind."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for batch in images[torch.randperm(len(images))].split(2 * BATCH):
            model(batch)
    model.eval()


def pixels(folder: Path, count: int) -> NDArray[np.uint8]:
    """The first photographs as the model takes them, uint8 [count, 224, 224, 3]."""
    files = sorted(folder.glob("*.jpg"))
    return np.stack([CROP(decode_file(files[place % len(files)])) for place in range(count)])
