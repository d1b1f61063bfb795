"""What goes from the server to whatever computes, and what comes back, also as bytes in a pipe.

Plain structures of our own, without pickle: a compute process decodes files of strangers, and what
it sends is read as data.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Buffer = bytes | memoryview

Fault = Literal["image", "model", "machine"]
"""Whose fault an error is: the image's own, the model's (not finite), the machine's (no memory)."""

_COUNT, _ITEM = struct.Struct("<I"), struct.Struct("<QB")
_PIXELS, _KEEP_INPUT, _FEATURES = 1, 2, 4
HEADER = struct.Struct("<II")
"""Before an answer: bytes of its JSON, bytes of its arrays."""
MOST_ANSWER = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """One image to predict."""

    data: Buffer
    """The bytes of an image file; or of uint8 RGB [H, W, 3], preprocessed, with `pixels`."""
    pixels: bool = False
    """Whether `data` are pixels."""
    keep_input: bool = False
    """Whether to return the preprocessed input."""
    features: bool = False
    """Whether to return the features."""


@dataclasses.dataclass(slots=True)
class Output:
    """What the model says of one image."""

    logits: Floats
    """float32 [K]; NaN with an error."""
    error: str | None = None
    """Why there are none."""
    fault: Fault = "image"
    """Whose fault the error is."""
    features: Floats | None = None
    """float32 [D], if they were asked for."""
    input: Buffer | None = None
    """The preprocessed input, uint8 [H, W, 3], if it was asked for."""
    decode_s: float = 0.0
    """Seconds for decoding and resizing this image."""
    infer_s: float = 0.0
    """Seconds for computing its batch."""
    batch: int = 1
    """Images in that batch."""


class BatchFailed(Exception):
    """The model could not compute a batch; the text is the reason."""


def pack_batch(batch: Sequence[Work]) -> list[Buffer]:
    """A batch as buffers to write one after the other."""
    head = bytearray(_COUNT.pack(len(batch)))
    for work in batch:
        flags = _PIXELS * work.pixels | _KEEP_INPUT * work.keep_input | _FEATURES * work.features
        head += _ITEM.pack(len(work.data), flags)
    return [bytes(head), *(work.data for work in batch)]


def read_batch(read: Any) -> list[Work] | None:
    """The next batch from `read(n)`, which returns n bytes or raises EOFError; None at the end."""
    try:
        (count,) = _COUNT.unpack(read(_COUNT.size))
    except EOFError:
        return None
    heads = list(_ITEM.iter_unpack(read(_ITEM.size * count)))
    return [
        Work(read(size), bool(flags & _PIXELS), bool(flags & _KEEP_INPUT), bool(flags & _FEATURES))
        for size, flags in heads
    ]


def pack_outputs(outputs: Sequence[Output]) -> list[Buffer]:
    """The outputs of a batch as buffers to write one after the other."""
    logits = np.stack([output.logits for output in outputs])
    features = next((o.features for o in outputs if o.features is not None), None)
    meta = {
        "classes": logits.shape[1],
        "width": 0 if features is None else len(features),
        "infer_s": outputs[0].infer_s,
        "rows": [
            [o.error, o.fault, o.decode_s, -1 if o.input is None else len(o.input)] for o in outputs
        ],
    }
    arrays: list[Buffer] = [logits.tobytes()]
    if features is not None:
        blank = np.full_like(features, np.nan)
        rows = [blank if o.features is None else o.features for o in outputs]
        arrays.append(np.stack(rows).tobytes())
    arrays += [output.input for output in outputs if output.input is not None]
    return pack_message(meta, arrays)


def pack_message(meta: dict[str, Any], arrays: Sequence[Buffer] = ()) -> list[Buffer]:
    """A message of plain values and arrays, as buffers."""
    text = json.dumps(meta).encode()
    return [HEADER.pack(len(text), sum(map(len, arrays))), text, *arrays]


def unpack_outputs(meta: dict[str, Any], arrays: bytes, count: int) -> list[Output]:
    """The inverse of `pack_outputs`, for a batch of `count`.

    Raises BatchFailed if that is what the message says, ValueError if it is no answer to it.
    """
    if "failed" in meta:
        raise BatchFailed(str(meta["failed"]))
    rows, classes, width = meta["rows"], int(meta["classes"]), int(meta["width"])
    if len(rows) != count:
        raise ValueError(f"{len(rows)} answers to {count} images")
    logits = np.frombuffer(arrays, np.float32, count * classes).reshape(count, classes)
    at = logits.nbytes
    features = None
    if width:
        features = np.frombuffer(arrays, np.float32, count * width, at).reshape(count, width)
        at += features.nbytes
    outputs = []
    for place, (error, fault, decode_s, size) in enumerate(rows):
        kept = None
        if size >= 0:
            kept, at = arrays[at : at + size], at + size
        outputs.append(
            Output(
                logits=logits[place],
                error=error,
                fault=fault,
                features=None if features is None else features[place],
                input=kept,
                decode_s=decode_s,
                infer_s=meta["infer_s"],
                batch=count,
            )
        )
    return outputs
