"""The options of `distcls report`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distcls.config import positional
from distcls.data.source import SPLITS
from distcls.errors import UsageError, require

MOST_RUNS = 8
"""Runs that one page compares."""

MOST_EXPLAINED = 48


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `distcls report`."""

    runs: tuple[Path, ...] = positional()
    """Run directory, or a model file; several are compared on the same images. Or the folder of a
    search (`distcls.launch.search`): its trials."""
    data: Path | None = None
    """Dataset directory to measure on; default: that of the first run."""
    split: str | None = None
    """Split to measure on: train, val, test; default: test, or val where there is no test split."""
    out: Path | None = None
    """HTML file to write; default: report.html in the run directory, for several runs here."""
    overwrite: bool = False
    """Replace the file."""
    limit: int | None = None
    """Measure on so many images only."""
    audit: bool = True
    """Look at the images of the dataset as `distcls audit` does; of one run."""
    explain: int = 6
    """Images with a map of what their prediction rests on, of one run; 0 for none."""
    quiet: bool = False
    """Print warnings and errors only."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.runs) <= MOST_RUNS:
            message = f"runs: {len(self.runs)} given, expected one, or up to {MOST_RUNS} to compare"
            raise UsageError(message)
        if len({run.resolve() for run in self.runs}) < len(self.runs):
            raise UsageError("runs: one is given twice")
        if self.split is not None:
            require(self.split in SPLITS, "split", self.split, ", ".join(SPLITS))
        require(
            0 <= self.explain <= MOST_EXPLAINED, "explain", self.explain, f"0 to {MOST_EXPLAINED}"
        )
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "1 or more")
