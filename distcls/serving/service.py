"""What is done for every request, however it has come: over HTTP (`app`) or gRPC (`grpc`)."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import queue
import random
import re
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

from distcls import log
from distcls.serving.engine import Busy, DeadlineMissed, EngineClosed
from distcls.serving.header import pixels_of
from distcls.serving.metrics import Metrics
from distcls.serving.options import MB, ServeOptions
from distcls.serving.protocol import Refused
from distcls.serving.repository import Repository, Version
from distcls.serving.tracing import open_tracer
from distcls.serving.work import Output, Work

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""What a client's own X-Request-Id may be; another is replaced."""
REASONS = {
    **{400: "bad_request", 401: "unauthorized", 403: "forbidden", 404: "not_found"},
    **{405: "method", 408: "slow_body", 413: "too_large", 415: "encoding", 500: "internal"},
    **{501: "unsupported", 503: "busy", 504: "deadline"},
}
"""Names of the reasons to refuse, by HTTP status, for the metrics."""
MOST_PIXELS = 200_000_000
"""Pixels of the images of one request."""
BODIES = 16
"""Bodies of the largest size that are in memory at a time; of usual photographs thousands."""
MOST_LINES, LONGEST_PATH = 10_000, 500
"""Lines of the access log that may wait for their reader, and letters of a path in one."""


class Call:
    """One request, as logs and metrics know it."""

    def __init__(self, method: str, path: str, request_id: str) -> None:
        """`request_id` is the client's own, if it is one."""
        self.method, self.path = method, path
        self.id = request_id if REQUEST_ID.fullmatch(request_id) else os.urandom(16).hex()
        self.began = time.monotonic()
        self.route = "unknown"
        """The pattern that fits its path, for logs and metrics."""
        self.model: tuple[str, str] | None = None
        """Name and version that answer it."""
        self.images = 0
        self.seconds: dict[str, float] = {}
        """Of its stages, once it was computed."""
        self.size = 0
        """Bytes that came."""
        self.client = ""
        """The client's address, if that is known."""
        self.error = ""
        """Why it was refused."""

    def header(self, name: str) -> str:
        """The value of a header; empty if it is not there."""
        return ""


class BodyBudget:
    """Bytes of bodies that may be in memory at a time, of all clients together."""

    def __init__(self, most: int) -> None:
        self._left = most

    def take(self, size: int) -> None:
        """Count bytes that came. Raises Refused if there is no room for more."""
        if size > self._left:
            message = "busy: too many large bodies are being read"
            raise Refused(503, message, {"retry-after": "2"})
        self._left -= size

    def give(self, size: int) -> None:
        """They are freed."""
        self._left += size


class AccessLog:
    """Lines of JSON on standard output, from a thread of its own.

    Whoever reads them may be slow, a full disk fails: requests never wait for it. Lines that find
    no room are counted, and said at the end.
    """

    def __init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(MOST_LINES)
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    def write(self, entry: dict[str, Any]) -> None:
        """Add a line; returns at once."""
        try:
            self._lines.put_nowait(json.dumps(entry) + "\n")
        except queue.Full:
            self._lost += 1

    def close(self) -> None:
        """Write what is left, for at most two seconds."""
        end = time.monotonic() + 2
        while self._thread.is_alive() and time.monotonic() < end:
            with contextlib.suppress(queue.Full):
                self._lines.put(None, timeout=0.1)
                self._thread.join(max(0.0, end - time.monotonic()))
        lost = self._lost + self._lines.qsize()
        if lost:
            log.warn(f"access log: {log.counted(lost, 'line')} could not be written")

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                sys.stdout.write(line)
                if self._lines.empty():
                    sys.stdout.flush()
            except (OSError, ValueError):
                self._lost += 1
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()


class Service:
    """The models, what is counted of them, and what a request passes on its way to them."""

    def __init__(self, options: ServeOptions, token: str = "") -> None:
        """`token` is the bearer token that requests have to carry, if any."""
        self.options = options
        self.repository = Repository(options)
        self.metrics = Metrics(self.repository)
        self.draining = False
        """Not ready any more, though what comes is still served."""
        self.refusing = False
        """New requests are refused, those under way finished."""
        self.in_flight = 0
        self.body_budget = BodyBudget(options.max_body * MB * BODIES)
        self.token = token
        """The bearer token that requests have to carry; empty if none is wanted."""
        self._tracer = open_tracer()
        self._access_log = AccessLog() if options.access_log else None

    @property
    def wants_token(self) -> bool:
        """Whether requests have to carry a token."""
        return bool(self.token)

    async def start(self) -> None:
        """Load the models. Raises UsageError if one cannot be served."""
        await self.repository.start()

    async def close(self) -> None:
        """Finish what is under way, end the compute processes."""
        await self.repository.close(self.options.drain_timeout)
        if self._tracer is not None:
            await self._tracer.close()
        if self._access_log is not None:
            await asyncio.to_thread(self._access_log.close)

    @property
    def not_ready(self) -> str:
        """Why the server is not ready; empty if it is."""
        if self.draining:
            return "the server is shutting down"
        return "" if self.repository.ready else "a model is not ready"

    def usable(self, version: Version) -> bool:
        """Whether a version is ready for requests."""
        return not self.draining and version.engine.ready

    def authorize(self, given: bytes) -> None:
        """Raise Refused unless `given`, the header Authorization, has the token."""
        if not self.token:
            return
        wanted = self.token.encode()
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), wanted):
            message = "a bearer token is wanted, as in `Authorization: Bearer TOKEN`"
            raise Refused(401, message, {"www-authenticate": "Bearer"})

    def require_taking(self) -> None:
        """Raise Refused if new requests are not taken any more."""
        if self.refusing:
            raise Refused(503, "the server is shutting down", {"retry-after": "1"})

    async def control(self, model: str, action: str, parameters: Any) -> None:
        """Load or unload a model. Raises Refused if that is not allowed, or fails."""
        if not self.options.control:
            raise Refused(403, "loading and unloading is not allowed; --control allows it")
        if not isinstance(parameters, dict) or any(
            name == "config" or name.startswith("file:") for name in parameters
        ):
            raise Refused(400, "parameters: config and file: are not supported")
        await getattr(self.repository, action)(model)

    def admit(self, call: Call, model: str, version: str) -> Version:
        """The version that answers a request. Raises Refused if there is none."""
        found = self.repository.find(model, version)
        call.model = found.name, found.version
        return found

    def still(self, call: Call, found: Version, model: str, version: str) -> Version:
        """The same version, or the one that has replaced it while a body was read."""
        return found if found.engine.ready else self.admit(call, model, version)

    async def compute(
        self, call: Call, found: Version, works: Sequence[Work], timeout: float | None
    ) -> list[Output]:
        """The outputs of images; cancelling drops those that have not begun."""
        for index, work in enumerate(works):
            if found.engine.is_poison(work):
                raise Refused(400, f"image {index}: it has ended two processes that decoded it")
        sizes = [0 if work.pixels else pixels_of(work.data) for work in works]
        if len(works) > 1 and sum(sizes) > MOST_PIXELS:
            most = MOST_PIXELS // 10**6
            message = f"{sum(sizes) // 10**6} megapixels in {len(works)} images, at most {most}"
            raise Refused(413, message)
        call.images = len(works)
        read = time.monotonic() - call.began
        seconds = min(timeout or self.options.timeout, self.options.timeout)
        outputs, queue = await found.engine.submit(works, sizes, time.monotonic() + seconds)
        call.seconds = {
            "read": read,
            "queue": queue,
            "decode": sum(output.decode_s for output in outputs),
            "infer": max(output.infer_s for output in outputs),
        }
        return outputs

    def count(self, call: Call, found: Version, outputs: Sequence[Output]) -> None:
        """Count a request that was answered."""
        call.seconds["total"] = time.monotonic() - call.began
        found.statistics.served(call.seconds, len(outputs))

    def refuse(self, call: Call, error: Exception) -> Refused:
        """What the client is told of an error, which is counted; one of ours is logged."""
        refused = self._refusal(call, error)
        call.error = refused.message
        self.metrics.rejected[REASONS.get(refused.status, str(refused.status))] += 1
        if call.model is not None:
            for version in self.repository.versions():
                if (version.name, version.version) == call.model:
                    reason = REASONS.get(refused.status, "other")
                    version.statistics.failed(reason, time.monotonic() - call.began)
        return refused

    def _refusal(self, call: Call, error: Exception) -> Refused:
        if isinstance(error, Refused):
            # whoever keeps it in a variable keeps no frame, and with it a body
            return error.with_traceback(None)
        if isinstance(error, Busy):
            wait = 1 + int(error.backlog) + random.randrange(2)  # not all at the same moment
            return Refused(503, str(error), {"retry-after": str(wait)})
        if isinstance(error, DeadlineMissed):
            return Refused(504, "the deadline passed before computing could begin")
        if isinstance(error, EngineClosed):
            message = "the server is shutting down, or the model was unloaded"
            return Refused(503, message, {"retry-after": "1"})
        text = "".join(traceback.format_exception(error))
        log.fail(f"request {call.id}: {text}")
        return Refused(500, f"internal error, request {call.id}")

    def record(self, call: Call, status: int | str) -> None:
        """Count the answer to a request, trace it, and print it if there is an access log.

        `status` is that of HTTP, or the name of gRPC's.
        """
        self.metrics.responses[call.route, str(status)] += 1
        if self._tracer is not None:
            self._tracer.record(call, status)
        if self._access_log is None:
            return
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "id": call.id,
            "method": call.method,
            "path": call.path[:LONGEST_PATH],
            "status": status,
            "bytes": call.size,
            "ms": round(1000 * (time.monotonic() - call.began), 2),
            **({"error": call.error} if call.error else {}),
            **({"client": call.client} if call.client else {}),
            "model": call.model and "/".join(call.model),
            "images": call.images,
            **{f"{name}_ms": round(1000 * s, 2) for name, s in call.seconds.items()},
        }
        self._access_log.write(entry)
