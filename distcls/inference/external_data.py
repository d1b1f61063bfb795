"""Which files beside itself an ONNX file would make the runtime read.

An ONNX file may keep weights in other files. A hostile one names `../../secret` or a link, and
older runtimes follow it. The few fields that matter are read from the protobuf wire format here,
because the inference side installs without the `onnx` package.

Field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

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
