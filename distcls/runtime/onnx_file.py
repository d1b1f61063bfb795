"""One `.onnx` file: read once, verified, and its metadata without a session.

The protobuf wire format is read here, because the inference side installs without `onnx`. Field
numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from distcls import log
from distcls.errors import UsageError, shown
from distcls.model_card import CHECKSUM, METADATA_CHECKSUM, PREFIX
from distcls.stored import canonical_digest, read_bytes

KEY = PREFIX + CHECKSUM
"""Metadata key under which an exported file carries its checksum, as JSON like all of them."""
METADATA_KEY = PREFIX + METADATA_CHECKSUM
"""That of the checksum of the metadata of ours, which files of 0.1.0 lack."""
MOST_BYTES = 2**31
"""A serialised message is smaller."""

_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "main graph", 14: "metadata", 25: "function"},
    "main graph": {1: "node", 5: "tensor", 12: "output", 15: "sparse"},
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
    "tensor": {13: "external data"},
}
"""By message: the fields that are, or hold at some depth, one of `_LEAVES`."""

_LEAVES = ("metadata", "output", "external data")
_METADATA = 14
"""The field of ModelProto that holds the metadata."""


class OnnxFile:
    """The content of an `.onnx` file, read once and verified.

    Two things are verified. A file that carries the checksums of its graph and weights and of its
    metadata, as every export does, has to match them; one without a checksum passes. And weights
    stored in other files have to lie in the file's own folder: a hostile model names `../../secret`
    or a link, and older runtimes follow it.
    """

    def __init__(self, path: Path, content: bytes | None = None) -> None:
        """`content` are its bytes if they have been read already.

        Raises UsageError if the file cannot be read, is no ONNX file, or fails verification.
        """
        self.path = Path(path)
        self.content = _read(self.path) if content is None else content
        """All of its bytes, a serialised ModelProto."""
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        """Of the whole file, hexadecimal."""
        self.metadata: dict[str, str] = {}
        """Its metadata_props."""
        self.output_names: tuple[str, ...] = ()
        """The outputs of its graph, in order."""
        self.external_data: tuple[str, ...] = ()
        """Locations of the weights that it stores in other files, relative to its folder."""
        try:
            self._parse()
            self._verify_checksum()
        except (ValueError, OverflowError, RecursionError) as error:
            raise UsageError(f"{path} is not an ONNX file") from error
        self._verify_external_data()

    def _parse(self) -> None:
        """Collect metadata, outputs and locations in one pass. Raises ValueError if it is none."""
        outputs, locations = [], set()
        for leaf, value in _leaves(memoryview(self.content), "model"):
            entry = dict(fields(value))
            name = bytes(entry.get(1, b"")).decode("utf-8")
            if leaf == "output":
                outputs.append(name)
            elif leaf == "metadata":
                if name.startswith(PREFIX) and name in self.metadata:
                    raise UsageError(f"{self.path}: its metadata has {shown(name)} twice; refused")
                self.metadata[name] = bytes(entry.get(2, b"")).decode("utf-8")
            elif name == "location":
                locations.add(bytes(entry.get(2, b"")).decode("utf-8"))
        self.output_names, self.external_data = tuple(outputs), tuple(sorted(locations))

    def _verify_checksum(self) -> None:
        carried = self.metadata.get(KEY)
        if carried is not None and carried != json.dumps(checksum(self.content)):
            raise UsageError(
                f"{self.path}: wrong checksum, its graph or weights are not what was exported; "
                "copy or export it again"
            )
        if METADATA_KEY in self.metadata:
            if self.metadata[METADATA_KEY] != json.dumps(metadata_checksum(self.metadata)):
                raise UsageError(
                    f"{self.path}: wrong checksum, its classes, its preprocessing or another part "
                    "of its metadata is not what was exported; copy or export it again"
                )
        elif carried is not None:
            log.say(
                f"{self.path}: was exported before metadata had a checksum; its class names "
                "cannot be verified, exporting it again adds one"
            )

    def _verify_external_data(self) -> None:
        folder = self.path.resolve().parent
        for location in self.external_data:
            if "\0" in location or not (folder / location).resolve().is_relative_to(folder):
                raise UsageError(
                    f"{self.path}: stores weights in {location!r}, outside its folder; refused"
                )


def checksum(model: bytes) -> str:
    """SHA-256 of a serialised ModelProto without its metadata_props, hexadecimal.

    Graph, weights, operator sets and functions count; the metadata, which holds the checksum,
    does not, nor does the order of the fields, since a writer may choose it. Raises ValueError if
    the bytes are no message.
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


def metadata_checksum(metadata: Mapping[str, str]) -> str:
    """SHA-256 of the entries of ours, the checksum of graph and weights included, hexadecimal."""
    return canonical_digest(
        {
            name: value
            for name, value in metadata.items()
            if name.startswith(PREFIX) and name != METADATA_KEY
        }
    )


def fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each length-delimited field. Raises ValueError if it is no message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if key < 8:
            raise ValueError("a field without a number")  # of a file full of zeros the first
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


def _leaves(message: memoryview, message_type: str) -> Iterator[tuple[str, memoryview]]:
    for field, value in fields(message):
        child = _CHILDREN[message_type].get(field)
        if child in _LEAVES:
            yield child, value
        elif child is not None:
            yield from _leaves(value, child)


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, MOST_BYTES)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such model file") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
