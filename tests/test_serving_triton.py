"""The same requests to `distcls serve` and to a real Triton server that serves the same file.

Triton is the one in the wheel of nvidia-pytriton, on the CPU, with the repository that
`distcls export-triton` writes; as the wheel has no backend for ONNX, its Python backend calls ONNX
Runtime. Every difference is in `DIFFERENT`, with its reason.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest

from distcls.export.triton import TritonOptions, write_repository
from tests.environments import environment
from tests.serving import WHOLE, infer, serving

pytest.importorskip("uvicorn", reason="distcls[serve] is not installed")
grpc = pytest.importorskip("grpc", reason="distcls[serve-grpc] is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="the wheel is for x86-64"),
]

BACKEND = """
import pathlib

import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        path = pathlib.Path(args["model_repository"], args["model_version"], "model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.names = [output.name for output in self.session.get_outputs()]

    def execute(self, requests):
        answers = []
        for request in requests:
            images = triton.get_input_tensor_by_name(request, "images").as_numpy()
            arrays = self.session.run(self.names, {"images": images})
            tensors = [triton.Tensor(n, a) for n, a in zip(self.names, arrays)]
            answers.append(triton.InferenceResponse(tensors))
        return answers
"""
"""A model for Triton's Python backend."""
TWO = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)
ONE = TWO[:1]
LENGTH = "Inference-Header-Content-Length"
INFER = "/v2/models/m/infer"


class Ports(NamedTuple):
    http: int
    grpc: int


class Case(NamedTuple):
    """A request over HTTP."""

    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] | None = None


def _get(path: str) -> Case:
    return Case("GET", path)


def _json(values: Any, path: str = INFER, **headers: str) -> Case:
    body = values if isinstance(values, bytes) else json.dumps(values).encode()
    return Case("POST", path, body, headers)


def _data(data: Any, **changed: Any) -> Case:
    """A tensor as JSON; None leaves a key out."""
    given = {"name": "images", "datatype": "UINT8", "shape": [1, 28, 28, 3], "data": data}
    return _json({"inputs": [{k: v for k, v in {**given, **changed}.items() if v is not None}]})


def _binary(
    images: Any = TWO,
    *,
    blob: bytes | None = None,
    size: int | None = None,
    given: dict[str, Any] | None = None,
    path: str = INFER,
    **top: Any,
) -> Case:
    """A tensor as bytes behind JSON."""
    raw = images.tobytes() if blob is None else blob
    tensor = {
        "name": "images",
        "datatype": "UINT8",
        "shape": [*images.shape],
        "parameters": {"binary_data_size": len(raw) if size is None else size},
        **(given or {}),
    }
    body, headers = infer({"inputs": [tensor], **top}, raw)
    return Case("POST", path, body, headers)


def _outputs(*names: str, **parameters: Any) -> Case:
    outputs = [
        {"name": name, **({"parameters": parameters} if parameters else {})} for name in names
    ]
    return _binary(outputs=outputs)


def _headers(case: Case, **headers: str) -> Case:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return case._replace(headers={**(case.headers or {}), **named})


ZEROS = [0] * (ONE.size - 1)
ANSWERED = {
    "nested": _data(ONE.tolist()),
    "flat": _data(ONE.ravel().tolist()),
    "binary": _binary(ONE),
    "binary, two": _binary(),
    "all outputs binary": _binary(parameters={"binary_data_output": True}),
    "one output binary": _binary(
        outputs=[{"name": "logits", "parameters": {"binary_data": True}}, {"name": "features"}]
    ),
    "all binary but one": _binary(
        parameters={"binary_data_output": True},
        outputs=[{"name": "logits", "parameters": {"binary_data": False}}, {"name": "features"}],
    ),
    "no outputs": _binary(outputs=[]),
    "an output twice": _outputs("logits", "logits"),
    "outputs in another order": _outputs("features", "logits"),
    "classification": _outputs("probabilities", classification=3),
    "classification, binary": _outputs("probabilities", classification=3, binary_data=True),
    "classification beyond": _outputs("probabilities", classification=99),
    "classification 0": _outputs("probabilities", classification=0),
    "id": _binary(id="a b"),
    "unknown keys": _binary(model_name="m", foo=[1]),
    "version 1": _binary(path="/v2/models/m/versions/1/infer"),
    "one raw tensor": Case("POST", INFER, ONE.tobytes(), {LENGTH: "0"}),
    "gzip": _headers(
        _binary()._replace(body=gzip.compress(_binary().body)), Content_Encoding="gzip"
    ),
    "deflate": _headers(
        _binary()._replace(body=zlib.compress(_binary().body)), Content_Encoding="deflate"
    ),
    "gzip accepted": _headers(_binary(), Accept_Encoding="gzip"),
    "deflate accepted": _headers(_binary(), Accept_Encoding="deflate"),
    "timeout": _binary(parameters={"timeout": 10**7}),
    "priority": _binary(parameters={"priority": 1}),
    "own parameter": _binary(parameters={"mine": "x"}),
}
"""Requests for inference that both answer, with the same numbers."""
SAID = {
    "live": _get("/v2/health/live"),
    "ready": _get("/v2/health/ready"),
    "server": _get("/v2"),
    "metadata": _get("/v2/models/m"),
    "metadata of a version": _get("/v2/models/m/versions/1"),
    "model ready": _get("/v2/models/m/ready"),
    "config": _get("/v2/models/m/config"),
    "stats": _get("/v2/models/m/stats"),
    "stats of all": _get("/v2/models/stats"),
    "index": Case("POST", "/v2/repository/index"),
    "index, ready": _json({"ready": True}, "/v2/repository/index"),
    "shared memory": _get("/v2/systemsharedmemory/status"),
    "CUDA shared memory": _get("/v2/cudasharedmemory/status"),
    "trace": _get("/v2/trace/setting"),
    "logging": _get("/v2/logging"),
}
"""Other requests that both answer."""
REFUSED = {
    "unknown model": _binary(path="/v2/models/x/infer"),
    "unknown version": _binary(path="/v2/models/m/versions/7/infer"),
    "unknown metadata": _get("/v2/models/x"),
    "unknown config": _get("/v2/models/x/config"),
    "unknown ready": _get("/v2/models/x/ready"),
    "version in letters": _get("/v2/models/m/versions/a"),
    "nothing there": _get("/v2/nothing"),
    "GET of infer": _get(INFER),
    "POST of metadata": _json({}, "/v2/models/m"),
    "load": _json({}, "/v2/repository/models/m/load"),
    "empty": _json(b""),
    "no JSON": _json(b"nope"),
    "a list": _json([]),
    "no inputs": _json({}),
    "inputs empty": _json({"inputs": []}),
    "inputs an object": _json({"inputs": {}}),
    "no name": _data([0, *ZEROS], name=None),
    "another name": _binary(given={"name": "x"}),
    "input twice": _json(
        {"inputs": 2 * json.loads(_data([0, *ZEROS]).body)["inputs"]},
    ),
    "FP32": _binary(given={"datatype": "FP32"}, blob=ONE.astype("f4").tobytes()),
    "no such datatype": _binary(given={"datatype": "U8"}),
    "no datatype": _data([0, *ZEROS], datatype=None),
    "no shape": _data([0, *ZEROS], shape=None),
    "shape of -1": _binary(ONE, given={"shape": [-1, 28, 28, 3]}),
    "shape of fractions": _binary(ONE, given={"shape": [1.5, 28, 28, 3]}),
    "three dimensions": _binary(ONE[0]),
    "batch of 0": _binary(ONE[:0]),
    "batch of 65": _binary(np.zeros((65, 28, 28, 3), np.uint8)),
    "another size": _binary(ONE[:, :14]),
    "a byte less": _binary(blob=TWO.tobytes()[:-1], size=TWO.nbytes),
    "a byte more": _binary(blob=TWO.tobytes() + b"x", size=TWO.nbytes),
    "wrong size": _binary(size=5),
    "negative size": _binary(size=-1),
    "no data": _data(None),
    "data and binary": _binary(ONE, given={"data": ONE.tolist()}),
    "few values": _data([1, 2]),
    "many values": _data([0, 0, *ZEROS]),
    "256": _data([256, *ZEROS]),
    "negative value": _data([-1, *ZEROS]),
    "fraction": _data([0.5, *ZEROS]),
    "text": _data(["1", *ZEROS]),
    "nesting of another shape": _data(ONE.reshape(28, 84).tolist()),
    "unknown output": _outputs("nope"),
    "classification -1": _outputs("probabilities", classification=-1),
    "classification in a text": _outputs("probabilities", classification="3"),
    "id a number": _binary(id=5),
    "length in letters": _headers(_binary(), Inference_Header_Content_Length="abc"),
    "length beyond": _headers(_binary(), Inference_Header_Content_Length="99999"),
    "length negative": _headers(_binary(), Inference_Header_Content_Length="-1"),
    "no gzip": _headers(_binary(), Content_Encoding="gzip"),
    "brotli": _headers(_binary(), Content_Encoding="br"),
    "no raw tensor": Case("POST", INFER, b"", {LENGTH: "0"}),
    "sequence": _binary(parameters={"sequence_id": 5}),
    "reserved parameter": _binary(parameters={"triton_x": 1}),
    "list as parameter": _binary(parameters={"mine": [1]}),
    "parameters a list": _binary(parameters=[]),
    "shared memory region": _data(None, parameters={"shared_memory_region": "r"}),
}
"""Requests that we refuse."""
OURS_TO_BLAME = "a client's mistake is 400 here, and to Triton an error of its own"
DIFFERENT = {
    **dict.fromkeys(
        (
            *("no JSON", "a list", "no inputs", "inputs an object", "no name", "no datatype"),
            *("no shape", "shape of -1", "shape of fractions", "negative size", "few values"),
            *("many values", "negative value", "fraction", "text", "classification -1"),
            *("classification in a text", "id a number", "parameters a list"),
        ),
        (500, 400, OURS_TO_BLAME),
    ),
    "256": (200, 400, "Triton takes it modulo 256"),
    "nesting of another shape": (200, 400, "Triton reads any nesting as flat"),
    "sequence": (200, 400, "Triton ignores it where a model has no sequences"),
    "brotli": (501, 415, "the status for it in HTTP is 415"),
    "load": (503, 403, "Triton calls it unavailable; trying again does not help"),
}
"""Statuses of another class: Triton's, ours, and why."""
BINARY = {"all binary but one": ("features",)}
"""Outputs that are binary here alone: `binary_data_output` is for all that do not say it
themselves; Triton ignores it where outputs are named."""


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    python = environment(
        "numpy<2", f"onnxruntime=={onnxruntime.__version__}", "nvidia-pytriton==0.7.0"
    )
    folder = tmp_path_factory.mktemp("triton")
    model = write_repository(
        TritonOptions(model=WHOLE, out=folder / "models", name="m", max_delay_us=0)
    )
    config = model / "config.pbtxt"
    text = config.read_text()
    assert 'backend: "onnxruntime"' in text
    config.write_text(text.replace('backend: "onnxruntime"', 'backend: "python"'))
    (model / "1" / "model.py").write_text(BACKEND)
    (packages,) = python.parent.parent.glob("lib/python*/site-packages")
    home = packages / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        pytest.skip(f"the wheel has no Python backend for {version}")
    backend = folder / "backends" / "python"
    shutil.copytree(home / "backends" / "python", backend)
    shutil.copy(stub, backend)
    ports = Ports(*_free_ports())
    command = [
        *(home / "bin" / "tritonserver", f"--model-repository={folder / 'models'}"),
        *(f"--backend-directory={backend.parent}", "--allow-metrics=false"),
        *("--http-address=127.0.0.1", f"--http-port={ports.http}"),
        *("--grpc-address=127.0.0.1", f"--grpc-port={ports.grpc}"),
    ]
    environ = {
        **os.environ,
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(packages),
        "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
    }
    said = folder / "said.txt"
    with said.open("wb") as output:
        process = subprocess.Popen(
            [*map(str, command)], env=environ, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + 60
        while not _ready(ports.http):
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < end, said.read_text()
            time.sleep(0.1)
        yield ports
    finally:
        process.terminate()
        process.wait(30)


def _free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("", 0)) as two:
        return one.getsockname()[1], two.getsockname()[1]


def _ready(port: int) -> bool:
    with contextlib.suppress(OSError):
        return _ask(port, SAID["ready"])[0] == 200
    return False


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, "--name", "m", "--grpc-port", 0, "--workers", 1) as server:
        found = re.search(r"gRPC at 127\.0\.0\.1:(\d+)", server.said)
        assert found
        yield Ports(server.port, int(found[1]))


def _ask(port: int, case: Case) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request(case.method, case.path, case.body, case.headers or {})
        reply = connection.getresponse()
        headers = {name.lower(): value for name, value in reply.getheaders()}
        body = reply.read()
    unpack = {"gzip": gzip.decompress, "deflate": zlib.decompress}
    encoding = headers.get("content-encoding")
    return reply.status, headers, unpack[encoding](body) if encoding else body


def _tensors(headers: dict[str, str], body: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answer to a request for inference: its JSON without outputs, and those by name."""
    size = int(headers.get(LENGTH.lower(), len(body)))
    values, rest = json.loads(body[:size]), body[size:]
    outputs = {}
    for each in values.pop("outputs"):
        binary = "data" not in each
        data = each.get("data")
        if binary:
            own = each["parameters"]["binary_data_size"]
            data, rest = rest[:own], rest[own:]
        if each["datatype"] == "FP32":
            data = np.frombuffer(data, "<f4") if binary else np.array(data, np.float32)
        outputs[each["name"]] = (each["datatype"], each["shape"], binary, data)
    assert not rest
    return values, outputs


@pytest.mark.parametrize("name", ANSWERED)
def test_same_numbers(triton: Ports, ours: Ports, name: str) -> None:
    answers = [_ask(port, ANSWERED[name]) for port in (triton.http, ours.http)]
    assert [status for status, _, _ in answers] == [200, 200], answers
    assert len({headers.get("content-encoding") for _, headers, _ in answers}) == 1
    (their_values, theirs), (our_values, found) = (_tensors(*each[1:]) for each in answers)
    assert our_values == their_values
    assert found.keys() == theirs.keys()
    for output, (*facts, data) in found.items():
        *expected, right = theirs[output]
        if name in BINARY and output in BINARY[name]:
            expected[2] = True
        assert facts == expected, output
        if output == "probabilities" and facts[0] == "FP32":
            # `distcls predict` computes them from the logits, Triton's are those of the graph
            assert np.abs(data - right).max() < 1e-6
        elif facts[0] == "FP32":
            assert np.array_equal(data, right), output
        else:
            assert data == right, output


@pytest.mark.parametrize("name", SAID)
def test_says_the_same(triton: Ports, ours: Ports, name: str) -> None:
    answers = [_ask(port, SAID[name]) for port in (triton.http, ours.http)]
    assert [status for status, _, _ in answers] == [200, 200], answers
    theirs, found = (json.loads(body or b"{}") for _, _, body in answers)
    if name in ("stats", "stats of all"):
        assert _shape(found) == _shape(theirs)
    elif name.startswith("metadata"):
        assert {**found, "platform": ""} == {**theirs, "platform": ""}
    elif name.startswith("index"):
        assert [{**each, "reason": ""} for each in theirs] == found
    elif name == "config":
        for key in ("name", "max_batch_size", "version_policy"):
            assert found[key] == theirs[key]
        delay = "max_queue_delay_microseconds"
        assert found["dynamic_batching"][delay] == theirs["dynamic_batching"][delay]
        for key in ("input", "output"):
            for own, right in zip(found[key], theirs[key], strict=True):
                assert own == {name: right[name] for name in own}
    elif name.endswith("shared memory"):
        assert found == theirs == []


def _shape(values: Any) -> Any:
    """Keys without values; of what is counted per batch size, one."""
    if isinstance(values, dict):
        return {key: _shape(value) for key, value in values.items() if key != "response_stats"}
    return [_shape(value) for value in values[:1]] if isinstance(values, list) else type(values)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_the_same(triton: Ports, ours: Ports, name: str) -> None:
    answers = [_ask(port, REFUSED[name]) for port in (triton.http, ours.http)]
    statuses = [status for status, _, _ in answers]
    different = DIFFERENT.get(name)
    if different is None:
        assert [status // 100 for status in statuses] == [4, 4], answers
    else:
        assert statuses == [*different[:2]], answers
    assert json.loads(answers[1][2]).keys() == {"error"}


def test_classification_without_class_names(triton: Ports, ours: Ports) -> None:
    """In Triton only the output that has a file with labels says them, here all but features."""
    case = _outputs("logits", classification=2)
    theirs, found = (
        _tensors(*_ask(port, case)[1:])[1]["logits"][3] for port in (triton.http, ours.http)
    )
    assert [text.rsplit(":", 1)[0] for text in found] == theirs


def _grpc_requests() -> dict[str, tuple[str, Any]]:
    from distcls.serving.messages import MESSAGES

    def asked(**changed: Any) -> Any:
        tensor = MESSAGES["InputTensor"](
            name=changed.pop("input", "images"),
            datatype=changed.pop("datatype", "UINT8"),
            shape=changed.pop("shape", TWO.shape),
        )
        raw = changed.pop("raw", [TWO.tobytes()])
        request = MESSAGES["ModelInferRequest"](inputs=[tensor], raw_input_contents=raw)
        for key, value in {"model_name": "m", **changed}.items():
            setattr(request, key, value)
        return request

    typed = asked(raw=[])
    typed.inputs[0].contents.uint_contents.extend(TWO.ravel().tolist())
    both = asked()
    both.inputs[0].contents.uint_contents.append(1)
    output = asked()
    output.outputs.add(name="nope")
    named = MESSAGES["NamedRequest"]
    return {
        "raw": ("ModelInfer", asked(id="q")),
        "typed": ("ModelInfer", typed),
        "version 1": ("ModelInfer", asked(model_version="1")),
        "live": ("ServerLive", named()),
        "ready": ("ServerReady", named()),
        "model ready": ("ModelReady", named(name="m")),
        "unknown model ready": ("ModelReady", named(name="x")),
        "metadata": ("ModelMetadata", named(name="m")),
        "index": ("RepositoryIndex", MESSAGES["RepositoryIndexRequest"]()),
        "unknown model": ("ModelInfer", asked(model_name="x")),
        "unknown version": ("ModelInfer", asked(model_version="7")),
        "unknown metadata": ("ModelMetadata", named(name="x")),
        "another input": ("ModelInfer", asked(input="x")),
        "datatype": ("ModelInfer", asked(datatype="FP32")),
        "shape": ("ModelInfer", asked(shape=[2, 9, 28, 3])),
        "batch of 65": ("ModelInfer", asked(shape=[65, 28, 28, 3], raw=[bytes(65 * 2352)])),
        "a byte less": ("ModelInfer", asked(raw=[TWO.tobytes()[:-1]])),
        "two raw": ("ModelInfer", asked(raw=[TWO.tobytes(), b""])),
        "no contents": ("ModelInfer", asked(raw=[])),
        "raw and typed": ("ModelInfer", both),
        "unknown output": ("ModelInfer", output),
    }


def test_grpc_answers_and_refuses_the_same(triton: Ports, ours: Ports) -> None:
    from distcls.serving.messages import MESSAGES

    found: dict[str, list[Any]] = {}
    for port in (triton.grpc, ours.grpc):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            for name, (method, request) in _grpc_requests().items():
                call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
                try:
                    data = call(request.SerializeToString(), timeout=30)
                    found.setdefault(name, []).append(
                        MESSAGES[f"{method}Response"].FromString(data)
                    )
                except grpc.RpcError as error:
                    found.setdefault(name, []).append(error.code().name)
    for name, (theirs, own) in found.items():
        if name == "two raw":  # Triton ignores what is too many
            assert (own, theirs.model_name) == ("INVALID_ARGUMENT", "m")
        elif isinstance(theirs, str) or isinstance(own, str):
            assert own == theirs, name
        elif own.DESCRIPTOR.name == "ModelInferResponse":
            assert own.id == theirs.id
            for at, (one, other) in enumerate(zip(own.outputs, theirs.outputs, strict=True)):
                assert (one.name, one.datatype, one.shape) == (
                    other.name,
                    other.datatype,
                    other.shape,
                )
                if one.name != "probabilities":
                    assert own.raw_output_contents[at] == theirs.raw_output_contents[at]
        else:
            if name == "metadata":
                theirs.platform = own.platform
            assert own == theirs, name
