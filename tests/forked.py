"""Commands in processes of their own that need not import torch again.

Importing torch, accelerate and timm takes three seconds, a test's training one. So a server process
imports them once, computes nothing itself (an OpenMP pool does not survive a fork), and forks for
each command. What it forks is a process like any other: it has its own id, environment, streams and
working folder, and can be signalled and killed. `Forked` has the methods of `subprocess.Popen` that
tests use. A launcher that is forked has a server of its own below it, from which its workers are.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import functools
import importlib
import io
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
LAUNCHER = "accelerate.commands.launch"
PRELOADED = (
    *("torch", "torch._dynamo", "torch.distributed.tensor", "torchvision.models", "timm"),
    *("accelerate", "accelerate.tracking", "scipy.special", "onnxruntime", "cv2", "PIL.Image"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "pyarrow.parquet", "yaml"),
    "sklearn.datasets",
    *("distcls.commands.train", "distcls.training.run", "distcls.commands.predict"),
    *(LAUNCHER, "torch.distributed.run"),
)
"""What the server imports; a command may import more."""
LONGEST = 1 << 20
PR_SET_NAME = 15


class Forked:
    """A command that was started; the part of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, stdout: IO[str] | None, stderr: IO[str] | None) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdout, self.stderr = stdout, stderr
        self._ended = os.pidfd_open(pid)
        self._written: tuple[str, str] | None = None

    def poll(self) -> int | None:
        """The exit code, None while it runs; of a signal its negative number."""
        if self.returncode is None and select.select([self._ended], [], [], 0)[0]:
            self.returncode = int(_ask({"reap": self.pid})["code"])
            os.close(self._ended)
            self._written = (self._read(self.stdout), self._read(self.stderr))
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        if self.returncode is None and not select.select([self._ended], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; all that it wrote (streams are files, so nothing fills up)."""
        self.wait(timeout)
        assert self._written is not None
        return self._written

    def send_signal(self, number: int) -> None:
        """Signal it, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    @staticmethod
    def _read(stream: IO[str] | None) -> str:
        if stream is None:
            return ""
        with stream:
            stream.seek(0)
            return stream.read()


def spawn(work: Callable[..., None], arguments: tuple[Any, ...], processes: int) -> None:
    """`torch.multiprocessing.spawn`, whose workers are forked from one that has torch loaded."""
    from torch.multiprocessing.spawn import start_processes

    multiprocessing.set_forkserver_preload(["tests.forked_torch"])
    start_processes(work, arguments, nprocs=processes, start_method="forkserver")  # type: ignore[no-untyped-call]


def start(
    module: str,
    arguments: Sequence[object],
    *,
    environment: dict[str, str] | None = None,
    cwd: Path = ROOT,
    new_session: bool = False,
) -> Forked:
    """Start `python -m module arguments`; what it writes is kept until it is asked for."""
    out, err = _stream(), _stream()
    request = {
        "module": module,
        "arguments": [str(argument) for argument in arguments],
        "environment": dict(os.environ if environment is None else environment),
        "cwd": str(cwd),
        "new_session": new_session,
    }
    return Forked(int(_ask(request, [out.fileno(), err.fileno()])["pid"]), out, err)


def _stream() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forked", str(theirs.fileno())],
        cwd=ROOT,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
    )
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)  # called first: the server leaves when nobody is there to ask
    return ours


def _ask(request: dict[str, Any], files: Sequence[int] = ()) -> dict[str, Any]:
    content = json.dumps(request).encode()
    attached = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
    connection = _server()
    # a launcher's handler of a signal raises: question and answer would get out of step
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        connection.sendmsg([content], attached)
        answer: dict[str, Any] = json.loads(connection.recv(LONGEST))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return answer


def serve(connection: socket.socket) -> None:
    """Fork for each request until whoever asks is gone."""
    for name in PRELOADED:
        importlib.import_module(name)
    while True:
        content, files, _, _ = socket.recv_fds(connection, LONGEST, 2)
        if not content:
            return
        request = json.loads(content)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if not pid:
                connection.close()
                _become(request, files)
            for file in files:
                os.close(file)
            answer = {"pid": pid}
        connection.send(json.dumps(answer).encode())


def _become(request: dict[str, Any], files: Sequence[int]) -> None:
    """Run a command in this process, which was forked for it, and leave."""
    code = 1
    try:
        if request["new_session"]:
            os.setsid()
        for file, place in zip(files, (1, 2), strict=bool(files)):
            os.dup2(file, place)
            os.close(file)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])
        more = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:1] = [request["cwd"], *filter(None, more)]
        if os.environ.get("PYTHONWARNINGS") == "ignore":
            warnings.simplefilter("ignore")
        sys.argv = [request["module"], *request["arguments"]]
        if request["module"] == LAUNCHER:
            _fork_workers()
        elif "RANK" in os.environ:
            _be_a_worker()
        sys.modules.pop(request["module"], None)  # imported already; as __main__ it runs anew
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _fork_workers() -> None:
    """Have torchrun, in this process, fork its workers from one that stays as this one is now."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not os.fork():
        ours.close()
        serve(theirs)
        os._exit(0)
    theirs.close()
    globals()["_server"] = lambda: ours

    def popen(self: Any, command: Sequence[str], environment: dict[str, str]) -> Forked:
        _, *flags, module_flag, module = command[: command.index("-m") + 2]
        assert (flags, module_flag, self._stdout, self._stderr) == (["-u"], "-m", None, None)
        arguments = command[command.index("-m") + 2 :]
        request = {"module": module, "arguments": arguments, "environment": environment}
        pid = _ask({**request, "cwd": str(Path.cwd()), "new_session": True})["pid"]
        return Forked(int(pid), None, None)

    subprocess_handler.SubprocessHandler._popen = popen  # type: ignore[method-assign,assignment]


def _be_a_worker() -> None:
    """Take on what is read when a process starts: its name, and the threads that it may have."""
    import torch

    name = f"rank {os.environ['RANK']}".encode()
    ctypes.CDLL(None).prctl(PR_SET_NAME, name, 0, 0, 0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
