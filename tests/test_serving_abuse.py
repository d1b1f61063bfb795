"""What a server in the open meets, in numbers: clients that leave, refusals, damaged requests."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import io
import random
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import httpx
import pytest

from tests.environments import environment
from tests.serving import PHOTO, Server, encoded, form, serving, together

pytestmark = pytest.mark.slow
LEAVERS, REFUSALS, MUTATIONS = 10_000, 100, 6_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path, "--max-wait", 60, "--header-timeout", 2) as server:
        server.post("/predict", PHOTO)
        yield server


def memory(server: Server) -> int:
    """Resident bytes of the server's own process."""
    pages = Path(f"/proc/{server.process.pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096


def descriptors(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


@pytest.mark.row(26)
@pytest.mark.timeout(900)
def test_ten_thousand_clients_hang_up(server: Server) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(PHOTO)
    whole = head + PHOTO
    ends = [whole, whole[: len(head) + 100], head, head[:20], b""]
    """Where the clients leave: after all of it, within the body, before it, within the headers."""

    def leave(index: int) -> None:
        drawn = random.Random(index)
        for _ in range(LEAVERS // 8):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(drawn.choice(ends))
                if drawn.random() < 0.3:
                    time.sleep(0.002)

    assert together(8, leave) == [None] * 8
    time.sleep(4)
    first = (descriptors(server), memory(server))
    assert together(8, leave) == [None] * 8
    time.sleep(4)
    assert descriptors(server) <= first[0] + 2
    assert memory(server) <= 1.05 * first[1]
    assert server.post("/predict", PHOTO).status == 200


@pytest.mark.row(23)
def test_every_client_reads_that_its_body_is_too_large(tmp_path: Path) -> None:
    body = bytes(8 << 20)
    with serving(tmp_path, "--max-body", 1) as server:
        url = f"http://127.0.0.1:{server.port}/predict"
        found: collections.Counter[tuple[str, int]] = collections.Counter()
        for _ in range(REFUSALS):
            found["http.client", server.post("/predict", body).status] += 1
        for _ in range(REFUSALS):
            found["httpx", httpx.post(url, content=body, timeout=60).status_code] += 1

        async def ask() -> None:
            async with aiohttp.ClientSession() as session:
                for _ in range(REFUSALS):
                    async with session.post(url, data=io.BytesIO(body)) as answer:
                        assert "1 MB" in (await answer.json())["error"]
                        found["aiohttp", answer.status] += 1

        asyncio.run(ask())
        assert found == {(name, 413): REFUSALS for name in ("http.client", "httpx", "aiohttp")}


@pytest.mark.row(22)
def test_damaged_requests_end_in_no_5xx(server: Server) -> None:
    """Bytes of good requests changed, cut, doubled and moved; no crash, no 5xx but 503 and 504."""
    drawn = random.Random(0)
    statuses: collections.Counter[str] = collections.Counter()
    good = [raw("/predict", PHOTO, {}), raw("/predict", *form([("a", PHOTO), ("b", b"x")]))]
    good += [
        raw("/v2/models/best/infer", *encoded([PHOTO])),
        raw("/v2/repository/index", b"{}", {}),
    ]
    good += [b"GET /v2/models/best HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"]
    for _ in range(MUTATIONS):
        data = mutated(bytearray(drawn.choice(good)), drawn)
        found = b""
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        with connection, contextlib.suppress(ConnectionError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            found = connection.recv(4096)
        status = found[9:12].decode("latin-1") if found.startswith(b"HTTP/1") else "closed"
        statuses[status] += 1
        assert status[0] != "5" or status in ("503", "504"), (data[:300], found)
    assert server.process.poll() is None
    assert "Traceback" not in server.said
    assert "a compute process ended" not in server.said
    assert server.post("/predict", PHOTO).status == 200
    assert statuses["200"] > 50
    assert statuses["400"] > 500


@pytest.mark.row(22)
def test_the_openapi_document_is_true(server: Server, tmp_path: Path) -> None:
    """Schemathesis makes thousands of requests from the document: answers are what it says."""
    program = environment("schemathesis==4.32.5").with_name("schemathesis")
    call = [str(program), "run", f"http://127.0.0.1:{server.port}/openapi.json", "--checks", "all"]
    # any text is an image of the right type to the document, and few are good ones
    call += ["--exclude-checks", "positive_data_acceptance,missing_required_header"]
    call += ["--continue-on-failure", "--max-time", "60", "--no-color"]
    done = subprocess.run(
        call, capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-5000:]
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated is not None
    assert int(generated[1]) > 500
    assert "Traceback" not in server.said


def raw(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def mutated(data: bytearray, drawn: random.Random) -> bytes:
    """The same with one to four damages, mostly near its beginning."""
    for _ in range(drawn.randint(1, 4)):
        at = min(int(drawn.expovariate(1 / 120)), len(data) - 1)
        kind = drawn.randrange(6)
        if kind == 0:
            data[at] = drawn.randrange(256)
        elif kind == 1:
            data[at] ^= 1 << drawn.randrange(8)
        elif kind == 2:
            del data[at : at + drawn.randint(1, 30)]
        elif kind == 3:
            data[at:at] = data[at : at + drawn.randint(1, 60)]
        elif kind == 4:
            data[at:at] = drawn.choice(
                [b"\r\n", b"\0", b"-1", b"999999999999", b"%00", b"{[", b"\xff"]
            )
        elif len(data) > 2:
            del data[-drawn.randint(1, len(data) // 2) :]
        if not data:
            data = bytearray(b"\r\n")
    return bytes(data)
