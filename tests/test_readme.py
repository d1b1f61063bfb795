"""The README tells what is true: every file is listed, and its example runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FILES = [
    path
    for room in ("distcls", "export", "launch", "benchmarks")
    for path in sorted((ROOT / room).rglob("*.py"))
    if path.name != "__init__.py"
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_has_its_line(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    line = f"- `{path.relative_to(ROOT)}`: {docstring.splitlines()[0]}"
    assert line in README.splitlines(), line


def test_every_command_and_recipe_named_exists() -> None:
    named = set(re.findall(r"(?:configs|launch)/\w+\.yaml", README))
    named.discard("configs/mine.yaml")
    assert named == {str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.yaml")} | {
        str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.yaml")
    }
