"""What follows from an audit: the repaired manifest, the page, and what a model adds."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from distcls.audit.audit import AuditOptions
from distcls.audit.drift import drift_findings, feature_tests, two_sample_test
from distcls.audit.findings import KINDS
from distcls.audit.model import Features
from distcls.audit.scan import Rows
from distcls.commands.audit import main
from distcls.data.dataset import Dataset
from distcls.data.prepare import PrepareOptions, prepare
from distcls.errors import BadValue, UsageError
from distcls.files import claimed
from tests.pictures import encode
from tests.sources import put
from tests.test_audit import folder, kinds, look, photo
from tests.test_predict_rows import with_features


def damaged(root: Path) -> Path:
    """Pictures with a leak, a copy, a conflict, a broken file and two names of one class."""
    data = folder(root)
    put(data / "train/cat/leak.png", photo(2))
    put(data / "train/dog/again.png", photo(1))
    put(data / "train/cat/other.png", photo(5))  # train/dog/5.png
    put(data / "train/Cat/new.png", photo(200))
    (data / "train/cat/broken.png").write_bytes(b"nothing")
    return data


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_repaired_manifest_can_be_prepared_and_has_no_error(tmp_path: Path, ending: str) -> None:
    data, fixed = damaged(tmp_path / "photos"), tmp_path / f"fixed.{ending}"
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    look(data, fix=fixed)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
    prepare(PrepareOptions(source=str(fixed), out=tmp_path / "data", quiet=True))
    prepared = Dataset.open(tmp_path / "data")
    assert prepared.classes == ("cat", "dog")
    counts = prepared.counts()
    assert (counts["test"], counts["train"] + counts["val"]) == (16, 16)
    assert not kinds(look(fixed))
    with pytest.raises(UsageError, match=r"exists already; choose another --fix or add"):
        look(data, fix=fixed)


def test_copies_in_classes_that_become_one_are_duplicates(tmp_path: Path) -> None:
    data, fixed = tmp_path / "photos", tmp_path / "fixed.csv"
    for name, seed in {"Cat/bild 01": 1, "cat/same": 1, "cat/2": 2, "dog/3": 3, "dog/4": 4}.items():
        put(data / f"{name}.png", photo(seed))
    put(data / "dog/thrice.png", photo(5))
    put(data / "Cat/thrice.png", photo(5))
    put(data / "cat/thrice.png", photo(5))
    found = kinds(look(data, fix=fixed))
    assert found["duplicate", "cat/same.png"] == "Cat/bild 01.png"
    conflicts = {image for kind, image in found if kind == "conflict"}
    assert conflicts <= {"dog/thrice.png", "Cat/thrice.png", "cat/thrice.png"}
    with fixed.open(newline="") as handle:
        kept = {row["image_id"]: row["label"] for row in csv.DictReader(handle)}
    assert kept == {"Cat/bild 01.png": "cat", "cat/2.png": "cat", "dog/3.png": "dog"} | {
        "dog/4.png": "dog"
    }


def test_labels_that_become_one_are_written_once(tmp_path: Path) -> None:
    manifest, fixed = tmp_path / "tags.csv", tmp_path / "fixed.csv"
    lines = ["path,labels"]
    for seed, labels in enumerate(("Wet|wet|warm", "wet", "wet", "warm")):
        put(tmp_path / f"{seed}.png", photo(seed))
        lines.append(f"{seed}.png,{labels}")
    put(tmp_path / "again.png", photo(1))
    manifest.write_text("\n".join([*lines, "again.png,Wet"]))
    found = look(manifest, fix=fixed, labels_column="labels")
    assert ("duplicate", "again.png") in kinds(found)
    with fixed.open(newline="") as handle:
        assert [row["labels"] for row in csv.DictReader(handle)] == [
            "wet|warm",
            "wet",
            "wet",
            "warm",
        ]


def test_near_copies_without_a_split_are_put_into_one_group(tmp_path: Path) -> None:
    for number in range(12):
        put(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png", photo(number))
    near = (photo(4)[1:], photo(4)[:, 2:])
    for number, picture in enumerate(near):
        put(tmp_path / "photos/a" / f"near{number}.png", picture)
    look(tmp_path / "photos", fix=tmp_path / "fixed.csv")
    with (tmp_path / "fixed.csv").open(newline="") as handle:
        groups = {row["image_id"]: row["group"] for row in csv.DictReader(handle)}
    assert {name for name, group in groups.items() if group} == {
        *("a/4.png", "a/near0.png", "a/near1.png")
    }
    assert len(set(groups.values())) == 2
    prepare(PrepareOptions(source=str(tmp_path / "fixed.csv"), out=tmp_path / "data", quiet=True))
    table = pq.read_table(tmp_path / "data/manifest.parquet").to_pydict()
    homes = dict(zip(table["image_id"], table["split"], strict=True))
    assert len({homes[name] for name, group in groups.items() if group}) == 1


def test_repairs_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=r"fix: .* expected the name of a \.csv or \.parquet file"):
        AuditOptions(data="digits", fix=Path("fixed.txt"))
    failure = look(Path("digits"), fix=tmp_path / "fixed.csv").failure
    assert isinstance(failure, UsageError)
    assert "fix: the images are no files" in str(failure)


def test_the_page_needs_no_network_and_shows_both_pictures(tmp_path: Path) -> None:
    data = damaged(tmp_path / "<photos>")
    look(data, out=tmp_path / "audit")
    page = (tmp_path / "audit/audit.html").read_text()
    assert "http:" not in page
    assert "https:" not in page
    assert "<photos>" not in page
    assert "&lt;photos&gt;" in page
    images = re.findall(r'<img src="data:image/(?:png|jpeg);base64,[^"]+" alt="([^"]*)"', page)
    assert {"train/cat/leak.png", "test/cat/2.png"} <= set(images)
    assert page.count("<li>") == len(look(data).findings)


def test_a_model_finds_mirrored_and_turned_pictures(tmp_path: Path) -> None:
    data = folder(tmp_path / "photos")
    put(data / "train/cat/mirrored.png", photo(2)[:, ::-1])
    put(data / "train/cat/turned.png", np.rot90(photo(6)))
    assert not kinds(look(data))
    model = with_features(tmp_path / "f.onnx")
    found = look(data, model=model)
    texts = {each.image: each.text for each in found.findings if each.kind == "near_leak"}
    assert {name: "mirrored" in text for name, text in texts.items()} == {
        "train/cat/mirrored.png": True,
        "train/cat/turned.png": False,
    }


def test_drift_is_told_from_chance() -> None:
    rng = np.random.default_rng(3)
    rows = Rows((8,), np.float32)
    rows.extend(rng.normal(size=(900, 8)))
    splits = ["train"] * 600 + ["val"] * 300
    same = feature_tests(Features(rows, np.arange(900)), splits)
    assert same.keys() == {"val"}
    assert not list(drift_findings([], same))
    rows.extend(rng.normal(size=(300, 8)) + 0.6)
    tests = feature_tests(Features(rows, np.arange(1200)), [*splits, *["test"] * 300])
    [finding] = drift_findings([], tests)
    assert (finding.kind, finding.split, finding.related) == ("drift", "test", "train")
    assert finding.value is not None
    assert finding.value < 0.001


def test_every_difference_of_a_split_is_printed(tmp_path: Path) -> None:
    for number in range(48):
        split = ("train", "val")[number % 2]
        name = f"{split}/{'ab'[number // 2 % 2]}/{number}.png"
        bright = photo(number, *((60, 80), (90, 60))[number % 2]) // (1 + number % 2)
        put(tmp_path / "photos" / name, bright)
    found = look(tmp_path / "photos")
    drift = [each.text for each in found.findings if each.kind == "drift"]
    assert len(drift) > 1
    lines = [line.strip() for line in found.to_text().splitlines()]
    assert lines[lines.index(drift[0]) - 1].endswith(f"{len(drift)}  {KINDS['drift']}")
    assert set(drift) <= set(lines)


def test_the_p_value_of_equal_samples_is_uniform() -> None:
    rng = np.random.default_rng(0)
    found = [
        two_sample_test(*rng.normal(size=(2, 30, 3)).astype(np.float32), seed=n)[1]
        for n in range(60)
    ]
    assert 0.3 < np.mean(found) < 0.7
    assert np.mean(np.array(found) < 0.2) < 0.4


def test_no_file_of_the_data_is_written_over(tmp_path: Path) -> None:
    data, made = folder(tmp_path / "photos"), tmp_path / "data"
    prepare(PrepareOptions(source=str(data), out=made, quiet=True))
    out = tmp_path / "audit"
    look(made, out=out)
    before = {path: path.read_bytes() for path in [*made.iterdir(), *out.iterdir()]}
    for read, fixed, told in (
        (made, made / "manifest.parquet", "a place outside of .*data"),
        (data, data / "train/cat/new.csv", "a place outside of .*photos"),
        (made, out / "audit.csv", "a file other than out"),
    ):
        with pytest.raises(BadValue, match=told):
            look(read, out=out, fix=fixed, overwrite=True)
    manifest = tmp_path / "audit.csv"
    manifest.write_text(f"path,label\n{data}/train/cat/0.png,cat\n")
    with pytest.raises(BadValue, match="a file other than data"):
        look(manifest, out=tmp_path, overwrite=True)
    assert {path: path.read_bytes() for path in [*made.iterdir(), *out.iterdir()]} == before


def test_names_of_any_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = folder(tmp_path / "photos"), tmp_path / "audit"
    here = os.fsencode(data) + b"/train/cat/"
    long = b"\x1b[31m\n" + b"long" * 40 + "\u202e.png".encode()
    Path(os.fsdecode(here + b"w\xff\xfe.png")).write_bytes(encode(photo(9), "PNG"))
    Path(os.fsdecode(here + long)).write_bytes(b"nothing")
    main([str(data), "--out", str(out), "--fix", str(tmp_path / "fixed.csv"), "--quiet"])
    with (out / "audit.csv").open(newline="", encoding="utf-8") as handle:
        rows = {row["image"]: row["text"] for row in csv.DictReader(handle)}
    assert rows["train/cat/w\\xff\\xfe.png"] == "its name is not UTF-8"
    assert any("\\u202e.png" in name for name in rows)
    assert "\u202e" not in "".join((out / name).read_text() for name in ("audit.csv", "audit.html"))
    printed = capsys.readouterr().out
    assert "first train/cat/" in printed
    assert all(line.isprintable() and len(line) < 200 for line in printed.splitlines())


def test_findings_are_printed_where_no_repair_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/1.png", "b/1.png"):
        put(tmp_path / "photos" / name, photo(1))
    with pytest.raises(UsageError, match="no image would be left"):
        main([str(tmp_path / "photos"), "--fix", str(tmp_path / "f.csv"), "--quiet"])
    assert "different labels" in capsys.readouterr().out


def test_one_audit_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    data, out = folder(tmp_path / "photos", 1), tmp_path / "audit"
    out.mkdir()
    with claimed(out), pytest.raises(UsageError, match=r"another process is writing .*audit at"):
        look(data, out=out)
    look(data, out=out)
    with pytest.raises(UsageError, match="exists already"):
        look(data, out=out)


def test_files_of_two_audits_do_not_mix(tmp_path: Path) -> None:
    data, out = folder(tmp_path / "photos", 2), tmp_path / "audit"
    look(data, out=out)
    before = {name: (out / name).read_bytes() for name in ("audit.csv", "audit.json")}
    (data / "train/cat/broken.png").write_bytes(b"nothing")
    (out / "audit.html").unlink()
    (out / "audit.html").mkdir()
    with pytest.raises(UsageError, match=r"audit.html is a folder"):
        look(data, out=out, overwrite=True)
    assert {name: (out / name).read_bytes() for name in before} == before
    (out / "audit.html").rmdir()
    look(data, out=out, overwrite=True)
    assert all((out / name).read_bytes() != before[name] for name in before)
    assert not list(out.glob(".*"))
