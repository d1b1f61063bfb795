"""Running the commands as a user does: in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests import forked

ROOT = Path(__file__).parent.parent.parent
SMALL = [
    *("--epochs", "2", "--batch-size", "32", "--limit", "200", "--log-every", "2"),
    *("--augment.crop-padding", "2", "--augment.rotate", "5", "--ema.decay", "0.9"),
]
"""Training options for the real loop in seconds."""


def command(*arguments: object, module: str = "distcls.cli", processes: int = 1) -> list[str]:
    """The command line of a module, on several processes if asked for."""
    call = [sys.executable, "-m", module, *map(str, arguments)]
    if processes == 1:
        return call
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "launch/two_cpu_processes.yaml",
    ]
    return [call[0], *launcher, "--num_processes", str(processes), *call[1:]]


def run(
    *arguments: object, module: str = "distcls.cli", processes: int = 1, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and check its exit code; one process is forked (`tests.forked`)."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    call = command(*arguments, module=module, processes=processes)
    if processes == 1:
        process = forked.start(module, arguments, environment=environment)
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
        done = subprocess.CompletedProcess(call, process.wait(), out, err)
    else:
        done = subprocess.run(
            call,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            timeout=300,
            check=False,
        )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def train(data: Path, out: Path, *more: object, processes: int = 1, code: int = 0) -> str:
    """Train in seconds; returns what was said."""
    arguments = ["--data", data, "--out", out, *SMALL, *more]
    return run(*arguments, module="distcls.train", processes=processes, code=code).stderr
