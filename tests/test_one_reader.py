"""What `prepare` and `predict` read of the same input: the same images, names, order and labels."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distcls.commands.prepare import main as prepare_main
from distcls.data.dataset import Dataset
from distcls.data.formats.detect import FORMATS, format_names, open_labelled, open_source
from distcls.data.prepare import PrepareOptions, prepare
from distcls.data.source import ImageSource, LabelOptions, read_class_names
from distcls.errors import BadImage, UsageError
from distcls.runtime.generic_onnx import read_classes
from tests.sources import digits, put, tree, write_manifest

IMAGE = digits(1)[0][0]

Read = Callable[[Path | str], list[str]]
"""The images that one of the two finds, in order."""


def by_predict(source: Path | str) -> list[str]:
    return list(open_source(str(source)).image_ids)


def by_prepare(source: Path | str) -> list[str]:
    return [record.image_id for record in open_labelled(str(source)).records]


both = pytest.mark.parametrize("read", [by_predict, by_prepare])


def labels_by_predict(source: Path | str) -> list[str | None]:
    return list(open_source(str(source)).true_labels or [])


def labels_by_prepare(source: Path | str) -> list[str | None]:
    found = open_labelled(str(source))
    return [found.classes[record.label] for record in found.records]


both_labels = pytest.mark.parametrize("read", [labels_by_predict, labels_by_prepare])


@both
@pytest.mark.parametrize(
    "junk",
    [
        "1/._0001.png",
        ".trash/0001.png",
        "1/.ipynb_checkpoints/0001-checkpoint.png",
        "__MACOSX/1/0001.png",
        "1/@eaDir/0001.png/thumb.jpg",
        ".hidden.png",
    ],
)
def test_hidden_trash_and_archive_entries_are_left_out_and_counted(
    tmp_path: Path, read: Read, junk: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree(tmp_path / "root", 30)
    plain = read(root)
    assert len(plain) == 30
    assert capsys.readouterr().err == ""
    put(root / junk, IMAGE)
    assert read(root) == plain
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{root}: left out 1 hidden " in line
    assert "first " in line


@both
def test_the_order_is_that_of_the_paths(tmp_path: Path, read: Read) -> None:
    names = ["a-b/1.png", "a/2.PNG", "a/10.png", "a/deep/er/1.jpg", "a/z.png", "b/x y.webp"]
    for name in names:
        put(tmp_path / "root" / name.lower(), IMAGE).rename(tmp_path / "root" / name)
    (tmp_path / "root" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "root" / "a" / "gone.bmp").symlink_to("nowhere")
    assert read(tmp_path / "root") == sorted([*names, "a/gone.bmp"])


@both
def test_links_are_followed_and_circles_counted(
    tmp_path: Path, read: Read, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    put(root / "train" / "a" / "1.png", IMAGE)
    put(root / "train" / "b" / "2.png", IMAGE)
    put(root / "test" / "a" / "3.png", IMAGE)
    (root / "val").symlink_to("test")  # the same folder under two names is read under both
    (root / "train" / "a" / "up").symlink_to(root)
    assert read(root) == ["test/a/3.png", "train/a/1.png", "train/b/2.png", "val/a/3.png"]
    assert "left out 1 link to its own parent folder" in capsys.readouterr().err


@both
def test_a_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(tmp_path / "root", 30)
    scandir = os.scandir

    def refuse(path: Path) -> object:  # root may list every folder
        if Path(path).name == "3":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match="3: cannot be listed: Permission denied"):
        read(root)


@both
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
@pytest.mark.parametrize(
    "header", [("Path", "Class"), ("IMAGE", " Label "), ("image_ID", "TARGET")]
)
def test_headers_in_any_case(
    tmp_path: Path, read: Read, header: tuple[str, str], ending: str
) -> None:
    rows = [header, ("a.png", "x"), ("b.png", "y")]
    assert read(write_manifest(tmp_path / f"list{ending}", rows)) == ["a.png", "b.png"]


@both_labels
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
@pytest.mark.parametrize("column", ["label", "class", "category", "target"])
def test_label_columns(
    tmp_path: Path, read: Callable[[Path], list[str]], column: str, ending: str
) -> None:
    rows = [("path", "note", column), ("a.png", "-", "x"), ("b.png", "-", " y ")]
    assert read(write_manifest(tmp_path / f"list{ending}", rows)) == ["x", "y"]


def test_the_first_label_column_wins_in_both(tmp_path: Path) -> None:
    rows = [("target", "path", "class"), ("1", "a.png", "x"), ("2", "b.png", "y")]
    path = write_manifest(tmp_path / "list.csv", rows)
    assert labels_by_predict(path) == labels_by_prepare(path) == ["x", "y"]


def test_a_column_of_floats_is_no_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`predict` needs no labels and goes on without; `prepare` needs them."""
    path = write_manifest(tmp_path / "l.parquet", [("path", "target"), ("a.png", 0.5)])
    assert open_source(str(path)).true_labels is None
    assert "column 'target' holds double" in capsys.readouterr().err
    with pytest.raises(UsageError, match="column 'target' holds double"):
        open_labelled(str(path))


@both
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_blanks_around_paths_are_stripped(tmp_path: Path, read: Read, ending: str) -> None:
    put(tmp_path / "a.png", IMAGE)
    put(tmp_path / "exact.png", IMAGE).rename(tmp_path / " exact.png ")
    put(tmp_path / "exact.png", IMAGE)
    names = [" a.png", "a b.png ", " exact.png ", "exact.png", "\tgone.png"]
    rows = [("path", "label"), *((name, "x") for name in names)]
    path = write_manifest(tmp_path / f"list{ending}", rows)
    assert read(path) == ["a.png", "a b.png", " exact.png ", "exact.png", "gone.png"]
    assert open_source(str(path)).image(0).shape == (8, 8, 3)
    assert open_source(str(path)).image(2).shape == (8, 8, 3)


@both
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"the manifest is empty \(0 bytes\)"),
        (b"\n\n", "the manifest is empty"),
        (b"path,label\n", "has a header but no rows"),
        (b"photo,label\na,b\n", "no column for the image; expected one of path, file"),
        (b"path,label,Path\na,b,c\n", "column 'path' occurs more than once"),
        (b"path,label\na.png,x\n\n  ,y\n", "row 2: path is empty"),
        (b"path,label\na.png,x\n\nb.png\n", "row 2: 1 values, but the header has 2"),
        (b"path,label\na.png,x\nb.png,\xff\n", "not UTF-8"),
        (b'path,label\na.png,x\n\nb.png,"x"y\n', "row 2: not valid CSV"),
        (b'"path\n', "row 0: not valid CSV|row 1: not valid CSV"),
    ],
)
def test_bad_manifests_are_refused_alike(
    tmp_path: Path, read: Read, content: bytes, message: str
) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read(tmp_path / "list.csv")
    assert "\n" not in str(caught.value)


@both
def test_an_image_without_a_name_is_called_by_its_path(tmp_path: Path, read: Read) -> None:
    rows = [("image_id", "path", "label"), ("one", "a.png", "x"), ("", "b.png", "y")]
    assert read(write_manifest(tmp_path / "list.csv", rows)) == ["one", "b.png"]


@pytest.mark.parametrize("read", [read_class_names, read_classes])
@pytest.mark.parametrize("name", ["classes.txt", "classes.json", "classes"])
def test_a_json_list_of_class_names_whatever_the_ending(
    tmp_path: Path, read: Callable[[Path], tuple[str, ...]], name: str
) -> None:
    (tmp_path / name).write_text(' ["a", " b c ", ""]\n', encoding="utf-8-sig")
    assert read(tmp_path / name) == ("a", "b c")


@pytest.mark.parametrize("read", [read_class_names, read_classes])
def test_class_names_one_per_line(tmp_path: Path, read: Callable[[Path], tuple[str, ...]]) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("[unknown]\n\n b c \n", encoding="utf-8-sig")
    assert read(path) == ("[unknown]", "b c")
    for content, message in [
        ("a\nb\n a\n", "'a' occurs twice"),
        ('["a", "b"', "cannot be read"),
        ('["a", 1]', "expected names"),
    ]:
        path.write_text(content)
        with pytest.raises(UsageError, match=f"classes: .*{message}"):
            read(path)


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shards(folder: Path, names: tuple[str, ...] = ("cat", "dog", "10")) -> str:
    """Two shards of 15 digits each, the class of digit N `names[N % 3]`; and a pattern for both."""
    folder.mkdir()
    for number in (0, 1):
        members: list[tuple[str, bytes]] = [("._x.png", b"AppleDouble")]
        for index in range(15 * number, 15 * number + 15):
            data = put(folder / "x.png", digits(30)[0][index]).read_bytes()
            members += [(f"{index:02d}.png", data)]
            members += [(f"{index:02d}.cls", names[index % 3].encode() + b"\n")]
        shard(folder / f"s-{number}.tar", members)
    return f"{folder}/s-{{0..1}}.tar"


@both
def test_shards(tmp_path: Path, read: Read, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = shards(tmp_path / "shards")
    names = [f"s-{index // 15}/{index:02d}" for index in range(30)]
    assert read(pattern) == read(f"{tmp_path}/shards/*.tar") == names
    assert "left out 2 hidden images, first s-0/._x.png" in capsys.readouterr().err
    assert labels_by_predict(pattern) == labels_by_prepare(pattern)


def test_shards_are_prepared(tmp_path: Path) -> None:
    pattern = shards(tmp_path / "shards")
    prepare(PrepareOptions(source=pattern, out=tmp_path / "data", quiet=True))
    data = Dataset.open(tmp_path / "data")
    assert data.classes == ("10", "cat", "dog")
    assert (data.info["kind"], data.packed, data.has_files) == ("tar", True, False)
    assert sum(data.counts().values()) == 30
    for name in data.counts():
        split = data.split(name)
        for place, image_id in enumerate(split.image_ids):
            index = int(image_id.rpartition("/")[2])
            np.testing.assert_array_equal(split.image(place)[..., 0], digits(30)[0][index])
            assert split.true_labels[place] == ("cat", "dog", "10")[index % 3]


def test_classes_of_shards_may_be_numbers(tmp_path: Path) -> None:
    pattern = shards(tmp_path / "shards", ("0", "1", "2"))
    options = LabelOptions(classes=("red", "green", "blue"))
    found = open_labelled(pattern, options=options)
    assert [record.label for record in found.records[:4]] == [0, 1, 2, 0]
    with pytest.raises(UsageError, match="'s-0/02' has the class '2', which is not one of"):
        open_labelled(pattern, options=LabelOptions(classes=("red", "green")))


def test_numbers_of_shards_may_start_at_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = shards(tmp_path / "shards", ("1", "2", "3"))
    found = open_labelled(pattern, options=LabelOptions(classes=("red", "green", "blue")))
    assert [record.label for record in found.records[:4]] == [0, 1, 2, 0]
    assert "classes are numbered from 1: 1 is 'red'" in capsys.readouterr().err
    found = open_labelled(pattern, options=LabelOptions(classes=("2", "1", "3")))
    assert [record.label for record in found.records[:4]] == [1, 0, 2, 1]
    assert "numbered" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pack", "off"), "the images of tar are not files; add --write-images"),
        (("--text-column", "text"), "text_column: 'text' is a column of a manifest, but"),
    ],
)
def test_options_that_shards_do_not_have(
    tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    pattern = shards(tmp_path / "shards")
    with pytest.raises(UsageError, match=message):
        prepare_main([pattern, "--out", str(tmp_path / "data"), *flags])
    assert not (tmp_path / "data").exists()


def no_labels(folder: Path) -> str:
    return str(shard(folder / "s.tar", [("a.png", b"1"), ("a.cls", b"x"), ("b.png", b"2")]))


def twice(folder: Path) -> str:
    members = [("a.png", b"1"), ("a.cls", b"x"), ("b.png", b"2"), ("b.cls", b"y")]
    return str(shard(folder / "s.tar", [*members, ("b.png", b"3"), ("b.png", b"4")]))


def one_image(folder: Path) -> str:
    return str(put(folder / "a.png", IMAGE))


def some_images(folder: Path) -> str:
    put(folder / "a.png", IMAGE)
    return f"{folder}/*.png"


def urls(folder: Path) -> str:
    rows = [("path", "label"), ("a.png", "x"), ("https://example.org/b.png", "y")]
    return str(write_manifest(folder / "list.csv", rows))


def remote(_: Path) -> str:
    return "http://127.0.0.1:9/photos/a.png"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_labels, r"'s/b' has no class, expected a KEY\.cls beside it"),
        (twice, "'s/b.png' occurs twice"),
        (one_image, r"a\.png: has no labels to train on; expected digits, a folder"),
        (some_images, r"\*\.png: has no labels to train on"),
        (urls, "row 2: 'https://example.org/b.png' is a URL; a dataset is prepared from local"),
        (remote, "a dataset is prepared from local files; copy them here first"),
    ],
)
def test_what_only_predict_reads_is_refused_by_prepare(
    tmp_path: Path, make: Callable[[Path], str], message: str
) -> None:
    location = make(tmp_path)
    assert len(open_source(location)) >= 1
    with pytest.raises(UsageError, match=message) as caught:
        prepare(PrepareOptions(source=location, out=tmp_path / "data", quiet=True))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_a_name_that_no_file_can_have_is_a_row(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "l.csv", [("path", "label"), ("a\0.png", "x"), ("b", "y")])
    with pytest.raises(BadImage, match="cannot be read: "):
        open_source(str(path)).image(0)
    path.write_text("path\nhttp://[::1/x.jpg\n")
    with pytest.raises(BadImage, match="cannot be fetched: "):
        open_source(str(path)).image(0)


def in_memory(_: Path) -> ImageSource:
    return open_source("digits")


def dataset_split(folder: Path) -> ImageSource:
    prepare(PrepareOptions(source="digits", out=folder / "data", limit=30, quiet=True))
    return open_source(str(folder / "data"), "train")


def files_split(folder: Path) -> ImageSource:
    source = str(tree(folder / "root", 60))
    prepare(PrepareOptions(source=source, out=folder / "data", pack="off", quiet=True))
    return open_source(str(folder / "data"), "train")


def folder_source(folder: Path) -> ImageSource:
    return open_source(str(tree(folder / "root", 30)))


def tar_source(folder: Path) -> ImageSource:
    return open_source(shards(folder / "shards"))


@pytest.mark.parametrize("make", [in_memory, dataset_split, files_split, folder_source, tar_source])
def test_every_source_keeps_to_the_interface(
    tmp_path: Path, make: Callable[[Path], ImageSource]
) -> None:
    source = make(tmp_path)
    assert len(source) == len(source.image_ids) >= 10
    images = [source.image(index) for index in range(len(source))]
    assert {(image.dtype, image.shape) for image in images} == {(np.dtype(np.uint8), (8, 8, 3))}
    if source.uniform is not None:
        grey = source.uniform
        assert grey.shape == (len(source), 8, 8, 1)
        np.testing.assert_array_equal(np.repeat(grey, 3, axis=-1), np.stack(images))
    if source.encoded:
        assert source.read(0).startswith(b"\x89PNG")
    else:
        with pytest.raises(UsageError, match="decoded already"):
            source.read(0)
    if source.true_labels is not None:
        assert len(source.true_labels) == len(source)
        assert isinstance(source.true_labels[0], str)
    assert source.fingerprint() == source.fingerprint()
    assert len(source.fingerprint()) == 64


def test_the_table_knows_every_format_that_may_be_asked_for() -> None:
    assert set(format_names()) - {"auto"} <= FORMATS.keys()


def test_digits_is_the_bundled_set_for_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "digits" / "a" / "1.png", IMAGE)
    monkeypatch.chdir(tmp_path)
    assert len(open_source("digits")) == len(open_labelled("digits").records) == 1797
    assert "the folder of that name is ./digits" in capsys.readouterr().err
    assert by_predict("./digits") == by_prepare("./digits") == ["a/1.png"]


def test_labels_of_a_dataset_are_text_for_multiple_outputs_too(tmp_path: Path) -> None:
    for index, image in enumerate(digits(8)[0]):
        put(tmp_path / f"{index}.png", image)
    rows = [("path", "tags"), *((f"{n}.png", ["a|b", "", "b", "c"][n % 4]) for n in range(8))]
    path = write_manifest(tmp_path / "list.csv", rows)
    options = {"labels_column": "tags", "val_fraction": 0.0, "test_fraction": 0.0}
    prepare(PrepareOptions(source=str(path), out=tmp_path / "d", quiet=True, **options))  # type: ignore[arg-type]
    split = Dataset.open(tmp_path / "d").split("train")
    assert split.true_labels[:4] == ["a|b", "", "b", "c"]
    assert json.loads((tmp_path / "d" / "classes.json").read_text())["kind"] == "multi_label"
