"""`python -m benchmarks.audit SOURCE`: what `distcls audit` finds of what was planted.

SOURCE is the folder of FashionMNIST's IDX files. Into its 70,000 images are planted: 200 copies of
test images among the training images, 50 near copies (shifted by up to 3 pixels, encoded as JPEG
with quality 70 to 95, or brightened, alone or together), and 30 blurred training images; 3 % of
the training labels are flipped. `distcls audit` then looks at them in a process of its own. Of the
near copies that it reports besides, those that are in the published data, a picture shows the
first 100 (`--show FILE.png`).

Instead of these: `--labels N` measures label errors on N of the 70,000 images (70000 takes hours),
`--pictures N` time and memory for a folder of N small PNG files, and `--divisions N` how often the
tests of drift take N random divisions of the 70,000 images for different ones, and what they see.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.common import finish
from distcls.audit.drift import SIGNIFICANT, measure_tests, measures_of
from distcls.audit.scan import scan
from distcls.data.image_dataset import open_dataset, opened

Images = NDArray[np.uint8]

COPIES, NEAR, BLURRED, FLIPPED = 200, 50, 30, 0.03
NAMES = ("images-idx3", "labels-idx1")


def read(path: Path, dimensions: int) -> Images:
    """An IDX file of unsigned bytes, packed by gzip."""
    data = gzip.decompress(path.read_bytes())
    shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def write(folder: Path, prefix: str, images: Images, labels: Images) -> None:
    """The two IDX files of a split."""
    for name, values in zip(NAMES, (images, labels), strict=True):
        header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
        (folder / f"{prefix}-{name}-ubyte").write_bytes(header + values.tobytes())


def near_copy(image: Images, number: int, rng: np.random.Generator) -> Images:
    """A copy that was shifted, encoded again, brightened, or all of it, by turns."""
    kinds = ("shift", "encode", "brighten", "shift encode brighten")[number % 4]
    if "shift" in kinds:
        dy, dx = 0, 0
        while dy == dx == 0:
            dy, dx = rng.integers(-3, 4, 2).tolist()
        move = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
        image = np.asarray(cv2.warpAffine(image, move, image.shape[::-1]), np.uint8)
    if "brighten" in kinds:
        gain, more = rng.uniform(1.05, 1.3), rng.uniform(5, 25)
        image = np.clip(image * gain + more, 0, 255).astype(np.uint8)
    if "encode" in kinds:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(70, 96))]
        data = cv2.imencode(".jpg", image, quality)[1]
        image = np.asarray(cv2.imdecode(data, cv2.IMREAD_GRAYSCALE), np.uint8)
    return image


def flipped(labels: Images, rng: np.random.Generator) -> tuple[Images, NDArray[np.int64]]:
    """The labels with some of them wrong, and which."""
    chosen = rng.choice(len(labels), round(FLIPPED * len(labels)), replace=False)
    wrong = labels.copy()
    wrong[chosen] = (wrong[chosen] + rng.integers(1, 10, len(chosen))) % 10
    return wrong, chosen


MEASURED = """
import json, resource, subprocess, sys, time
began = time.monotonic()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({
    "seconds": round(time.monotonic() - began, 1),
    "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    "peak_mib": round(usage.ru_maxrss / 1024),
}))
sys.exit(code)
"""
"""Runs a command and prints what it took. In a small process: to the peak of a process counts that
of the one that started it, and this one has torch and all images."""


def audit(
    folder: Path, out: Path, *options: str, format: str = "idx"
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The rows of audit.csv; seconds by the clock and of the CPU, peak memory in MiB."""
    call = [sys.executable, "-m", "distcls", "audit", str(folder), "--format", format, "--out"]
    call += [str(out), *options]
    call = [sys.executable, "-c", MEASURED, *call]
    process = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"distcls audit ended with {process.returncode}")
    cost = json.loads(process.stdout)
    with (out / "audit.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    return rows, cost


def copies(source: Path, scratch: Path, show: Path | None) -> dict[str, Any]:
    """Plant and look for copies and blurred images, in all 70,000."""
    rng = np.random.default_rng(0)
    parts = {
        prefix: [
            read(source / f"{prefix}-{name}-ubyte.gz", 3 - 2 * place)
            for place, name in enumerate(NAMES)
        ]
        for prefix in ("train", "t10k")
    }
    (images, labels), (tests, test_labels) = parts["train"], parts["t10k"]
    labels, _ = flipped(labels, rng)
    images = images.copy()
    blurred = rng.choice(len(images), BLURRED, replace=False)
    for at in blurred.tolist():
        images[at] = cv2.GaussianBlur(images[at], (0, 0), rng.uniform(1.5, 3))
    chosen = rng.choice(len(tests), COPIES + NEAR, replace=False)
    planted = [tests[at] for at in chosen[:COPIES]]
    planted += [near_copy(tests[at], n, rng) for n, at in enumerate(chosen[COPIES:].tolist())]
    write(
        scratch,
        "train",
        np.concatenate([images, np.stack(planted)]),
        np.concatenate([labels, test_labels[chosen]]),
    )
    write(scratch, "t10k", tests, test_labels)
    rows, cost = audit(scratch, scratch / "audit")
    names = {f"train/{len(images) + n:05d}": n for n in range(len(planted))}
    exact = {row["image"] for row in rows if row["kind"] in ("leak", "conflict", "duplicate")}
    near = {row["image"]: row["related"] for row in rows if row["kind"].startswith("near_")}
    dim = {row["image"] for row in rows if row["kind"] == "blurred"}
    copied = [name for name, n in names.items() if n < COPIES]
    nearly = [name for name, n in names.items() if n >= COPIES]
    others = {name: other for name, other in near.items() if name not in names}
    if show is not None:
        _draw(others, np.concatenate([images, np.stack(planted)]), tests, show)
    return {
        "images": len(images) + len(planted) + len(tests),
        "exact_found": sum(name in exact for name in copied) / len(copied),
        "near_found": sum(name in near or name in exact for name in nearly) / len(nearly),
        "near_reported_of_the_published_data": len(others),
        "blurred_found": sum(f"train/{at:05d}" in dim for at in blurred.tolist()) / BLURRED,
        "blurred_reported": len(dim),
        **cost,
    }


def _draw(pairs: dict[str, str], images: Images, tests: Images, path: Path) -> None:
    def picture(name: str) -> Images:
        split, _, number = name.partition("/")
        return np.asarray((images if split == "train" else tests)[int(number)])

    tiles = [np.hstack([picture(a), picture(b)]) for a, b in list(pairs.items())[:100]]
    tiles = [
        np.pad(np.kron(tile, np.ones((2, 2), np.uint8)), 4, constant_values=128) for tile in tiles
    ]
    tiles += [np.full_like(tiles[0], 128)] * (-len(tiles) % 10)
    rows = [np.hstack(tiles[at : at + 10]) for at in range(0, len(tiles), 10)]
    cv2.imwrite(str(path), np.vstack(rows))


def everything(source: Path) -> tuple[Images, Images]:
    """All 70,000 images and their labels."""
    found = [
        np.concatenate(
            [read(source / f"{p}-{name}-ubyte.gz", 3 - 2 * n) for p in ("train", "t10k")]
        )
        for n, name in enumerate(NAMES)
    ]
    return found[0], found[1]


def labels(source: Path, scratch: Path, count: int, recipe: str) -> dict[str, Any]:
    """Flip and look for labels, in some of the images."""
    rng = np.random.default_rng(0)
    images, true = everything(source)
    chosen = np.r_[rng.permutation(60_000), 60_000:70_000][:count]
    wrong, places = flipped(true[chosen], rng)
    write(scratch, "train", images[chosen], wrong)
    rows, cost = audit(scratch, scratch / "audit", "--label-errors", "--recipe", recipe)
    found = [row["image"] for row in rows if row["kind"] == "label_error"]
    planted = {f"train/{at:05d}" for at in places.tolist()}
    right = [name in planted for name in found]
    summary = json.loads((scratch / "audit" / "audit.json").read_text())
    return {
        "images": count,
        "judges_right": round(summary["label_errors_accuracy"], 4),
        "flipped": len(planted),
        "precision_at_the_number_flipped": round(sum(right[: len(planted)]) / len(planted), 3),
        "found_of_the_flipped": round(sum(right) / len(planted), 3),
        "reported": len(found),
        **cost,
    }


def pictures(source: Path, scratch: Path, count: int) -> dict[str, Any]:
    """Look at a folder of PNG files of 32x32 pixels: the published images, then these turned."""
    images, true = everything(source)
    folder = scratch / "pictures"
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
    for number in range(count):
        turns, at = divmod(number, len(images))
        small = cv2.resize(images[at], (32, 32), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / str(true[at]) / f"{number:07d}.png"), np.rot90(small, turns))
    rows, cost = audit(folder, scratch / "audit", format="folder")
    return {"images": count, "findings": len(rows), **cost}


def divisions(source: Path, scratch: Path, count: int) -> dict[str, Any]:
    """Random divisions into train, val and test (70, 10 and 20 %) that seem to differ, and changes
    of test that are seen."""
    images, true = everything(source)
    write(scratch, "train", images, true)
    write(scratch, "t10k", images[:1], true[:1])
    measures = measures_of(scan(opened(open_dataset(scratch, format="idx")), None))
    measures = {name: values[: len(images)] for name, values in measures.items()}
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for size in (500, 5_000, 70_000):
        alarms, chance = 0, 0
        for _ in range(count):
            splits = rng.choice(["train", "val", "test"], size, p=[0.7, 0.1, 0.2])
            rows = rng.permutation(len(images))[:size]
            drawn = {name: values[rows] for name, values in measures.items()}
            tests = measure_tests(drawn, splits.tolist())
            alarms += any(each.differs for each in tests)
            chance += any(each.p < SIGNIFICANT for each in tests)
        found[f"alarms_of_{size}_images"] = alarms
        found[f"below_{SIGNIFICANT}_of_{size}_images"] = chance
    splits = ["train"] * 60_000 + ["test"] * 10_000
    published = {each.measure: each for each in measure_tests(measures, splits)}
    found["published_split"] = {name: round(each.distance, 4) for name, each in published.items()}
    for gain in (1.02, 1.05, 1.1):
        brighter = measures["brightness"].copy()
        brighter[60_000:] *= gain
        [test] = measure_tests({"size": brighter}, splits)
        found[f"test_brighter_by_{gain}"] = [round(test.distance, 3), test.differs]
    return {"divisions": count, **found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a JSON line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=__doc__)
    parser.add_argument("source", type=Path, help="folder of FashionMNIST's IDX files")
    parser.add_argument("--show", type=Path, help="PNG of the near copies in the published data")
    for name in ("labels", "pictures", "divisions"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help="measure that instead")
    parser.add_argument("--recipe", default="fashion_mnist", help="of the runs for label errors")
    parser.add_argument("--out", type=Path, help="file for the JSON line")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        if options.labels:
            found = labels(options.source, Path(scratch), options.labels, options.recipe)
        elif options.pictures:
            found = pictures(options.source, Path(scratch), options.pictures)
        elif options.divisions:
            found = divisions(options.source, Path(scratch), options.divisions)
        else:
            found = copies(options.source, Path(scratch), options.show)
    for name, value in found.items():
        print(f"{name:<40} {value}")
    finish("audit", out=options.out, **found)


if __name__ == "__main__":
    main()
