"""Dataset directories of others, and damaged ones: refused in one line that names file and row."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distcls import stored
from distcls.data import integrity
from distcls.data.dataset import CLASSES, INFO, MANIFEST, PACK, Dataset
from distcls.data.formats.manifest import open_table
from distcls.data.prepare import PrepareOptions, prepare
from distcls.errors import DistclsError, UsageError
from distcls.runtime.model import OnnxModel
from distcls.runtime.pipeline import stream
from distcls.system import cache_folder
from tests import flipping, tiny_dataset, tiny_onnx

CLASS_NAMES = ("red", "green", "blue")
COUNT = 12
WANTED = ["path", "label"]
Change = Callable[[dict[str, list[Any]]], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images, labels = tiny_dataset.coloured(COUNT)
    splits = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    return tiny_dataset.write(
        tmp_path / "data", list(images), labels, CLASS_NAMES, splits=splits, files=True
    )


@pytest.fixture
def prepared(digits: Path, tmp_path: Path) -> Path:
    """What prepare writes, all of it, of few images."""
    source = tiny_dataset.write_images(tmp_path / "in", tiny_dataset.coloured(COUNT)[0])
    rows = [f"{path.name},{CLASS_NAMES[i % 3]}" for i, path in enumerate(sorted(source.iterdir()))]
    (source / "m.csv").write_text("\n".join(["path,label", *rows]))
    prepare(PrepareOptions(source=str(source / "m.csv"), out=tmp_path / "out", quiet=True))
    return tmp_path / "out"


def everything(folder: Path) -> Any:
    """All that training, prediction and evaluation take from a directory."""
    data = Dataset.open(folder)
    found: list[Any] = [data.task, data.background, sorted(data.info.items(), key=str)]
    for name in data.counts():
        split = data.split(name)
        pixels = [split.image(index).tobytes() for index in range(len(split))]
        found.append((split.image_ids, split.labels.tolist(), split.weights, pixels))
    return found


def refused(folder: Path, read: Callable[[Path], Any] = everything) -> str:
    with pytest.raises(UsageError) as caught:
        read(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


# --- damage


@pytest.mark.row(46)
@pytest.mark.parametrize("name", [MANIFEST, PACK, CLASSES, INFO])
@pytest.mark.parametrize("stride", [flipping.STRIDE, pytest.param(3, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_a_dataset(prepared: Path, name: str, stride: int) -> None:
    found = flipping.flip(prepared / name, lambda: everything(prepared), stride=stride, first=5)
    assert found.refused > 0.9 * found.tried
    print(f"{name}: {found}")


@pytest.mark.row(46)
def test_labels_shifted_by_one_are_refused(prepared: Path) -> None:
    table = pq.read_table(prepared / MANIFEST)
    shifted = pa.array([(label + 1) % 3 for label in table["label"].to_pylist()], pa.int32())
    pq.write_table(table.set_column(2, table.schema.field("label"), shifted), prepared / MANIFEST)
    assert "manifest.parquet: wrong checksum" in refused(prepared)


@pytest.mark.row(46)
def test_the_pack_of_another_dataset_is_refused(prepared: Path) -> None:
    pack = np.fromfile(prepared / PACK, np.uint8)
    (prepared / PACK).write_bytes((255 - pack).tobytes())
    assert "pack.bin: wrong checksum" in refused(prepared)


def bombs(folder: Path) -> Iterator[Path]:
    """Tables of some kilobytes that unpack to thousands of times as much."""
    rows = 20_000
    names = pa.array([str(number) for number in range(rows)])
    same = pa.array(np.zeros(rows, np.int32))
    long = pa.DictionaryArray.from_arrays(same, pa.array(["x" * 1_000_000]))
    yield write_table(folder / "a_text.parquet", {"path": long, "image_id": names})
    huge = pa.array(["y" * 10_000_000] * 4)
    yield write_table(folder / "texts.parquet", {"path": huge}, use_dictionary=False)
    many = pa.array(np.zeros(1_000_000, np.int8))
    yield write_table(folder / "rows.parquet", {"label": many})


def write_table(file: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), file, compression="zstd", **options)
    return file


@pytest.mark.row(46)
def test_parquet_that_unpacks_to_gigabytes_is_refused_before_it_is_read(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in bombs(tmp_path):
        assert path.stat().st_size < 100_000
        with pytest.raises(UsageError) as caught, open_table(str(path), None, WANTED) as table:
            list(table.blocks)
        assert re.search("may unpack to|which cannot be", str(caught.value)), path
        assert "\n" not in str(caught.value)
        shutil.copy(path, prepared / MANIFEST)
        tiny_dataset.sign(prepared)
        assert re.search("may unpack to|which cannot be", refused(prepared))
        monkeypatch.setattr(stored, "MOST_UNPACKED", 1 << 24)  # the others are small, for a test


@pytest.mark.row(47)
def test_class_names_in_another_order_are_refused(prepared: Path) -> None:
    names = json.loads((prepared / CLASSES).read_text())
    (prepared / CLASSES).write_text(json.dumps(names[::-1]))
    assert "classes.json: wrong checksum" in refused(prepared)


@pytest.mark.row(47)
def test_an_edited_dataset_json_is_refused(prepared: Path) -> None:
    info = json.loads((prepared / INFO).read_text())
    (prepared / INFO).write_text(json.dumps(info))  # laid out in another way: no change
    everything(prepared)
    (prepared / INFO).write_text(json.dumps(info | {"seed": info["seed"] + 1}))
    assert "dataset.json: wrong checksum" in refused(prepared)


@pytest.mark.row(47)
def test_a_dataset_without_checksums_is_read_with_a_note(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = json.loads((folder / INFO).read_text())
    del info["sha256"]
    (folder / INFO).write_text(json.dumps(info))
    everything(folder)
    assert "has no checksums" in capsys.readouterr().err


@pytest.mark.row(47)
def test_a_pack_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    plain = integrity.digest
    monkeypatch.setattr(integrity, "digest", lambda path: hashed.append(path) or plain(path))
    for _ in range(3):
        integrity._verify.cache_clear()  # as in another process
        everything(folder)
    assert hashed == [folder / PACK]
    os.utime(folder / PACK)  # another time: perhaps another content
    everything(folder)
    assert len(hashed) == 2


@pytest.mark.row(47)
def test_a_pack_that_prepare_has_just_written_is_not_hashed_again(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "digest", None)
    everything(prepared)


@pytest.mark.row(47)
def test_a_cache_that_cannot_be_written_is_done_without(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTCLS_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("")
    everything(folder)
    (folder / PACK).write_bytes(bytes((folder / PACK).stat().st_size))
    assert "wrong checksum" in refused(folder)


@pytest.mark.row(47)
def test_the_record_of_a_pack_is_not_read(folder: Path) -> None:
    everything(folder)
    integrity._verify.cache_clear()
    for path in (cache_folder() / "packs").iterdir():
        path.write_text("{" * 100)
    everything(folder)


# --- forgery: the checksums are right


def put(name: str, row: int, value: Any, kind: pa.DataType | None = None) -> Change:
    """Another value in a row of a column."""

    def change(columns: dict[str, list[Any]]) -> None:
        columns[name][row] = value
        if kind is not None:
            columns[name] = pa.array(columns[name], kind)

    return change


BAD_ROWS: list[tuple[str, Change]] = [
    ("row 7 .*label is 99, expected a class from 0 to 2", put("label", 7, 99)),
    ("row 7 .*label is -1, expected", put("label", 7, -1)),
    ("row 3 .*label is None, expected", put("label", 3, None)),
    ("column 'label' holds double", put("label", 3, 1.5)),
    ("column 'label' holds string", lambda c: c.update(label=["red"] * COUNT)),
    ("column 'label' holds list", lambda c: c.update(label=[[1]] * COUNT)),
    ("row 5: image_id is None, expected a text", put("image_id", 5, None)),
    ("column 'image_id' holds int64", lambda c: c.update(image_id=list(range(COUNT)))),
    ("row 0 .*split is 'training'", put("split", 0, "training")),
    ("row 2 .*split is None", put("split", 2, None)),
    ("row 4 .*offset is -1, expected an image within the", put("offset", 4, -1)),
    ("row 4 .*offset is 99999, expected", put("offset", 4, 99999)),
    ("row 4 .*offset is None", put("offset", 4, None)),
    ("row 1 .*height is 0, expected 1 to", put("height", 1, 0)),
    ("row 1 .*height is 2147483647", put("height", 1, 2**31 - 1)),
    ("row 1 .*width is -8", put("width", 1, -8)),
    ("row 11 .*offset is .*, expected an image within", put("width", 11, 9)),
    ("row 6 .*channels is 2, expected 1 or 3", put("channels", 6, 2)),
    ("column 'path' is missing", lambda c: c.pop("path")),
    ("column 'weight' holds string", lambda c: c.update(weight=["x"] * COUNT)),
    ("'image 0011' has the weight nan", lambda c: c.update(weight=[1.0] * 11 + [None])),
]


def with_rows(folder: Path, change: Change) -> Path:
    columns = pq.read_table(folder / MANIFEST).to_pydict()
    change(columns)
    pq.write_table(pa.table(columns), folder / MANIFEST)
    return tiny_dataset.sign(folder)


@pytest.mark.row(47)
@pytest.mark.parametrize(("told", "change"), BAD_ROWS)
def test_a_row_that_cannot_be_is_named(folder: Path, told: str, change: Change) -> None:
    everything(folder)
    with pytest.raises(UsageError, match=rf"^{folder / MANIFEST}: {told}"):
        everything(with_rows(folder, change))


@pytest.mark.row(47)
def test_a_name_twice_is_refused_where_no_checksum_vouches_for_it(folder: Path) -> None:
    with_rows(folder, put("image_id", 5, "image 0001"))
    info = json.loads((folder / INFO).read_text())
    del info["sha256"]
    (folder / INFO).write_text(json.dumps(info))
    assert "row 5: image_id is 'image 0001', expected each one once" in refused(folder)


@pytest.mark.row(47)
@pytest.mark.parametrize("path", [None, "", "a\0b.png"])
def test_a_path_that_is_none_is_named(tmp_path: Path, path: str | None) -> None:
    images, labels = tiny_dataset.coloured(4)
    folder = tiny_dataset.write(
        tmp_path / "files", list(images), labels, CLASS_NAMES, packed=False, files=True
    )
    with_rows(folder, put("path", 2, path))
    assert "row 2 ('image 0002'): path is" in refused(folder)


@pytest.mark.row(47)
@pytest.mark.parametrize(
    "values", [[], 3, None, "x", {}, {"format": 2}, {"format": [[1]]}, {"format": 1}]
)
def test_a_dataset_json_that_is_none(folder: Path, values: Any) -> None:
    (folder / INFO).write_text(json.dumps(values))
    assert str(folder) in refused(folder)


@pytest.mark.row(47)
@pytest.mark.parametrize(
    "change",
    [
        {"packed": 1},
        {"packed": None},
        {"pack_bytes": -1},
        {"pack_bytes": 2.5},
        {"root": 3},
        {"root": "\ud800"},
        {"transparent": "no"},
        {"background": [0, 0]},
        {"left_out": {"png": "x"}},
        {"sha256": {"pack.bin": "x"}},
        {"invented": 1},
    ],
)
def test_a_value_that_dataset_json_cannot_have(folder: Path, change: dict[str, Any]) -> None:
    info = json.loads((folder / INFO).read_text())
    (folder / INFO).write_text(json.dumps(integrity.sealed(info, INFO) | change))
    key = next(iter(change))
    assert f"dataset.json: {key}" in refused(folder).replace("'", "")


@pytest.mark.row(47)
@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"format": 1, "format": 1}', "\xff"])
def test_no_json_is_one_line(folder: Path, text: str) -> None:
    for name in (INFO, CLASSES):
        before = (folder / name).read_bytes()
        (folder / name).write_text(text, encoding="latin-1")
        assert str(folder / name) in refused(folder)
        (folder / name).write_bytes(before)


@pytest.mark.row(47)
@pytest.mark.parametrize(
    "classes",
    [
        ["a", "b", "b"],
        ["a", "b", 3],
        ["a", "b", None],
        "abc",
        7,
        {"kind": "heads"},
        {"kind": "heads", "heads": [{"name": 1, "classes": ["a"]}]},
        {"kind": "multi_label", "classes": ["a", "a"]},
        {"kind": "multi_label", "classes": ["a"], "thresholds": ["x"]},
        {"kind": ["heads"]},
    ],
)
def test_classes_that_are_none(folder: Path, classes: Any) -> None:
    (folder / CLASSES).write_text(json.dumps(classes))
    assert "classes.json: neither names of classes nor heads" in refused(tiny_dataset.sign(folder))


@pytest.mark.row(47)
def test_classes_that_are_too_few(folder: Path) -> None:
    (folder / CLASSES).write_text(json.dumps(["red"]))
    assert "expected a class from 0 to 0" in refused(tiny_dataset.sign(folder))


@pytest.mark.row(40)
@pytest.mark.parametrize("name", [INFO, CLASSES, MANIFEST])
def test_pipes_are_not_opened(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert str(folder) in refused(folder)


# --- a pack that is cut while it is read


@pytest.mark.row(48)
def test_a_pack_that_is_cut_under_prediction_is_named(folder: Path, tmp_path: Path) -> None:
    """Reading a mapped file beyond its end is SIGBUS, the end of the process without a word."""
    images, labels = tiny_dataset.coloured(2000)
    data = tiny_dataset.write(tmp_path / "many", list(images), labels, CLASS_NAMES)
    split = Dataset.open(data).split("test")
    model = OnnxModel(tiny_onnx.write(tmp_path / "m.onnx"))
    for source in (split, split.first(1999)):
        assert source.uniform is not None
        chunks = stream(source, model, batch_size=8)
        next(chunks)
        os.truncate(data / PACK, 4096)
        with pytest.raises(DistclsError, match=r"pack.bin was truncated from 384,000 to 4,096"):
            list(chunks)
        with pytest.raises(DistclsError, match=r"pack.bin was truncated"):
            source.image(1900)
        (data / PACK).write_bytes(images.tobytes())
