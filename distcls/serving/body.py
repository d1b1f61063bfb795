"""Reading the body of a request within limits of size, time and compression."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from distcls.serving.options import MB, Limits
from distcls.serving.protocol import Refused

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

LEAST_RATE, GRACE = 10_000, 5.0
"""Bytes per second that a body has to come at, after the first seconds."""
MOST_DRAINED, DRAIN_SECONDS = 64 * MB, 10.0
"""Of a body that is refused: what is still read, so that the client reads the answer."""
MOST_RATIO = 100
"""Decompressed bytes for each one that was sent, beyond the first MB."""


class ClientGone(Exception):
    """The client has closed the connection."""


class Body:
    """The body of one request, read at most once."""

    def __init__(self, receive: Receive, headers: dict[bytes, bytes], limits: Limits) -> None:
        self._receive = receive
        self._limits = limits
        self._headers = headers
        length = headers.get(b"content-length", b"")
        self.declared = int(length) if length.isdigit() and len(length) < 16 else None
        """Bytes that the client has announced."""
        chunked = b"transfer-encoding" in headers
        self.complete = not chunked and not self.declared
        """Whether all of it has been read."""
        self.budget: Any = None
        """What bounds the memory of all bodies, a `BodyBudget`."""
        self._taken = 0
        self.too_slow = False
        self.size = 0
        """Bytes read."""

    async def read(self) -> bytes:
        """All of it, decompressed. Raises Refused, and ClientGone."""
        most = self._limits.max_body * MB
        if self.declared is not None and self.declared > most:
            raise self._too_large(most)
        parts: list[bytes] = []
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        last = loop.time() + self._limits.body_timeout
        due = loop.time() + GRACE
        try:
            async with asyncio.timeout_at(min(last, due)) as timer:
                while not self.complete:
                    parts.append(await self._next())
                    self._take(len(parts[-1]))
                    if self.size > most:
                        raise self._too_large(most)
                    timer.reschedule(min(last, due + self.size / LEAST_RATE))
        except TimeoutError:
            self.too_slow = True
            raise self._came_slowly(time.monotonic() - began) from None
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return self._decompressed(data)

    def _take(self, size: int) -> None:
        if self.budget is not None:
            self.budget.take(size)
            self._taken += size

    def release(self) -> None:
        """Its bytes are not needed any more."""
        if self.budget is not None:
            self.budget.give(self._taken)
        self._taken = 0

    async def drain(self) -> bool:
        """Read and discard what is left, so that the client reads our answer; whether it ended.

        A client that is still sending when the connection is closed loses the answer.
        """
        if self.complete:
            return True
        if self.too_slow or (self.declared or 0) > MOST_DRAINED:
            return False
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self.complete and self.size <= MOST_DRAINED:
                    await self._next()
        except (TimeoutError, ClientGone):
            return False
        return self.complete

    async def gone(self) -> None:
        """Return when the client has closed the connection; for use after the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.complete = True
            raise ClientGone
        part: bytes = message.get("body", b"")
        self.size += len(part)
        self.complete = not message.get("more_body", False)
        return part

    def _came_slowly(self, seconds: float) -> Refused:
        return Refused(
            408,
            f"the body came too slowly: {self.size:,} bytes in {seconds:.0f} s, expected "
            f"{LEAST_RATE // 1000} kB/s and at most {self._limits.body_timeout:g} s",
        )

    def _too_large(self, most: int) -> Refused:
        return Refused(413, f"the body is larger than {most // MB} MB (--max-body)")

    def _decompressed(self, data: bytes) -> bytes:
        encoding = self._headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding in (b"identity", b""):
            return data
        if encoding not in (b"gzip", b"deflate"):
            name = encoding.decode("latin-1")[:40]
            raise Refused(415, f"Content-Encoding: {name!r}, expected gzip, deflate or identity")
        most = min(2 * self._limits.max_body * MB, MB + MOST_RATIO * len(data))
        unpacker = zlib.decompressobj(31 if encoding == b"gzip" else 15)
        try:
            unpacked = unpacker.decompress(data, most + 1)
        except zlib.error as error:
            name = encoding.decode()
            raise Refused(400, f"Content-Encoding: the body is not {name}: {error}") from error
        if len(unpacked) > most:
            raise Refused(413, f"the body decompresses to more than {most:,} bytes")
        if not unpacker.eof or unpacker.unused_data:
            raise Refused(400, "Content-Encoding: the compressed body is cut off, or goes on")
        return unpacked
