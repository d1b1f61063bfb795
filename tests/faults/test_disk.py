"""A disk that is full, and one that is read-only: rows 7 and 8."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
from pathlib import Path

import pytest

from distcls.training.checkpointing import newest_intact, states
from tests.e2e.commands import ROOT, command
from tests.faults.survival import all_options, kill_all, start, wait_for

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


@pytest.mark.row(7)
def test_a_full_disk_keeps_the_state_before(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(digits, out, SLOW="0.1")
    wait_for(lambda: bool(states(out / "last")), process)
    kill_all(process)
    before = states(out / "last")
    limited = subprocess.run(
        command("--data", digits, "--out", out, *all_options(digits), module="distcls.train"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        # the state is some 25 MB: a file of that size cannot be written any more
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12 << 20, 12 << 20)),
    )
    assert limited.returncode == 1
    assert str(out / "last") in limited.stderr
    assert "MiB free there" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert states(out / "last") == before
    assert newest_intact(out / "last") is not None


def as_anybody() -> None:
    """Before a program starts: let permissions hold for root, too, from then on."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
                raise OSError(ctypes.get_errno(), "prctl")


@pytest.mark.row(8)
@pytest.mark.parametrize(
    "new",
    [
        pytest.param(True, id="to be made"),
        pytest.param(False, id="there already", marks=pytest.mark.slow),
    ],
)
def test_a_read_only_folder_is_refused_before_the_first_step(
    new: bool, digits: Path, tmp_path: Path
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    out = locked / "run" if new else locked
    done = subprocess.run(
        command("--data", digits, "--out", out, *all_options(digits), module="distcls.train"),
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=as_anybody,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert f"{locked}" in line
    assert "permission denied" in line
    assert not list(locked.iterdir())
