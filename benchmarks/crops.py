"""`python -m benchmarks.crops PICTURES`: random resized crops out of the original, and as before.

Before, they were cut out of the image scaled down to 1.15 times the network's input, and enlarged
again; now out of the original pixels. Two figures of both ways:

Top-1 on fine textures at 224 pixels. Each class is one large picture: of those below PICTURES the
ones with the finest detail, and scikit-image's brick, grass and gravel where it is installed.
Training images come from its left half, those of validation and test from the two quarters on the
right; they are grey and of one mean and contrast, so that the texture alone tells them apart.

Images per second on CPUs, read from JPEGs, cropped and augmented, for photographs of two sizes.

The full run takes about 25 minutes on 2 cores, `--quick` about 3.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import alternate, finish, ratio
from benchmarks.common import table as rate_table
from benchmarks.photographs import SMALLEST, large_pictures
from benchmarks.scores import gain, score, table
from distcls import log
from distcls.data.dataset import Dataset, Split
from distcls.data.prepare import PrepareOptions, prepare
from distcls.errors import UsageError
from distcls.imaging import Preprocess, decode_file
from distcls.models.config import ModelConfig
from distcls.system import available_cores
from distcls.training import loader
from distcls.training.augment import Augment
from distcls.training.config import AugmentConfig, TrainConfig
from distcls.training.sampler import uniforms

BEFORE, NOW = "out of 1.15 x the input", "out of the original"
INPUT = (224, 224)
SAMPLES = ("brick.png", "grass.png", "gravel.png")
WINDOW = 1024
"""Side of the part of a large picture that a class is made of, in pixels."""
PHOTO, QUALITY = 400, 90
"""Side of an image of a texture, in pixels of the picture, and its JPEG quality."""
HELD_OUT = 10
"""Images of each class in validation, and twice as many in test."""
SOURCES = 8
"""Pictures that the photographs which are only read are cut out of."""
SIZES = ((375, 500), (1500, 2000))
"""Height and width of the photographs that are only read."""

Pixels = NDArray[np.uint8]
"""Grey [H, W] or RGB [H, W, 3]."""


@contextlib.contextmanager
def way(name: str) -> Iterator[None]:
    """Crop as before: as small images, whose crops are enlarged in any case, still are."""
    if name == NOW:
        yield
        return
    with mock.patch.object(loader, "_small", return_value=True):
        yield


def textures(pictures: Path, classes: int) -> dict[str, Pixels]:
    """The parts of finest detail of the pictures that have most of it, and the samples."""
    found: dict[str, tuple[float, Pixels]] = {}
    for path in large_pictures(pictures, WINDOW):
        name = "_".join(path.relative_to(pictures).with_suffix("").parts)
        found[name] = finest(_grey(path), WINDOW)
        say(f"{name}: detail {found[name][0]:.1f}")
    ranked = sorted(found, key=lambda name: -found[name][0])
    samples = sample_pictures()
    chosen = {name: found[name][1] for name in ranked[: classes - len(samples)]}
    return {**chosen, **samples}


def sample_pictures() -> dict[str, Pixels]:
    """scikit-image's textures, if it is installed."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        say("scikit-image is not installed: no brick, grass and gravel")
        return {}
    folder = Path(package.origin).parent / "data"
    files = [folder / name for name in SAMPLES if (folder / name).is_file()]
    return {path.stem: _grey(path) for path in files}


def finest(picture: Pixels, side: int) -> tuple[float, Pixels]:
    """The square of most detail, by the quarter of it that has least, and that quarter's amount."""
    detail = np.abs(cv2.Laplacian(picture.astype(np.float32), cv2.CV_32F))
    sums = cv2.integral(detail)
    half, best = side // 2, (-1.0, 0, 0)
    for top in range(0, picture.shape[0] - side + 1, 32):
        for left in range(0, picture.shape[1] - side + 1, 32):
            grid = sums[top : top + side + 1 : half, left : left + side + 1 : half]
            quarters = np.diff(np.diff(grid, axis=0), axis=1)
            best = max(best, (float(quarters.min()) / half**2, top, left))
    amount, top, left = best
    return amount, picture[top : top + side, left : left + side]


def write_textures(folder: Path, found: dict[str, Pixels], images: int) -> None:
    """A folder tree SPLIT/CLASS with `images` training images of each class."""
    rng = np.random.default_rng(0)
    counts = {"train": images, "val": HELD_OUT, "test": 2 * HELD_OUT}
    for name, picture in found.items():
        height, width = picture.shape[0] // 2, picture.shape[1] // 2
        regions = {
            "train": picture[:, :width],
            "val": picture[:height, width:],
            "test": picture[height:, width:],
        }
        for split, region in regions.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(counts[split]):
                photo = level(cut(region, (PHOTO, PHOTO), rng))
                write_jpeg(folder / split / name / f"{number:03d}.jpg", photo)


def cut(region: Pixels, size: tuple[int, int], rng: np.random.Generator) -> Pixels:
    """A random part of this size; a region that is smaller goes on as in a mirror."""
    needed = [max(0, each - have) for each, have in zip(size, region.shape, strict=False)]
    if any(needed):
        region = np.pad(region, ((0, needed[0]), (0, needed[1])), mode="reflect")
    top, left = (
        int(rng.integers(have - each + 1)) for each, have in zip(size, region.shape, strict=False)
    )
    return region[top : top + size[0], left : left + size[1]]


def level(image: Pixels) -> Pixels:
    """The image with the mean 128 and the standard deviation 45."""
    values = image.astype(np.float32)
    values = (values - values.mean()) / max(1.0, float(values.std())) * 45 + 128
    return np.asarray(values.clip(0, 255).round(), np.uint8)


def write_jpeg(path: Path, image: Pixels) -> None:
    """Write grey or RGB pixels."""
    pixels = image if image.ndim == 2 else image[..., ::-1]
    if not cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY]):
        raise UsageError(f"{path} cannot be written")


def accuracy(data: Path, scratch: Path, given: argparse.Namespace) -> dict[str, list[float]]:
    """Test top-1 of both ways, seed by seed."""
    scores: dict[str, list[float]] = {BEFORE: [], NOW: []}
    for seed in range(given.seeds):
        for place, (name, values) in enumerate(scores.items()):
            config = TrainConfig(
                data=data,
                out=scratch / f"run{seed}{place}",
                epochs=given.epochs,
                batch_size=32,
                lr=2e-3,
                seed=seed,
                quiet=True,
                model=ModelConfig(name="mobilenet_v3_small"),
                augment=AugmentConfig(flip=0.5, resized_crop=tuple(given.area)),
            )
            began = time.monotonic()
            with way(name):
                values.append(score(config))
            seconds = time.monotonic() - began
            say(f"seed {seed}, {name}: test top-1 {values[-1]:.4f} ({seconds:.0f} s)")
    return scores


def loading(
    pictures: Path, scratch: Path, size: tuple[int, int], given: argparse.Namespace
) -> dict[str, list[float]]:
    """Images per second of both ways, from JPEGs of this size."""
    rng, paths = np.random.default_rng(0), large_pictures(pictures)[:SOURCES]
    folder = scratch / f"photographs{size[0]}"
    for place, path in enumerate(paths):
        picture = decode_file(path)
        if picture.shape[0] < size[0] or picture.shape[1] < size[1]:
            picture = np.asarray(cv2.resize(picture, (size[1], size[0])), np.uint8)
        (folder / "train" / f"class{place}").mkdir(parents=True)
        for number in range(place, given.photographs, len(paths)):
            name = folder / "train" / f"class{place}" / f"{number:03d}.jpg"
            write_jpeg(name, cut(picture, size, rng))
    data = scratch / f"data{size[0]}"
    prepare(PrepareOptions(source=str(folder), out=data, pack="off", format="folder", quiet=True))
    split = Dataset.open(data).split("train")
    return alternate(
        {name: lambda name=name: rate(split, name, given) for name in (BEFORE, NOW)},  # type: ignore[misc]
        given.rounds,
    )


def rate(split: Split, name: str, given: argparse.Namespace) -> float:
    """Images per second of an epoch, read, cropped and flipped, in batches of 32."""
    config = AugmentConfig(flip=0.5, resized_crop=tuple(given.area))
    with way(name):
        crops = loader.make_crops(config, split, INPUT, 0)
    augment = Augment(config, INPUT, cropped=crops is not None)
    reader = loader.Loader(
        split,
        augment.reading(Preprocess(size=INPUT)),
        workers=available_cores(),
        prefetch=3,
        crops=crops,
    )
    began = time.perf_counter()
    for batch in reader.batches(np.array_split(np.arange(len(split)), -(-len(split) // 32))):
        draws = torch.from_numpy(uniforms(0, 0, batch.indices, augment.draws))
        augment(batch.images, draws)
    return len(split) / (time.perf_counter() - began)


def say(text: str) -> None:
    """What the benchmark is doing, as it goes."""
    print(text, flush=True)


def _grey(path: Path) -> Pixels:
    return np.asarray(cv2.cvtColor(decode_file(path), cv2.COLOR_RGB2GRAY), np.uint8)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = f"folder with one folder for each picture, of {SMALLEST} pixels a side or more"
    parser.add_argument("pictures", type=Path, help=what)
    parser.add_argument("--classes", type=int, default=12)
    parser.add_argument("--images", type=int, default=40, help="training images of each class")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--area", type=float, nargs=2, default=(0.35, 1.0), metavar=("LOW", "HIGH"))
    parser.add_argument("--photographs", type=int, default=96, help="read for the speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a trial of what the full run does")
    parser.add_argument("--out", type=Path, help="file for the JSON line, too")
    given = parser.parse_args()
    if given.quick:
        given.classes, given.images, given.epochs, given.seeds = 4, 16, 2, 1
        given.photographs, given.rounds = 32, 2
    return given


def main() -> None:
    """The command."""
    given = _arguments()
    log.set_quiet(True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        rates = {}
        for size in SIZES:
            say(f"reading {given.photographs} photographs of {size[1]}x{size[0]}")
            rates[f"{size[1]}x{size[0]}"] = loading(given.pictures, scratch, size, given)
        found = textures(given.pictures, given.classes)
        say(f"textures: {', '.join(found)}")
        write_textures(scratch / "textures", found, given.images)
        data = scratch / "data"
        options = PrepareOptions(
            source=str(scratch / "textures"), out=data, pack="off", format="folder", quiet=True
        )
        prepare(options)
        scores = accuracy(data, scratch, given)
    for name, measured in rates.items():
        print(f"JPEGs of {name}, read, cropped and augmented at {INPUT[1]} pixels")
        print(rate_table(measured, BEFORE))
    print(f"{len(found)} textures, {given.images} images each, {given.epochs} epochs")
    print(table(scores, BEFORE))
    mean, spread = gain(scores, NOW, BEFORE)
    finish(
        "crops",
        out=given.out,
        area=list(given.area),
        classes=len(found),
        images=given.images,
        epochs=given.epochs,
        scores=scores,
        gain=mean,
        gain_spread=spread,
        images_per_s=rates,
        ratio={name: ratio(measured, NOW, BEFORE) for name, measured in rates.items()},
        seconds=round(time.monotonic() - began),
    )


if __name__ == "__main__":
    main()
