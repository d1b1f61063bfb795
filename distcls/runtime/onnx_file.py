"""Whether an exported file is what was exported: a digest of its graph and weights, in itself.

The metadata, in which the digest stands, is left out of it; the graph with its weights counts,
and so do the operator sets and functions.
Read from the protobuf wire format, because the inference side installs without `onnx`.

An ONNX file may keep weights in other files. A hostile one names `../../secret` or a link, and
older runtimes follow it. The few fields that matter are read from the protobuf wire format here,
because the inference side installs without the `onnx` package.

Field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from distcls.errors import UsageError

_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "graph",
        10: "tensor",
        11: "graph",
        22: "sparse",
        23: "sparse",
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""By message: the fields that hold, at some depth, a tensor's external data."""


def check_external_data(path: Path) -> None:
    """Raise UsageError if the ONNX file at `path` is none, or names data outside its folder."""
    folder = path.resolve().parent
    try:
        locations = sorted(set(_locations(memoryview(path.read_bytes()), "model")))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not an ONNX file") from error
    for location in locations:
        if "\0" in location or not (folder / location).resolve().is_relative_to(folder):
            raise UsageError(f"{path}: keeps weights in {location!r}, outside its folder; refused")


def _locations(message: memoryview, kind: str) -> Iterator[str]:
    for field, value in fields(message):
        child = _CHILDREN[kind].get(field)
        if child == "entry":
            entry = dict(fields(value))
            if bytes(entry.get(1, b"")) == b"location":
                yield bytes(entry.get(2, b"")).decode("utf-8")
        elif child is not None:
            yield from _locations(value, child)


def fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each length-delimited field. Raises ValueError if it is no message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            _, at = _varint(message, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            size, at = _varint(message, at)
            if at + size > len(message):
                raise ValueError("field longer than its message")
            yield key >> 3, message[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value, at, shift = value | (byte & 0x7F) << shift, at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("number without an end")


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
