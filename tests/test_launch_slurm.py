"""launch/slurm.sh, really run: its tasks are processes, only srun and scontrol are stand-ins."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARGUMENTS = ["--config", "my config.yaml", "--out", "runs/$HOME"]
"""Training's, which must come through the shells unharmed."""

SRUN = """
import os, signal, subprocess, sys
call = sys.argv[1:]
while call[0].startswith("--"):
    call.pop(0)
tasks = []
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
for task in range(int(os.environ["SLURM_NTASKS"])):
    numbers = {"SLURM_PROCID": str(task), "SLURM_LOCALID": "0"}
    tasks.append(subprocess.Popen(call, env={**os.environ, **numbers}))
sys.exit(max(task.wait() for task in tasks))
"""
"""Starts the tasks, hands signals on, ends with the highest exit code: as srun does."""

SCONTROL = """
import os, pathlib, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    assert sys.argv[3] == os.environ["SLURM_JOB_NODELIST"]
    print("127.0.0.1\\nnode2")
else:
    with pathlib.Path("scontrol.log").open("a") as log:
        print(*sys.argv[1:], file=log)
"""

TRAINING = """
import json, os, pathlib, signal, sys, time
if sys.argv[2] == "distcls.launch.preflight" and os.environ["PREFLIGHT"] == "real":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:], "--free-gib", "0", "--timeout", "20"])
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
said = {"arguments": sys.argv[1:], **{name: os.environ[name] for name in names}}
part = pathlib.Path(f"{os.getpid()}.part")
part.write_text(json.dumps(said))
part.rename(f"{sys.argv[2]}-{os.getpid()}.json")
if sys.argv[2] == "distcls.launch.preflight":
    sys.exit(os.environ["PREFLIGHT"] == "fail")
else:
    time.sleep(float(os.environ["SECONDS_TO_TRAIN"]))
    sys.exit(int(os.environ["CODE"]))
"""
"""Stands in for python: says where it is, then trains for so long and ends with a code."""


def free_job_id() -> int:
    """A job whose port is free."""
    for number in range(1_234_500, 1_244_500, 7):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20000 + number % 10000)):
                return number
    raise AssertionError("no port is free")


class Job:
    """A job of two nodes with a task each, in a folder of its own."""

    def __init__(self, folder: Path, *, preflight: str = "", seconds: float = 0, code: int = 0):
        self.folder = folder
        for name, program in (("srun", SRUN), ("scontrol", SCONTROL), ("python", TRAINING)):
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!{sys.executable}\n{program}")
            path.chmod(0o755)
        self.id = free_job_id()
        slurm = {
            "SLURM_JOB_ID": str(self.id),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NTASKS": "2",
            "SLURM_NNODES": "2",
            # what the batch script itself has: expanded too early, all ranks would be this one
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
        }
        stand_ins = {"PREFLIGHT": preflight, "SECONDS_TO_TRAIN": str(seconds), "CODE": str(code)}
        paths = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHON": str(folder / "bin" / "python"),
            "PYTHONPATH": str(ROOT),
        }
        self.process = subprocess.Popen(
            ["bash", ROOT / "launch" / "slurm.sh", *ARGUMENTS],
            cwd=folder,
            env={**os.environ, **slurm, **stand_ins, **paths},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def end(self) -> tuple[int, str]:
        """Exit code and output."""
        try:
            said = self.process.communicate(timeout=60)[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # whatever is left of it
        return self.process.returncode, said

    def tasks(self, module: str) -> list[dict[str, object]]:
        """What the tasks that ran a module said, by rank."""
        found = [json.loads(path.read_text()) for path in self.folder.glob(f"{module}-*.json")]
        return sorted(found, key=lambda said: str(said["RANK"]))

    def scontrol(self) -> list[str]:
        log = self.folder / "scontrol.log"
        return log.read_text().splitlines() if log.exists() else []


def test_the_tasks_have_ranks_of_their_own_and_form_one_run(tmp_path: Path) -> None:
    job = Job(tmp_path, preflight="real")
    code, said = job.end()
    assert code == 0, said
    # the real preflight: two processes met at that port, and an all-reduce counted both
    assert "preflight: 2 processes, no problems" in said
    tasks = job.tasks("distcls.train")
    assert [task["RANK"] for task in tasks] == ["0", "1"]
    for task in tasks:
        assert task["WORLD_SIZE"] == "2"
        assert (task["LOCAL_RANK"], task["LOCAL_WORLD_SIZE"]) == ("0", "1")
        assert task["MASTER_ADDR"] == "127.0.0.1"
        assert task["MASTER_PORT"] == str(20000 + job.id % 10000)
        own = ["--processes", "2", "--resume", "auto"]
        assert task["arguments"] == ["-m", "distcls.train", *ARGUMENTS, *own]
    assert job.scontrol() == []


def test_the_signal_before_the_time_limit_reaches_all_tasks_and_the_job_queues_again(
    tmp_path: Path,
) -> None:
    job = Job(tmp_path, seconds=100)
    deadline = time.monotonic() + 60
    while len(job.tasks("distcls.train")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.process.send_signal(signal.SIGUSR1)  # to the batch script alone, as --signal=B: does
    code, said = job.end()
    assert code == 75, said
    assert job.scontrol() == [f"requeue {job.id}"]


@pytest.mark.parametrize("failure", [1, 2])
def test_a_job_that_fails_does_not_queue_again(failure: int, tmp_path: Path) -> None:
    job = Job(tmp_path, code=failure)
    assert job.end()[0] == failure
    assert job.scontrol() == []


def test_nothing_trains_where_the_preflight_fails(tmp_path: Path) -> None:
    job = Job(tmp_path, preflight="fail")
    assert job.end()[0] == 1
    assert len(job.tasks("distcls.launch.preflight")) == 2
    assert job.tasks("distcls.train") == []
