"""`distcls audit`: what was planted is found, and nothing else."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from distcls.audit.audit import AuditOptions, AuditResult, audit
from distcls.audit.checks import class_findings
from distcls.cli import run
from distcls.commands.audit import main
from distcls.data.prepare import PrepareOptions, prepare
from distcls.errors import UsageError
from distcls.imaging.preprocess import WHITE
from distcls.task import Task, same_names
from tests.pictures import encode
from tests.sources import put, records, tree, write_manifest

Pixels = NDArray[np.uint8]


def photo(seed: int, height: int = 60, width: int = 80) -> Pixels:
    """A picture with detail of all sizes, unlike that of any other seed."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells in (3, 6, 12, 24):
        part = rng.normal(0, 1, (cells, cells, 3))
        total += cv2.resize(part, (width, height), interpolation=cv2.INTER_CUBIC) / cells**0.4
    total = (total - total.min()) / (total.max() - total.min())
    return np.asarray(20 + 200 * total, np.uint8)


def folder(root: Path, count: int = 8) -> Path:
    """ROOT/SPLIT/CLASS/N.png: different pictures of two classes in two splits."""
    for number in range(4 * count):
        split, label = ("train", "test")[number // 2 % 2], ("cat", "dog")[number % 2]
        put(root / split / label / f"{number}.png", photo(number))
    return root


def look(data: Path, **options: object) -> AuditResult:
    return audit(AuditOptions(data=str(data), quiet=True, **options))  # type: ignore[arg-type]


def kinds(result: AuditResult) -> dict[tuple[str, str], str]:
    """What was found of each image or class, but for tiny classes, and the other image."""
    return {
        (each.kind, each.image or each.label): each.related
        for each in result.findings
        if each.kind != "tiny_class"
    }


def test_nothing_is_found_where_nothing_is_wrong(tmp_path: Path) -> None:
    assert not kinds(look(folder(tmp_path / "photos")))


def test_exact_copies_across_splits_inside_one_and_with_another_label(tmp_path: Path) -> None:
    data = folder(tmp_path / "photos")
    copied = photo(2)  # test/cat/2.png
    put(data / "train/cat/leak.bmp", copied)
    put(data / "train/dog/again.png", photo(1))  # train/dog/1.png
    put(data / "train/cat/other.png", photo(5))  # train/dog/5.png
    assert kinds(look(data)) == {
        ("leak", "train/cat/leak.bmp"): "test/cat/2.png",
        ("duplicate", "train/dog/again.png"): "train/dog/1.png",
        ("conflict", "train/dog/5.png"): "train/cat/other.png",
    }


def test_near_copies(tmp_path: Path) -> None:
    data = folder(tmp_path / "photos")
    changed = {
        "shifted": photo(2)[3:, 2:],
        "smaller": cv2.resize(photo(6), None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA),
        "brighter": np.clip(photo(10) * 1.2 + 20, 0, 255).astype(np.uint8),
    }
    for name, picture in changed.items():
        put(data / f"train/cat/{name}.png", np.asarray(picture, np.uint8))
    (data / "train/dog/encoded.jpg").write_bytes(encode(photo(14), "JPEG", quality=70))
    assert kinds(look(data)) == {
        ("near_leak", "train/cat/shifted.png"): "test/cat/2.png",
        ("near_leak", "train/cat/smaller.png"): "test/cat/6.png",
        ("near_leak", "train/cat/brighter.png"): "test/cat/10.png",
        ("near_conflict", "train/dog/encoded.jpg"): "test/cat/14.png",
    }


def test_images_that_are_odd(tmp_path: Path) -> None:
    data = folder(tmp_path / "photos")
    here = data / "train/cat"
    put(here / "blank.png", np.full((60, 80, 3), 90, np.uint8))
    put(here / "dark.png", photo(100) // 8)
    put(here / "bright.png", 225 + photo(101) // 10)
    put(here / "blurred.png", np.asarray(cv2.GaussianBlur(photo(102), (0, 0), 8), np.uint8))
    put(here / "long.png", photo(103, 20, 400))
    put(here / "huge.png", np.tile(photo(104), (15, 15, 1)))
    two = np.zeros((60, 80, 3), np.uint8)
    two[5:25, 5:25] = 255
    put(here / "two.png", two)
    exif = Image.Exif()
    exif[0x0112] = 6
    (here / "turned.jpg").write_bytes(encode(photo(105), "JPEG", quality=95, exif=exif))
    hidden = np.dstack([photo(106), np.full((60, 80), 255, np.uint8)])
    hidden[:30, :, 3] = 0
    (here / "hidden.png").write_bytes(encode(Image.fromarray(hidden), "PNG"))
    (here / "broken.png").write_bytes(b"no image at all")
    found = {(kind, Path(image).stem) for kind, image in kinds(look(data))}
    same = ("blank", "dark", "bright", "blurred", "broken")
    assert found == {
        *((name, name) for name in same),
        ("odd_aspect_ratio", "long"),
        ("odd_size", "huge"),
        ("low_information", "two"),
        ("rotated", "turned"),
        ("hidden_pixels", "hidden"),
    }


def test_class_names_that_mean_one_class() -> None:
    names = ["cat", "Cat ", "caf\u00e9", "cafe\u0301", "dog"]
    assert same_names(names) == [["cat", "Cat "], ["caf\u00e9", "cafe\u0301"]]


def test_small_and_uneven_classes() -> None:
    found = list(class_findings(records([0] * 300 + [1] * 3), Task(classes=("cat", "dog"))))
    assert [(each.kind, each.label) for each in found] == [
        ("tiny_class", "dog"),
        ("imbalance", "dog"),
    ]


def test_the_table_the_summary_and_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(tmp_path / "photos")
    put(data / "train/cat/a, leak.png", photo(2))
    out = tmp_path / "audit"
    with pytest.raises(SystemExit) as left:
        run(main, [str(data), "--out", str(out), "--strict", "--json"])
    assert left.value.code == 3
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == f"error: {data}: 1 error (--strict)"
    assert json.loads(printed.out) == json.loads((out / "audit.json").read_text())
    assert json.loads(printed.out)["findings"]["error"] == {"leak": 1}
    with (out / "audit.csv").open(newline="") as handle:
        row = next(csv.DictReader(handle))
    assert row["image"] == "train/cat/a, leak.png"
    assert (row["kind"], row["severity"], row["split"]) == ("leak", "error", "train")
    assert row["related"] == "test/cat/2.png"
    with pytest.raises(UsageError, match="exists already"):
        look(data, out=out)


def test_manifests_dataset_directories_and_what_prepare_left_out(tmp_path: Path) -> None:
    source = tree(tmp_path / "digits", 100)
    (source / "0/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    prepare(PrepareOptions(source=str(source), out=tmp_path / "data", quiet=True))
    assert kinds(look(tmp_path / "data")) == {("broken", "0/broken.png"): ""}
    rows = [("path", "label"), *((f"digits/{n % 2}/{n:04d}.png", n % 2) for n in (0, 1, 10, 11))]
    copied = (source / "1/0001.png").read_bytes()
    (source / "1/copy.png").write_bytes(copied)
    manifest = write_manifest(tmp_path / "list.csv", [*rows, ("digits/1/copy.png", "0")])
    assert kinds(look(manifest)) == {("conflict", "digits/1/copy.png"): "digits/1/0001.png"}
    with pytest.raises(UsageError, match="no such file"):
        look(tmp_path / "nowhere")


def test_transparent_images_are_seen_on_their_background(tmp_path: Path) -> None:
    assert AuditOptions(data="x").background == WHITE
    picture = np.dstack([photo(1), np.full((60, 80), 255, np.uint8)])
    picture[20:40, 20:40, 3] = 0
    shown = photo(1)
    shown[20:40, 20:40] = 255
    data = folder(tmp_path / "photos")
    (data / "train/cat/alpha.png").write_bytes(encode(Image.fromarray(picture), "PNG"))
    put(data / "train/cat/flat.png", shown)
    assert ("duplicate", "train/cat/flat.png") in kinds(look(data))


def test_the_original_stays(tmp_path: Path) -> None:
    data = folder(tmp_path / "photos")
    names = ("cat/b (1).png", "cat/b.png", "dog/a copy.png", "dog/z.png")
    for number, name in enumerate(names):
        put(data / "train" / name, photo(100 + number // 2))
    found = kinds(look(data))
    assert found["duplicate", "train/cat/b (1).png"] == "train/cat/b.png"
    assert found["duplicate", "train/dog/a copy.png"] == "train/dog/z.png"


def test_a_run_without_an_export_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.pth").write_bytes(b"")
    with pytest.raises(UsageError, match=r"^model: .*best.pth has no features.*export --ckpt"):
        look(tmp_path, model=tmp_path / "run")


def test_splits_that_do_not_differ_are_told_of() -> None:
    result = AuditResult(
        data="d", images=9, splits={}, classes=[], findings=[], seconds=0, drift={"val": (0.1, 0.4)}
    )
    assert result.to_text() == (
        "nothing found\ndrift: val does not differ from train by the features, p 0.400"
    )
    assert result.to_json()["drift"] == {"val": {"mmd": 0.1, "p": 0.4}}


def test_prepare_says_what_needs_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tree(tmp_path / "digits", 60)
    (source / "0").rename(source / "Cat")
    (source / "1").rename(source / "cat ")
    copied = next((source / "Cat").iterdir())
    (source / "cat " / "copy.png").write_bytes(copied.read_bytes())
    prepare(PrepareOptions(source=str(source), out=tmp_path / "data", quiet=True))
    said = capsys.readouterr().err.splitlines()
    assert any("1 image with pixels of another and other labels, first" in line for line in said)
    assert (
        "warning: classes 'Cat' and 'cat ' differ in case, blanks or Unicode form only: are they "
        "one?" in said
    )


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_images(tmp_path: Path) -> None:
    """Less than 1,400 bytes for each more; up to 8,192 images all are compared with all."""
    peaks = []
    rng = np.random.default_rng(0)
    for start, end in ((0, 9_000), (9_000, 14_000)):
        for number in range(start, end):
            picture = rng.integers(0, 256, (12, 12, 3), np.uint8)
            put(tmp_path / "photos" / "ab"[number % 2] / f"{number:05d}.png", picture)
        tracemalloc.start()
        look(tmp_path / "photos")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 5_000 < 1400
