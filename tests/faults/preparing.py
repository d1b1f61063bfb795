"""Running `distcls prepare` and reading its refusals."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

from distcls import cli
from tests import forked


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "distcls.cli", "prepare", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    process = start(*arguments)
    out, err = process.communicate()
    return subprocess.CompletedProcess([], process.wait(), out, err)


def start(*arguments: object) -> forked.Forked:
    """`distcls prepare` in a process of its own, forked from one that has the libraries loaded."""
    return forked.start("distcls.cli", ["prepare", *arguments], environment=None, cwd=Path.cwd())


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`run` without the second that a process takes to start."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.run(cli.dispatch, ["prepare", *map(str, arguments)])
        except SystemExit as left:
            code = int(left.code or 0)
    return subprocess.CompletedProcess([], code, out.getvalue(), err.getvalue())


def refused(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The error, which has to be one line; before it stands at most what was recognised."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    *before, line = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert not any(other.startswith(("error: ", "Traceback")) for other in before)
    return line


def parts(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.endswith(".part")]
