"""Atomic writing: whatever happens in the middle, no reader sees half of it."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from distcls.errors import DistclsError, UsageError
from distcls.files import (
    MOST_HELD,
    atomic_folder,
    atomic_path,
    claimed_output,
    digest,
    require_writable,
    second_name,
    writable,
    write_json,
    write_text,
    zeros,
)


def program(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_second_name_keeps_its_content_when_the_first_is_written_anew(tmp_path: Path) -> None:
    first, second = tmp_path / "best", tmp_path / "kept"
    first.write_text("epoch 1")
    second.write_text("older")
    second_name(first, second)
    assert second.samefile(first)
    with atomic_path(first) as part:
        part.write_text("epoch 2")
    assert (first.read_text(), second.read_text()) == ("epoch 2", "epoch 1")
    assert names(tmp_path) == ["best", "kept"]


def test_a_second_name_is_a_copy_where_links_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refused)
    (tmp_path / "best").write_text("epoch 1")
    second_name(tmp_path / "best", tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "epoch 1"
    assert not (tmp_path / "kept").samefile(tmp_path / "best")


def test_a_file_takes_its_place_and_nothing_else_stays(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "a.txt"
    with atomic_path(target) as part:
        part.write_text("whole")
        assert part.parent == target.parent
        assert not target.exists()
    assert target.read_text() == "whole"
    assert names(target.parent) == ["a.txt"]


def test_a_file_gets_the_rights_of_the_umask(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
        with atomic_folder(tmp_path / "folder") as part:
            (part / "b.txt").write_text("y")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_an_exception_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def interrupted() -> None:
        with atomic_path(target) as part:
            part.write_text("half")
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        interrupted()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_an_exception_leaves_no_folder(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_folder(tmp_path / "set") as part:
            (part / "half.bin").write_bytes(b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


def test_a_folder_comes_whole_and_may_replace_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with atomic_folder(tmp_path / "set") as part:
        (part / "deep").mkdir()
        (part / "deep" / "b.bin").write_bytes(b"b")
        assert names(tmp_path / "set") == []
    assert (tmp_path / "set" / "deep" / "b.bin").read_bytes() == b"b"
    assert names(tmp_path) == ["set"]


def test_a_folder_never_replaces_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "precious").write_text("mine")
    (tmp_path / "file").write_text("mine too")
    for name in ("set", "file"):
        with (
            pytest.raises(UsageError, match=f"{name} exists already"),
            atomic_folder(tmp_path / name),
        ):
            pytest.fail("the block must not run")
    assert (tmp_path / "set" / "precious").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine too"


KILLED = """
    import sys, time
    from pathlib import Path
    from distcls.files import atomic_folder, atomic_path

    root = Path(sys.argv[1])
    with atomic_path(root / "a.txt") as part, atomic_folder(root / "set") as folder:
        part.write_text("half")
        (folder / "b.txt").write_text("half")
        print("ready", flush=True)
        time.sleep(60)
"""


def test_kill_in_the_middle(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.kill()
        assert child.wait(30) == -signal.SIGKILL
    assert (tmp_path / "a.txt").read_text() == "old"
    assert not (tmp_path / "set").exists()
    write_text(tmp_path / "a.txt", "new")  # what the killed one left is in nobody's way
    assert (tmp_path / "a.txt").read_text() == "new"


FULL = """
    import resource, signal, sys
    from pathlib import Path
    from distcls.errors import DistclsError, UsageError
    from distcls.files import write_text

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write_text(Path(sys.argv[1]), "x" * 100_000)
    except DistclsError as error:
        assert not isinstance(error, UsageError)
        print(error)
"""


def test_a_full_disk_names_the_path_and_the_free_space(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    result = program(FULL, target)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout
    assert "File too large" in result.stdout
    assert "MiB free" in result.stdout
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    below_file = tmp_path / "file" / "below"
    with pytest.raises(UsageError, match="file is a file, expected a folder"):
        require_writable(below_file)
    with pytest.raises(UsageError, match="file is a file, expected a folder"):
        write_text(below_file / "a.txt", "x")
    with (
        pytest.raises(UsageError, match="file is a file, expected a folder"),
        atomic_folder(below_file),
    ):
        pytest.fail("the block must not run")
    with pytest.raises(DistclsError, match=r"/proc/distcls failed: No such file or directory$"):
        require_writable(Path("/proc/distcls"))


def test_a_refused_permission_is_the_users_to_solve(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="here/x cannot be written: permission denied"),
        writable(tmp_path),
    ):
        raise PermissionError(13, "Permission denied", "here/x")


def test_require_writable_makes_the_folder_and_leaves_it_empty(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []


def test_json_is_strict_and_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "Zoë", "n": [1, 2]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "Zoë" in text
    assert json.loads(text) == {"name": "Zoë", "n": [1, 2]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "b.json", {"n": float("nan")})
    assert names(tmp_path) == ["a.json"]


def test_digest_of_known_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert digest(tmp_path / "a", "md5") == "900150983cd24fb0d6963f7d28e17f72"
    assert digest(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_an_output_is_claimed_by_one(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "one"
    with claimed_output(out, "busy"):
        assert out.is_dir()
        with pytest.raises(UsageError, match="busy"), claimed_output(out, "busy"):
            pass
        assert out.is_dir()  # the one that was refused has not removed it
    assert not (tmp_path / "runs").exists()  # nothing was written
    with claimed_output(out, "busy"):
        (out / "file").write_text("")
    assert names(out) == ["file"]
    with pytest.raises(FileNotFoundError), claimed_output(out, "busy"):
        (out / "missing").unlink()
    assert names(out) == ["file"]


def test_an_output_that_vanishes_while_it_is_claimed_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last holder removes what stayed empty."""
    out, opened = tmp_path / "run", os.open

    def late(path: Path, flags: int) -> int:
        if places:
            places.pop().rmdir()
            return opened(path, flags)
        descriptor = opened(path, flags)
        if not vanished:
            vanished.append(True)
            out.rmdir()
        return descriptor

    places, vanished = [out], []
    monkeypatch.setattr(os, "open", late)
    with claimed_output(out, "busy"):
        assert vanished
        assert out.is_dir()
    assert not out.exists()


def test_what_cannot_be_an_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match="file is a file, expected a folder"),
        claimed_output(tmp_path / "file" / "run", "busy"),
    ):
        pass


def test_a_large_array_needs_room_in_the_temporary_folder() -> None:
    count = MOST_HELD + 1
    assert isinstance(zeros((count,), np.uint8), np.memmap)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(DistclsError, match=r"cannot take 64 MiB: File too large; TMPDIR names"):
            zeros((count,), np.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
