"""Virtual environments of tests, with packages that ours must not have.

They are kept between runs in the user's cache, by the names and versions of the packages.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

INSTALL_TIMEOUT = 600


def environment(*packages: str) -> Path:
    """The Python of an environment with these packages; skips the test if it cannot be made."""
    text = "\n".join((sys.version, *packages))
    parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distcls-tests"
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / hashlib.sha256(text.encode()).hexdigest()[:16]
    python = folder / "bin" / "python"
    with (parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "complete").exists():
            return python
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        try:
            done = subprocess.run(
                [python, "-m", "pip", "install", "--quiet", *packages],
                capture_output=True,
                text=True,
                timeout=INSTALL_TIMEOUT,
                check=False,
            )
            failed = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        except subprocess.TimeoutExpired:
            failed = [f"not installed within {INSTALL_TIMEOUT} s"]
        if failed:
            pytest.skip(f"pip install {' '.join(packages)}: {failed[0]}")
        (folder / "complete").touch()
    return python
