"""The servers of `benchmarks.serve`: their environments, how each is asked, started and ended."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.common import NotStarted
from benchmarks.open_loop import post
from benchmarks.photographs import CROP
from distcls import log
from distcls.files import write_text
from distcls.imaging import decode_file
from distcls.system import available_cores, cache_folder

WAYS = Path(__file__).parent / "serve_ways"
LONGEST_START, LONGEST_END = 120, 10
"""Seconds until the first answer, and from SIGTERM to the end."""
BATCH, WAIT = 8, 0.002
"""Of the servers that batch by a timer: images, and seconds to wait for them."""
COMPUTING = (f"onnxruntime=={version('onnxruntime')}",)
DECODING = (*COMPUTING, f"opencv-python-headless=={version('opencv-python-headless')}")
Answer = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """One server."""

    name: str
    command: Callable[[Place], Sequence[str | Path]]
    """What starts it; may write files into the place's folder."""
    packages: tuple[str, ...] = ()
    """Of its virtual environment; none: it runs in this one."""
    path: str = "/predict"
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "image/jpeg"),)
    body: Callable[[Path], bytes] = Path.read_bytes
    """The body of a request for a photograph."""
    read: Callable[[Answer], tuple[str, float]] = lambda answer: (
        answer["label"],
        sum(answer["seconds"].values()),
    )
    """The label in an answer, and the seconds of decoding and computing that it tells."""
    environment: Callable[[Place], dict[str, str]] = lambda place: {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """What a server is started with."""

    python: Path
    model: Path
    port: int
    folder: Path
    """Empty, for its own files."""

    @property
    def packages(self) -> Path:
        """The folder that its packages are installed in."""
        return next((self.python.parent.parent / "lib").glob("python*/site-packages"))


def ways() -> dict[str, Way]:
    """All contestants by name, ours first."""
    cores = str(available_cores())
    script = {
        name: (lambda place, name=name, more=more: [
            place.python, WAYS / f"{name}_way.py", place.model, str(place.port), cores, *more
        ])
        for name, more in {
            "starlette": (),
            "litserve": (str(BATCH), str(WAIT)),
            "ray": (str(BATCH), str(WAIT)),
        }.items()
    }  # fmt: skip
    protocol: dict[str, Any] = {"path": "/v2/models/model/infer", "read": _of_protocol}
    json_headers = (("Content-Type", "application/json"),)
    found = [
        *(
            Way(name=f"distcls {engine}", command=_ours(engine), read=_of_ours)
            for engine in ("processes", "threads")
        ),
        Way(
            name="Starlette",
            packages=(*DECODING, "starlette", "uvicorn==0.54.0", "uvloop", "httptools"),
            command=script["starlette"],
        ),
        Way(
            name="LitServe",
            packages=(*DECODING, "litserve==0.2.19"),
            command=script["litserve"],
            headers=json_headers,
            body=lambda path: json.dumps({"image": _base64(path)}).encode(),
        ),
        Way(
            name="MLServer",
            packages=(*DECODING, "mlserver==1.7.1", "uvloop<0.22"),  # 0.22 ends its workers
            command=_mlserver,
            environment=lambda place: {"PYTHONPATH": str(WAYS)},
            headers=json_headers,
            body=_of_mlserver,
            **protocol,
        ),
        Way(
            name="Ray Serve",
            packages=(*DECODING, "ray[serve]==2.60.0"),
            command=script["ray"],
            environment=lambda place: {"RAY_USAGE_STATS_ENABLED": "0"},
        ),
        Way(
            name="Triton tensors",
            packages=(*COMPUTING, "nvidia-pytriton==0.7.0", "numpy<2"),
            command=_triton,
            environment=_of_stub,
            headers=(("Inference-Header-Content-Length", str(len(_TENSOR))),),
            body=lambda path: _TENSOR + CROP(decode_file(path)).tobytes(),
            **protocol,
        ),
    ]
    return {way.name: way for way in found}


def _ours(engine: str) -> Callable[[Place], Sequence[str | Path]]:
    words = ["-m", "distcls", "serve", "--provider", "cpu", "--engine", engine, "--quiet"]
    return lambda place: [
        place.python, *words, "--model", place.model, "--port", str(place.port)
    ]  # fmt: skip


def _of_ours(answer: Answer) -> tuple[str, float]:
    found = answer["predictions"][0]
    return found["label"], found["seconds"]["decode"] + found["seconds"]["infer"]


def _of_protocol(answer: Answer) -> tuple[str, float]:
    found = {output["name"]: output["data"] for output in answer["outputs"]}
    return found["label"][0], sum(found["seconds"])


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _of_mlserver(path: Path) -> bytes:
    given = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": [_base64(path)]}
    return json.dumps({"inputs": [{**given, "parameters": {"content_type": "base64"}}]}).encode()


def _mlserver(place: Place) -> Sequence[str | Path]:
    ports = {f"{name}_port": free_port() for name in ("grpc", "metrics")}
    settings = {
        **{"host": "127.0.0.1", "http_port": place.port, **ports, "debug": False},
        "parallel_workers": available_cores(),
    }
    model = {
        **{"name": "model", "implementation": "mlserver_way.Runtime"},
        **{"max_batch_size": BATCH, "max_batch_time": WAIT},
        "parameters": {"uri": str(place.model)},
    }
    write_text(place.folder / "settings.json", json.dumps(settings))
    write_text(place.folder / "model-settings.json", json.dumps(model))
    return [place.python.with_name("mlserver"), "start", place.folder]


_IMAGE = 3 * CROP.size[0] * CROP.size[1]
_TENSOR = json.dumps(
    {
        "inputs": [
            {
                **{"name": "images", "datatype": "UINT8", "shape": [1, *CROP.size, 3]},
                "parameters": {"binary_data_size": _IMAGE},
            }
        ]
    }
).encode()
_CONFIG = """backend: "python"
max_batch_size: 64
input [ { name: "images" data_type: TYPE_UINT8 dims: [ %d, %d, 3 ] } ]
output [
  { name: "label" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "seconds" data_type: TYPE_FP32 dims: [ 2 ] }
]
dynamic_batching { }
instance_group [ { kind: KIND_CPU count: %d } ]
"""


def _triton(place: Place) -> Sequence[str | Path]:
    """A repository with one model; Triton batches what waits while an instance is busy."""
    server = place.packages / "pytriton" / "tritonserver"
    model = place.folder / "model"
    (model / "1").mkdir(parents=True)
    write_text(model / "config.pbtxt", _CONFIG % (*CROP.size, available_cores()))
    shutil.copyfile(WAYS / "triton_model.py", model / "1" / "model.py")
    shutil.copyfile(WAYS / "classifier.py", model / "1" / "classifier.py")
    (model / "1" / "model.onnx").symlink_to(place.model)
    stub = "triton_python_backend_stub"
    number = f"{sys.version_info[0]}.{sys.version_info[1]}"
    shutil.copy(server / "python_backend_stubs" / number / stub, server / "backends" / "python")
    options = {
        **{"model-repository": place.folder, "backend-directory": server / "backends"},
        **{"http-address": "127.0.0.1", "http-port": place.port},
        **{"allow-grpc": "false", "allow-metrics": "false", "log-info": "false"},
    }
    return [server / "bin" / "tritonserver", *(f"--{key}={text}" for key, text in options.items())]


def _of_stub(place: Place) -> dict[str, str]:
    """So that the interpreter inside its stub is ours, with the packages of its environment."""
    return {
        "PATH": f"{place.python.parent}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{sys.base_prefix}/lib",
    }


def environment_of(way: Way) -> Path:
    """The interpreter of its virtual environment, which is made if it is not there.

    Raises NotStarted if its packages cannot be installed.
    """
    if not way.packages:
        return Path(sys.executable)
    folder = cache_folder() / "benchmarks" / "envs" / _plain(way.name)
    python, wanted = folder / "bin" / "python", "\n".join(way.packages) + "\n"
    finished = folder / "packages.txt"
    if finished.is_file() and finished.read_text(encoding="utf-8") == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    log.say(f"{way.name}: installing {', '.join(way.packages)} into {folder}")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for call in ([sys.executable, "-m", "venv", str(folder)], [*pip, *way.packages]):
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or "no reason").splitlines()[-1]
            raise NotStarted(f"it cannot be installed: {reason}")
    write_text(finished, wanted)
    return python


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        port: int = tried.getsockname()[1]
        return port


class Running:
    """A server that runs, from its start to its end; paused while others are measured."""

    def __init__(self, way: Way, model: Path, photographs: Sequence[Path], folder: Path) -> None:
        """Start it and wait for its first answer. Raises NotStarted."""
        self.way = way
        self.bodies = [folder / f"{number:04d}.body" for number in range(len(photographs))]
        folder.mkdir()
        for body, path in zip(self.bodies, photographs, strict=True):
            body.write_bytes(way.body(path))
        own = folder / "server"
        own.mkdir()
        python = environment_of(way)
        place = Place(python=python, model=model, port=free_port(), folder=own)
        self.port = place.port
        self._said = folder / "said.txt"
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        env |= way.environment(place)
        began = time.perf_counter()
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [*map(str, way.command(place))],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=env,
                start_new_session=True,  # an interrupt from the keyboard is ours to handle
            )
        self._main = psutil.Process(self._process.pid)
        self._seen: set[psutil.Process] = set()
        try:
            self._wait()
        except BaseException:
            self.end()
            raise
        self.ready = time.perf_counter() - began
        """Seconds from its start to its first answer."""

    def _wait(self) -> None:
        end = time.monotonic() + LONGEST_START
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise NotStarted(f"it ended with code {self._process.returncode}: {self.said}")
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError):
                self.answer(0)
                return
            time.sleep(0.02)
        raise NotStarted(f"no answer within {LONGEST_START} s: {self.said}")

    @property
    def said(self) -> str:
        """The last line that it wrote."""
        lines = self._said.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def request(self, number: int) -> bytes:
        """The request for a photograph."""
        return post(self.way.path, self.bodies[number].read_bytes(), dict(self.way.headers))

    def answer(self, number: int) -> tuple[str, float]:
        """The label of a photograph, and the seconds of decoding and computing."""
        with contextlib.closing(self.connection()) as connection:
            return self._ask(connection, self.bodies[number].read_bytes())

    def connection(self) -> http.client.HTTPConnection:
        """A connection to it."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def _ask(self, connection: http.client.HTTPConnection, body: bytes) -> tuple[str, float]:
        connection.request("POST", self.way.path, body, dict(self.way.headers))
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {content[:200]!r}")
        return self.way.read(json.loads(content))

    def alone(self, seconds: float) -> dict[str, float]:
        """Medians in ms of requests one after the other: the round trip, and what it adds to
        decoding and computing."""
        trips: list[float] = []
        added: list[float] = []
        bodies = [path.read_bytes() for path in self.bodies]
        end = time.perf_counter() + seconds
        with contextlib.closing(self.connection()) as connection:
            while time.perf_counter() < end:
                body = bodies[len(trips) % len(bodies)]
                began = time.perf_counter()
                _, computing = self._ask(connection, body)
                trips.append(time.perf_counter() - began)
                added.append(trips[-1] - computing)
        return {"round_trip_ms": 1e3 * median(trips), "added_ms": 1e3 * median(added)}

    def processes(self) -> list[psutil.Process]:
        """It and all below it that run."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._seen |= {self._main, *self._main.children(recursive=True)}
        return [each for each in self._seen if each.is_running()]

    def memory(self) -> float:
        """Megabytes of all its processes, what they share among them counted once.

        Pages of files count in full although another server may use the same libraries.
        """
        own, files = 0, Counter[str]()
        for process in self.processes():
            mapped = Counter[str]()
            with contextlib.suppress(OSError):
                path = ""
                for line in Path(f"/proc/{process.pid}/smaps").read_text("utf-8").splitlines():
                    words = line.split()
                    if not words[0].endswith(":"):
                        path = words[5] if len(words) > 5 and words[5].startswith("/") else ""
                    elif words[0] == "Rss:":
                        mapped[path] += int(words[1]) if path else 0
                    elif words[0] == "Pss:":
                        own += 0 if path else int(words[1])
                    elif words[0] == "Anonymous:" and path:
                        own += int(words[1])
                        mapped[path] -= int(words[1])
            files |= mapped  # of each file the most that one process has
        return (own + files.total()) / 1024

    def pause(self) -> None:
        """Stop its processes, so that they take no time from others."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()

    def resume(self) -> None:
        """Let them run on."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A block in which it runs."""
        self.resume()
        try:
            self.answer(0)  # awake
            yield
        finally:
            self.pause()

    def end(self) -> None:
        """End it, then those of its processes that have outlived it."""
        self.resume()
        left = self.processes()
        self._process.terminate()
        _, left = psutil.wait_procs(left, timeout=LONGEST_END)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=LONGEST_END)


def _plain(name: str) -> str:
    return name.partition(" ")[0].lower()
