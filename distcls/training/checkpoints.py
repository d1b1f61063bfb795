"""The full states of a run: `last/step_00000422.CHECKSUM.pth`, the newest few.

The checksum (the first half of the SHA-256) stands in the name, so one rename makes file and
checksum appear together. An older state goes only after the newer one is whole.
"""

from __future__ import annotations

import hashlib
import io
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from distcls.errors import DistclsError
from distcls.files import atomic_path
from distcls.log import warn
from distcls.models.checkpoint import load_tensors
from distcls.training.config import CheckpointConfig

NAME = re.compile(r"step_(\d+)\.([0-9a-f]{32})\.pth")


class Checkpoints:
    """Writes states in the background, one at a time."""

    def __init__(self, folder: Path, config: CheckpointConfig, step: int) -> None:
        self._folder = folder
        self._config = config
        self._step = step
        self._time = time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="distcls-checkpoint")
        self._task: Future[None] | None = None
        for part in folder.glob(".step_*.part"):  # what a killed process was writing
            part.unlink(missing_ok=True)

    def due(self, step: int) -> bool:
        """Whether a state within the epoch is due after `step` steps."""
        steps, minutes = self._config.every_steps, self._config.every_minutes
        if steps is not None and step - self._step >= steps:
            return True
        return minutes is not None and time.monotonic() - self._time >= 60 * minutes

    def save(self, step: int, content: dict[str, Any]) -> None:
        """Copy the state after `step` steps and write the copy while training goes on.

        Raises DistclsError if the one before could not be written (naming path and free space).
        """
        self.wait()
        self._step, self._time = step, time.monotonic()
        self._task = self._pool.submit(self._write, step, _copied(content))

    def wait(self) -> None:
        """Return when nothing is being written any more; raises what went wrong."""
        if self._task is not None:
            task, self._task = self._task, None
            task.result()

    def close(self) -> None:
        """Finish writing."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _write(self, step: int, content: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        data = buffer.getbuffer()
        path = self._folder / f"step_{step:08d}.{_checksum(data)}.pth"
        with atomic_path(path) as part:
            part.write_bytes(data)
        others = [other for other in states(self._folder) if other != path]
        # a state of this step or a later one was damaged, or this run would have started from it
        whole = [other for other in others if step_of(other) < step]
        for other in set(others) - set(whole[: self._config.keep - 1]):
            other.unlink()


def newest_whole(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest state whose checksum is right, with its content; None if there is no state.

    Damaged ones are passed over with a warning. Raises DistclsError if all are.
    """
    candidates = states(folder)
    for path in candidates:
        name = NAME.fullmatch(path.name)
        assert name is not None
        if _checksum(path.read_bytes()) == name[2]:
            return path, load_tensors(path)
        warn(f"{path} is damaged (its checksum is wrong); the state before it is tried")
    if candidates:
        raise DistclsError(f"{folder}: no state is whole; start anew in another --out")
    return None


def states(folder: Path) -> list[Path]:
    """The states in a folder, newest first."""
    found = [path for path in folder.glob("step_*.pth") if NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a state's name."""
    name = NAME.fullmatch(path.name)
    assert name is not None
    return int(name[1])


def _checksum(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _copied(value: Any) -> Any:
    """A copy in main memory that training does not change any more."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value
