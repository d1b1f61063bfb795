"""Training runs as a user starts them, on any number of processes, and what they recorded."""

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

    Raises RuntimeError, with what the run said, if it failed.
    """
    arguments = ["--data", data, "--out", out, "--processes", processes, "--quiet", *options]
    if threads is not None:
        arguments += ["--threads", threads]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    call = [*(launcher if processes > 1 else []), "-m", module, *arguments]
    done = subprocess.run(
        [sys.executable, *map(str, call)],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"training ended with code {done.returncode}\n{done.stderr}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]
