"""What a user sees of a long job: on a terminal, in a log, in a notebook's kernel."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from distcls import log
from distcls.commands import train as train_command
from distcls.log import Progress, duration, fit_line
from distcls.training.logging import epoch_line

BLOCKS = "▏▎▍▌▋▊▉█"
SMALL = ("--model", "simple_cnn", "--epochs", "2", "--limit", "600", "--batch-size", "4")


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(log, "time", clock)
    monkeypatch.setattr(log, "_last_line", 0.0)
    return clock


@contextlib.contextmanager
def on_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Standard error is a terminal of so many columns; afterwards all that was written is there."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written, chunks = [], []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while chunk := os.read(master, 65536):
                chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        yield written
    reader.join(10)
    os.close(master)
    written += b"".join(chunks).decode().replace("\r\n", "\n").split("\n")


@pytest.mark.parametrize("columns", [40, 80])
def test_a_run_on_a_terminal(
    columns: int, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_terminal(columns, monkeypatch) as written:
        train_command.main(["--data", str(digits), "--out", str(tmp_path / "run"), *SMALL])
    drawn = [part for line in written for part in line.split("\r")[:-1] if part.strip()]
    assert len(drawn) > 4
    assert all(len(part) < columns for part in drawn)  # none breaks the line
    assert any(re.match(r"epoch 1/2 +\d+% .*at most \d+ s left", part) for part in drawn)
    if columns >= 80:
        assert any(re.search(r"█.*loss \d\.\d{4}, [\d,]+ images/s", part) for part in drawn)
    # what is left on the screen: each line after its last return, the bar itself removed
    lines = [line.rpartition("\r")[2] for line in written]
    epochs = [line for line in lines if line.startswith("epoch")]
    assert [line[:9] for line in epochs] == ["epoch 1/2", "epoch 2/2"]
    assert all(re.search(r"train loss .* top-1 .* val loss .* top-1", line) for line in epochs)
    assert all(len(line) <= max(columns, 80) for line in epochs)
    assert lines[-3].startswith("best epoch")
    assert lines[-2].startswith("next: distcls predict")
    assert lines[-1] == ""


def test_a_message_does_not_run_into_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_terminal(80, monkeypatch) as written, Progress("reading", 100) as progress:
        progress._draw()
        log.warn("one image is odd")
    assert written[0].split("\r")[-1] == "warning: one image is odd"
    assert written[1].split("\r")[1].startswith("reading   0%")  # drawn again
    assert written[1].split("\r")[-1] == ""


@pytest.mark.parametrize("width", range(12, 140, 7))
@pytest.mark.parametrize("fraction", [None, 0.0, 0.3, 0.999, 1.0])
def test_a_line_never_exceeds_its_width(width: int, fraction: float | None) -> None:
    details = ["at most 12 min left", "loss 0.1234", "1,234 images/s"]
    for blocks in (BLOCKS, "#"):
        line = fit_line("epoch  1/20", fraction, details, width, blocks)
        assert len(line) <= width
        assert line.startswith("epoch  1/20"[:width])


def test_a_line_has_what_fits() -> None:
    details = ["3 min left", "loss 0.1234"]
    assert fit_line("a", 0.5, details, 41, "#") == "a  50% |####    | 3 min left, loss 0.1234"
    assert fit_line("a", 0.5, details, 39, "#") == "a  50% 3 min left, loss 0.1234"
    assert fit_line("a", 0.25, details, 28, BLOCKS) == "a  25% |██      | 3 min left"
    assert fit_line("a", 0.26, [], 28, BLOCKS) == "a  26% |████▋             |"
    assert fit_line("a", None, details, 28, BLOCKS) == "a 3 min left, loss 0.1234"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.01, "1 s"), (59.6, "60 s"), (120, "2 min"), (5400, "90 min"), (9000, "2.5 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def lines_of(seconds: int, clock: Clock, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a log gets of a job of one image per second."""
    with Progress("reading", seconds) as progress:
        for _ in range(seconds):
            clock.now += 1
            progress.update()
    return capsys.readouterr().err.splitlines()


def test_a_log_gets_a_line_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(15, clock, capsys) == []
    clock.now += 1000
    assert lines_of(100, clock, capsys) == [
        "reading  10%  90 s left  10 of 100 images  1 images/s",
        "reading  30%  70 s left  30 of 100 images  1 images/s",
    ]
    clock.now += 1000
    found = lines_of(36_000, clock, capsys)  # ten hours
    assert len(found) == 63
    assert found[-1].startswith("reading  97%  20 min left")


def test_other_lines_are_progress_enough(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("reading", 1000) as progress:
        for second in range(100):
            clock.now += 1
            progress.update()
            if second % 9 == 0:
                log.say("an epoch")
    assert set(capsys.readouterr().err.splitlines()) == {"an epoch"}


def test_quiet_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with log.hushed():
        assert lines_of(100, clock, capsys) == []
    monkeypatch.setenv("RANK", "1")
    assert lines_of(100, clock, capsys) == []
    monkeypatch.delenv("RANK")
    assert lines_of(100, clock, capsys) != []


def test_the_line_of_an_epoch_in_a_log() -> None:
    row = {
        "epoch": 3.0,
        "train_loss": 0.5,
        "train_top1": 0.75,
        "val_loss": 0.25,
        "val_top1": 0.875,
        "val_exact": 0.5,
        "images_per_s": 1234.5,
        "data_wait": 0.2,
        "seconds": 12.3,
    }
    assert epoch_line(row, 20, "best", "at most 4 min left") == (
        "epoch  3/20  train loss 0.5000 top-1 0.7500  val loss 0.2500 top-1 0.8750 exact 0.5000  "
        "1,234 images/s  data wait 20%  12 s  at most 4 min left  best"
    )
    row["data_wait"] = 0.01
    assert "data wait" not in epoch_line(row, 20, "", "")
