"""README, docs and CONTRIBUTING are true: the files, folders and functions that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.house import arrows, folder, modules

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
WALKS = re.findall(r"^\d+\. `([\w/]+\.py)`", CONTRIBUTING, re.M)
"""The files of the walks through a training step and a predicted image."""


def test_every_recipe_and_template_named_exists() -> None:
    pages = (README, *(path.read_text() for path in (ROOT / "docs").glob("*.md")))
    named = set(re.findall(r"(?:configs|launch)/\w+\.yaml", "\n".join(pages)))
    named.discard("configs/mine.yaml")
    assert named == {str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.yaml")} | {
        str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.yaml")
    }


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) < 155
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_folder_has_its_row() -> None:
    inside = {name for name in map(folder, arrows(modules(ROOT))) if name.startswith("distcls.")}
    inside -= {"distcls.train", "distcls.evaluate", "distcls.__main__"}  # aliases
    rows = set(
        re.findall(
            r"`(\w+)(?:/|\.py)?`", CONTRIBUTING.partition("## Layers")[2].partition("\n## ")[0]
        )
    )
    assert {name.removeprefix("distcls.") for name in inside} <= rows


def test_the_walks_enter_few_files() -> None:
    _, training, predicting = re.split(r"^## Walk: ", CONTRIBUTING, flags=re.M)[:3]
    for walk in (training, predicting.partition("\n## ")[0]):
        entered = re.findall(r"^\d+\. `([\w/]+\.py)`", walk, re.M)
        assert 1 < len(set(entered)) <= 8
        assert max(map(entered.count, entered)) <= 2


@pytest.mark.parametrize("path", sorted(set(WALKS)))
def test_the_walks_name_what_is_there(path: str) -> None:
    text = (ROOT / path).read_text()
    for line in CONTRIBUTING.splitlines():
        if re.match(rf"\d+\. `{re.escape(path)}`", line):
            for name in re.findall(r"`(?:\w+\.)?(\w+)\(", line):
                assert f"def {name}(" in text or f"class {name}" in text, (path, name)
