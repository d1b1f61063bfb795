"""Commands as a user types them: training on any number of processes, and its records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def train(
    data: Path,
    out: Path,
    *options: object,
    processes: int = 1,
    threads: int | None = None,
    module: str = "distcls.train",
) -> list[dict[str, Any]]:
    """Train in `processes` processes of `threads` each; returns the steps that it recorded.

    Raises RuntimeError, with the run's output, if it failed.
    """
    arguments = ["--data", data, "--out", out, "--processes", processes, "--quiet", *options]
    if threads is not None:
        arguments += ["--threads", threads]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    _run([*(launcher if processes > 1 else []), "-m", module, *arguments])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def call(*arguments: object) -> dict[str, Any]:
    """The `--json` output of a sub-command of `distcls`. Raises RuntimeError if it failed."""
    found: dict[str, Any] = json.loads(_run(["-m", "distcls.cli", *arguments]))
    return found


def _run(arguments: list[object]) -> str:
    """Run Python with these arguments to its end; its standard output."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = " ".join(map(str, arguments[:3]))
        raise RuntimeError(f"{said} ended with code {done.returncode}\n{done.stderr}")
    return done.stdout
