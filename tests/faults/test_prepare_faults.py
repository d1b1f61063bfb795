"""What `distcls prepare` does when things go wrong, each caused for real."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from distcls.data.dataset import MANIFEST, PACK, Dataset
from tests.faults.preparing import command, parts, refused, run, start


def begun(folder: Path) -> bool:
    return bool(parts(folder))


def packing(folder: Path) -> bool:
    return any((part / PACK).exists() for part in parts(folder))


def writing_images(folder: Path) -> bool:
    return any(next(part.rglob("*.png"), None) is not None for part in parts(folder))


def flushing(folder: Path) -> bool:
    return any((part / MANIFEST).exists() for part in parts(folder))


def killed_at(moment: Callable[[Path], bool], folder: Path, *arguments: object) -> bool:
    """Kill a run at that moment; False if it was over before."""
    process = start(*arguments)
    while not moment(folder) and process.poll() is None:
        pass
    process.kill()
    return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("moment", [begun, packing, writing_images, flushing])
def test_kill_9_leaves_nothing_that_looks_whole(
    tmp_path: Path, moment: Callable[[Path], bool]
) -> None:
    arguments = ("digits", "--out", tmp_path / "data", "--quiet")
    for _ in range(5):  # a busy machine may be too slow to hit the moment at once
        if killed_at(moment, tmp_path, *arguments, "--write-images"):
            break
        assert sum(Dataset.open(tmp_path / "data").counts().values()) == 1797
        shutil.rmtree(tmp_path / "data")
    else:
        pytest.fail("it always ended before the moment came")
    assert not (tmp_path / "data").exists()
    assert len(parts(tmp_path)) == 1
    done = run(*arguments)  # the next run is not in the way of the last, and clears it away
    assert (done.returncode, done.stderr) == (0, "")
    assert sum(Dataset.open(tmp_path / "data").counts().values()) == 1797
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_unfinished_folder_of_a_living_run_is_left_alone(tmp_path: Path) -> None:
    arguments = ("digits", "--out", tmp_path / "data", "--limit", 500, "--quiet")
    first = start(*arguments, "--write-images")
    while not writing_images(tmp_path):
        assert first.poll() is None
    first.send_signal(signal.SIGSTOP)
    (own,) = parts(tmp_path)
    try:
        assert run(*arguments).returncode == 0
        assert own.exists()
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait() != 0  # the place is taken, and what took it stays as it is
    assert Dataset.open(tmp_path / "data").info["options"]["write_images"] is False
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.row(7)
@pytest.mark.parametrize(
    ("limit", "flags"),
    [(50_000, ()), (1_000, ("--write-images", "--pack", "off", "--limit", "99"))],
)
def test_disk_full(tmp_path: Path, limit: int, flags: tuple[str, ...]) -> None:
    done = subprocess.run(
        command("digits", "--out", tmp_path / "data", *flags),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    line = refused(done, 1)
    assert str(tmp_path) in line
    assert "MiB free there" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.row(8)
def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    line = refused(run("digits", "--out", tmp_path / "file" / "data"))
    assert "file is a file, expected a folder" in line
    done = run("digits", "--out", "/proc/distcls/data")
    assert done.returncode in (1, 2)
    assert "/proc" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_output_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("years of work")
    line = refused(run("digits", "--out", tmp_path / "data"))
    assert "data exists already; choose another folder or remove it" in line
    assert (tmp_path / "data" / "thesis.txt").read_text() == "years of work"
