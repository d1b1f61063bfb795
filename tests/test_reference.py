"""The page of the API reference is what the docstrings say, and names all there is."""

from __future__ import annotations

import inspect
import re

import distcls
from tests.e2e.commands import ROOT
from tests.reference import GROUPS, page

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_page_is_current() -> None:
    assert page() == PAGE, "python -m tests.reference > docs/api.md"


def test_all_public_names_are_there_and_described() -> None:
    names = [name for group in GROUPS.values() for name in group]
    assert sorted(names) == sorted(distcls.__all__)
    for name in names:
        assert inspect.getdoc(getattr(distcls, name))
        assert f"\n### {name}\n" in PAGE
        assert f"(#{name.lower()})" in PAGE


def test_every_parameter_is_described() -> None:
    for name in ("load", "open_dataset", "prepare_dataset", "fit", "evaluate_model", "export_onnx"):
        told = inspect.getdoc(getattr(distcls, name)) or ""
        described = re.findall(r"^    (\w+): ", told.partition("Args:")[2], re.M)
        parameters = inspect.signature(getattr(distcls, name)).parameters
        assert set(described) >= set(parameters), name
        assert "Raises:\n    UsageError: " in told
