"""The drawn captchas: reproducible, each text once, and a manifest that can be prepared."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.captchas import (
    ALPHABET,
    CaptchaOptions,
    _glyph,
    draw,
    find_fonts,
    texts,
    write,
)
from distcls.errors import BadValue, UsageError
from distcls.imaging import decode
from tests.e2e.commands import ROOT

FONTS = pytest.mark.skipif(
    not list(Path("/usr/share/fonts/truetype").glob("dejavu/DejaVu*.ttf")),
    reason="needs Debian's fonts-dejavu-core",
)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


@FONTS
def test_the_same_seed_draws_the_same_and_no_text_twice(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        write(CaptchaOptions(out=tmp_path / name, count=40, seed=seed))
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")]
    assert len(files) == 41
    assert all(
        (tmp_path / "one" / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files
    )
    found, other = rows(tmp_path / "one"), rows(tmp_path / "other")
    drawn = [row["text"] for row in found]
    assert len(set(drawn)) == 40
    assert not set(drawn) & {row["text"] for row in other}
    assert all(len(text) == 5 and set(text) <= set(ALPHABET) for text in drawn)
    splits = [row["split"] for row in found]
    assert (splits.count("train"), splits.count("val"), splits.count("test")) == (36, 2, 2)
    picture = decode((tmp_path / "one" / found[7]["path"]).read_bytes())
    assert picture.shape == (48, 160, 3)
    assert picture.std() > 10


@FONTS
def test_a_larger_set_begins_with_the_smaller_one() -> None:
    small, large = (CaptchaOptions(out=Path("unused"), count=n, length=3) for n in (30, 300))
    assert texts(large)[:30] == texts(small)
    assert len(set(texts(large))) == 300


@FONTS
def test_every_character_is_whole_and_looks_like_no_other() -> None:
    for font in map(str, find_fonts(None)):
        tiles = {character: _glyph(font, character) for character in ALPHABET}
        assert len({tile.tobytes() for tile in tiles.values()}) == len(ALPHABET)
        for character, tile in tiles.items():
            rim = np.concatenate([tile[0], tile[-1], tile[:, 0], tile[:, -1]])
            assert not rim.any(), (font, character)  # nothing is cut off
            assert (tile > 128).sum() > 100


@FONTS
def test_the_characters_stand_in_their_order() -> None:
    """Where a character differs, the pictures differ there and hardly elsewhere."""
    fonts = find_fonts(None)
    one, other = (draw(text, fonts, np.random.default_rng(0)) for text in ("MM2MM", "MM7MM"))
    apart = np.abs(one.astype(int) - other).mean((0, 2)).reshape(5, 32).mean(1)
    assert apart.argmax() == 2
    assert apart[[0, 4]].max() < apart[2] / 10


@FONTS
def test_too_few_fonts_are_refused() -> None:
    two = [str(path) for path in find_fonts(None)[:2]]
    with pytest.raises(UsageError, match=r"^fonts: 2 found, three or more are needed"):
        find_fonts(two)
    with pytest.raises(UsageError, match=r"^fonts: none\.ttf does not exist"):
        find_fonts([*two, "none.ttf"])


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("count", {"count": 10}),
        ("count", {"count": 600, "length": 2}),
        ("length", {"length": 0}),
        ("seed", {"seed": -1}),
    ],
)
def test_bad_values(field: str, values: dict[str, int]) -> None:
    with pytest.raises(BadValue, match=f"^{field}: "):
        CaptchaOptions(out=Path("unused"), **values)  # type: ignore[arg-type]


@FONTS
def test_the_command_and_the_manifest(tmp_path: Path) -> None:
    out, data = tmp_path / "captchas", tmp_path / "data"
    call = [
        sys.executable,
        "-m",
        "benchmarks.captchas",
        "--out",
        out,
        "--count",
        "400",
        "--length",
        "2",
    ]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    line = json.loads(done.stdout)
    assert line["benchmark"] == "captchas"
    assert len(line["fonts"]) >= 3
    with pytest.raises(UsageError, match="exists already"):
        write(CaptchaOptions(out=out, count=400, length=2))
    text = ["--text-column", "text", "--out", data, "--json"]
    call = [sys.executable, "-m", "distcls.cli", "prepare", out / "manifest.csv", *text]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["counts"] == {"train": 360, "val": 20, "test": 20}
