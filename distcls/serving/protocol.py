"""The Open Inference Protocol v2: requests into images, outputs into answers, without a server.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol with Triton's
extensions for binary data and classification. What a client sends is checked here, value by value.

A model has one input, `images`: tensors, UINT8 [N, H, W, 3], preprocessed; or encoded image files,
BYTES [N] or [N, 1]. In JSON an encoded image is base64.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import itertools
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from distcls import __version__
from distcls.errors import did_you_mean, shown
from distcls.serving.work import Buffer, Output, Work
from distcls.task import Task

INPUT, LOGITS, PROBABILITIES, FEATURES, ERRORS = (
    *("images", "logits", "probabilities", "features"),
    "errors",
)
EXTENSIONS = (
    *("binary_tensor_data", "classification", "statistics", "model_configuration"),
    *("model_repository", "parameters"),
)
MOST_VALUES = 1_000_000
"""Values in a JSON body: each takes up to a hundred times its text once it is parsed."""
MOST_JSON_NUMBERS = 4 << 20
"""Bytes of JSON that may hold a tensor: parsing it stops everything else for some 30 ms a MB."""
_LENGTH = struct.Struct("<I")


class Refused(Exception):
    """A request that is not served, with its HTTP status and the reason for the client."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interface:
    """What a model version takes and gives."""

    name: str
    version: str
    size: tuple[int, int]
    """Height and width of its input."""
    task: Task
    features: int = 0
    """Width of the features; 0 if the file has none."""
    most: int = 64
    """Images in one request."""

    @property
    def outputs(self) -> dict[str, int]:
        """Names of the outputs with their widths, in order."""
        classes = len(self.task.classes)
        heads = {f"{PROBABILITIES}:{head.name}": len(head.classes) for head in self.task.heads}
        wide = {FEATURES: self.features} if self.features else {}
        return {LOGITS: classes, PROBABILITIES: classes, **heads, **wide}

    def labels(self, output: str) -> Sequence[str]:
        """Class names of an output; raises Refused for one whose numbers are no classes."""
        if output == FEATURES:
            raise Refused(400, "classification: the output features has no classes")
        for head in self.task.heads:
            if output == f"{PROBABILITIES}:{head.name}":
                return head.classes
        return self.task.classes

    def metadata(self, versions: Sequence[str]) -> dict[str, Any]:
        """The answer to GET /v2/models/NAME."""
        height, width = self.size
        return {
            "name": self.name,
            "versions": list(versions),
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, height, width, 3]}],
            "outputs": [
                {"name": name, "datatype": "FP32", "shape": [-1, number]}
                for name, number in self.outputs.items()
            ],
        }

    def config(self) -> dict[str, Any]:
        """The answer to GET /v2/models/NAME/config, as a Triton model configuration."""
        height, width = self.size
        return {
            "name": self.name,
            "platform": "onnxruntime_onnx",
            "backend": "onnxruntime",
            "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": self.most,
            "input": [
                {"name": INPUT, "data_type": "TYPE_UINT8", "dims": [height, width, 3]},
            ],
            "output": [
                {"name": name, "data_type": "TYPE_FP32", "dims": [number]}
                for name, number in self.outputs.items()
            ],
            "dynamic_batching": {"max_queue_delay_microseconds": 0},
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """One output that a request wants."""

    name: str
    binary: bool
    classification: int = 0
    """The likeliest classes as texts, so many; 0: the numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferRequest:
    """A request for inference, checked."""

    request_id: str
    works: list[Work]
    outputs: list[Wanted]
    timeout: float | None = None
    """Seconds within which computing has to begin."""
    skip_errors: bool = False
    """Whether a bad image is a row of NaN instead of an error of the whole request."""


def server_metadata() -> dict[str, Any]:
    """The answer to GET /v2."""
    return {"name": "distcls", "version": __version__, "extensions": list(EXTENSIONS)}


Contents = Callable[[dict[str, Any], str], Buffer | list[Any]]
"""Given an input and its datatype: its contents as bytes, or as a list, nested or flat. Images in
a list are bytes, or texts in base64."""


def parse_infer(body: Buffer, header_length: str | None, interface: Interface) -> InferRequest:
    """The request in a body; `header_length` is the header Inference-Header-Content-Length.

    Raises Refused with the reason.
    """
    if header_length is None:
        head, blobs, length = body, memoryview(b""), len(body)
    else:
        length = _header_length(header_length, len(body))
        if length == 0:
            return _raw_request(body, interface)
        view = memoryview(body)
        head, blobs = view[:length], view[length:]

    def contents(given: dict[str, Any], datatype: str) -> Buffer | list[Any]:
        return _json_contents(given, datatype, blobs, length)

    return check_infer(parse_object(head), contents, interface)


def check_infer(values: dict[str, Any], contents: Contents, interface: Interface) -> InferRequest:
    """The request in the JSON object of a body, or in a message of gRPC that is made into one.

    Raises Refused with the reason.
    """
    parameters = _parameters(values, "parameters")
    given = _one_input(values)
    works = _works_of(given, contents, interface)
    binary = _flag(parameters.get("binary_data_output", False), "binary_data_output")
    outputs = _outputs_of(values, binary, interface)
    if any(output.name == FEATURES for output in outputs):
        works = [dataclasses.replace(work, features=True) for work in works]
    request_id = values.get("id", "")
    if not isinstance(request_id, str) or len(request_id) > 1000:
        raise Refused(400, f"id: {shown(request_id)}, expected a text of at most 1,000 letters")
    return InferRequest(
        request_id=request_id,
        works=works,
        outputs=outputs,
        timeout=_timeout(parameters),
        skip_errors=_on_error(parameters),
    )


def _header_length(text: str, size: int) -> int:
    plain = text.strip()
    if not (plain.isascii() and plain.isdigit() and len(plain) < 12 and int(plain) <= size):
        raise Refused(
            400,
            f"Inference-Header-Content-Length: {shown(text)}, expected a whole number from 0 to "
            f"{size}, the bytes of the body",
        )
    return int(plain)


def _raw_request(body: Buffer, interface: Interface) -> InferRequest:
    """A body without JSON: one tensor, or one encoded image. Its outputs are binary as well."""
    height, width = interface.size
    if not len(body):
        raise Refused(400, "the body is empty, expected one image")
    pixels = len(body) == height * width * 3 and not _looks_encoded(bytes(body[:12]))
    wanted = [Wanted(name=name, binary=True) for name in interface.outputs]
    work = Work(body, pixels=pixels, features=bool(interface.features))
    return InferRequest(request_id="", works=[work], outputs=wanted)


def _looks_encoded(head: bytes) -> bool:
    """Whether bytes that may be pixels as well begin like a JPEG, PNG, GIF or WebP file."""
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8")
    return head.startswith(starts) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def parse_object(text: Buffer) -> dict[str, Any]:
    """The JSON object in a body. Raises Refused for what is none, or has too many values."""
    data = bytes(text)
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise Refused(413, f"the JSON has more than {MOST_VALUES:,} values; send tensors binary")
    try:
        values = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Refused(400, f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise Refused(400, f"the body is {_kind(values)}, expected a JSON object")
    return values


def _parameters(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The parameters of a request, an input or an output: plain values by name."""
    found = values.get("parameters", {})
    if not isinstance(found, dict):
        raise Refused(400, f"{where}: {_kind(found)}, expected an object")
    for name, value in found.items():
        if name.startswith("triton_"):
            raise Refused(400, f"{where}: {shown(name)} is reserved")
        if isinstance(value, list | dict):
            raise Refused(400, f"{where}.{name}: {_kind(value)}, expected a plain value")
        if name.startswith("shared_memory"):
            raise Refused(400, f"{where}.{name}: shared memory is not supported")
    if found.get("sequence_id", 0) not in (0, ""):
        raise Refused(400, f"{where}.sequence_id: the model keeps no state between requests")
    return found


def _timeout(parameters: dict[str, Any]) -> float | None:
    value = parameters.get("timeout", 0)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise Refused(400, f"parameters.timeout: {shown(value)}, expected microseconds")
    return value / 1e6 if value else None


def _on_error(parameters: dict[str, Any]) -> bool:
    value = parameters.get("on_error", "fail")
    if value not in ("fail", "skip"):
        raise Refused(400, f"parameters.on_error: {shown(value)}, expected fail or skip")
    return bool(value == "skip")


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise Refused(400, f"{name}: {shown(value)}, expected true or false")
    return value


def _one_input(values: dict[str, Any]) -> dict[str, Any]:
    inputs = values.get("inputs")
    if not isinstance(inputs, list) or not all(isinstance(each, dict) for each in inputs):
        what = "is missing" if inputs is None else f"is {_kind(inputs)}"
        raise Refused(400, f"inputs {what}, expected a list with the input {INPUT!r}")
    if len(inputs) != 1:
        raise Refused(400, f"inputs: {len(inputs)} of them, expected one, {INPUT!r}")
    given: dict[str, Any] = inputs[0]
    if given.get("name") != INPUT:
        raise Refused(400, f"inputs: {shown(given.get('name'))} is unknown, expected {INPUT!r}")
    return given


def _works_of(given: dict[str, Any], contents: Contents, interface: Interface) -> list[Work]:
    """The images of the input."""
    _parameters(given, f"inputs.{INPUT}.parameters")
    datatype = given.get("datatype")
    if datatype not in ("UINT8", "BYTES"):
        raise Refused(
            400,
            f"datatype: {shown(datatype)}, expected UINT8 (tensors) or BYTES (encoded images)",
        )
    shape = _shape(given.get("shape"), datatype, interface)
    data = contents(given, datatype)
    if isinstance(data, list):
        if datatype == "BYTES":
            return _encoded(data, shape)
        return [Work(row.tobytes(), pixels=True) for row in _tensor(data, shape)]
    if datatype == "BYTES":
        return [Work(each) for each in _split_bytes(data, shape[0])]
    if len(data) != math.prod(shape):
        expected = math.prod(shape)
        raise Refused(400, f"a tensor of {len(data)} bytes, expected {expected} for shape {shape}")
    view, each = memoryview(data), len(data) // shape[0]
    return [Work(view[at : at + each], pixels=True) for at in range(0, len(data), each)]


def _json_contents(
    given: dict[str, Any], datatype: str, blobs: Buffer, header: int
) -> Buffer | list[Any]:
    """The contents of an input: in the JSON of `header` bytes, or in the bytes that follow it."""
    size = given.get("parameters", {}).get("binary_data_size")
    if (size is None) == ("data" not in given):
        raise Refused(400, f"inputs.{INPUT}: expected either data or parameters.binary_data_size")
    if size is not None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise Refused(400, f"binary_data_size: {shown(size)}, expected a number of bytes")
        if size != len(blobs):
            raise Refused(400, f"binary_data_size: {size}, but {len(blobs)} bytes follow the JSON")
        return blobs
    if len(blobs):
        raise Refused(400, f"{len(blobs)} bytes follow the JSON, and no input is binary")
    if datatype == "UINT8" and header > MOST_JSON_NUMBERS:
        most = MOST_JSON_NUMBERS >> 20
        raise Refused(
            413, f"a tensor in {header:,} bytes of JSON, at most {most} MB; send it binary"
        )
    if not isinstance(given["data"], list):
        raise Refused(400, f"data: {_kind(given['data'])}, expected a list")
    return given["data"]


def _shape(shape: object, datatype: str, interface: Interface) -> list[int]:
    height, width = interface.size
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not whole or not shape:
        raise Refused(400, f"shape: {shown(shape)}, expected a list of whole numbers")
    assert isinstance(shape, list)
    fits = shape[1:] in ([], [1]) if datatype == "BYTES" else shape[1:] == [height, width, 3]
    if not fits:
        expected = "[N] or [N, 1]" if datatype == "BYTES" else f"[N, {height}, {width}, 3]"
        raise Refused(400, f"shape: {shown(shape)}, expected {expected} for {datatype}")
    if not 1 <= shape[0] <= interface.most:
        raise Refused(400, f"shape: {shape[0]} images, expected 1 to {interface.most}")
    return shape


def _flatten(data: list[Any], shape: list[int]) -> list[Any]:
    """The values of nested lists of this shape, or of a flat one."""
    level, depth = data, 0
    while level and isinstance(level[0], list):
        depth += 1
        if depth >= len(shape) or set(map(type, level)) != {list}:
            raise Refused(400, f"data: its nesting is not that of the shape {shape}")
        if len(level) != math.prod(shape[:depth]) or {*map(len, level)} != {shape[depth]}:
            raise Refused(400, f"data: its lengths are not those of the shape {shape}")
        level = list(itertools.chain.from_iterable(level))
    if depth not in (0, len(shape) - 1) or len(level) != math.prod(shape):
        expected = math.prod(shape)
        raise Refused(400, f"data: {len(level)} values, expected {expected} for shape {shape}")
    return level


def _tensor(data: list[Any], shape: list[int]) -> NDArray[np.uint8]:
    flat = _flatten(data, shape)
    if set(map(type, flat)) != {int}:
        other = next(value for value in flat if type(value) is not int)
        raise Refused(400, f"data: {shown(other)}, expected whole numbers from 0 to 255")
    if min(flat) < 0 or max(flat) > 255:
        other = next(value for value in flat if not 0 <= value <= 255)
        raise Refused(400, f"data: {shown(other)}, expected whole numbers from 0 to 255")
    return np.array(flat, np.uint8).reshape(shape)


def _encoded(data: list[Any], shape: list[int]) -> list[Work]:
    works = []
    for index, text in enumerate(_flatten(data, shape)):
        if isinstance(text, bytes):
            works.append(Work(text))
            continue
        if not isinstance(text, str):
            raise Refused(400, f"data[{index}]: {_kind(text)}, expected an image as base64")
        try:
            works.append(Work(base64.b64decode(text, validate=True)))
        except (binascii.Error, ValueError) as error:
            raise Refused(400, f"data[{index}]: not base64: {error}") from error
    return works


def _split_bytes(blobs: Buffer, count: int) -> list[memoryview]:
    """The elements of a BYTES tensor: each a length in 4 bytes, little-endian, and its bytes."""
    view, at = memoryview(blobs), 0
    found: list[memoryview] = []
    while at < len(view) and len(found) <= count:  # no more than that: each is an object
        if at + 4 > len(view):
            raise Refused(400, "BYTES: the last length is cut off")
        (size,) = _LENGTH.unpack(view[at : at + 4])
        at += 4
        if at + size > len(view):
            raise Refused(
                400, f"BYTES: element {len(found)} has {size} bytes, {len(view) - at} are left"
            )
        found.append(view[at : at + size])
        at += size
    if len(found) != count:
        several = "more" if len(found) > count else len(found)
        raise Refused(400, f"BYTES: {several} elements, expected {count} for the shape")
    return found


def _outputs_of(values: dict[str, Any], binary: bool, interface: Interface) -> list[Wanted]:
    asked = values.get("outputs", [])
    if not isinstance(asked, list) or not all(isinstance(each, dict) for each in asked):
        raise Refused(400, f"outputs: {_kind(asked)}, expected a list of objects")
    known = interface.outputs
    if not asked:
        return [Wanted(name=name, binary=binary) for name in known]
    found: dict[str, Wanted] = {}
    for each in asked:
        name = each.get("name")
        if name not in known or not isinstance(name, str):
            hint = did_you_mean(str(name), known) if isinstance(name, str) else ""
            raise Refused(400, f"outputs: {shown(name)} is unknown{hint}")
        parameters = _parameters(each, f"outputs.{name}.parameters")
        count = parameters.get("classification", 0)
        if type(count) is not int or count < 0:
            raise Refused(400, f"classification: {shown(count)}, expected a number of classes")
        if count:
            interface.labels(name)
        own = _flag(parameters.get("binary_data", binary), "binary_data")
        found.setdefault(name, Wanted(name=name, binary=own, classification=count))
    return list(found.values())


def format_infer(
    request: InferRequest, outputs: Sequence[Output], interface: Interface
) -> tuple[bytes, int | None]:
    """The body of an answer, and the bytes of its JSON where binary data follow it.

    Raises Refused if an image is bad, unless they are skipped.
    """
    check_outputs(outputs, request.skip_errors)
    tensors = output_tensors(request, outputs, interface)
    described: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for wanted, datatype, array in tensors:
        each: dict[str, Any] = {
            "name": wanted.name,
            "datatype": datatype,
            "shape": list(array.shape),
        }
        if wanted.binary:
            blob = raw_contents(datatype, array)
            each["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        elif datatype == "BYTES":
            each["data"] = array.ravel().tolist()
        else:
            each["data"] = np.ascontiguousarray(array.ravel())
        described.append(each)
    values = {
        "model_name": interface.name,
        "model_version": interface.version,
        "outputs": described,
    }
    if request.request_id:
        values["id"] = request.request_id
    text = orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join((text, *blobs)), len(text)) if blobs else (text, None)


def check_outputs(outputs: Sequence[Output], skip_errors: bool = False) -> None:
    """Raise Refused for the first output with an error, unless images with one are skipped."""
    for index, output in enumerate(outputs):
        if output.error is None or (skip_errors and output.fault != "machine"):
            continue
        where = f"image {index}: " if len(outputs) > 1 else ""
        status = {"image": 400, "model": 500, "machine": 503}[output.fault]
        headers = {"retry-after": "1"} if status == 503 else None
        raise Refused(status, f"{where}{output.error}", headers)


def output_tensors(
    request: InferRequest, outputs: Sequence[Output], interface: Interface
) -> list[tuple[Wanted, str, NDArray[Any]]]:
    """The wanted tensors: each with its datatype, FP32 or BYTES (texts in an object array)."""
    logits = np.stack([output.logits for output in outputs])
    good = np.array([output.error is None for output in outputs])
    probabilities = np.full_like(logits, np.nan)
    probabilities[good] = interface.task.probabilities(logits[good])
    by_name = {LOGITS: logits, PROBABILITIES: probabilities}
    for head, span in zip(interface.task.heads, interface.task.slices, strict=False):
        by_name[f"{PROBABILITIES}:{head.name}"] = probabilities[:, span]
    if any(work.features for work in request.works):
        blank = np.full(interface.features, np.nan, np.float32)
        rows = [blank if o.features is None or o.error is not None else o.features for o in outputs]
        by_name[FEATURES] = np.stack(rows)
    found: list[tuple[Wanted, str, NDArray[Any]]] = []
    for wanted in request.outputs:
        array = by_name[wanted.name]
        if wanted.classification:
            texts = _classification(array, interface.labels(wanted.name), wanted.classification)
            found.append((wanted, "BYTES", texts))
        else:
            found.append((wanted, "FP32", array))
    if request.skip_errors:
        texts = np.array([output.error or "" for output in outputs], object)
        binary = all(wanted.binary for wanted in request.outputs)
        found.append((Wanted(name=ERRORS, binary=binary), "BYTES", texts))
    return found


def _classification(values: NDArray[np.float32], labels: Sequence[str], count: int) -> NDArray[Any]:
    """`VALUE:INDEX:LABEL` of the `count` highest of each row, an object array of texts [N, k]."""
    k = min(count, values.shape[1])
    best = np.argsort(-values, axis=1, kind="stable")[:, :k]
    texts = [
        [f"{row[index]:f}:{index}:{labels[index]}" for index in ranked]
        for row, ranked in zip(values.tolist(), best.tolist(), strict=True)
    ]
    return np.array(texts, object).reshape(len(values), k)


def raw_contents(datatype: str, array: NDArray[Any]) -> bytes:
    """The bytes of an output tensor, little-endian; of BYTES each text behind its length."""
    if datatype != "BYTES":
        return array.tobytes()
    encoded = [text.encode() for text in array.ravel().tolist()]
    return b"".join(_LENGTH.pack(len(each)) + each for each in encoded)


def _kind(value: object) -> str:
    """What a JSON value is, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "a flag"}
    return names.get(type(value), "a number")
