"""Whether a folder is one and the same to all ranks, and open to them."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

from distcls.errors import DistclsError
from distcls.files import write_text


class Trial:
    """One file a rank, named by rank and by a token that no other run has."""

    def __init__(self, folder: Path, token: str, rank: int) -> None:
        self.folder = folder
        self.token = token
        self.rank = rank

    def write(self) -> str:
        """Write this rank's file. Returns why that failed; empty if it did not."""
        if not self.folder.is_dir():
            # created here, it would hide that a mount is missing
            return f"{self.folder} is no folder; create it, or mount it"
        try:
            write_text(self._path(self.rank), self.token)
        except DistclsError as error:
            return str(error)
        return ""

    def wait_for(self, ranks: list[int], seconds: float) -> list[int]:
        """Look for the files of `ranks`; returns those that did not show within `seconds`."""
        deadline = time.monotonic() + seconds
        while ranks := [rank for rank in ranks if not self._shows(rank)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)  # network file systems take seconds to show what another host wrote
        return ranks

    def remove(self) -> None:
        """Remove this rank's file."""
        with contextlib.suppress(OSError):
            self._path(self.rank).unlink()

    def free_gib(self) -> float:
        """Free space in GiB; 0 if there is no such folder."""
        try:
            return shutil.disk_usage(self.folder).free / 2**30
        except OSError:
            return 0.0

    def _path(self, rank: int) -> Path:
        return self.folder / f".preflight-{self.token}-{rank}"

    def _shows(self, rank: int) -> bool:
        try:
            return self._path(rank).read_text(encoding="utf-8") == self.token
        except OSError:
            return False
