"""`python -m benchmarks.captchas --out DIR`: draws captchas, and the manifest to prepare them by.

Each shows five characters (or `--length`) out of 32: the digits 2 to 9 and the capitals without I
and O, which look like 1 and 0 in some font; 0 and 1 are left out with them. Every character has its
own font, size, rotation, slant, position and colour; the whole is waved, crossed by lines, speckled
and noisy. A captcha is a pure function of (seed, its number, fonts), and no text is drawn twice, so
the texts of the test split are unseen.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmarks.common import finish
from distcls import log
from distcls.cli import run
from distcls.config import parse
from distcls.errors import UsageError, require
from distcls.files import atomic_folder

ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZ"
HEIGHT, PITCH = 48, 32
"""Pixels of a captcha: its height, and its width per character."""
GLYPH = 64
"""Side of the tile that a character is drawn on before it is distorted."""
FONT_SIZE = 42
"""Size of the font there, in pixels; capitals are about 30 high."""
SPLITS = {0: "val", 10: "test"}
"""Of 20 captchas in a row these; the other 18 are for training."""
FONTS = Path("/usr/share/fonts/truetype")
FACES = {
    "dejavu": ("Sans", "Sans-Bold", "Serif", "Serif-Bold", "SansMono", "SansMono-Bold"),
    "liberation": ("Sans-Regular", "Sans-Bold", "Serif-Regular", "Serif-Bold", "Mono-Bold"),
    "freefont": ("Sans", "SansBold", "Serif", "SerifBold", "Mono", "MonoBold"),
}
"""Debian's packages fonts-dejavu-core, fonts-liberation, fonts-freefont-ttf, and faces of each."""
FILES = {"dejavu": "DejaVu", "liberation": "Liberation", "freefont": "Free"}
"""What their files' names begin with."""
FEWEST_FONTS = 3

Pixels = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptchaOptions:
    """Options of the drawing."""

    out: Path
    """Folder to write, with `manifest.csv` in it; must not exist."""
    count: int = 20_000
    """Captchas: 90 % for training, 5 % for validation and for testing each."""
    length: int = 5
    """Characters per captcha."""
    seed: int = 0
    """Seed of the texts and the drawing."""
    fonts: tuple[str, ...] | None = None
    """TrueType files, three or more; default: the installed ones of Debian's DejaVu, Liberation and
    FreeFont."""
    result: Path | None = None
    """File for the JSON line that is printed at the end."""

    def __post_init__(self) -> None:
        require(self.count >= 20, "count", self.count, "at least 20: one of 20 is for testing")
        require(self.length >= 1, "length", self.length, "at least 1")
        most = len(ALPHABET) ** self.length // 2
        few = f"at most {most:,}, half of the texts of {self.length} characters that there are"
        require(self.count <= most, "count", self.count, few)
        require(self.seed >= 0, "seed", self.seed, "0 or more")


def find_fonts(given: Sequence[str] | None) -> tuple[Path, ...]:
    """The fonts to draw with. Raises UsageError for fewer than three, and for a missing file."""
    if given is None:
        paths = [
            FONTS / package / f"{FILES[package]}{face}.ttf"
            for package, faces in FACES.items()
            for face in faces
        ]
        found = tuple(path for path in paths if path.is_file())
        remedy = "apt-get install fonts-dejavu-core fonts-liberation fonts-freefont-ttf"
    else:
        found, remedy = tuple(map(Path, given)), "name more files"
        for path in found:
            if not path.is_file():
                raise UsageError(f"fonts: {path} does not exist")
    if len(found) < FEWEST_FONTS:
        raise UsageError(f"fonts: {len(found)} found, three or more are needed; {remedy}")
    return found


def texts(options: CaptchaOptions) -> list[str]:
    """The texts in their order, all different; those of a smaller count come first."""
    rng = np.random.default_rng([options.seed, 0])
    drawn: dict[str, None] = {}
    while len(drawn) < options.count:
        places = rng.integers(len(ALPHABET), size=options.length)
        drawn["".join(ALPHABET[place] for place in places)] = None
    return list(drawn)


def draw(text: str, fonts: Sequence[Path], rng: np.random.Generator) -> Pixels:
    """One captcha, uint8 [48, 32 * characters, 3]."""
    width = PITCH * len(text)
    picture = _paper(width, rng)
    step = (width - 12) / len(text)
    for place, character in enumerate(text):
        font = str(fonts[rng.integers(len(fonts))])
        centre = (6 + step * (place + 0.5) + rng.uniform(-3, 3), HEIGHT / 2 + rng.uniform(-4, 4))
        matrix = _distortion(centre, rng)
        ink = cv2.warpAffine(_glyph(font, character), matrix, (width, HEIGHT))
        share = ink[..., None] / np.float32(255)
        picture = picture * (1 - share) + _dark(rng) * share
    return _spoil(_waved(picture, rng), rng)


def _paper(width: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A light background, shaded from left to right, float32 [48, width, 3] in 0..255."""
    ends = rng.uniform(185, 255, (2, 3))
    share = np.linspace(0, 1, width)[None, :, None]
    shade = ends[0] * (1 - share) + ends[1] * share
    return np.repeat(shade, HEIGHT, axis=0).astype(np.float32)


@functools.cache
def _glyph(font: str, character: str) -> Pixels:
    """A character in the middle of a tile, 255 where there is ink, uint8 [64, 64]."""
    tile = Image.new("L", (GLYPH, GLYPH))
    face = ImageFont.truetype(font, FONT_SIZE)
    ImageDraw.Draw(tile).text((GLYPH / 2, GLYPH / 2), character, 255, face, anchor="mm")
    return np.array(tile, np.uint8)


def _distortion(centre: tuple[float, float], rng: np.random.Generator) -> NDArray[np.float64]:
    """Affine map of a tile to its position, rotated, slanted, scaled, [2, 3] for OpenCV."""
    angle = np.radians(rng.uniform(-25, 25))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    slant = np.array([[1.0, rng.uniform(-0.3, 0.3)], [0.0, 1.0]])
    linear = turn @ slant @ np.diag(rng.uniform((0.55, 0.7), (0.8, 1.0)))
    offset = np.array(centre) - linear @ np.array([GLYPH / 2, GLYPH / 2])
    return np.column_stack([linear, offset])


def _waved(picture: NDArray[np.float32], rng: np.random.Generator) -> Pixels:
    """Shifted up and down along the width, and to the sides along the height."""
    height, width = picture.shape[:2]
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    high, wide = rng.uniform(0.5, 2.5, 2)
    lengths, phases = rng.uniform(35, 80, 2), rng.uniform(0, 2 * np.pi, 2)
    down = rows + high * np.sin(2 * np.pi * columns / lengths[0] + phases[0])
    aside = columns + wide * np.sin(2 * np.pi * rows / lengths[1] + phases[1])
    maps = aside.astype(np.float32), down.astype(np.float32)
    waved = cv2.remap(picture, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(waved.round().clip(0, 255), np.uint8)


def _spoil(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Lines across, speckles, and noise that is grey or coloured."""
    height, width = picture.shape[:2]
    for _ in range(rng.integers(2, 5)):
        left, right = (int(y) for y in rng.integers(0, height, 2))
        ends = (
            (int(rng.integers(0, width // 4)), left),
            (int(rng.integers(3 * width // 4, width)), right),
        )
        cv2.line(picture, *ends, _dark(rng).tolist(), 1, cv2.LINE_AA)
    speckles = int(rng.integers(20, 80))
    rows, columns = rng.integers(0, height, speckles), rng.integers(0, width, speckles)
    picture[rows, columns] = rng.integers(0, 256, (speckles, 3))
    channels = int(rng.choice([1, 3]))
    noise = rng.normal(0, rng.uniform(4, 16), (height, width, channels))
    return np.asarray((picture + noise).round().clip(0, 255), np.uint8)


def _dark(rng: np.random.Generator) -> NDArray[np.float32]:
    """A colour that stands out from the paper, float32 [3]."""
    return rng.uniform(0, 120, 3).astype(np.float32)


def write(options: CaptchaOptions) -> tuple[Path, ...]:
    """Draw all of them into the folder; returns the fonts. Raises UsageError if it exists."""
    fonts = find_fonts(options.fonts)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["path", "text", "split"])
    with (
        atomic_folder(options.out) as part,
        log.Progress("drawing", options.count) as progress,
    ):
        (part / "images").mkdir()
        for number, text in enumerate(texts(options)):
            progress.update()
            rng = np.random.default_rng([options.seed, 1, number])
            path = f"images/{number:06d}.jpg"
            right, jpeg = cv2.imencode(
                ".jpg", draw(text, fonts, rng), [cv2.IMWRITE_JPEG_QUALITY, 90]
            )
            assert right
            (part / path).write_bytes(jpeg.tobytes())
            rows.writerow([path, text, SPLITS.get(number % 20, "train")])
        (part / "manifest.csv").write_text(table.getvalue())
    return fonts


def main(arguments: Sequence[str]) -> None:
    """Parse, draw, report."""
    about = "Draw distorted texts with their manifest, for `distcls prepare --text-column text`."
    options = parse(CaptchaOptions, arguments, prog="python -m benchmarks.captchas", about=about)
    began = time.monotonic()
    fonts = [path.stem for path in write(options)]
    seconds = time.monotonic() - began
    log.say(
        f"wrote {options.out / 'manifest.csv'}: {options.count:,} captchas in {len(fonts)} fonts"
    )
    finish(
        "captchas",
        out=options.result,
        count=options.count,
        length=options.length,
        seed=options.seed,
        fonts=fonts,
        images_per_s=round(options.count / seconds),
    )


if __name__ == "__main__":
    run(main)
