"""A real `distcls serve` in a process of its own, and plain requests to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.e2e.commands import ROOT
from tests.pictures import encode, smooth

EXPORTED = ROOT / "tests" / "fixtures" / "v076daf9"
"""Real networks, exported: `whole` (10 classes), `run_heads`, `run_labels`."""
WHOLE = EXPORTED / "whole" / "best.onnx"
PHOTO = encode(smooth(40, 90, 1), "JPEG", quality=90)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The text of an error, which has to be the body's only line."""
        values = self.json
        assert self.status >= 400, self
        return str(values["error"])


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[bytes], said: Path, timeout: float) -> None:
        self.process = process
        self._said = said
        end = time.monotonic() + timeout
        while (found := re.search(r"ready after .*?://[^/]*?:(\d+)/", self.said)) is None:
            assert process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.02)
        self.port = int(found[1])

    @property
    def said(self) -> str:
        """What it has printed on standard error."""
        return self._said.read_text(encoding="utf-8", errors="replace")

    @property
    def out(self) -> str:
        """What it has printed on standard output."""
        return self._said.with_suffix(".out").read_text(encoding="utf-8")

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = 60,
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            found = connection.getresponse()
            named = {name.lower(): value for name, value in found.getheaders()}
            return Answer(found.status, named, found.read())

    def get(self, path: str, **options: Any) -> Answer:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any = b"", **options: Any) -> Answer:
        if not isinstance(body, bytes):
            body = json.dumps(body)
        return self.request("POST", path, body, **options)

    def raw(self, data: bytes, timeout: float = 30) -> bytes:
        """What comes back for these bytes on a connection, until it is closed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(data)
            parts = []
            while part := connection.recv(1 << 16):
                parts.append(part)
            return b"".join(parts)

    def processes(self) -> list[int]:
        """Its compute processes."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(word) for word in path.read_text(encoding="ascii").split()]

    def stop(self, timeout: float = 40) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)


@contextlib.contextmanager
def serving(
    folder: Path,
    *arguments: object,
    model: Path | None = WHOLE,
    env: dict[str, str] | None = None,
    timeout: float = 60,
) -> Iterator[Server]:
    """A server with these arguments on a free port, until the block ends; its words go to
    `folder`."""
    words = [] if model is None else ["--model", str(model)]
    call = [sys.executable, "-m", "distcls", "serve", *words, "--port", "0", "--provider", "cpu"]
    said = folder / f"serve-{time.monotonic_ns()}.txt"
    with said.open("wb") as stderr, said.with_suffix(".out").open("wb") as stdout:
        process = subprocess.Popen(
            [*call, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **(env or {})},
            cwd=ROOT,
        )
    try:
        yield Server(process, said, timeout)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired as error:
                process.kill()
                process.wait()
                raise AssertionError(f"SIGTERM did not end it: {said.read_text()}") from error


def form(files: Sequence[tuple[str, bytes]]) -> tuple[bytes, dict[str, str]]:
    """A multipart form with files, and its headers."""
    parts = [
        b'--limit\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n%s\r\n'
        % (name.encode(), data)
        for name, data in files
    ]
    head = {"Content-Type": "multipart/form-data; boundary=limit"}
    return b"".join(parts) + b"--limit--\r\n", head


def infer(body: dict[str, Any], *blobs: bytes) -> tuple[bytes, dict[str, str]]:
    """The body and headers of a request with binary data."""
    text = json.dumps(body).encode()
    return b"".join((text, *blobs)), {"Inference-Header-Content-Length": str(len(text))}


def encoded(images: Sequence[bytes], **more: Any) -> tuple[bytes, dict[str, str]]:
    """An inference request with encoded images, binary."""
    blob = b"".join(len(image).to_bytes(4, "little") + image for image in images)
    given = {
        "name": "images",
        "datatype": "BYTES",
        "shape": [len(images)],
        "parameters": {"binary_data_size": len(blob)},
    }
    return infer({"inputs": [given], **more}, blob)


def together(number: int, work: Any) -> list[Any]:
    """The results of `work(0)` to `work(number - 1)`, each in a thread of its own, at once."""
    results: list[Any] = [None] * number
    ready = threading.Barrier(number)

    def run(index: int) -> None:
        ready.wait()
        try:
            results[index] = work(index)
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
