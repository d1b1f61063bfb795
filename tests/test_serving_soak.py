"""Many requests to one server: its memory stays flat, and every image gets its own answer."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import http.client
import json
import queue
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from distcls.commands.predict import main as predict
from distcls.prediction import shortest
from tests.pictures import encode, smooth
from tests.serving import WHOLE, Server, serving

CONNECTIONS = 16
SAMPLES = 10
"""How often the memory is looked at, evenly over the requests."""
FLAT = 1.05
PHOTOGRAPHS = 1000


def bodies() -> list[bytes]:
    """Forty images of some 1 kB, and ten files that are none."""
    pictures = [smooth(60, 80, seed) for seed in range(40)]
    good = [encode(picture, "JPEG", quality=80 - place) for place, picture in enumerate(pictures)]
    broken = [good[place][: 200 + 40 * place] for place in range(8)]
    return [*good, *broken, b"no image at all", b"\x89PNG\r\n\x1a\n" + bytes(1000)]


def expected_status(server: Server, files: list[bytes]) -> dict[bytes, int]:
    """The status of each file; a decoder may take one that was cut late."""
    found = {body: server.post("/predict", body).status for body in files}
    assert all(found[body] == 200 for body in files[:40])
    assert sum(status == 400 for status in found.values()) >= 8, found
    return found


class Soak:
    """Clients that keep their connections, and now and then hang up in the middle."""

    def __init__(self, server: Server, files: dict[bytes, int]) -> None:
        self.port, self.files = server.port, files
        self.left = 0
        self.seen: Counter[str] = Counter()

    async def run(self, requests: int, each_sample: Callable[[], None]) -> None:
        """Send them, and call `each_sample` SAMPLES times on the way."""
        for _ in range(SAMPLES):
            self.left = requests // SAMPLES
            await asyncio.gather(*(self._client(number) for number in range(CONNECTIONS)))
            each_sample()

    async def _client(self, seed: int) -> None:
        drawn = random.Random(f"{seed} {self.seen.total()}")
        files = list(self.files)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        while self.left > 0:
            self.left -= 1
            body = drawn.choice(files)
            head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            manner = drawn.random()
            if manner < 0.02:  # it leaves in the middle of the body, or before the answer
                writer.write(head.encode() + body[: len(body) // 2 if manner < 0.01 else None])
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
                writer.close()
                self.seen["left"] += 1
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                continue
            writer.write(head.encode() + body)
            status = await self._status(reader)
            if status == 503:
                self.seen["busy"] += 1
                continue
            assert status == self.files[body], (status, body[:20])
            self.seen[str(status)] += 1
        writer.close()

    async def _status(self, reader: asyncio.StreamReader) -> int:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = head.split(b"content-length:")[1].split(b"\r\n")[0]
        await reader.readexactly(int(length))
        return int(head.split()[1])


def processes(server: Server) -> list[psutil.Process]:
    main = psutil.Process(server.process.pid)
    return [main, *main.children(recursive=True)]


def wait_for_workers(server: Server, number: int) -> None:
    """The first answers while the others still start."""
    end = time.monotonic() + 30
    while f'distcls_workers{{model="best",version="1"}} {number}.0' not in (
        server.get("/metrics").body.decode()
    ):
        assert time.monotonic() < end, server.said
        time.sleep(0.02)


def memory(server: Server) -> int:
    """Kilobytes that all its processes have taken; pages of files, which others share, are none."""
    total = 0
    for process in processes(server):
        text = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        total += sum(map(int, re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", text, re.MULTILINE)))
    return total


def descriptors(server: Server) -> int:
    return sum(process.num_fds() for process in processes(server))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("engine", "requests"), [("processes", 100_000), ("threads", 20_000)])
def test_memory_and_descriptors_stay_flat(engine: str, requests: int, tmp_path: Path) -> None:
    with serving(tmp_path, "--engine", engine, "--workers", 2, "--header-timeout", 2) as server:
        wait_for_workers(server, 2)
        soak = Soak(server, expected_status(server, bodies()))
        before = [process.pid for process in processes(server)]
        opened = descriptors(server)
        samples: list[int] = []
        asyncio.run(soak.run(requests, lambda: samples.append(memory(server))))
        assert soak.seen.total() == requests
        assert soak.seen["200"] > 0.7 * requests, soak.seen
        assert soak.seen["400"] > 0.1 * requests, soak.seen
        assert soak.seen["left"] > 0.01 * requests, soak.seen
        assert [process.pid for process in processes(server)] == before, server.said
        assert max(samples) < FLAT * samples[0], " ".join(f"{kb / 1024:.1f}" for kb in samples)
        end = time.monotonic() + 20
        while descriptors(server) > opened:
            assert time.monotonic() < end, (descriptors(server), opened)
            time.sleep(0.1)
        assert server.stop() == 0
        assert "error" not in server.said, server.said


Ask = Callable[[bytes], tuple[dict[str, Any] | None, str]]
"""The prediction for an image, or None and the error."""


Protocol = Callable[[Server, int], contextlib.AbstractContextManager[Ask]]
"""What asks a server for that number of callers."""


@contextlib.contextmanager
def over_http(server: Server, callers: int) -> Iterator[Ask]:
    """POST /predict, on as many connections as callers."""
    idle: queue.SimpleQueue[http.client.HTTPConnection] = queue.SimpleQueue()

    def ask(body: bytes) -> tuple[dict[str, Any] | None, str]:
        connection = idle.get()
        try:
            connection.request("POST", "/predict?probabilities=true", body)
            response = connection.getresponse()
            values = json.loads(response.read())
        finally:
            idle.put(connection)
        if response.status == 200:
            (found,) = values["predictions"]
            return found, ""
        assert response.status == 400, values
        return None, values["error"]

    with contextlib.ExitStack() as stack:
        for _ in range(callers):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            idle.put(stack.enter_context(contextlib.closing(connection)))
        yield ask


@contextlib.contextmanager
def over_grpc(server: Server, callers: int) -> Iterator[Ask]:
    """ModelInfer with the image file, on one channel."""
    grpc = pytest.importorskip("grpc", reason="distcls[serve-grpc] is not installed")
    from distcls.serving.messages import MESSAGES

    classes = server.get("/card").json["classes"]
    found = re.search(r"gRPC at 127\.0\.0\.1:(\d+)", server.said)
    assert found is not None
    channel = grpc.insecure_channel(f"127.0.0.1:{found[1]}")
    infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    def ask(body: bytes) -> tuple[dict[str, Any] | None, str]:
        request = MESSAGES["ModelInferRequest"](model_name="best")
        request.inputs.add(name="images", datatype="BYTES", shape=[1])
        request.outputs.add(name="probabilities")
        request.raw_input_contents.append(len(body).to_bytes(4, "little") + body)
        try:
            data = infer(request.SerializeToString(), timeout=60)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.INVALID_ARGUMENT:
                raise
            return None, error.details()
        answer = MESSAGES["ModelInferResponse"].FromString(data)
        values = np.frombuffer(answer.raw_output_contents[0], np.float32)
        probabilities = dict(zip(classes, shortest(values), strict=True))
        return {"label": max(classes, key=probabilities.get), "probabilities": probabilities}, ""

    with contextlib.closing(channel):
        yield ask


def photographs_and_others(folder: Path) -> dict[str, bytes]:
    """A thousand images, every eighth of them broken in one of four ways, as files in `folder`."""
    folder.mkdir()
    found = {}
    for number in range(PHOTOGRAPHS):
        data = encode(smooth(60 + number % 7, 90, number), "JPEG", quality=90)
        if number % 8 == 3:
            data = (data[: len(data) // 3], b"text %d" % number, data[:2], b"\x89PNG" + data)[
                number // 8 % 4
            ]
        found[f"{number:04d}.jpg"] = data
        (folder / f"{number:04d}.jpg").write_bytes(data)
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[bytes, dict[str, str]]:
    """The row of `distcls predict` for the bytes of each image."""
    folder = tmp_path_factory.mktemp("predict")
    files = photographs_and_others(folder / "images")
    out = folder / "pre.csv"
    call = ["--model", str(WHOLE), str(folder / "images"), "--out", str(out), "--probabilities"]
    predict([*call, "--provider", "cpu", "--max-bad", "1", "--quiet"])
    with out.open(encoding="utf-8", newline="") as file:
        rows = {row["image_id"]: row for row in csv.DictReader(file)}
    assert sum(bool(row["error"]) for row in rows.values()) == PHOTOGRAPHS // 8
    return {data: rows[name] for name, data in files.items()}


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [over_http, over_grpc])
@pytest.mark.parametrize("engine", ["processes", "threads"])
def test_each_image_gets_the_row_of_predict_at_any_concurrency(
    engine: str, protocol: Protocol, expected: dict[bytes, dict[str, str]], tmp_path: Path
) -> None:
    options = ("--engine", engine, "--max-wait", 60, "--grpc-port", 0)
    with serving(tmp_path, *options) as server:
        for callers in (1, 16, 64):
            with protocol(server, callers) as ask, ThreadPoolExecutor(callers) as pool:
                answers = list(pool.map(ask, expected))
            for (found, error), row in zip(answers, expected.values(), strict=True):
                assert error == row["error"], row
                if found is None:
                    continue
                assert found["label"] == row["label"]
                own = {key: float(row[f"p:{key}"]) for key in found["probabilities"]}
                assert found["probabilities"] == own
