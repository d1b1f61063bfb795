"""Choices of provider that are kept for the next time, in the user's cache folder.

A choice holds for one model file, one machine and one set of versions. Nothing depends on the
cache: a file that is damaged, of another version or cannot be written is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from distcls import __version__
from distcls.cores import available_cores
from distcls.errors import DistclsError
from distcls.files import digest, write_json
from distcls.inference.providers.installed import versions

FORMAT = 1
FOLDER = "DISTCLS_CACHE"
"""Environment variable that names another folder for the cache."""


def cache_folder() -> Path:
    """$DISTCLS_CACHE, or `distcls` in the user's cache folder (XDG base directories)."""
    own = os.environ.get(FOLDER)
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "distcls"


def key_of(model: Path, **asked: Any) -> str:
    """What a choice holds for: the model's bytes, the machine, the versions, what was asked."""
    facts = {
        "model": digest(model),
        "cpu": cpu_name(),
        "cores": available_cores(),
        "gpus": _gpu_names(),
        "versions": versions(),
        "distcls": __version__,
        "asked": asked,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def recall(key: str) -> dict[str, Any] | None:
    """What was kept under a key; None if there is nothing that can be read."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # the last: no home folder
        values = json.loads(_file(key).read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("format") == FORMAT:
            return values
    return None


def keep(key: str, values: dict[str, Any]) -> bool:
    """Keep values under a key, atomically; False if the folder cannot be written."""
    try:
        write_json(_file(key), {"format": FORMAT, **values})
    except (DistclsError, OSError, RuntimeError):
        return False
    return True


def cpu_name() -> str:
    """The processor's model, as the system calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    import platform

    return platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    """NVIDIA GPUs as the driver names them."""
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            names += [
                line.partition(":")[2].strip()
                for line in path.read_text(encoding="utf-8").splitlines()
                if line.startswith("Model")
            ]
    return names


def _file(key: str) -> Path:
    return cache_folder() / "providers" / f"{key}.json"
