"""The table of faults is whole, and tells what the tests found."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

from tests.e2e.commands import ROOT
from tests.faults.table import ROWS

REQUIRED = {*range(1, 49)}


def marked(path: Path) -> set[int]:
    """The rows that the tests of a file are marked with, without importing it."""
    found: set[int] = set()
    for node in ast.parse(path.read_text()).body:
        marks: list[ast.expr] = []
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = node.decorator_list
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            marks = node.value.elts if isinstance(node.value, ast.List) else [node.value]
        for mark in marks:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.row":
                found.update(ast.literal_eval(row) for row in mark.args)
    return found


def test_every_row_has_a_test() -> None:
    rows: set[int] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        rows |= marked(path)
    assert REQUIRED - rows == set(), "rows without a test"
    assert rows - ROWS.keys() == set(), "rows without a name in tests/faults/table.py"


def test_the_table_tells_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.row(1, 2)\n"
        "def test_good(): pass\n"
        "@pytest.mark.row(2)\n"
        "def test_bad(): assert False\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError\n"
        "@pytest.mark.row(3)\n"
        "def test_error(broken): pass\n"
        "@pytest.mark.row(13)\n"
        "def test_not_here(): pytest.skip('no GPU')\n"
        "@pytest.mark.row(1)\n"
        "@pytest.mark.skip(reason='not today')\n"
        "def test_not_today(): pass\n"
        "def test_of_no_row(): pass\n"
    )
    arguments = ["-q", "-p", "tests.faults.table", "--rootdir", tmp_path, "-c", os.devnull]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, arguments), str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    _, _, table = done.stdout.partition(" faults ===")
    lines = [" ".join(line.split()) for line in table.splitlines()[1:5]]
    assert lines == [
        f"1 {ROWS[1]} 2 passed",
        f"2 {ROWS[2]} 2 failed",
        f"3 {ROWS[3]} 1 failed",
        f"13 {ROWS[13]} 1 skipped: no GPU",
    ], done.stdout
