"""The table of training options: no row is empty, and every test and field it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distcls.config.schema import leaves
from distcls.training.config import TrainConfig

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "training-options.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| feature |")
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_row_names_what_is_there(row: list[str]) -> None:
    assert len(row) == 3
    assert all(row)
    files = re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", row[2])
    last = ""
    for file, function in files:
        last = file or last
        text = (ROOT / last).read_text()
        assert not function or f"def {function}(" in text, (last, function)
    assert last


def test_every_section_of_the_config_has_a_row() -> None:
    fields = " ".join(row[1] for row in ROWS)
    sections = {leaf.key.split(".")[0] for leaf in leaves(TrainConfig) if "." in leaf.key}
    assert not {name for name in sections if f"{name}." not in fields} - {"input", "loader"}
