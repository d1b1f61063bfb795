"""`distcls serve`: the application on its port, its signals and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import ssl
import sys
import time
from typing import TYPE_CHECKING, Any

from distcls import log
from distcls.cli import packages_for
from distcls.errors import UsageError, shown
from distcls.serving.app import App
from distcls.serving.connection import HttpServer
from distcls.serving.options import ServeOptions
from distcls.stored import read_bytes

if TYPE_CHECKING:
    from distcls.serving.grpc import GrpcServer

TOKEN = "DISTCLS_TOKEN"
"""Environment variable with the bearer token."""
MOST_TOKEN = 4096
SPARE_FILES = 64
"""Open files that are no connections: models, compute processes, libraries."""
POLL = 0.01
LAST_ANSWERS = 2.0
"""Seconds in which clients have to read what was sent to them before the end."""


def serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or SIGINT. Raises DistclsError if it cannot begin."""
    began = time.monotonic()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_Serving(options).run(began))


def _loop_factory() -> Any:
    """uvloop's event loop, which is the faster one, where it is installed."""
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.new_event_loop
    return None


def check(options: ServeOptions) -> dict[str, Any]:
    """Open and warm up the models; what would be served. Raises DistclsError if one fails."""
    return asyncio.run(_check(options))


async def _check(options: ServeOptions) -> dict[str, Any]:
    app = App(options, _read_token(options))
    _tls(options)
    _free_port(options.host, options.port)
    if options.grpc_port is not None:
        _free_port(options.host, options.grpc_port, "grpc_port")
        _grpc_server()
    try:
        await app.start()
        versions = list(app.repository.versions())
        for version in versions:
            await version.engine.wait_for_lanes()
        return {"models": [_facts_of(version) for version in versions]}
    finally:
        await app.close()


def _facts_of(version: Any) -> dict[str, Any]:
    facts = version.engine.facts
    lanes = version.engine.lanes
    return {
        "name": version.name,
        "version": version.version,
        "task": version.interface.task.summary(),
        "input": list(version.interface.size),
        "provider": facts["provider"],
        "workers": len(lanes),
        "batch_size": facts["batch_size"],
        "image_ms": round(1000 * facts["seconds"], 2),
        "memory_mb": round(sum(lane.facts["memory"] for lane in lanes) / 2**20),
        "sha256": facts["sha256"],
    }


class _Serving:
    """One run of the server."""

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self.app = App(options, _read_token(options))
        self._stop = asyncio.Event()
        self._reloading: asyncio.Future[None] | None = None
        self._now = False

    async def run(self, began: float) -> None:
        """Begin, serve, drain, end."""
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._ask_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        _raise_descriptor_limit(self.options.max_connections)
        http = HttpServer(self.app, _tls(self.options))
        bound = _bind(self.options.host, self.options.port)
        port = bound.getsockname()[1]
        grpc = watching = None
        try:
            grpc = self._grpc(port)
            starting = asyncio.ensure_future(self.app.start())
            stopping = asyncio.ensure_future(self._stop.wait())
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                return
            await starting
            if self.options.reload is not None:
                watching = asyncio.ensure_future(self.app.repository.watch(self.options.reload))
            await _listen(http, bound, self.options)
            if grpc is not None:
                await grpc.start()
            self._say(port, None if grpc is None else grpc.port, time.monotonic() - began)
            await stopping
            await self._drain(http, grpc)
        finally:
            bound.close()
            if watching is not None:
                watching.cancel()
            if grpc is not None:
                await grpc.stop()
            await self.app.close()
        log.say("stopped")

    def _grpc(self, http_port: int) -> GrpcServer | None:
        """The server for gRPC, if one is wanted. Raises UsageError if it cannot listen."""
        port = self.options.grpc_port
        if port is None:
            return None
        found = _free_port(self.options.host, port, "grpc_port")
        while found == http_port:  # a free one that nobody listens on yet
            found = _free_port(self.options.host, port, "grpc_port")
        return _grpc_server()(self.app, found)

    def _reload(self) -> None:
        if not self.app.repository.names:  # still loading, so it is new
            return
        try:
            self.app.token = _read_token(self.options)
        except UsageError as error:
            log.warn(f"the token stays as it was: {error}")
        self._reloading = asyncio.ensure_future(self.app.repository.reload())

    def _ask_to_stop(self) -> None:
        if self._stop.is_set():
            self._now = True
        self._stop.set()

    async def _drain(self, http: HttpServer, grpc: GrpcServer | None) -> None:
        """Not ready, then no new requests, then the end once those under way are done."""
        options = self.options
        self.app.draining = True
        log.say(f"stopping: {log.counted(self.app.in_flight, 'request')} under way")
        await self._wait(options.drain_delay, lambda: False)
        self.app.refusing = True
        ending = asyncio.ensure_future(grpc.stop(options.drain_timeout)) if grpc else None
        await self._wait(options.drain_timeout, lambda: self.app.in_flight == 0)
        if self.app.in_flight:
            left = log.counted(self.app.in_flight, "request")
            log.warn(f"{left} were still under way after {options.drain_timeout:g} s")
        await http.stop(LAST_ANSWERS)
        if grpc and ending:
            await grpc.stop()
            await ending

    async def _wait(self, seconds: float, done: Any) -> None:
        end = time.monotonic() + seconds
        while not self._now and not done() and time.monotonic() < end:
            await asyncio.sleep(POLL)

    def _say(self, port: int, grpc_port: int | None, seconds: float) -> None:
        options = self.options
        host = f"[{options.host}]" if ":" in options.host else options.host
        scheme = "https" if options.tls_cert else "http"
        url = f"{scheme}://{host}:{port}{options.base_path}"
        for version in self.app.repository.versions():
            log.say(
                f"{version.name} (version {version.version}): {version.interface.task.summary()}, "
                f"{version.engine.facts['provider']}"
            )
        if grpc_port is not None:
            log.say(f"gRPC at {host}:{grpc_port}")
        header = '-H "Authorization: Bearer $TOKEN" ' if self.app.wants_token else ""
        log.say(
            f"ready after {seconds:.1f} s: {url}/ is a page to try it, {url}/docs the reference"
        )
        log.say(f"curl {header}--data-binary @photo.jpg {url}/predict")


def _grpc_server() -> type[GrpcServer]:
    """Its class. Raises UsageError where its packages lack."""
    with packages_for("--grpc-port"):
        from distcls.serving.grpc import GrpcServer
    return GrpcServer


def _read_token(options: ServeOptions) -> str:
    """The bearer token; empty if none is wanted. Raises UsageError for a file without one."""
    if options.token_file is None:
        given = os.environ.get(TOKEN)
        token = (given or "").strip()
        if given is not None and not token:
            raise UsageError(f"{TOKEN} is set and empty; unset it to serve without a token")
    else:
        try:
            data = read_bytes(options.token_file, MOST_TOKEN)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"token_file: {options.token_file}: {reason}") from error
        token = data.decode("utf-8", "replace").strip()
        if not token:
            raise UsageError(f"token_file: {options.token_file} is empty")
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise UsageError("token_file: the token has to be printable ASCII without blanks")
    return token


def _bind(host: str, port: int, key: str = "port") -> socket.socket:
    """A socket at an address, not listening yet. Raises UsageError if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    # as servers do: a port whose last connections are still closing is free
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        where = f"host: {host}" if port == 0 else f"{key}: {port} of {host}"
        raise UsageError(f"{where} cannot be listened on: {error.strerror}") from error
    except (ValueError, UnicodeError) as error:
        found.close()
        raise UsageError(f"host: {shown(host)} is no address") from error
    return found


def _free_port(host: str, port: int, key: str = "port") -> int:
    """The port to listen on, tried. Raises UsageError if it is taken or not ours to take."""
    with _bind(host, port, key) as tried:
        found: int = tried.getsockname()[1]
        return found


async def _listen(http: HttpServer, bound: socket.socket, options: ServeOptions) -> None:
    try:
        await http.start(bound)
    except OSError as error:  # by a server that was starting at the same time
        message = f"port: {options.port} of {options.host} cannot be listened on: {error.strerror}"
        raise UsageError(message) from error


def _tls(options: ServeOptions) -> ssl.SSLContext | None:
    if options.tls_cert is None or options.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key)
    except OSError as error:
        message = f"tls_cert: {options.tls_cert} and {options.tls_key} are no pair: {error}"
        raise UsageError(message) from error
    return context


def _raise_descriptor_limit(wanted: int) -> None:
    """As many open files as the system allows: each connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < wanted + SPARE_FILES:
        log.warn(
            f"the system allows {hard} open files (ulimit -n), too few for --max-connections "
            f"{wanted}: clients beyond some {max(1, hard - SPARE_FILES)} have to wait"
        )


def print_plan(plan: dict[str, Any]) -> None:
    """What `--check` found, for people."""
    for model in plan["models"]:
        height, width = model["input"]
        facts = (
            *(model["task"], f"input {height}x{width}", model["provider"]),
            *(f"{model['image_ms']} ms an image", f"{model['memory_mb']} MB"),
        )
        title = f"{model['name']} (version {model['version']})"
        sys.stdout.write(f"{title}: {', '.join(facts)}\n")
