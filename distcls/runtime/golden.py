"""Golden samples: a few inputs, made by a rule, with the logits that an exported file had for them.

The export embeds the logits; a server compares them before it serves the file, so that a runtime or
a processor that computes something else is found before a client finds it. The inputs are no
photographs, whose pixels nobody may want in a published file, and need no room.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls import stored
from distcls.errors import DistclsError
from distcls.model_card import GOLDEN, PREFIX
from distcls.runtime.model import Images, OnnxModel

SAMPLES = 4
KEY = PREFIX + GOLDEN
"""Metadata key with the logits, as JSON."""
TOLERANCE = 1e-3
"""Largest difference of a logit where the certificate states none."""

_SCHEMA = stored.each(stored.each(stored.number(-1e9, 1e9), stored.MOST_NAMES), SAMPLES, SAMPLES)


def golden_inputs(size: tuple[int, int]) -> Images:
    """The inputs, uint8 [4, H, W, 3]: waves of several lengths, in whole numbers."""
    height, width = size
    y, x, channel = np.ogrid[:height, :width, :3]
    waves: list[NDArray[np.int64]] = []
    for sample in range(SAMPLES):
        length = 24 + 16 * sample
        slope = (2 * sample + 1) * y + (7 - 2 * sample) * x
        phase = (slope * 256 // length + 64 * channel + 31 * sample) % 512
        waves.append(np.where(phase < 256, phase, 511 - phase))
    return np.stack(waves).astype(np.uint8)


def golden_metadata(model: OnnxModel) -> dict[str, str]:
    """The entry of the metadata: the logits that the model has for the inputs."""
    logits = model.logits(golden_inputs(model.card.preprocess.size))
    return {KEY: json.dumps([[float(str(value)) for value in row] for row in logits])}


def check_golden(model: OnnxModel, metadata: Mapping[str, str]) -> bool | None:
    """Whether the model computes here what it computed when it was exported.

    Returns:
        None for a file without golden samples; else whether an image has the same logits to the bit
        in a batch and alone.

    Raises:
        DistclsError: for other logits than those, or in reduced precision another prediction.
    """
    if KEY not in metadata:
        return None
    try:
        values = stored.parse_json(metadata[KEY], _SCHEMA, place=GOLDEN)
    except ValueError as error:
        raise DistclsError(f"{model.path}: its golden samples are damaged: {error}") from error
    inputs = golden_inputs(model.card.preprocess.size)
    found = model.logits(inputs)
    expected: Any = np.array(values, np.float32)
    if expected.shape != found.shape:
        raise DistclsError(f"{model.path}: its golden samples are of another number of classes")
    difference = float(np.abs(expected - found).max())
    allowed = float((model.card.certificate or {}).get("tolerance", TOLERANCE))
    decide = model.card.task.decide
    if model.execution.precision == "reduced":
        holds = bool((decide(expected) == decide(found)).all())
    else:
        holds = difference <= allowed  # a NaN is not
    if not holds:
        raise DistclsError(
            f"{model.path}: computes other logits here than when it was exported (golden samples "
            f"differ by {difference:.1e}, allowed {allowed:.0e}) with {model.execution}"
        )
    alone = np.concatenate([model.logits(inputs[at : at + 1]) for at in range(SAMPLES)])
    return bool(np.array_equal(alone, found))
