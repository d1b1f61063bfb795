"""Messages to the user on standard error, printed by the main process only.

Standard output carries results only (`--json`), so that it can be piped.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from distcls.errors import DistclsError

_quiet = False
_output_closed = False
"""Whether standard output was closed at the start (`>&-`)."""


def set_output_closed() -> None:
    """Record that what is printed on standard output goes nowhere."""
    global _output_closed
    _output_closed = True


def require_output() -> None:
    """Raise DistclsError if standard output is closed: a result must not be lost silently."""
    if _output_closed:
        raise DistclsError("standard output is closed, the result cannot be printed there")


@contextlib.contextmanager
def writing_output() -> Iterator[None]:
    """A block that writes results to standard output; DistclsError where that fails, such as on a
    full disk. A reader that has left (`| head`) raises BrokenPipeError, as always."""
    require_output()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # what is left in the buffer would fail once more when the interpreter exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise DistclsError(f"standard output cannot be written: {error.strerror}") from error


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


@contextlib.contextmanager
def hushed(quiet: bool = True) -> Iterator[None]:
    """A block in which `say` is silent, or with False not; then it is as before."""
    before = _quiet
    set_quiet(quiet)
    try:
        yield
    finally:
        set_quiet(before)


def say(message: str) -> None:
    """Print a line of progress, unless quiet; main process only."""
    if not _quiet and rank() == 0:
        _write(message)


def warn(message: str) -> None:
    """Print a warning, also when quiet; main process only."""
    if rank() == 0:
        _write(f"warning: {message}")


def fail(message: str) -> None:
    """Print an error; processes other than the main one add their rank."""
    where = f"[rank {rank()}] " if rank() else ""
    _write(f"{where}error: {message}")


def show_progress() -> bool:
    """Whether to draw a live progress bar: on a terminal, in the main process, unless quiet."""
    return not _quiet and rank() == 0 and sys.stderr is not None and sys.stderr.isatty()


def print_json(value: Any) -> None:
    """Print one JSON object on standard output, for machines.

    Characters that the stream's encoding lacks become JSON's own escapes, so it stays JSON.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    with writing_output():
        print(text)


def _write(line: str) -> None:
    """Print a line on standard error, if there is one.

    Python has none (None) where it was closed at the start, and print would take standard output
    instead. A terminal that has gone or a full disk must not end hours of work: messages go nowhere
    from then on. A reader that has left (`2>&1 | head`) still ends the command.
    """
    if sys.stderr is None:
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - open to the end
