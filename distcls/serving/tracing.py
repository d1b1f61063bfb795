"""Traces of requests by OpenTelemetry, with the extra `serve-otel`.

Where they go is said by OpenTelemetry's own environment variables: without
OTEL_EXPORTER_OTLP_ENDPOINT (or ..._TRACES_ENDPOINT) nothing of it is imported. A request's span
continues the trace of its `traceparent` header (W3C Trace Context).
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import Any, Protocol

from distcls import __version__, log

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
HTTP = "http/protobuf"
STAGES = ("read", "queue", "decode", "infer")
"""Spans within that of a request, one after the other."""
UNTRACED = (
    *("/v2/health/live", "/v2/health/ready", "/metrics", "/grpc.health.v1.Health/Check"),
    *("/inference.GRPCInferenceService/ServerLive", "/inference.GRPCInferenceService/ServerReady"),
)
"""Routes that are asked for all the time, by machines."""
FAILED = ("DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE", "UNIMPLEMENTED")
"""Codes of gRPC that are the server's fault."""
CLOSE_SECONDS = 5.0
"""What the last spans may take on their way, at the end of the server."""


class Request(Protocol):
    """What is said of a request of the application."""

    id: str
    method: str
    path: str
    route: str
    began: float
    model: tuple[str, str] | None
    images: int
    seconds: dict[str, float]
    size: int

    def header(self, name: str) -> str:
        """The value of a header; empty if it is not there."""


def open_tracer() -> Tracer | None:
    """What records requests, as the environment says; None, with a warning if traces are wanted but
    cannot be had."""
    environment = os.environ
    wanted = any(environment.get(name) for name in ENDPOINTS)
    off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not wanted or off or environment.get("OTEL_TRACES_EXPORTER", "otlp") == "none":
        return None
    protocol = next((environment[name] for name in PROTOCOLS if environment.get(name)), HTTP)
    if protocol != HTTP:
        log.warn(f"no traces: the protocol {protocol!r} of OTLP is not supported, but {HTTP}")
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warn(f'no traces: {error.name} is missing; pip install "distcls[serve-otel]"')
        return None
    return Tracer(BatchSpanProcessor(OTLPSpanExporter()))


class Tracer:
    """Makes spans of requests that are done, and hands them to a processor of spans."""

    def __init__(self, processor: Any) -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = "service.name" in OTELResourceDetector().detect().attributes
        resource = Resource.create({} if named else {"service.name": "distcls"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("distcls", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def record(self, request: Request, status: int | str) -> None:
        """Make the spans of a request that got `status`: its own, and one for each of its stages.

        The stages stand one after the other, as long as was measured. `decode` is the sum over the
        images of a request and `infer` the time of a whole batch, so they are cut at its end.
        """
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        if request.route in UNTRACED:
            return
        end = time.time_ns()
        at = end - int((time.monotonic() - request.began) * 1e9)
        carrier = {name: request.header(name) for name in ("traceparent", "tracestate")}
        span = self._tracer.start_span(
            _name(request),
            self._propagator.extract({name: text for name, text in carrier.items() if text}),
            SpanKind.SERVER,
            _attributes(request, status),
            start_time=at,
        )
        if status in FAILED or (isinstance(status, int) and status >= 500):
            span.set_status(StatusCode.ERROR)
        within = set_span_in_context(span)
        for stage in STAGES:
            if stage in request.seconds:
                part = self._tracer.start_span(stage, within, start_time=at)
                at = min(end, at + int(request.seconds[stage] * 1e9))
                part.end(at)
        span.end(end)

    async def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, CLOSE_SECONDS)


def _name(request: Request) -> str:
    if request.method == "gRPC":
        return request.route.lstrip("/")
    return f"{request.method} {request.route}"


def _attributes(request: Request, status: int | str) -> dict[str, Any]:
    """By OpenTelemetry's conventions for HTTP and for gRPC, and ours."""
    found: dict[str, Any]
    if isinstance(status, str):
        found = {
            "rpc.system.name": "grpc",
            "rpc.method": request.route.lstrip("/"),
            "rpc.response.status_code": status,
        }
    else:
        found = {
            "http.request.method": request.method,
            "http.route": request.route,
            "http.response.status_code": status,
            "http.request.body.size": request.size,
            "url.path": request.path,
        }
    found["distcls.request_id"] = request.id
    if request.model is not None:
        found["distcls.model"], found["distcls.version"] = request.model
    if request.images:
        found["distcls.images"] = request.images
    return found
