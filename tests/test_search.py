"""What a search of a folder takes for an image, and what it says about the rest."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distcls.commands.prepare import main
from distcls.data.formats import folder as module
from distcls.data.formats.detect import open_source
from distcls.data.formats.folder import FolderSource
from distcls.errors import UsageError
from distcls.plotting import Tile, draw_grid
from tests.sources import digits, put, tree

IMAGE = digits(1)[0][0]


def renamed(path: Path, ending: str = ".jpg") -> Path:
    """A real image of the format `ending` under another name."""
    image = np.dstack([IMAGE] * 3) if ending == ".ppm" else IMAGE
    return put(path.with_name(f"x{ending}"), image).rename(path)


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        *(("a.jfif", ".jpg"), ("a", ".jpg"), ("a.img", ".png"), ("a.JFIF", ".jpg")),
        *(("frame.0001", ".png"), ("a.jpg_original", ".jpg"), ("a.pgm", ".pgm")),
        *(("a.ppm", ".ppm"), ("a.dat", ".webp"), ("a.b c", ".bmp"), ("a.x", ".tiff")),
    ],
)
def test_images_are_found_by_their_content(tmp_path: Path, name: str, ending: str) -> None:
    renamed(tmp_path / name, ending)
    source = open_source(str(tmp_path))
    assert source.image_ids == [name]
    assert len(source.left_out) == 0


def test_what_is_no_image_is_counted_by_ending(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree(tmp_path / "root", 40)
    for name in ("1/a.txt", "1/b.txt", "list.csv", "1/Thumbs.db"):
        (root / name).write_bytes(b"P")
    for name in ("2/a.dat", "README", "3/b.0001", "3/b.0002"):
        (root / name).write_bytes(b"no image at all")
    (root / "2" / "._0001.png").write_bytes(b"AppleDouble")
    (root / "4" / "sound.heic").write_bytes(b"RIFF1234WAVE")
    assert len(open_source(str(root))) == 41
    said = capsys.readouterr().err
    kinds = "2 .txt, 2 other ending, 1 .csv, 1 .dat, 1 .db, 1 no ending"
    assert f"{root}: left out 8 files that are not images ({kinds}), first " in said
    main([str(root), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert f"left out 8 files that are not images ({kinds})" in said
    assert "warning: 1 of 41 images cannot be read (1 .heic); see " in said
    with (tmp_path / "out" / "rejected.csv").open(newline="") as handle:
        rows = {row["image_id"]: row["reason"] for row in csv.DictReader(handle)}
    assert rows.pop("4/sound.heic")
    assert rows == {
        "2/a.dat": "no image by its content (.dat)",
        "README": "no image by its content (no ending)",
        "3/b.0001": "no image by its content (other ending)",
        "3/b.0002": "no image by its content (other ending)",
        "2/._0001.png": "hidden file",
    }


def test_files_that_would_wait_or_cannot_be_read_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "self").symlink_to("self")
    put(tmp_path / "a.png", IMAGE)
    source = open_source(str(tmp_path))
    assert source.image_ids == ["a.png"]
    assert len(source.left_out) == 3


def test_no_file_with_a_known_ending_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        (tmp_path / f"{number}.jpg").touch()
        (tmp_path / f"{number}.txt").touch()
    opened: list[str] = []
    monkeypatch.setattr(module, "_read_head", lambda path: opened.append(path) or b"")
    assert len(FolderSource(tmp_path)) == 20
    assert opened == []
    (tmp_path / "notes").touch()
    assert len(FolderSource(tmp_path)) == 20
    assert opened == [f"{tmp_path}/notes"]


def test_many_files_are_listed_soon(tmp_path: Path) -> None:
    for number in range(20_000):
        (tmp_path / f"{number}.jpg").touch()
    began = time.process_time()
    assert len(FolderSource(tmp_path)) == 20_000
    assert time.process_time() - began < 0.5


def test_pictures_that_distcls_drew_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "a.png", IMAGE)
    Image.fromarray(IMAGE).save(tmp_path / "b.png")
    draw_grid([Tile(image=np.zeros((8, 8, 3), np.uint8), text="cat 99 %")], tmp_path / "pre.png")
    source = open_source(str(tmp_path))
    assert source.image_ids == ["a.png", "b.png"]
    assert "left out 1 picture drawn by distcls, first pre.png" in capsys.readouterr().err
    assert [tuple(row) for row in source.left_out] == [
        ("pre.png", "pre.png", "picture drawn by distcls")
    ]
    assert open_source(str(tmp_path / "*.png")).image_ids == ["a.png", "b.png", "pre.png"]
    (tmp_path / "pre.csv").write_text("image_id,label\n")
    monkeypatch.setattr(module, "FEW", 2)  # of many only those beside a table of the same name
    assert open_source(str(tmp_path)).image_ids == ["a.png", "b.png"]


@pytest.mark.parametrize("name", ["in[x]", "in[x] (2)"])
def test_brackets_in_the_name_of_a_folder(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / name / "a.png", IMAGE)
    put(tmp_path / "z[1]" / "b.png", IMAGE)
    source = open_source(f"{tmp_path}/{name}/*.png")
    assert source.image_ids == ["a.png"]
    assert source.image(0).shape == (8, 8, 3)
    assert "its brackets are taken literally" in capsys.readouterr().err
    assert open_source(f"{tmp_path}/*/[ab].png").image_ids == sorted(
        [f"{name}/a.png", "z[1]/b.png"]
    )
    assert open_source(f"{tmp_path}/*[1]/b.p?g").image_ids == ["z[1]/b.png"]
    with pytest.raises(UsageError, match=r"no file matches; \[...\] stands for one of its"):
        open_source(f"{tmp_path}/no[x]/*.png")


def test_brackets_that_match_are_a_set(tmp_path: Path) -> None:
    put(tmp_path / "inx" / "a.png", IMAGE)
    put(tmp_path / "in[x]" / "b.png", IMAGE)
    assert open_source(f"{tmp_path}/in[x]/*.png").image_ids == ["inx/a.png"]
