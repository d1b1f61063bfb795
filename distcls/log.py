"""Messages to the user on standard error, printed by the main process only.

Standard output carries results only (`--json`), so that it can be piped.
"""

from __future__ import annotations

import os
import sys

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Silence `say`; warnings and errors are still printed."""
    global _quiet
    _quiet = quiet


def rank() -> int:
    """Rank of this process, from the launcher's RANK; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of this run, from the launcher's WORLD_SIZE; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(message: str) -> None:
    """Print a line of progress, unless quiet; main process only."""
    if not _quiet and rank() == 0:
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print a warning, also when quiet; main process only."""
    if rank() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> None:
    """Print an error; processes other than the main one add their rank."""
    where = f"[rank {rank()}] " if rank() else ""
    print(f"{where}error: {message}", file=sys.stderr, flush=True)


def show_progress() -> bool:
    """Whether to draw a live progress bar: on a terminal, in the main process, unless quiet."""
    return not _quiet and rank() == 0 and sys.stderr.isatty()
