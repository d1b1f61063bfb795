"""Tables survive hostile names and give every float32 back."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distcls.batch.table import check_ending, open_writer
from distcls.errors import UsageError
from distcls.files import csv_line
from distcls.prediction import Columns, shortest

NAMES = [
    "plain.jpg",
    "with space.jpg",
    'quo"te.jpg',
    "com,ma.jpg",
    "line\nbreak.jpg",
    "carriage\rreturn.jpg",
    "ünï-漢字-🙂.jpg",
    "'; drop.jpg",
    " lead",
    "back\\slash",
    "tab\t.jpg",
]
ENDINGS = [".csv", ".jsonl", ".parquet"]


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8", newline="\n") as handle:
            return [json.loads(line) for line in handle]
    with path.open(encoding="utf-8", newline="") as handle:
        return [
            {key: value or None for key, value in row.items()}
            for row in csv.DictReader(handle, strict=True)
        ]


@pytest.mark.parametrize("ending", ENDINGS)
def test_names_and_gaps_survive(tmp_path: Path, ending: str) -> None:
    numbers = np.random.default_rng(0).random(len(NAMES), np.float32)
    values: list[float | None] = [*shortest(numbers[:-1]), None]
    errors: list[str | None] = [None] * (len(NAMES) - 1) + ["corrupt, or 'worse'\nreally"]
    path = tmp_path / f"table{ending}"
    header = ["image_id", "p:a,b", "error"]
    columns: Columns = {"image_id": NAMES, "p:a,b": values, "error": errors}
    with open_writer(path, header, ending, {"p:a,b"}) as write:
        write({key: column[:4] for key, column in columns.items()})
        write({key: column[4:] for key, column in columns.items()})
    rows = read(path)
    assert [row["image_id"] for row in rows] == NAMES
    assert [row["error"] for row in rows] == errors
    assert rows[-1]["p:a,b"] is None
    back = np.array([row["p:a,b"] for row in rows[:-1]], np.float32)
    np.testing.assert_array_equal(back, numbers[:-1])
    assert list(rows[0]) == header


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_shortest_gives_the_same_float32_back(values: list[float]) -> None:
    exact = np.array(values, np.float32)
    text = [repr(value) for value in shortest(exact)]
    np.testing.assert_array_equal(np.array([float(t) for t in text]).astype(np.float32), exact)


def test_shortest_is_short() -> None:
    assert [repr(v) for v in shortest(np.array([0.1, 1, 0.99999994], np.float32))] == [
        "0.1",
        "1.0",
        "0.99999994",
    ]


@given(st.lists(st.text(alphabet=st.characters(codec="utf-8")), min_size=2, max_size=4))
def test_any_text_survives_csv(cells: list[str]) -> None:
    (back,) = csv.reader(io.StringIO(csv_line(cells), newline=""), strict=True)
    assert back == cells


def test_parquet_rows_are_gathered(tmp_path: Path) -> None:
    path = tmp_path / "many.parquet"
    with open_writer(path, ["image_id"], ".parquet", set()) as write:
        for start in range(0, 1000, 10):
            write({"image_id": [str(start + n) for n in range(10)]})
    file = pq.ParquetFile(path)
    assert file.metadata.num_row_groups == 1
    assert file.read().column(0).to_pylist() == [str(n) for n in range(1000)]
    file.close()


@pytest.mark.parametrize("name", ["pre.txt", "pre", "pre.csv.gz"])
def test_unknown_ending_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(UsageError, match=r"\.csv, \.jsonl, \.parquet"):
        check_ending(Path(name))
