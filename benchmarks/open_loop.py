"""An open-loop load generator: requests at times drawn beforehand, whatever the server does.

A closed loop waits for an answer before it asks again, so a server that stalls is asked less and
looks better than it is. Here every request is due at a time of a Poisson process, and its latency
counts from then, so that what waits for a connection or for a stall is counted as a user would.

Plain sockets in one event loop: about 0.1 ms of one core a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import sys
import time
from collections.abc import Sequence

import numpy as np

SLOWEST = 20.0
"""Seconds after which a request counts as failed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of the requests of one run."""

    offered: float
    """Requests a second that were due."""
    seconds: float
    latencies: list[float]
    """Seconds from when each answered request was due, for status 200."""
    refused: list[float]
    """The same of those with status 503 or 429."""
    failed: int
    """Requests with another status, an error of the connection, or no answer."""

    @property
    def goodput(self) -> float:
        """Answers with status 200 a second."""
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        """A percentile of the latency in ms; infinite if under 99 % were answered."""
        total = len(self.latencies) + len(self.refused) + self.failed
        if not self.latencies or len(self.latencies) < 0.99 * total:
            return float("inf")
        return 1000 * float(np.percentile(self.latencies, share))


def post(path: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    """A request as bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process, in seconds from the beginning."""
    drawn = random.Random(seed)
    found, now = [], drawn.expovariate(rate)
    while now < seconds:
        found.append(now)
        now += drawn.expovariate(rate)
    return found


async def offer(
    port: int, requests: Sequence[bytes], rate: float, seconds: float, seed: int = 0
) -> Outcome:
    """Send `requests` in turn at `rate` a second for `seconds`."""
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    answered: list[float] = []
    refused: list[float] = []
    failed = 0
    began = time.perf_counter() + 0.05

    async def one(due: float, request: bytes) -> None:
        nonlocal failed
        try:
            async with asyncio.timeout(SLOWEST):
                status = await _ask(port, idle, request)
        except (OSError, TimeoutError, EOFError, ValueError):
            failed += 1
            return
        latency = time.perf_counter() - began - due
        if status == 200:
            answered.append(latency)
        elif status in (429, 503):
            refused.append(latency)
        else:
            failed += 1

    tasks = []
    for place, due in enumerate(arrivals(rate, seconds, seed)):
        wait = began + due - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(due, requests[place % len(requests)])))
    await asyncio.gather(*tasks)
    for _, writer in idle:
        writer.close()
    return Outcome(
        offered=rate, seconds=seconds, latencies=answered, refused=refused, failed=failed
    )


async def _ask(
    port: int,
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]],
    request: bytes,
) -> int:
    """The status of a request, on a connection that is free or a new one."""
    if idle:
        reader, writer = idle.pop()
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    kept = False
    try:
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head.split(b" ", 2)[1])
        length = _after(head, b"content-length:")
        if length is not None:
            await reader.readexactly(int(length))
            kept = b"connection: close" not in head
        elif _after(head, b"transfer-encoding:") == b"chunked":
            await reader.readuntil(b"0\r\n\r\n")
            kept = True
        return status
    finally:
        if kept:
            idle.append((reader, writer))
        else:
            writer.close()


def _after(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n"):
        if line.startswith(name):
            return line[len(name) :].strip()
    return None


def main() -> None:
    """Read a job as JSON from standard input, where the bodies are files; print the outcome."""
    job = json.load(sys.stdin)
    requests = []
    for name in job["files"]:
        with open(name, "rb") as file:  # noqa: PTH123 - few imports
            requests.append(post(job["path"], file.read(), job["headers"]))
    with contextlib.suppress(ImportError):
        import uvloop

        uvloop.install()
    found = asyncio.run(
        offer(job["port"], requests, job["rate"], job["seconds"], job.get("seed", 0))
    )
    print(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    main()
