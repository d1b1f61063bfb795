"""`python -m benchmarks.folders`: what a stranger's folder becomes, with the defaults alone.

Six folders are made by script from pictures, fonts and icons of the system, each with a folder of
held-out pictures of other places, fonts or artists: four subjects, two small classes, small grey
letters, three unbalanced classes, fine textures, transparent icons. Each is trained on with no
option but `--data`, `--out` and `--seed`, once per seed, and predicted; `--checkout DIR` does it
with another version's commands. On Debian the pictures are in `plasma-workspace-wallpapers`, the
icons in `oxygen-icon-theme`, `faenza-icon-theme` and `gnome-icon-theme`, the fonts below
/usr/share/fonts.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmarks.common import finish

PICTURES = Path("/usr/share/wallpapers")
THEMES = Path("/usr/share/icons")
ICONS = ("oxygen/base/48x48/{}/*.png", "Faenza/{}/48/*.png")
OTHER_ICONS = ("gnome/48x48/{}/*.png",)
CATEGORIES = (
    "actions",
    "apps",
    "categories",
    "devices",
    "emblems",
    "mimetypes",
    "places",
    "status",
)
FONTS = Path("/usr/share/fonts")
SUBJECTS = ("Autumn", "DarkestHour", "FallenLeaf", "Path")
TEXTURES = ("Altai", "Autumn", "EveningGlow", "FallenLeaf", "Flow", "Kay", "Opal", "Path")
LETTERS = "ABCDEFGHKR"

Pixels = NDArray[np.uint8]


def picture(name: str) -> Pixels:
    """The largest picture of a wallpaper, BGR."""
    files = [path for path in (PICTURES / name).rglob("*") if path.suffix in (".jpg", ".png")]
    images = (cv2.imread(str(path)) for path in sorted(files))
    return max((image for image in images if image is not None), key=lambda image: image.size)


def crops(
    image: Pixels, count: int, sides: tuple[int, int], held_out: bool, rng: np.random.Generator
) -> Iterator[Pixels]:
    """Crops of random places and shapes; those held out are of a band in the middle."""
    width = image.shape[1]
    left, right = width * 2 // 5, width * 3 // 5
    for number in range(count):
        part = image[:, left:right] if held_out else (image[:, :left], image[:, right:])[number % 2]
        tall, wide = (min(int(rng.integers(*sides)), side) for side in part.shape[:2])
        y, x = (
            int(rng.integers(0, side - length + 1))
            for side, length in zip(part.shape, (tall, wide), strict=False)
        )
        yield part[y : y + tall, x : x + wide]


def photographs(
    out: Path, counts: dict[str, int], sides: tuple[int, int], held_out: bool, seed: int
) -> None:
    """JPEGs of up to 640 pixels, `counts` of each picture."""
    for place, (name, count) in enumerate(counts.items()):
        rng = np.random.default_rng([seed, place, held_out])
        folder = out / name
        folder.mkdir(parents=True)
        for number, crop in enumerate(crops(picture(name), count, sides, held_out, rng)):
            scale = min(1.0, 640 / max(crop.shape[:2]))
            small = cv2.resize(crop, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            cv2.imwrite(str(folder / f"IMG_{number:04d}.jpg"), small)


def letters(out: Path, held_out: bool) -> None:
    """Grey letters of 28 pixels in many fonts, shifted; those held out are of other fonts."""
    fonts = sorted(path for path in FONTS.rglob("*.ttf") if _writes(path))
    fonts = fonts[::4] if held_out else [path for at, path in enumerate(fonts) if at % 4]
    rng = np.random.default_rng([7, held_out])
    for letter in LETTERS:
        (out / letter).mkdir(parents=True)
        for number in range(40 if held_out else 200):
            font = ImageFont.truetype(str(fonts[number % len(fonts)]), int(rng.integers(16, 25)))
            tile = Image.new("L", (28, 28), int(rng.integers(0, 90)))
            place = (14 + int(rng.integers(-3, 4)), 14 + int(rng.integers(-3, 4)))
            ink = int(rng.integers(150, 256))
            ImageDraw.Draw(tile).text(place, letter, fill=ink, font=font, anchor="mm")
            noisy = np.asarray(tile, np.float64) + rng.normal(0, 12, (28, 28))
            file = out / letter / f"{number:03d}.png"
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file)


def _writes(path: Path) -> bool:
    """Whether a font has Latin letters, drawn each its own."""
    try:
        font = ImageFont.truetype(str(path), 20)
        drawn = {bytes(font.getmask(letter)) for letter in LETTERS}
    except OSError:
        return False
    return len(drawn) == len(LETTERS)


def icons(out: Path, held_out: bool) -> None:
    """Icons with transparency by category; those held out are of another artist."""
    for category in CATEGORIES:
        (out / category).mkdir(parents=True)
        for pattern in OTHER_ICONS if held_out else ICONS:
            for path in sorted(THEMES.glob(pattern.format(category))):
                if not path.is_symlink():
                    name = f"{pattern.partition('/')[0]}-{path.name}"
                    (out / category / name).write_bytes(path.read_bytes())


FOLDERS: dict[str, Callable[[Path, bool], None]] = {
    "4 subjects x 60": lambda out, held: photographs(
        out, dict.fromkeys(SUBJECTS, 60), (240, 800), held, 1
    ),
    "2 x 15": lambda out, held: photographs(
        out, dict.fromkeys(SUBJECTS[:2], 40 if held else 15), (240, 800), held, 2
    ),
    "10 x 200 small grey": letters,
    "unbalanced 200, 20, 5": lambda out, held: photographs(
        out,
        dict.fromkeys(SUBJECTS[1:], 40)
        if held
        else dict(zip(SUBJECTS[1:], (200, 20, 5), strict=True)),
        (240, 800),
        held,
        3,
    ),
    "8 fine textures x 80": lambda out, held: photographs(
        out, dict.fromkeys(TEXTURES, 40 if held else 80), (128, 200), held, 4
    ),
    "transparent icons": icons,
}


def run(command: list[str], checkout: Path) -> str:
    """Run a command of a checkout; its standard output. Raises RuntimeError if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [sys.executable, "-m", "distcls.cli", *command],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=None,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout


def held_out_accuracy(model: Path, folder: Path, scratch: Path, checkout: Path) -> float:
    """Top-1 over a folder of class folders, by `predict`."""
    out = scratch / "held_out.csv"
    run(["predict", "--model", str(model), str(folder), "--out", str(out), "--quiet"], checkout)
    with out.open(newline="") as rows:
        right = [row["image_id"].split("/")[0] == row["label"] for row in csv.DictReader(rows)]
    return statistics.mean(right)


def trial(name: str, seed: int, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train on one folder with the defaults; its figures."""
    data, out = scratch / "folders" / name, scratch / "run"
    checkout = options.checkout
    began = time.perf_counter()
    if options.two_steps:
        prepared = scratch / "prepared"
        run(["prepare", str(data), "--out", str(prepared), "--quiet"], checkout)
        data = prepared
    given = ["--data", str(data), "--out", str(out), "--seed", str(seed), *options.train]
    result = json.loads(run(["train", *given, "--json"], checkout))
    minutes = (time.perf_counter() - began) / 60
    accuracy = held_out_accuracy(out / "best.pth", scratch / "held out" / name, scratch, checkout)
    figures = {
        "folder": name,
        "seed": seed,
        "epochs": result["epochs"],
        "val_top1": round(result["best_score"], 4),
        "held_out_top1": round(accuracy, 4),
        "minutes": round(minutes, 2),
    }
    print(figures, file=sys.stderr, flush=True)
    return figures


def main() -> None:
    """Make the folders, train on each, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the runs")
    parser.add_argument("--only", action="append", help="a folder's name, or the start of it")
    parser.add_argument("--checkout", type=Path, default=Path.cwd(), help="version to measure")
    parser.add_argument("--two-steps", action="store_true", help="prepare first, as 0.2 needs it")
    parser.add_argument("--keep", type=Path, help="make the folders here, and keep them")
    parser.add_argument("--make-only", action="store_true", help="stop once they are made")
    parser.add_argument("train", nargs="*", help="more options of distcls train, after --")
    options = parser.parse_args()
    names = [name for name in FOLDERS if not options.only or name.startswith(tuple(options.only))]
    with tempfile.TemporaryDirectory() as temporary:
        root = options.keep or Path(temporary)
        for name in names:
            for kind, held in (("folders", False), ("held out", True)):
                if not (root / kind / name).exists():
                    print(f"making {kind}: {name}", file=sys.stderr, flush=True)
                    FOLDERS[name](root / kind / name, held)
        if options.make_only:
            return
        rows = []
        for name in names:
            for seed in map(int, options.seeds.split(",")):
                print(f"training on {name}, seed {seed}", file=sys.stderr, flush=True)
                with tempfile.TemporaryDirectory(dir=root) as scratch:
                    (Path(scratch) / "folders").symlink_to(root / "folders")
                    (Path(scratch) / "held out").symlink_to(root / "held out")
                    rows.append(trial(name, seed, Path(scratch), options))
    for name in names:
        found = [row for row in rows if row["folder"] == name]
        columns = ("epochs", "val_top1", "held_out_top1", "minutes")
        means = {key: round(statistics.mean(row[key] for row in found), 4) for key in columns}
        print(name, means)
    finish("folders", rows=rows, train=options.train)


if __name__ == "__main__":
    main()
