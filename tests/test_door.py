"""How commands end: the exit code, one line for a user's mistake, a traceback for ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HEAD = """
import sys, time
from distcls.cli import run
from distcls.errors import BadImage, BadValue, DistclsError, Stopped, UsageError

def main(arguments):
    {body}

run(main)
"""


def door(body: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HEAD.format(body=body), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


def distcls(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distcls.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=folder,
    )


def test_done_is_nought_and_arguments_arrive() -> None:
    result = door("print('|'.join(arguments))", "a b", "--c")
    assert (result.returncode, result.stdout, result.stderr) == (0, "a b|--c\n", "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("DistclsError('the disk is full')", 1, "error: the disk is full"),
        ("UsageError('no such folder')", 2, "error: no such folder"),
        ("BadValue('lr', -1, 'more')", 2, "error: lr: -1 is not valid, expected more"),
        ("BadImage('truncated')", 1, "error: truncated"),
        ("Stopped('saved; resume it')", 75, "saved; resume it"),
    ],
)
def test_errors_for_the_user_are_one_line_and_a_code(error: str, code: int, line: str) -> None:
    result = door(f"raise {error}")
    assert (result.returncode, result.stdout, result.stderr) == (code, "", line + "\n")


def test_another_process_says_which_it_is() -> None:
    result = door("raise UsageError('no')", RANK="3", WORLD_SIZE="4")
    assert (result.returncode, result.stderr) == (2, "[rank 3] error: no\n")


def test_a_bug_keeps_its_traceback() -> None:
    result = door("{}['missing']")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert "KeyError: 'missing'" in result.stderr


def test_ctrl_c() -> None:
    # a shell's background jobs, and what they start, begin with Ctrl-C ignored
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    body = f"{heard}; print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", HEAD.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=30)
    assert (child.returncode, errors) == (130, "error: interrupted\n")


def test_a_reader_that_leaves_is_no_traceback() -> None:
    body = "[print('x' * 1000) for _ in range(1000)]"
    with subprocess.Popen(
        [sys.executable, "-c", HEAD.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr is not None
        assert child.stderr.read() == ""
        assert child.wait(30) == 1


def test_a_result_that_cannot_be_written_is_not_success() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-c", HEAD.format(body="print('result')")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert result.returncode != 0
    assert "No space left" in result.stderr


def test_the_command_without_arguments_helps() -> None:
    result = distcls()
    assert result.returncode == 0
    assert result.stdout.startswith("usage: distcls COMMAND")
    assert distcls("--help").stdout == result.stdout
    for name in ("prepare", "train", "evaluate", "export", "predict"):
        assert f"  {name} " in result.stdout


def test_an_unknown_command_is_suggested_the_right_one() -> None:
    result = distcls("pedict")
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown command 'pedict'; did you mean 'predict'?")
    assert result.stderr.count("\n") == 1


def test_a_mistake_in_a_config_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data: d\nout: o\nlearning_rate: 0.1\n")
    result = distcls("train", "--config", "recipe.yaml", folder=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: recipe.yaml: unknown key 'learning_rate'")
    assert result.stderr.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def test_version() -> None:
    from distcls import __version__

    result = distcls("--version")
    assert (result.returncode, result.stdout) == (0, f"distcls {__version__}\n")
