"""Messages and progress for the user on standard error, of the main process only.

Standard output carries results only (`--json`), so that it can be piped. The kernel of a notebook
has no pipe, and colours standard error as an error: there it takes the messages that are none.

    say, warn, fail   a line
    Progress          how far a long job is, by its images
    live              one line that changes, for a job with more to show
"""

from __future__ import annotations

import contextlib
import html
import importlib
import json
import math
import os
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from distcls.errors import TURNING, DistclsError

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
        _write(message, plain=True)


def warn(message: str) -> None:
    """Print a warning, also when quiet; main process only."""
    if rank() == 0:
        _write(f"warning: {message}")


def fail(message: str) -> None:
    """Print an error; processes other than the main one add their rank."""
    where = f"[rank {rank()}] " if rank() else ""
    _write(f"{where}error: {message}")


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


def in_notebook() -> bool:
    """Whether this process is the kernel of a Jupyter notebook."""
    ipython = sys.modules.get("IPython")
    shell = getattr(ipython, "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def columns() -> int | None:
    """Width of the terminal that standard error is; None where it is none."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def duration(seconds: float) -> str:
    """A duration in the unit that suits it: `45 s`, `12 min`, `3.2 h`, `2.5 days`."""
    for limit, unit, name in ((99.5, 1, "s"), (99.5 * 60, 60, "min")):
        if seconds < limit:
            return f"{max(1.0, seconds / unit):.0f} {name}"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def amount(number: int, digits: int) -> str:
    """A number of parameters or operations in millions, with `digits`, or in thousands where these
    would be few: `4.20 M`, `1.5 k`, `286`."""
    if number >= 2 * 10 ** (6 - digits):
        return f"{number / 1e6:,.{digits}f} M"
    return f"{number / 1e3:,.1f} k" if number >= 1000 else str(number)


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: `1 error`, `2 errors`, `2 processes`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def width(text: str) -> int:
    """The cells of a terminal that a text takes: letters of Chinese, Japanese and Korean take two,
    marks above another letter none."""
    if text.isascii():
        return len(text)
    letters = (each for each in text if unicodedata.category(each) not in ("Mn", "Me", "Cf"))
    return sum(1 + (unicodedata.east_asian_width(each) in ("W", "F")) for each in letters)


def padded(text: str, cells: int) -> str:
    """A text with blanks behind it, so wide."""
    return text + " " * (cells - width(text))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row of a table, whose columns stand below each other."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(padded(cell, cells) for cell, cells in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


class Live:
    """One line that says how far a job is. This one is shown nowhere; see `live`."""

    every = math.inf
    """Seconds between two drawings."""

    def __init__(self) -> None:
        self._next = time.monotonic() + self.every

    def due(self) -> bool:
        """Whether enough time has passed to draw again; costs nothing to speak of."""
        return time.monotonic() >= self._next

    def draw(
        self, title: str, fraction: float | None, details: Sequence[str], left: float | None = None
    ) -> None:
        """Show it: `fraction` of the job is done, `details` are in the order of their importance.

        `left` are the seconds until the job's next message, if known.
        """
        self._next = time.monotonic() + self.every
        self._show(title, fraction, details, left)

    def _show(
        self, title: str, fraction: float | None, details: Sequence[str], left: float | None
    ) -> None: ...

    def hide(self) -> None:
        """Make room for a message."""

    def unhide(self) -> None:
        """Show it below the message."""

    def close(self) -> None:
        """Remove it for good."""
        global _live
        self.hide()
        if _live is self:
            _live = None


_live: Live | None = None
"""The line on the terminal, which messages must not run into."""


def live() -> Live:
    """Where a job shows how far it is: in place on a terminal or in a notebook, elsewhere (a file,
    a CI log) as a line now and then. Nowhere if quiet, and in processes other than the main one."""
    global _live
    if _quiet or rank() != 0 or sys.stderr is None:
        return Live()
    if in_notebook():
        return _NotebookLine()
    _live = _TerminalLine() if sys.stderr.isatty() else _LogLines()
    return _live


class _TerminalLine(Live):
    """Redrawn in place, with a bar as wide as the terminal leaves room for."""

    every = 0.2
    _line = ""

    def _show(
        self, title: str, fraction: float | None, details: Sequence[str], left: float | None
    ) -> None:
        # the last column stays free: some terminals begin a new line there
        line = fit_line(title, fraction, details, (columns() or 80) - 1, _blocks())
        self._replace(line)
        self._line = line

    def hide(self) -> None:
        self._replace("")

    def unhide(self) -> None:
        line, self._line = self._line, ""
        self._replace(line)
        self._line = line

    def close(self) -> None:
        super().close()
        self._line = ""

    def _replace(self, line: str) -> None:
        if line or self._line:
            _put(f"\r{line.ljust(len(self._line))}" + "\r" * (not line), sys.stderr)


NARROWEST_BAR, WIDEST_BAR = 8, 40


def fit_line(
    title: str, fraction: float | None, details: Sequence[str], width: int, blocks: str
) -> str:
    """Title, percentage, bar and details on a line of at most `width` characters.

    What does not fit is left out: the bar, then the details beginning with the last. `blocks` are
    the characters of an eighth of a bar's cell, of two eighths, and so on.
    """
    head = title if fraction is None else f"{title} {fraction:4.0%}"
    tail = ""
    for detail in details:
        longer = f"{tail}, {detail}" if tail else detail
        if len(head) + 1 + len(longer) <= width:
            tail = longer
    room = min(WIDEST_BAR, width - len(head) - len(tail) - 4)
    if fraction is None or room < NARROWEST_BAR:
        return f"{head} {tail}".strip()[:width]
    full, part = divmod(int(fraction * room * len(blocks)), len(blocks))
    bar = blocks[-1] * full + (blocks[part - 1] if part else "")
    return f"{head} |{bar.ljust(room)}| {tail}".rstrip()


def _blocks() -> str:
    """What bars are made of: eighths of a cell, or where the stream cannot encode those `#`."""
    try:
        "█▏".encode(sys.stderr.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return "#"
    return "▏▎▍▌▋▊▉█"


class _NotebookLine(Live):
    """An output of the cell that is updated in place.

    IPython alone does that, so no ipywidgets are needed, and a notebook that was saved, or run
    without a browser, holds the last text instead of a widget that is gone.
    """

    every = 0.5

    def __init__(self) -> None:
        super().__init__()
        self._handle: Any = None

    def _show(
        self, title: str, fraction: float | None, details: Sequence[str], left: float | None
    ) -> None:
        head = title if fraction is None else f"{title} {fraction:.0%}"
        text = ", ".join([head, *details])
        value = "" if fraction is None else f' value="{fraction:.4f}"'
        bar = f'<progress style="width: 15em"{value}></progress>'
        self._update({"text/plain": text, "text/html": f"{bar} {html.escape(text)}"})

    def close(self) -> None:
        if self._handle is not None:
            self._update({"text/plain": "", "text/html": ""})
            self._handle = None

    def _update(self, content: dict[str, str]) -> None:
        if self._handle is None:
            display = importlib.import_module("IPython.display").display
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


FIRST_LINE, LONGEST_SILENCE = 10.0, 600.0
"""Seconds without a line in a log until the first one on progress, and at most."""
_last_line = -math.inf
"""When the last line was printed."""


class _LogLines(Live):
    """Lines after 10 s without any, then after 20 s, 40 s and so on up to 10 min.

    None shortly before another message: jobs and epochs of a few seconds have no line but their
    own.
    """

    every = 0.0

    def __init__(self) -> None:
        super().__init__()
        self._began, self._silence = time.monotonic(), FIRST_LINE

    def due(self) -> bool:
        return time.monotonic() >= max(self._began, _last_line) + self._silence

    def _show(
        self, title: str, fraction: float | None, details: Sequence[str], left: float | None
    ) -> None:
        if not self.due() or (left is not None and left < self._silence):
            return
        self._silence = min(2 * self._silence, LONGEST_SILENCE)
        head = title if fraction is None else f"{title} {fraction:4.0%}"
        _write("  ".join([head, *details]))


class Progress:
    """How far a job over images is, with its speed and the time left.

    A context manager; `shown` False shows nothing.
    """

    def __init__(
        self, what: str, total: int | None = None, *, done: int = 0, shown: bool = True
    ) -> None:
        """`what` is done with `total` images (None: not known), `done` of them before the start."""
        self._what, self._total = what, total
        self._before = self._done = done
        self._began = time.monotonic()
        self._live = live() if shown else Live()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._live.close()

    def update(self, count: int = 1) -> None:
        """So many more images are done."""
        self._done += count
        if self._live.due():
            self._draw()

    def _draw(self) -> None:
        rate = (self._done - self._before) / max(time.monotonic() - self._began, 1e-9)
        speed = f"{rate:,.0f} images/s"
        if not self._total:
            self._live.draw(self._what, None, [f"{self._done:,} images", speed])
            return
        left = (self._total - self._done) / max(rate, 1e-9)
        counts = f"{self._done:,} of {self._total:,} images"
        details = [f"{duration(left)} left", counts, speed]
        self._live.draw(self._what, self._done / self._total, details, left)


_CONTROLS = {
    **{code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code != ord("\t")},
    **{code: f"\\u{code:04x}" for code in (0x2028, 0x2029)},
    **TURNING,
    **{ord("\n"): "\\n", ord("\r"): "\\r"},
}
"""Characters of paths and files that would end a line, move the cursor or turn text around."""


def _write(line: str, *, plain: bool = False) -> None:
    """Print a line; a `plain` one is neither a warning nor an error."""
    global _last_line
    _last_line = time.monotonic()
    line = line.translate(_CONTROLS)
    if _live is not None:
        _live.hide()
    _put(f"{line}\n", sys.stdout if plain and in_notebook() else sys.stderr)
    if _live is not None:
        _live.unhide()


def _put(text: str, stream: TextIO | None) -> None:
    """Write to standard error, if there is one.

    Python has none (None) where it was closed at the start, and print would take standard output
    instead. A terminal that has gone or a full disk must not end hours of work: messages go nowhere
    from then on. A reader that has left (`2>&1 | head`) still ends the command.
    """
    if stream is None:
        return
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - open to the end
