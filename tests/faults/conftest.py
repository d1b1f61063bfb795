"""Runs that nothing happened to, to compare with, and the table at the end."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.table import pytest_collection_modifyitems, pytest_terminal_summary

__all__ = ["pytest_collection_modifyitems", "pytest_terminal_summary"]

Unbroken = tuple[int, Path, Path]


@pytest.fixture(autouse=True)
def _no_run_is_left_behind() -> Iterator[None]:
    yield
    if survival := sys.modules.get("tests.faults.survival"):  # it is slow to load
        survival.end_all()


@pytest.fixture(scope="session")
def unbroken_run(
    digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Unbroken]:
    """A run on so many processes that nothing happened to: their number, its folder, its trace."""
    from tests.faults.survival import assert_every_sample_once_an_epoch, finish, start

    @functools.cache
    def train(processes: int) -> Unbroken:
        folder = tmp_path_factory.mktemp("unbroken")
        (folder / "trace").mkdir()
        trace = str(folder / "trace")
        finish(start(digits, folder / "run", processes=processes, TRACE=trace))
        assert_every_sample_once_an_epoch(folder / "trace")
        return processes, folder / "run", folder / "trace"

    return train


@pytest.fixture(
    params=[
        pytest.param(1, id="one process", marks=pytest.mark.slow),
        pytest.param(2, id="two processes"),
    ]
)
def unbroken(request: pytest.FixtureRequest, unbroken_run: Callable[[int], Unbroken]) -> Unbroken:
    """The same, on one process and on two."""
    return unbroken_run(request.param)
