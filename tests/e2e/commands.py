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


def environment(processes: int = 1, **more: str) -> dict[str, str]:
    """The variables of a command on so many processes; on CPUs if there are fewer GPUs."""
    found = {**os.environ, "PYTHONWARNINGS": "ignore"}
    if processes > 1:
        import torch  # not for the commands that work without

        if torch.cuda.device_count() < processes:
            found["CUDA_VISIBLE_DEVICES"] = ""
    return found | more


Process = forked.Forked | subprocess.Popen[str]
"""A command that was started."""
FROM_SCRATCH = ("LD_PRELOAD", "ROOM")
"""Variables that a process has to have from its start, or that limit the memory it has loaded."""


def start(call: list[str], environment: dict[str, str], *, new_session: bool = False) -> Process:
    """Start a `command`; its process, the launcher's of several, is forked (`tests.forked`)."""
    _, _, module, *arguments = call
    if any(name in environment for name in FROM_SCRATCH):
        return subprocess.Popen(
            call,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=new_session,
        )
    return forked.start(module, arguments, environment=environment, new_session=new_session)


def run(
    *arguments: object, module: str = "distcls.cli", processes: int = 1, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and check its exit code."""
    call = command(*arguments, module=module, processes=processes)
    process = start(call, environment(processes))
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    done = subprocess.CompletedProcess(call, process.wait(), out, err)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def train(data: Path, out: Path, *more: object, processes: int = 1, code: int = 0) -> str:
    """Train in seconds; returns what was said."""
    arguments = ["--data", data, "--out", out, *SMALL, *more]
    return run(*arguments, module="distcls.train", processes=processes, code=code).stderr
