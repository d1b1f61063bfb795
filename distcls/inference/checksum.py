"""Whether an exported file is what was exported: a digest of its graph and weights, in itself.

The metadata, in which the digest stands, is left out of it; the graph with its weights counts,
and so do the operator sets and functions.
Read from the protobuf wire format, because the inference side installs without `onnx`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from distcls.errors import UsageError
from distcls.inference.external_data import fields

KEY = "distcls.sha256"
"""Metadata key under which an exported file carries the digest, as JSON like all of them."""

_GRAPH, _METADATA, _OUTPUT = 7, 14, 12
"""Fields of ModelProto, and one of GraphProto; https://github.com/onnx/onnx/blob/main/onnx/onnx.proto"""


def checksum(model: bytes) -> str:
    """SHA-256 of a serialised ModelProto without its metadata_props, hexadecimal.

    The order of the fields does not count, since a writer may choose it. Raises ValueError if the
    bytes are no message.
    """
    found = sorted(
        (number, hashlib.sha256(value).digest())
        for number, value in fields(memoryview(model))
        if number != _METADATA
    )
    total = hashlib.sha256()
    for number, value in found:
        total.update(number.to_bytes(4, "big") + value)
    return total.hexdigest()


def check_checksum(path: Path) -> None:
    """Raise UsageError if the ONNX file at `path` carries a digest that is not its own.

    A file without one (of others, or of an earlier version) passes.
    """
    content = path.read_bytes()
    try:
        carried = _metadata(content).get(KEY)
        if carried is None or carried == json.dumps(checksum(content)):
            return
    except ValueError as error:
        raise UsageError(f"{path} is not an ONNX file") from error
    raise UsageError(
        f"{path}: wrong checksum, its graph or weights are not what was exported; copy or export "
        "it again"
    )


def outputs(path: Path) -> list[str]:
    """Names of the outputs of the ONNX file at `path`. Raises UsageError if it is none."""
    try:
        model = memoryview(path.read_bytes())
        return [
            bytes(dict(fields(value)).get(1, b"")).decode()
            for part, graph in fields(model)
            if part == _GRAPH
            for number, value in fields(graph)
            if number == _OUTPUT
        ]
    except ValueError as error:
        raise UsageError(f"{path} is not an ONNX file") from error


def _metadata(model: bytes) -> dict[str, str]:
    entries = [dict(fields(v)) for number, v in fields(memoryview(model)) if number == _METADATA]
    return {
        bytes(entry.get(1, b"")).decode(): bytes(entry.get(2, b"")).decode() for entry in entries
    }
