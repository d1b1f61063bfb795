"""Columns of a manifest that mean nothing to distcls: kept by `prepare`, groups of `evaluate`."""

from __future__ import annotations

import csv
import datetime
import json
import math
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import distcls
from distcls.commands.audit import main as audit_main
from distcls.commands.evaluate import main as evaluate_main
from distcls.commands.prepare import main as prepare_main
from distcls.data.columns import Choice, ManifestColumns
from distcls.data.dataset import Dataset, fingerprint_of
from distcls.data.formats.manifest import read_columns
from distcls.data.prepare import PrepareOptions, prepare
from distcls.errors import UsageError
from distcls.evaluation.groups import _by_range, _numbers
from distcls.files import csv_line
from tests import tiny_dataset, tiny_onnx
from tests.serving import EXPORTED

COUNT = 60
CAMERAS = ["Nikon", "Žák", "a, b"]
OTHERS: dict[str, list[Any]] = {
    "Camera": [CAMERAS[number % 3] if number % 7 else None for number in range(COUNT)],
    "age": [20 + number for number in range(COUNT)],
    "flash": [number % 2 == 0 for number in range(COUNT)],
    "score": [math.nan if number == 3 else number / 8 for number in range(COUNT)],
    "day": [datetime.date(2020, 1, 1 + number % 28) for number in range(COUNT)],
    "id": [f"{number:03d}" for number in range(COUNT)],
}


def manifest(folder: Path, ending: str, others: dict[str, Any], count: int = COUNT) -> Path:
    """Images with their classes, and other columns."""
    images, labels = tiny_dataset.coloured(count)
    if not (folder / "images").exists():
        tiny_dataset.write_images(folder / "images", images)
    table: dict[str, Any] = {"path": [f"images/{number:03d}.png" for number in range(count)]}
    table |= {"label": [tiny_onnx.COLOURS[label] for label in labels], **others}
    path = folder / f"list.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table(table), path)
        return path
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(table)
        cells = (["" if cell is None else cell for cell in column] for column in table.values())
        writer.writerows(zip(*cells, strict=True))
    return path


def prepared(source: Path, out: Path, **options: Any) -> Dataset:
    prepare(PrepareOptions(source=str(source), out=out, quiet=True, **options))
    return Dataset.open(out)


def refused(source: Path, out: Path, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        prepared(source, out, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_every_image_keeps_its_values(tmp_path: Path, ending: str) -> None:
    source = manifest(tmp_path, ending, OTHERS)
    data = prepared(source, tmp_path / "data")
    for path in (tmp_path / "data", source):
        opened = pickle.loads(pickle.dumps(distcls.open_dataset(path)))
        frame = opened.to_dataframe().set_index("image_id")
        for example in opened[::-1]:
            place = int(Path(example.image_id).stem)
            values = {name: column[place] for name, column in OTHERS.items()}
            values["day"] = str(values["day"])
            if ending == "csv":
                texts = {n: None if v is None else str(v) for n, v in values.items()}
                assert example.columns == texts
            else:
                values["score"] = None if place == 3 else values["score"]
                assert example.columns == values
            row = frame.loc[example.image_id, list(values)]
            assert row.astype(object).where(row.notna(), None).to_dict() == example.columns
    assert set(data.counts()) == {"train", "val", "test"}


def test_they_are_no_part_of_what_a_dataset_is(tmp_path: Path) -> None:
    """A run goes on with a dataset directory that has other columns."""
    found = []
    for name, others in {"with": OTHERS, "without": {}}.items():
        (tmp_path / name).mkdir()
        data = prepared(manifest(tmp_path / name, "csv", others), tmp_path / f"{name}.data")
        found.append(fingerprint_of(data, data.split("train"), data.split("val")))
    assert found[0] == found[1]


def test_what_prepare_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {
        "note": ["x" * 300] * COUNT,
        "loss": [1] * COUNT,
        "box": [[1, 2]] * COUNT,
        "": OTHERS["id"],
    }
    odd |= {
        "empty": pa.nulls(COUNT),
        "two\nlines": OTHERS["id"],
        "many": pa.array([2**64 - 1] * COUNT, pa.uint64()),
    }
    odd |= {"bytes": [b"\xff"] * COUNT, "codes": pa.array(CAMERAS * 20).dictionary_encode()}
    source = manifest(tmp_path, "parquet", OTHERS | odd)
    prepare_main([str(source), "--out", str(tmp_path / "data"), "--json"])
    out, said = capsys.readouterr()
    result = json.loads(out)
    assert result["columns"] == [*OTHERS, "codes"]
    assert f"kept: {', '.join([*OTHERS, 'codes'])}\n" in said
    reasons = result["columns_left_out"]
    assert reasons["note"] == "holds texts of more than 256 characters"
    assert reasons["loss"] == "is a name that distcls uses; rename it"
    assert reasons["box"] == "holds list<element: int64>, no plain values"
    assert reasons["two\\nlines"].startswith("is no name of")
    assert reasons["bytes"] == "holds binary, which cannot be read as text"
    assert (reasons["empty"], reasons["a column"]) == ("is empty", "has no name")
    assert reasons["many"] == "holds numbers of more than 63 bits"
    assert "note (holds texts of more than 256 characters)" in said
    opened = distcls.open_dataset(tmp_path / "data")
    assert opened[0].columns["codes"] in CAMERAS


def test_columns_by_name(tmp_path: Path) -> None:
    wide = {f"f{number}": [number] * COUNT for number in range(300)}
    source = manifest(tmp_path, "parquet", OTHERS | wide | {"box": [[1]] * COUNT})
    assert prepared(source, tmp_path / "a").split("test").kept.num_columns == 0
    chosen = prepared(source, tmp_path / "b", keep_columns=("CAMERA", "f7"))
    assert chosen.split("test").kept.column_names == ["Camera", "f7"]
    assert (
        not prepared(source, tmp_path / "c", keep_columns=("none",)).split("test").kept.num_columns
    )
    for name, told in {
        "camra": "no column 'camra'; did you mean 'Camera'?",
        "label": "'label' is a column that the dataset is made of",
        "box": "column 'box' of .* holds list<.*, no plain values",
    }.items():
        with pytest.raises(UsageError, match=f"^keep_columns: .*{told}"):
            prepared(source, tmp_path / "d", keep_columns=(name,))
    assert not (tmp_path / "d").exists()
    with pytest.raises(UsageError, match="keep_columns: 'age' is a column of a manifest, but"):
        prepared(tmp_path / "images", tmp_path / "d", keep_columns=("age",))


def test_a_column_that_is_there_twice_is_not_kept(tmp_path: Path) -> None:
    path = manifest(tmp_path, "csv", {"age": OTHERS["age"], "site": OTHERS["id"]})
    path.write_text(path.read_text().replace("age,site", "Site,site"))
    assert prepared(path, tmp_path / "data").split("train").kept.num_columns == 0
    assert "'Site' is there twice" in refused(path, tmp_path / "d", keep_columns=("site",))


def test_the_memory_is_that_of_the_different_texts(tmp_path: Path) -> None:
    rows = 100_000
    lines = (
        f"{number}.png,a,{'camera of the lab' if number % 3 else 'other'}\n"
        for number in range(rows)
    )
    path = tmp_path / "list.csv"
    path.write_text("path,label,camera\n" + "".join(lines))
    choice = Choice({"camera": "camera"}, {}, False)
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    found = ManifestColumns(str(path), rows, choice, lambda: read_columns(str(path), ["camera"]))
    assert found.table.num_rows == rows
    assert pa.total_allocated_bytes() - before < 6 * rows
    assert tracemalloc.get_traced_memory()[1] < 20 << 20  # of a block of rows
    tracemalloc.stop()


def test_hostile_columns_of_a_dataset_directory_are_dropped(tmp_path: Path) -> None:
    data = prepared(manifest(tmp_path, "csv", OTHERS), tmp_path / "data")
    table = pq.read_table(data.folder / "manifest.parquet")
    long = pa.array(["x" * 10_000] * COUNT).dictionary_encode()
    table = table.append_column("long", long).append_column("nested", pa.array([[1]] * COUNT))
    for name in ("twice", "twice", "truth"):
        table = table.append_column(name, pa.array(range(COUNT)))
    pq.write_table(table, data.folder / "manifest.parquet")
    tiny_dataset.sign(data.folder)
    assert Dataset.open(data.folder).split("test").kept.column_names == [*OTHERS]


def csv_cell(value: Any) -> str:
    return csv_line([value]).strip().strip('"')


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_they_survive_the_repairs_of_an_audit(tmp_path: Path, ending: str) -> None:
    data = prepared(manifest(tmp_path, "parquet", OTHERS), tmp_path / "data")
    fixed = tmp_path / f"fixed.{ending}"
    audit_main([str(data.folder), "--out", str(tmp_path / "audit"), "--fix", str(fixed), "--quiet"])
    again = distcls.open_dataset(prepared(fixed, tmp_path / "again").folder)
    before = {e.image_id: e.columns for e in distcls.open_dataset(data.folder)}
    assert len(again) > COUNT / 2
    for example in again:
        own = before[example.image_id]
        if ending == "csv":
            own = {n: None if value is None else csv_cell(value) for n, value in own.items()}
        assert example.columns == own


# --- groups


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_onnx.write(tmp_path / "m.onnx")


def groups(
    capsys: pytest.CaptureFixture[str], model: Path, data: Path, *more: str
) -> dict[str, dict[str, Any]]:
    evaluate_main(["--model", str(model), "--data", str(data), "--json", *more])
    found = json.loads(capsys.readouterr().out)
    assert sum(group["count"] for group in found["groups"]) == found["count"]
    return {group["value"]: group for group in found["groups"]}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_groups_of_any_column(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    source = manifest(tmp_path, ending, OTHERS)
    data = prepared(source, tmp_path / "data", test_fraction=1.0).folder
    for place in (data, source):
        found = groups(capsys, model, place, "--by", "camera")
        assert found.keys() == {*CAMERAS, "(no value)"}
        assert found["(no value)"]["count"] == sum(not cell for cell in OTHERS["Camera"])
        found = groups(capsys, model, place, "--by", "age")
        assert next(iter(found)) == "20 to 25"  # in their order
        assert [group["count"] for group in found.values()] == [6] * 10
        assert len(groups(capsys, model, place, "--by", "age", "--bins", "0")) == COUNT
        assert groups(capsys, model, place, "--by", "score", "--bins", "2").keys() == {
            "0 to 3.625",
            "3.75 to 7.375",
            "(no value)",
        }
        assert len(groups(capsys, model, place, "--by", "id")) == COUNT  # 007 is no number
        assert groups(capsys, model, place, "--by", "flash").keys() == {"True", "False"}


def test_numbers_are_in_order_and_what_pandas_writes_is_missing(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = ["10", "9", "  ", "nan", "NA", "9.0", "100", "", "NaN", "-1"]
    others = {"Age": cells * 6, "site": ["NA", "DE", " ", "", "DE"] * 12}
    source = manifest(tmp_path, "csv", others)
    found = groups(capsys, model, source, "--by", "age", "--bins", "0")
    counts = {value: group["count"] for value, group in found.items()}
    assert list(counts) == ["-1", "9", "10", "100", "(no value)"]
    assert counts == {"-1": 6, "9": 12, "10": 6, "100": 6, "(no value)": 30}
    found = groups(capsys, model, source, "--by", "age")
    assert {value: group["count"] for value, group in found.items()} == counts
    found = groups(capsys, model, source, "--by", "site")  # of texts NA is one of them
    assert {value: group["count"] for value, group in found.items()} == {
        **{"NA": 12, "DE": 24, "(no value)": 24}
    }


def test_every_prediction_has_them(tmp_path: Path, model: Path) -> None:
    source = manifest(tmp_path, "parquet", OTHERS)
    outputs = distcls.evaluate_model(model, source, quiet=True).outputs
    outputs.write(tmp_path / "predictions.parquet", {})
    rows = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    for number, row in enumerate(rows):
        assert row["Camera"] == OTHERS["Camera"][number]
        assert (row["age"], row["flash"]) == (OTHERS["age"][number], OTHERS["flash"][number])


def test_a_group_has_the_figures_of_its_images(tmp_path: Path, model: Path) -> None:
    source = manifest(tmp_path, "parquet", OTHERS)
    ages = np.array(OTHERS["age"])
    for name, bins in {"camera": None, "age": 4}.items():
        result = distcls.evaluate_model(model, source, by=name, bins=bins, quiet=True)
        for group in result.groups:
            if bins:
                low, high = map(float, group.value.split(" to "))
                own = (ages >= low) & (ages <= high)
            else:
                wanted = None if group.value == "(no value)" else group.value
                own = np.array([cell == wanted for cell in OTHERS["Camera"]])
            assert group.count == own.sum()
            assert group.loss == pytest.approx(result.outputs.loss[own].mean())
        assert len({group.loss for group in result.groups}) == len(result.groups) == 4


def test_columns_that_make_no_groups(tmp_path: Path, model: Path) -> None:
    source = manifest(tmp_path, "parquet", OTHERS)
    for more, told in {
        ("--by", "camra"): "by: the manifest has no column 'camra' .*did you mean 'Camera'",
        ("--by", "path"): "by: the manifest has no column 'path' that makes groups",
        ("--by", "Labels"): "by: 'Labels' is a name that distcls uses, and .*; rename it in the",
        ("--by", "Camera", "--bins", "4"): "bins: 4 is for numbers, and 'Camera' has none",
    }.items():
        with pytest.raises(UsageError, match=told):
            evaluate_main(["--model", str(model), "--data", str(source), *more])
    with pytest.raises(UsageError, match="bins: 4 is not valid, expected nothing without --by"):
        evaluate_main(["--model", str(model), "--data", str(source), "--bins", "4"])


def test_ranges_are_even_and_equal_numbers_stay_together() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 50, 999).astype(float)
    numbers[::10] = math.nan
    codes, names = _by_range(numbers, 7)
    assert (codes[::10] == -1).all()
    sizes = np.bincount(codes[codes >= 0])
    assert len(sizes) == len(names) == 7
    assert sizes.max() - sizes.min() < 60
    for code, name in enumerate(names):
        low, _, high = name.partition(" to ")
        inside = (numbers >= float(low)) & (numbers <= float(high))
        np.testing.assert_array_equal(inside, codes == code)
    assert _by_range(np.array([2.0, 2.0, 2.0]), 3)[1] == ["2"]
    assert _by_range(np.array([math.inf, -math.inf, 0.5, 1e9]), 2)[1] == [
        "-inf to 0.5",
        "1e+09 to inf",
    ]
    assert _by_range(np.array([math.nan]), 3)[1] == []


def test_numbers_of_more_than_53_bits_have_ranges() -> None:
    numbers = pa.chunked_array([pa.array([2**63 - 1 - i for i in range(40)])])
    assert _numbers(numbers) == pytest.approx(2.0**63)


def test_a_head_makes_groups(capsys: pytest.CaptureFixture[str]) -> None:
    found = groups(
        capsys, EXPORTED / "run_heads" / "best.onnx", EXPORTED / "heads", "--by", "parity"
    )
    assert found.keys() == {"even", "odd"}
