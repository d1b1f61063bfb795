"""Messages to the user on standard error, spoken by the main process alone.

Standard output carries results only (`--json`), so that it can be piped.
"""

from __future__ import annotations

import os
import sys

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Silence `say`; warnings and errors are still shown."""
    global _quiet
    _quiet = quiet


def rank() -> int:
    """Rank of this process, as torchrun and accelerate put it into the environment."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of this run, as torchrun and accelerate put it into the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(message: str) -> None:
    """Print a line of progress, unless quiet or not the main process."""
    if not _quiet and rank() == 0:
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print a warning, also when quiet; the main process alone speaks."""
    if rank() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> None:
    """Print an error; other processes than the main one say which they are."""
    where = f"[rank {rank()}] " if rank() else ""
    print(f"{where}error: {message}", file=sys.stderr, flush=True)


def show_progress() -> bool:
    """Whether a live progress bar makes sense here."""
    return not _quiet and rank() == 0 and sys.stderr.isatty()
