"""distcls prepare, from a source to an opened dataset."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from distcls.commands.prepare import main
from distcls.data import prepare as module
from distcls.data.dataset import CLASSES, INFO, MANIFEST, PACK, Dataset
from distcls.data.prepare import PrepareOptions, pixel_digest, prepare
from distcls.errors import UsageError
from distcls.imaging import decode_file
from distcls.training.config import TrainConfig
from distcls.training.inputs import open_input
from tests.pictures import smooth
from tests.sources import digits, idx_folder, put, tree


def run(source: Path | str, out: Path, **options: Any) -> Dataset:
    prepare(PrepareOptions(source=str(source), out=out, quiet=True, **options))
    return Dataset.open(out)


def all_ids(dataset: Dataset) -> list[str]:
    return [name for split in dataset.counts() for name in dataset.split(split).image_ids]


def test_digits_are_all_there_and_unharmed(tmp_path: Path) -> None:
    data = run("digits", tmp_path / "out")
    images, labels = digits(1797)
    assert sum(data.counts().values()) == 1797
    assert data.classes == tuple("0123456789")
    for name in ("train", "val", "test"):
        split = data.split(name)
        rows = [int(image_id.removeprefix("digits/")) for image_id in split.image_ids]
        assert split.uniform is not None
        np.testing.assert_array_equal(split.uniform[..., 0], images[rows])
        np.testing.assert_array_equal(split.labels, labels[rows])
    assert images.max() == 255
    assert len(set(all_ids(data))) == 1797


def test_every_class_gives_the_same_part(tmp_path: Path) -> None:
    data = run("digits", tmp_path / "out", split_by="draw")
    per_class = np.bincount(digits(1797)[1])
    for name, fraction in (("test", 0.2), ("val", 0.1)):
        found = np.bincount(data.split(name).labels)
        np.testing.assert_allclose(found, per_class * fraction, atol=0.5)


def test_the_seed_decides_and_nothing_else(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", 80)
    one, same, other = (
        run(source, tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    for name in (MANIFEST, PACK, CLASSES):
        assert (one.folder / name).read_bytes() == (same.folder / name).read_bytes()
    assert one.split("val").image_ids != other.split("val").image_ids


def test_a_tree_of_colour_images_is_packed_as_decoded(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", 40)  # grey first: the pack is widened half way
    rng = np.random.default_rng(0)
    for index in range(5):
        put(source / "9" / f"z{index}.png", rng.integers(0, 255, (7, 9 + index, 3), np.uint8))
    data = run(source, tmp_path / "out")
    assert data.packed
    assert set(data.table["channels"].to_pylist()) == {3}
    for name in data.counts():
        packed, files = data.split(name), data.split(name, use_pack=False)
        for index, image_id in enumerate(packed.image_ids):
            expected = decode_file(source / image_id)
            np.testing.assert_array_equal(packed.image(index), expected)
            np.testing.assert_array_equal(files.image(index), expected)


def test_copies_of_colour_images_keep_their_colours(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", 40)
    path = put(source / "3" / "red.png", np.full((4, 4, 3), (250, 20, 5), np.uint8))
    run(source, tmp_path / "out", write_images=True)
    (copy,) = (tmp_path / "out" / "images").rglob("*red.png.png")
    np.testing.assert_array_equal(decode_file(copy), decode_file(path))
    assert decode_file(copy)[0, 0].tolist() == [250, 20, 5]


def test_grey_trees_are_packed_in_one_channel(tmp_path: Path) -> None:
    data = run(tree(tmp_path / "source", 40), tmp_path / "out")
    assert set(data.table["channels"].to_pylist()) == {1}
    assert data.info["pack_bytes"] == 40 * 64


def test_limit_draws_evenly(tmp_path: Path) -> None:
    data = run("digits", tmp_path / "out", limit=60)
    assert data.counts() == {"train": 20, "val": 20, "test": 20}
    for name in data.counts():
        assert np.bincount(data.split(name).labels).tolist() == [2] * 10
    with pytest.raises(UsageError, match="limit 9 is too small: there are 10 classes"):
        run("digits", tmp_path / "few", limit=9)


def test_limit_does_not_decode_the_rest(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", 400)
    chosen = set(all_ids(run(source, tmp_path / "whole", limit=30, split_by="draw")))
    for path in source.rglob("*.png"):
        if path.relative_to(source).as_posix() not in chosen:
            path.write_bytes(b"damaged")
    again = run(source, tmp_path / "again", limit=30, split_by="draw")
    assert set(all_ids(again)) == chosen
    assert again.info["rejected"] == 0


def test_written_images_are_the_images(tmp_path: Path) -> None:
    data = run(idx_folder(tmp_path / "idx"), tmp_path / "out", write_images=True, pack="off")
    assert not data.packed
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 140
    images, labels = digits(140)
    for name, start in (("train", 0), ("val", 0), ("test", 100)):
        split = data.split(name)
        for index, image_id in enumerate(split.image_ids):
            row = start + int(image_id.rpartition("/")[2])
            place = tmp_path / "out" / "images" / name / str(labels[row])
            path = place / f"{image_id.replace('/', '_')}.png"
            np.testing.assert_array_equal(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), images[row])
            np.testing.assert_array_equal(split.image(index)[..., 0], images[row])


def test_a_dataset_with_its_own_images_can_be_moved(tmp_path: Path) -> None:
    run("digits", tmp_path / "here", write_images=True, pack="off", limit=30)
    moved = Dataset.open((tmp_path / "here").rename(tmp_path / "there"))
    assert moved.split("train").image(0).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("limit", "value", "options", "reason"),
    [
        ("PACK_MEAN_PIXELS", 49, [], "they have more than 7x7 pixels on average; --pack on packs"),
        ("PACK_MOST_BYTES", 1024, [], "they would take more than 9.53674e-07 GiB decoded; --pack"),
        ("PACK_MOST_BYTES", 1024, ["--pack", "off"], "--pack off"),
    ],
)
def test_why_there_is_no_pack(  # noqa: PLR0917
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: str,
    value: int,
    options: list[str],
    reason: str,
) -> None:
    monkeypatch.setattr(module, limit, value)
    source = tree(tmp_path / "source", 40)
    main([str(source), "--out", str(tmp_path / "out"), "--json", *options])
    captured = capsys.readouterr()
    assert "no pack, images are decoded on every use (" + reason in captured.err
    assert json.loads(captured.out)["no_pack"].startswith(reason)


def test_pack_auto_leaves_large_images_to_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tree(tmp_path / "source", 60)  # 64 pixels each
    assert run(source, tmp_path / "small").packed
    for limit, value in (("PACK_MEAN_PIXELS", 63), ("PACK_MOST_BYTES", 60 * 64 - 1)):
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, value)
            large = run(source, tmp_path / limit)
            assert not large.packed
            assert not (large.folder / PACK).exists()
            assert large.split("train").image(0).shape == (8, 8, 3)
            assert run(source, tmp_path / f"{limit}_on", pack="on").packed


def test_bad_files_are_listed_and_never_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tree(tmp_path / "source", 60)
    bad = source / "3" / 'an "odd", name.png'
    bad.write_bytes(b"text, no image")
    (source / "4" / "empty.jpg").write_bytes(b"")
    whole = put(source / "5" / "cut.jpg", np.full((64, 64, 3), 90, np.uint8))
    whole.write_bytes(whole.read_bytes()[:300])
    data = run(source, tmp_path / "out")
    with (tmp_path / "out" / "rejected.csv").open(newline="") as handle:
        rows = {row["image_id"]: row for row in csv.DictReader(handle)}
    assert set(rows) == {'3/an "odd", name.png', "4/empty.jpg", "5/cut.jpg"}
    assert rows['3/an "odd", name.png']["path"] == str(bad)
    assert rows["4/empty.jpg"]["reason"] == "empty file"
    assert data.info["rejected"] == 3
    assert sum(data.counts().values()) == 60
    assert not set(rows) & set(all_ids(data))
    assert "warning: 3 of 63 images cannot be read" in capsys.readouterr().err


def test_a_class_gets_a_training_image_back(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", 60)
    good, bad = put(source / "x" / "a.png", digits(1)[0][0]), source / "x" / "b.png"
    bad.write_bytes(good.read_bytes())
    trained = [i for i in run(source, tmp_path / "o").split("train").image_ids if i[0] == "x"]
    (source / trained[0]).write_bytes(b"damaged")
    data = run(source, tmp_path / "out", write_images=True)
    train = data.split("train")
    index = data.classes.index("x")
    (row,) = np.flatnonzero(train.labels == index)
    np.testing.assert_array_equal(train.image(int(row))[..., 0], digits(1)[0][0])
    assert len(list((tmp_path / "out" / "images" / "train" / "x").iterdir())) == 1


def test_json_is_all_there_is_on_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["digits", "--out", str(tmp_path / "out"), "--json", "--limit", "30"])
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert values["counts"] == {"train": 10, "val": 10, "test": 10}
    assert (values["rejected"], values["packed"]) == (0, True)
    assert "30 images of 10 classes" in printed.err
    main(["digits", "--out", str(tmp_path / "more"), "--quiet"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val-fraction", "1"], r"val_fraction: 1\.0 is not valid, expected at least 0"),
        (["--test-fraction", "-0.1"], "test_fraction: -0.1 is not valid"),
        (["--val-fraction", "0.5", "--test-fraction", "0.5"], "together with test_fraction"),
        (["--limit", "0"], "limit: 0 is not valid"),
        (["--pack", "maybe"], "pack: 'maybe' is not valid, expected one of auto, on, off"),
        (["--pack", "off"], "--pack off: the images of digits are not files; add --write-images"),
    ],
)
def test_wrong_options(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        main(["digits", "--out", str(tmp_path / "out"), *flags])
    assert not list(tmp_path.iterdir())


def test_zero_fractions_are_splits_that_are_not_there(tmp_path: Path) -> None:
    data = run("digits", tmp_path / "out", val_fraction=0, test_fraction=0)
    assert data.counts() == {"train": 1797}


def test_weights_and_groups_reach_the_manifest(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", 40)
    rows = [
        (path.relative_to(source).as_posix(), path.parent.name, f"p{index % 8}", index / 4)
        for index, path in enumerate(sorted(source.rglob("*.png")))
    ]
    with (source / "list.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([("path", "label", "group", "weight"), *rows])
    data = run(source / "list.csv", tmp_path / "out")
    table = pq.read_table(data.folder / MANIFEST).to_pylist()
    found = {(row["path"], row["group"], row["weight"]) for row in table}
    assert found == {(path, group, weight) for path, _, group, weight in rows}
    homes = {(row["group"], row["split"]) for row in table}
    assert len(homes) == 8


def test_the_weight_column_belongs_to_manifests(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"weight_column: 'trust' is a column of a manifest, but"):
        run("digits", tmp_path / "out", weight_column="trust")
    source = tree(tmp_path / "source", 40)
    paths = sorted(path.relative_to(source) for path in source.rglob("*.png"))
    rows = [("path", "label", "trust"), *((p, p.parent, 1 + i) for i, p in enumerate(paths))]
    with (source / "list.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows(rows)
    split = run(source / "list.csv", tmp_path / "out", weight_column="trust").split("train")
    assert split.weights is not None
    places = [paths.index(Path(name)) for name in split.image_ids]
    assert split.weights.tolist() == [1 + place for place in places]
    assert run("digits", tmp_path / "plain", limit=30).split("train").weights is None


def test_class_names_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["digits", "--out", str(tmp_path / "out"), "--limit", "30"])
    assert "\nclasses: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n" in capsys.readouterr().err
    for number in range(25):
        for copy in range(2):
            put(tmp_path / "many" / f"{'long' * 12}-{number:02d}" / f"{copy}.png", digits(1)[0][0])
    put(tmp_path / "many" / "a\nb" / "0.png", digits(1)[0][0])
    main([str(tmp_path / "many"), "--out", str(tmp_path / "out2")])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line[:8] == "classes:"]
    whole = "long" * 12 + "-00"
    long = f"{whole[:19]}...{whole[-18:]}"
    assert line.startswith(f"classes: a\\nb, {long}, ")
    assert line.endswith(", ... (26 in all)")
    assert line.count(", ") == 10


def test_prepare_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from distcls.commands.prepare import main; main(sys.argv[1:]);"
        "print([m for m in ('torch', 'torchvision', 'accelerate', 'sklearn') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tree(tmp_path / "s", 40)), "--out", "out", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_images_that_training_and_validation_share_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same picture in two files, one of them encoded anew without loss."""
    pictures = [smooth(seed=seed) for seed in range(12)]
    for number, picture in enumerate(pictures):
        for split, ending in (("train", "png"), ("val", "bmp"), ("test", "png")):
            if split == "train" or number < 5:
                shown = picture if split != "test" or number < 1 else 255 - picture
                file = tmp_path / "p" / split / "ab"[number % 2] / f"{split}{number}.{ending}"
                file.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(file), shown)
    out = tmp_path / "data"
    prepare(PrepareOptions(source=str(tmp_path / "p"), out=out))
    said = capsys.readouterr().err
    assert "5 of 5 val images are duplicates of training images, first 'val/a/val0.bmp' of" in said
    assert "1 of 5 test images are duplicates of training images" in said
    assert json.loads((out / INFO).read_text())["repeated"] == {"val": 5, "test": 1}
    open_input(TrainConfig(data=out, out=tmp_path / "run"))
    assert "5 of 5 validation images are also training images" in capsys.readouterr().err


def test_pixels_are_told_apart() -> None:
    large = smooth(300, 400, seed=3)
    other = large.copy()
    other[1, 1] += 1  # not one of those that are digested
    assert pixel_digest(large) == pixel_digest(large.copy())
    assert pixel_digest(large) != pixel_digest(other)
    grey = np.zeros((4, 6, 1), np.uint8)
    assert pixel_digest(grey) != pixel_digest(grey.reshape(6, 4, 1))
