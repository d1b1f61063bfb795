"""HTTP connections: uvicorn's protocol on httptools, with the limits that it lacks.

uvicorn parses and answers; alone it waits for ever for a client that is silent, that sends its
headers byte by byte or that does not read its answer, and it bounds neither headers nor pipelines.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httptools
import orjson
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from distcls.serving.options import Limits
from distcls.serving.service import REASONS, Service

if TYPE_CHECKING:
    from distcls.serving.app import App

HEADER_BYTES = 65_536
"""Of the request line and all headers."""
MOST_PIPELINED = 100
"""Requests that a connection may send before the answer to the first."""
LINGER = 2.0
"""Seconds for which what a refused client still sends is read and dropped: a connection that is
closed with unread bytes is reset, and the client loses the answer."""
BACKLOG = 1024


CONTINUE = b"HTTP/1.1 100 "
"""How the interim answer begins that asks for the body."""


class _TooLarge(Exception):
    """The headers are larger than `HEADER_BYTES`."""


class _TooMany(Exception):
    """More requests than `MOST_PIPELINED` wait on this connection."""


class _JoinedWrites:
    """A transport to which the head of an answer goes together with its body.

    One call of the system instead of two, and the client is woken once: some 0.1 ms a request.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""

    def write(self, data: bytes) -> None:
        if not self._head and data.startswith(b"HTTP/1.1 ") and not data.startswith(CONTINUE):
            self._head = data
        else:
            data, self._head = self._head + data, b""
            self._transport.write(data)

    def flush(self) -> None:
        if self._head:  # an answer without a body
            head, self._head = self._head, b""
            self._transport.write(head)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


class Connection(HttpToolsProtocol):
    """One connection of a client, and the requests that it sends one after the other."""

    def __init__(
        self, config: Config, state: ServerState, service: Service, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(config, state, {}, loop)
        self._service = service
        self._limits: Limits = service.options
        self._timer: asyncio.TimerHandle | None = None
        """For the headers, or for the client to read what was sent."""
        self._in_headers = False
        self._header_bytes = 0
        self._refused = False
        """It was told why it is closed; what it sends is dropped."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(503, "busy: too many connections are open")
        else:
            self._start_timer(self._limits.header_timeout, self._end_without_headers)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._stop_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._refused:
            return
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # to a protocol that is not spoken here
            self.cycle.keep_alive = False
        except httptools.HttpParserError as error:
            self._refuse_invalid(error)
            return
        if not self._in_headers:
            return
        self._header_bytes += len(data)
        if self._header_bytes > HEADER_BYTES:
            self._refuse(431, f"the headers are larger than {HEADER_BYTES:,} bytes")
        elif self._timer is None:
            self._start_timer(self._limits.header_timeout, self._end_without_headers)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_headers, self._header_bytes = True, 0

    def on_url(self, url: bytes) -> None:
        """A part of the request line."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > HEADER_BYTES:
            raise _TooLarge

    def on_headers_complete(self) -> None:
        """The application takes over."""
        self._in_headers = False
        self._stop_timer()
        if len(self.pipeline) >= MOST_PIPELINED:
            raise _TooMany
        super().on_headers_complete()
        joined = _JoinedWrites(self.transport)
        self.cycle.transport = joined  # type: ignore[assignment]
        self.cycle.on_response = functools.partial(self._complete, joined)

    def _complete(self, answer: _JoinedWrites) -> None:
        """An answer was handed to the system, or waits to be."""
        answer.flush()
        others = bool(self.pipeline)
        self.on_response_complete()
        if self._refused and not others:
            self._linger()
        elif self._timer is None and self.transport.get_write_buffer_size():
            self._start_timer(self._limits.write_timeout, self._require_read)

    def pause_writing(self) -> None:
        """The client does not read; see `asyncio.Protocol`."""
        super().pause_writing()
        self._start_timer(self._limits.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        self._stop_timer()

    def _require_read(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _end_without_headers(self) -> None:
        if not self._in_headers:  # not a byte of a request has come
            self.transport.abort()
            return
        seconds = self._limits.header_timeout
        self._refuse(408, f"the headers came too slowly: they have to be there in {seconds:g} s")

    def _refuse_invalid(self, error: httptools.HttpParserError) -> None:
        if isinstance(error.__context__, _TooLarge):
            self._refuse(431, f"the headers are larger than {HEADER_BYTES:,} bytes")
        elif isinstance(error.__context__, _TooMany):
            self.transport.abort()
        else:
            reason = str(error)[:100] or "it cannot be parsed"
            self._refuse(400, f"the request is not valid HTTP: {reason}")

    def _refuse(self, status: int, message: str) -> None:
        """Tell the client why it is not answered, and close."""
        self._refused = True
        self._service.metrics.rejected[REASONS.get(status, str(status))] += 1
        cycle = self.cycle
        pending = cycle is not None and not cycle.response_complete
        if pending and cycle.more_body and self.pipeline:
            self.pipeline.popleft()  # the one at fault, which came last
            return  # those before it are answered; `_complete` closes
        if pending and not cycle.more_body:
            return
        if pending and cycle.response_started:
            self.transport.abort()  # in the middle of the answer to this one
            return
        body = orjson.dumps({"error": message})
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n"
            + ("retry-after: 1\r\n" if status == 503 else "")
        )
        self.transport.write(head.encode() + b"\r\n" + body)
        self._linger()
        if pending:  # the application was reading the body
            cycle.disconnected = True
            cycle.message_event.set()

    def _linger(self) -> None:
        """Close, but read on for a while."""
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._start_timer(LINGER, self.transport.abort)
        else:
            self.transport.close()
            self._start_timer(self._limits.write_timeout, self.transport.abort)

    def _start_timer(self, seconds: float, then: Any) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, then)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class HttpServer:
    """Listens for HTTP on behalf of an application."""

    def __init__(self, app: App, tls: ssl.SSLContext | None = None) -> None:
        """The application has the limits, and counts what is refused."""
        self._service = app
        self._tls = tls
        self._state = ServerState()
        idle = app.options.header_timeout
        self._config = Config(
            app,
            interface="asgi3",
            http=HttpToolsProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=idle,  # type: ignore[arg-type]  # seconds for call_later
        )
        self._server: asyncio.Server | None = None

    async def start(self, bound: socket.socket) -> None:
        """Listen on a socket that is bound. Raises OSError if another server took its port."""
        loop = asyncio.get_running_loop()
        self._config.load()
        bound.listen(BACKLOG)  # uvloop does not say so if that fails
        # the handshake has the time limit of the headers
        limits: dict[str, Any] = {}
        if self._tls is not None:
            limits["ssl_handshake_timeout"] = self._service.options.header_timeout
        self._server = await loop.create_server(
            lambda: Connection(self._config, self._state, self._service, loop),
            sock=bound,
            ssl=self._tls,
            backlog=BACKLOG,
            **limits,
        )

    def stop_listening(self) -> None:
        """Take no new connections, and close those that wait for no answer."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()

    async def stop(self, timeout: float) -> None:
        """The same, and end the others once their last answer was read, at most `timeout` later."""
        self.stop_listening()
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while self._state.connections and loop.time() < end:
            await asyncio.sleep(0.01)
        for connection in list(self._state.connections):
            connection.transport.abort()
