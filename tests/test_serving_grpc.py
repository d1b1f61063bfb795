"""gRPC of `distcls serve`: a real server, plain channels, and the answers of HTTP beside them."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import distcls
from distcls.errors import UsageError
from distcls.serving.options import ServeOptions
from distcls.serving.protocol import Refused
from distcls.serving.server import check, serve
from tests.pictures import encode, smooth
from tests.serving import WHOLE, Server, infer, serving

pytest.importorskip("uvicorn", reason="distcls[serve] is not installed")
grpc = pytest.importorskip("grpc", reason="distcls[serve-grpc] is not installed")
from google.protobuf import descriptor_pool, json_format  # noqa: E402

from distcls.serving.messages import MESSAGES, parse  # noqa: E402

TOKEN = {"authorization": "Bearer sesame"}
SERVICE = "inference.GRPCInferenceService/"
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)
FILES = [encode(smooth(40, 90, seed), "JPEG", quality=90) for seed in range(3)]
RAW = b"".join(len(data).to_bytes(4, "little") + data for data in FILES)
CODE = grpc.StatusCode


class Client:
    """Calls over one channel, with the token."""

    def __init__(self, server: Server, roots: Any = None) -> None:
        found = re.search(r"gRPC at 127\.0\.0\.1:(\d+)", server.said)
        assert found, server.said
        self.port = int(found[1])
        address = f"127.0.0.1:{self.port}"
        self.channel = (
            grpc.secure_channel(address, roots) if roots else grpc.insecure_channel(address)
        )

    def __call__(
        self,
        method: str,
        request: Any = None,
        answer: str = "",
        *,
        metadata: dict[str, str] | None = TOKEN,
        timeout: float = 30,
        compression: Any = None,
    ) -> Any:
        """The answer to a message, or to bytes."""
        path = method if method.startswith("/") else f"/{SERVICE}{method}"
        data = request if isinstance(request, bytes) else request and request.SerializeToString()
        reply = self.channel.unary_unary(path)(
            data or b"",
            timeout=timeout,
            metadata=[*(metadata or {}).items()],
            compression=compression,
        )
        return MESSAGES[answer or f"{method}Response"].FromString(reply)

    def fails(self, *arguments: Any, **options: Any) -> tuple[Any, str]:
        """The code and text with which a call fails."""
        with pytest.raises(grpc.RpcError) as error:
            self(*arguments, **options)
        return error.value.code(), error.value.details()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "token").write_text("sesame\n")
    options = ("--name", "m", "--grpc-port", 0, "--workers", 1, "--batch-size", 64)
    limits = ("--max-body", 1, "--max-wait", 0.1, "--control", "--access-log")
    with serving(folder, *options, *limits, "--token-file", folder / "token") as found:
        yield found


@pytest.fixture(scope="module")
def call(server: Server) -> Iterator[Client]:
    client = Client(server)
    yield client
    client.channel.close()


def asked(datatype: str = "UINT8", shape: tuple[int, ...] = PIXELS.shape, **more: Any) -> Any:
    """A request for inference without contents."""
    return json_format.ParseDict(
        {
            "model_name": "m",
            "inputs": [{"name": "images", "datatype": datatype, "shape": list(shape)}],
            **more,
        },
        MESSAGES["ModelInferRequest"](),
    )


def tensors(pixels: NDArray[np.uint8] = PIXELS, **more: Any) -> Any:
    """A request with a raw tensor."""
    request = asked(shape=pixels.shape, **more)
    request.raw_input_contents.append(pixels.tobytes())
    return request


def files(**more: Any) -> Any:
    """A request with raw image files."""
    request = asked("BYTES", (len(FILES),), **more)
    request.raw_input_contents.append(RAW)
    return request


def arrays(answer: Any) -> dict[str, NDArray[np.float32]]:
    pairs = zip(answer.outputs, answer.raw_output_contents, strict=True)
    return {each.name: np.frombuffer(raw, "<f4").reshape(each.shape) for each, raw in pairs}


def parameter(request: Any, name: str, **value: Any) -> Any:
    request.parameters.add(key=name).value.CopyFrom(MESSAGES["Parameter"](**value))
    return request


def test_numbers_are_those_of_http_and_of_predict(server: Server, call: Client) -> None:
    typed = asked()
    typed.inputs[0].contents.uint_contents.extend(PIXELS.ravel().tolist())
    listed = asked("BYTES", (3, 1))
    listed.inputs[0].contents.bytes_contents.extend(FILES)
    answers = [arrays(call("ModelInfer", each)) for each in (tensors(), typed, files(), listed)]
    with distcls.load(WHOLE, provider="cpu") as predictor:
        logits = np.stack([each.logits for each in predictor(FILES)])
        features = predictor.features(FILES)
    for found in answers[2:]:
        assert np.array_equal(found["logits"], logits)
        assert np.array_equal(found["features"], features)
    given = {"name": "images", "datatype": "UINT8", "shape": list(PIXELS.shape)}
    given["parameters"] = {"binary_data_size": PIXELS.nbytes}
    body, headers = infer(
        {"inputs": [given], "parameters": {"binary_data_output": True}}, PIXELS.tobytes()
    )
    over_http = server.post("/v2/models/m/infer", body, headers={**headers, **TOKEN})
    assert over_http.status == 200, over_http
    blob = over_http.body[int(over_http.headers["inference-header-content-length"]) :]
    for found in answers[:2]:
        assert list(found) == ["logits", "probabilities", "features"]
        assert b"".join(each.tobytes() for each in found.values()) == blob


def test_id_outputs_and_classification(call: Client) -> None:
    request = tensors(id="q7", outputs=[{"name": "probabilities"}])
    request.outputs[0].parameters.add(key="classification").value.int64_param = 2
    answer = call("ModelInfer", request)
    assert (answer.id, answer.model_name, answer.model_version) == ("q7", "m", "1")
    assert [(each.name, each.datatype, [*each.shape]) for each in answer.outputs] == [
        ("probabilities", "BYTES", [3, 2])
    ]
    (raw,) = answer.raw_output_contents
    best = arrays(call("ModelInfer", tensors()))["probabilities"][0].max()
    assert raw[4 : 4 + raw[0]].decode().startswith(f"{best:f}:")


def test_one_bad_image_is_skipped_if_asked(call: Client) -> None:
    request = asked("BYTES", (2,))
    request.inputs[0].contents.bytes_contents.extend([FILES[0], b"no image"])
    code, text = call.fails("ModelInfer", request)
    assert code is CODE.INVALID_ARGUMENT
    assert text.startswith("image 1: ")
    answer = call("ModelInfer", parameter(request, "on_error", string_param="skip"))
    assert answer.outputs[-1].name == "errors"
    logits = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(2, 10)
    assert np.isnan(logits).all(axis=1).tolist() == [False, True]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("ServerMetadata", "GET /v2"),
        ("ModelMetadata", "GET /v2/models/m"),
        ("ModelConfig", "GET /v2/models/m/config"),
        ("ModelStatistics", "GET /v2/models/m/stats"),
        ("RepositoryIndex", "POST /v2/repository/index"),
    ],
)
def test_says_what_http_says(server: Server, call: Client, method: str, path: str) -> None:
    named = MESSAGES["NamedRequest"](name="m") if method.startswith("Model") else None
    found = _plain(json_format.MessageToDict(call(method, named), preserving_proto_field_name=True))
    verb, where = path.split()
    expected = _plain(server.request(verb, where, headers=TOKEN).json)
    if method == "RepositoryIndex":
        found = found["models"]
    if method == "ModelConfig":
        numbers = {"TYPE_UINT8": 2, "TYPE_FP32": 11}
        for each in (*expected["input"], *expected["output"]):
            each["data_type"] = str(numbers[each["data_type"]])
        found = found["config"]
    assert found == expected


def _plain(values: Any) -> Any:
    """Without what is 0 or empty, which messages leave out, and with all numbers as texts."""
    if isinstance(values, dict):
        plain = {key: _plain(value) for key, value in values.items()}
        return {key: value for key, value in plain.items() if value not in ("0", "", [], {})}
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return str(values)


def test_health_needs_no_token(call: Client) -> None:
    assert call("ServerLive", metadata=None).live
    assert call("ServerReady", metadata=None).ready
    probe = call("/grpc.health.v1.Health/Check", None, "HealthCheckResponse", metadata=None)
    assert probe.status == 1
    assert call("ModelReady", MESSAGES["NamedRequest"](name="m")).ready
    assert not call("ModelReady", MESSAGES["NamedRequest"](name="x")).ready


@pytest.mark.parametrize("given", [{}, {"authorization": "Bearer wrong"}])
def test_everything_else_needs_one(call: Client, given: dict[str, str]) -> None:
    for method in ("ModelMetadata", "ModelInfer", "Nonsense"):
        code, text = call.fails(method, tensors(), "Empty", metadata=given)
        assert (code, "bearer token" in text) == (CODE.UNAUTHENTICATED, True)
    with pytest.raises(grpc.RpcError) as error:
        next(call.channel.stream_stream(f"/{SERVICE}ModelStreamInfer")(iter([])))
    assert error.value.code() is CODE.UNAUTHENTICATED


def _two_raw(request: Any) -> None:
    request.raw_input_contents.append(b"x")


def _both(request: Any) -> None:
    request.inputs[0].contents.uint_contents.append(1)


def _wrong_field(request: Any) -> None:
    del request.raw_input_contents[:]
    request.inputs[0].contents.fp32_contents.append(1)


def _short(request: Any) -> None:
    request.raw_input_contents[0] = request.raw_input_contents[0][:-1]


def _beyond_255(request: Any) -> None:
    del request.raw_input_contents[:]
    request.inputs[0].contents.uint_contents.extend([256] * PIXELS.size)


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(request: Any) -> None:
        place = request.inputs[0] if path in ("name", "datatype") else request
        setattr(place, path, value)

    return change


REFUSED: dict[str, tuple[Callable[[Any], Any], Any, str]] = {
    "model": (_set("model_name", "n"), CODE.NOT_FOUND, "unknown model 'n'"),
    "version": (_set("model_version", "9"), CODE.NOT_FOUND, "unknown version '9' of 'm'"),
    "input": (_set("name", "image"), CODE.INVALID_ARGUMENT, "inputs: 'image' is unknown"),
    "datatype": (_set("datatype", "FP32"), CODE.INVALID_ARGUMENT, "datatype: 'FP32', expected"),
    "id": (_set("id", "x" * 1001), CODE.INVALID_ARGUMENT, "id: "),
    "shape": (lambda r: r.inputs[0].shape.append(1), CODE.INVALID_ARGUMENT, "shape: "),
    "two inputs": (lambda r: r.inputs.add(), CODE.INVALID_ARGUMENT, "inputs: 2 of them"),
    "no input": (lambda r: r.ClearField("inputs"), CODE.INVALID_ARGUMENT, "inputs: 0 of them"),
    "output": (lambda r: r.outputs.add(name="logit"), CODE.INVALID_ARGUMENT, "outputs: 'logit'"),
    "two raw": (_two_raw, CODE.INVALID_ARGUMENT, "raw_input_contents: 2 of them"),
    "raw and typed": (_both, CODE.INVALID_ARGUMENT, "raw_input_contents: 1 of them and"),
    "other field": (_wrong_field, CODE.INVALID_ARGUMENT, "inputs.images.contents: "),
    "short": (_short, CODE.INVALID_ARGUMENT, "a tensor of 7055 bytes, expected 7056"),
    "256": (_beyond_255, CODE.INVALID_ARGUMENT, "data: 256, expected whole numbers"),
    "sequence": (
        lambda r: parameter(r, "sequence_id", int64_param=5),
        *(CODE.INVALID_ARGUMENT, "parameters.sequence_id"),
    ),
    "no value": (lambda r: parameter(r, "timeout"), CODE.INVALID_ARGUMENT, "parameters.timeout"),
    "shared memory": (
        lambda r: (
            r.inputs[0]
            .parameters.add(key="shared_memory_region")
            .value.CopyFrom(MESSAGES["Parameter"](string_param="x"))
        ),
        *(CODE.INVALID_ARGUMENT, "inputs.images.parameters.shared_memory_region"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(call: Client, case: str) -> None:
    change, code, text = REFUSED[case]
    request = tensors()
    change(request)
    found, details = call.fails("ModelInfer", request)
    assert (found, details[: len(text)]) == (code, text)


def test_unknown_methods_are_unimplemented(call: Client) -> None:
    code, text = call.fails("TraceSetting", None, "Empty")
    assert code is CODE.UNIMPLEMENTED
    assert "/inference.GRPCInferenceService/TraceSetting is not supported" in text


def test_answers_of_a_stream_come_in_order(call: Client) -> None:
    requests = [tensors(PIXELS[: 1 + k % 3], id=str(k)) for k in range(60)]
    requests[7].model_name = "n"
    stream = call.channel.stream_stream(f"/{SERVICE}ModelStreamInfer")
    data = (each.SerializeToString() for each in requests)
    kind = MESSAGES["ModelStreamInferResponse"]
    answers = [kind.FromString(each) for each in stream(data, metadata=[*TOKEN.items()])]
    assert [answer.infer_response.id for answer in answers] == [
        "" if k == 7 else str(k) for k in range(60)
    ]
    assert answers[7].error_message.startswith("unknown model 'n'")
    assert [answers[k].infer_response.outputs[0].shape[0] for k in (0, 1, 2)] == [1, 2, 3]


def test_a_client_loads_and_unloads(call: Client) -> None:
    wanted = MESSAGES["ControlRequest"](model_name="m")
    call("RepositoryModelUnload", wanted, "Empty")
    assert call.fails("ModelInfer", tensors())[0] is CODE.NOT_FOUND
    assert not call("ServerReady").ready
    call("RepositoryModelLoad", wanted, "Empty")
    assert call("ModelInfer", tensors()).model_name == "m"
    wanted.parameters.add(key="file:1/model.onnx").value.string_param = "x"
    assert call.fails("RepositoryModelLoad", wanted, "Empty")[0] is CODE.INVALID_ARGUMENT


def test_large_messages_are_refused(server: Server, call: Client) -> None:
    code, _ = call.fails("ModelInfer", b"\x3a\x80\x80\x80\x01" + b"0" * (2 << 20))
    assert code is CODE.RESOURCE_EXHAUSTED
    before = _peak_memory(server)
    bomb = b"\x3a\x80\x80\x80\x20" + bytes(64 << 20)
    code, _ = call.fails("ModelInfer", bomb, compression=grpc.Compression.Gzip)
    assert code is CODE.RESOURCE_EXHAUSTED
    assert _peak_memory(server) - before < 32 << 20


def _peak_memory(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="ascii")
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+)", status)
    return int(kilobytes) << 10


def test_small_fields_do_not_become_much_memory() -> None:
    began = time.monotonic()
    for data in (b"\x2a\x00" * 500_000, b"\x2a\x04\x22\x00\x22\x00" * 100_000):
        with pytest.raises(Refused, match="more than 10,000 fields"):
            parse("ModelInferRequest", data)
    numbers = MESSAGES["Contents"](uint_contents=[1] * (3 << 20))
    with pytest.raises(Refused, match=r"uint_contents: 3,145,728 bytes, at most 2 MB; send raw"):
        parse("Contents", numbers.SerializeToString())
    assert time.monotonic() - began < 5


def test_damaged_messages_are_refused(call: Client) -> None:
    """Whatever bytes come, the answer is a refusal of the client's, or right."""
    drawn = random.Random(0)
    messages = [tensors(PIXELS[:1]), files(), parameter(asked(), "x", double_param=1.0)]

    def damaged() -> Iterator[bytes]:
        for _ in range(400):
            data = bytearray(drawn.choice(messages).SerializeToString())
            for _ in range(drawn.randrange(1, 4)):
                at = drawn.randrange(min(len(data), 60))
                data[at : at + drawn.randrange(3)] = drawn.randbytes(drawn.randrange(3))
            yield bytes(data)

    stream = call.channel.stream_stream(f"/{SERVICE}ModelStreamInfer")
    kind = MESSAGES["ModelStreamInferResponse"]
    answers = [kind.FromString(each) for each in stream(damaged(), metadata=[*TOKEN.items()])]
    errors = [answer.error_message for answer in answers if answer.error_message]
    assert len(answers) == 400
    assert len(errors) > 200
    assert not [error for error in errors if "internal" in error]
    assert call("ModelInfer", tensors()).model_name == "m"


def test_deadlines_cancellation_and_overload(server: Server, call: Client) -> None:
    """With a compute process that stands still."""
    (process,) = server.processes()
    data = tensors(np.zeros((64, 28, 28, 3), np.uint8)).SerializeToString()
    infer_ = call.channel.unary_unary(f"/{SERVICE}ModelInfer")
    metadata = [*TOKEN.items()]
    os.kill(process, signal.SIGSTOP)
    try:
        first = infer_.future(tensors().SerializeToString(), metadata=metadata)
        time.sleep(0.2)
        late = parameter(tensors(), "timeout", int64_param=100_000)
        code, text = call.fails("ModelInfer", late)
        assert (code, text) == (
            CODE.DEADLINE_EXCEEDED,
            "the deadline passed before computing could begin",
        )
        assert call.fails("ModelInfer", tensors(), timeout=0.1)[0] is CODE.DEADLINE_EXCEEDED
        waiting = []
        while not [each for each in waiting if each.done()] and len(waiting) < 300:
            waiting.append(infer_.future(data, metadata=metadata))
            time.sleep(0.01)
        *taken, refused = waiting
        assert (refused.code(), refused.details()[:6]) == (CODE.RESOURCE_EXHAUSTED, "busy: ")
        assert int(dict(refused.trailing_metadata())["retry-after"]) >= 1
        assert len(taken) > 1
        for each in taken:
            each.cancel()
        assert call("ServerLive").live
    finally:
        os.kill(process, signal.SIGCONT)
    assert first.result(20)
    assert call("ModelInfer", tensors()).model_name == "m"
    page = server.get("/metrics", headers=TOKEN).body.decode()
    dropped = dict(re.findall(r'distcls_dropped_total\{.*reason="(\w+)".*\} (\S+)', page))
    assert float(dropped["cancelled"]) >= 64
    assert float(dropped["deadline"]) >= 3


def test_requests_are_counted_and_logged(server: Server, call: Client) -> None:
    named = MESSAGES["NamedRequest"](name="m")
    before = call("ModelStatistics", named).model_stats[0]
    call("ModelInfer", tensors(), metadata={**TOKEN, "x-request-id": "mine-1"})
    call.fails("ModelInfer", asked())
    after = call("ModelStatistics", named).model_stats[0]
    assert after.inference_count == before.inference_count + 3
    counts = [each.inference_stats.success.count for each in (before, after)]
    assert counts[1] == counts[0] + 1
    assert after.inference_stats.fail.count == before.inference_stats.fail.count + 1
    page = server.get("/metrics", headers=TOKEN).body.decode()
    route = 'route="/inference.GRPCInferenceService/ModelInfer"'
    assert f'distcls_responses_total{{{route},status="OK"}}' in page
    assert f'distcls_responses_total{{{route},status="INVALID_ARGUMENT"}}' in page
    entries = [json.loads(line) for line in server.out.splitlines()]
    (entry,) = [entry for entry in entries if entry["id"] == "mine-1"]
    assert (entry["status"], entry["model"], entry["images"]) == ("OK", "m/1", 3)


def test_brings_no_messages_of_others() -> None:
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")


def test_a_package_that_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "distcls.serving.grpc", raising=False)
    monkeypatch.setitem(sys.modules, "grpc", None)
    options = ServeOptions(model=WHOLE, grpc_port=0, port=0)
    for call_ in (serve, check):
        with pytest.raises(
            UsageError, match=r"--grpc-port: this needs grpc.*distcls\[serve-grpc\]"
        ):
            call_(options)


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"grpc_port: {port} of 127.0.0.1 cannot be listened"):
            serve(ServeOptions(model=WHOLE, grpc_port=port, port=0))
    with pytest.raises(UsageError, match="another port than --port"):
        ServeOptions(model=WHOLE, grpc_port=8000)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """PEM files for 127.0.0.1: certificate and key."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    names = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1")
    made = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    subprocess.run(
        [*made, "-nodes", "-days", "1", *names, "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
    )
    return cert, key


def _one_after(event: threading.Event) -> Iterator[bytes]:
    """A request once the event is set, then none until the stream is ended by the server."""
    event.wait(60)
    yield tensors().SerializeToString()
    time.sleep(10)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_ends_after_what_is_under_way(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    """Over TLS: the request that has begun is answered, a silent stream delays nothing."""
    cert, key = certificate
    options = ("--name", "m", "--grpc-port", 0, "--workers", 1, "--batch-size", 8)
    with serving(tmp_path, *options, "--tls-cert", cert, "--tls-key", key) as server:
        roots = grpc.ssl_channel_credentials(cert.read_bytes())
        call = Client(server, roots)
        assert call("ModelInfer", tensors()).model_name == "m"
        go = threading.Event()
        silent = call.channel.stream_stream(f"/{SERVICE}ModelStreamInfer")(_one_after(go))
        (process,) = server.processes()
        os.kill(process, signal.SIGSTOP)
        infer_ = call.channel.unary_unary(f"/{SERVICE}ModelInfer")
        under_way = infer_.future(tensors().SerializeToString())
        time.sleep(0.2)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        later = Client(server, roots)
        assert later.fails("ServerReady", timeout=5)[0] is CODE.UNAVAILABLE
        go.set()
        last = MESSAGES["ModelStreamInferResponse"].FromString(next(silent))
        assert last.error_message == "the server is shutting down"
        os.kill(process, signal.SIGCONT)
        answer = MESSAGES["ModelInferResponse"].FromString(under_way.result(10))
        assert answer.model_name == "m"
        assert server.process.wait(10) == 0
        assert time.monotonic() - began < 5
        assert silent.code() is not CODE.OK
        for client in (call, later):
            client.channel.close()
