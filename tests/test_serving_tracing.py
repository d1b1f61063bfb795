"""Traces of a real server: spans as a collector on this machine receives them."""

from __future__ import annotations

import http.server
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="distcls[serve] is not installed")
from distcls.serving.tracing import ENDPOINTS, PROTOCOLS, open_tracer
from tests.serving import PHOTO, serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
METHOD = "inference.GRPCInferenceService/ModelInfer"
THREADS = ("--engine", "threads", "--workers", 1)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ENDPOINTS, *PROTOCOLS, "OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


class Collector(http.server.ThreadingHTTPServer):
    """Takes what is sent by OTLP over HTTP."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[tuple[str, bytes]] = []

    def spans(self) -> tuple[dict[str, Any], list[Any]]:
        """Attributes of the resource, and all spans."""
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        resource: dict[str, Any] = {}
        found: list[Any] = []
        for path, body in self.bodies:
            assert path == "/v1/traces"
            message = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
            for each in message.resource_spans:
                resource |= attributes(each.resource)
                found += [span for scope in each.scope_spans for span in scope.spans]
        return resource, found


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        self.server.bodies.append((self.path, body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def attributes(of: Any) -> dict[str, Any]:
    kinds = ("string_value", "int_value")
    return {
        each.key: next(getattr(each.value, kind) for kind in kinds if each.value.HasField(kind))
        for each in of.attributes
    }


def test_spans_of_a_request_arrive_at_a_collector(collector: Collector, tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="distcls[serve-otel]")
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}"}
    head = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    grpc = pytest.importorskip("grpc", reason="distcls[serve-grpc] is not installed")
    with serving(tmp_path, *THREADS, "--grpc-port", 0, env=env) as server:
        answer = server.post("/predict", PHOTO, headers=head)
        assert answer.status == 200
        assert server.post("/predict", b"no image").status == 400
        assert server.get("/v2/health/ready").status == 200  # probes are not traced
        unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        assert server.get("/card", headers=unsampled).status == 200
        (address,) = re.findall(r"gRPC at (\S+)", server.said)
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary(f"/{METHOD}")(b"", metadata=[*head.items()])
        assert server.stop() == 0  # the last spans are sent before it leaves
    resource, spans = collector.spans()
    assert resource["service.name"] == "distcls"
    own, bad = (span for span in spans if span.name == "POST /predict")
    assert (own.trace_id.hex(), own.parent_span_id.hex(), own.kind) == (TRACE, PARENT, 2)
    said = attributes(own)
    assert said["http.route"] == "/predict"
    assert said["http.response.status_code"] == 200
    assert said["distcls.request_id"] == answer.headers["x-request-id"]
    assert said["distcls.images"] == 1
    assert attributes(bad)["http.response.status_code"] == 400
    assert bad.trace_id != own.trace_id
    stages = [span for span in spans if span.parent_span_id == own.span_id]
    assert [span.name for span in stages] == ["read", "queue", "decode", "infer"]
    times = [own.start_time_unix_nano]
    for span in stages:
        assert span.trace_id == own.trace_id
        assert span.start_time_unix_nano == times[-1]
        times.append(span.end_time_unix_nano)
    assert times == sorted(times)
    assert times[-1] <= own.end_time_unix_nano
    named = {"POST /predict", METHOD, *(span.name for span in stages)}
    assert {span.name for span in spans} == named
    (call,) = (span for span in spans if span.name == METHOD)
    assert (call.trace_id.hex(), call.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes(call)["rpc.response.status_code"] == "INVALID_ARGUMENT"


@pytest.mark.slow
def test_a_collector_that_is_down_stops_nothing(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="distcls[serve-otel]")
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    with serving(tmp_path, *THREADS, env=env) as server:
        assert server.post("/predict", PHOTO).status == 200
        assert server.stop(15) == 0


def test_nothing_is_imported_unless_an_endpoint_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would raise
    assert open_tracer() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert open_tracer() is None


def test_what_is_missing_for_traces_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    exporter = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, exporter, None)
    assert open_tracer() is None
    assert 'pip install "distcls[serve-otel]"' in capsys.readouterr().err
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    assert open_tracer() is None
    assert "the protocol 'grpc' of OTLP is not supported" in capsys.readouterr().err
