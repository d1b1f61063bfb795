"""Real data that many tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from distcls.data.prepare import PrepareOptions, prepare


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset directory of scikit-learn's handwritten digits: 1259 train, 179 val, 359 test."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare(PrepareOptions(source="digits", out=folder, quiet=True))
    return folder
