"""Clearing away what a killed run left beside its place."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def claimed(part: Path) -> Iterator[None]:
    """Hold a lock on an unfinished folder; the system drops it when the process dies."""
    descriptor = os.open(part, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove_stale_parts(out: Path) -> None:
    """Remove the unfinished `.NAME.*.part` folders beside `out` that no process claims any more."""
    with contextlib.suppress(OSError):
        for part in out.parent.iterdir():
            if part.name.startswith(f".{out.name}.") and part.name.endswith(".part"):
                _remove_unclaimed(part)


def _remove_unclaimed(part: Path) -> None:
    try:
        descriptor = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(part, ignore_errors=True)
    except OSError:
        pass  # claimed, or no way to know
    finally:
        os.close(descriptor)
