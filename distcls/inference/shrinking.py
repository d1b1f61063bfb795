"""Decoding large JPEGs at a half, a quarter or an eighth of their size, where the answers stay.

The JPEG decoder scales as part of its transform, and so has a fraction of the pixels to compute:
photographs of 12 megapixels come several times as fast. The pixels are not those of training to
the last bit, so it is done by choice only, and refused if too many answers change.
"""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.errors import UsageError
from distcls.imaging import decode
from distcls.inference.inputs import Source
from distcls.inference.model import Model
from distcls.inference.pipeline import stream

CHECKED = 128
"""Images, spread over the input, that are answered both ways."""
SAME = 0.998
"""Share of them whose answer has to stay, as for a model in reduced precision."""


def shrunk(source: Source, model: Model) -> Source:
    """The same images, JPEGs decoded no larger than the model's preprocessing needs them.

    Raises UsageError if there are no files to decode.
    """
    if source.read is None:
        raise UsageError("scaled_decode: this input is decoded already; leave it out")
    read, preprocess = source.read, model.card.preprocess

    def load(index: int) -> NDArray[np.uint8]:
        return decode(read(index), shrinks=preprocess.shrinks)

    return dataclasses.replace(source, load=load)


def check_shrunk(source: Source, fast: Source, model: Model) -> None:
    """Raise UsageError if the model answers otherwise to `fast`, made of `source` by `shrunk`."""
    every = range(0, len(source), -(-len(source) // CHECKED))
    usual, other = _answers(source, model, every), _answers(fast, model, every)
    known = (usual >= 0).all(axis=1) & (other >= 0).all(axis=1)
    changed = int((usual[known] != other[known]).any(axis=1).sum())
    said = f"the answer of {changed} of {known.sum()} images changes"
    if changed > (1 - SAME) * known.sum():
        raise UsageError(f"scaled_decode: {said} ({1 - SAME:.1%} may); leave it out")
    log.say(f"scaled decoding: {said}")


def _answers(source: Source, model: Model, indices: range) -> NDArray[np.int64]:
    """What the model decides, [n, answers]; -1 for a bad image."""
    targets = model.card.resolved_targets
    with contextlib.closing(stream(source, model, indices=indices)) as chunks:
        logits = np.concatenate([chunk.logits for chunk in chunks])[:, : len(targets.classes)]
    good = np.isfinite(logits).all(axis=1)
    decided = targets.decide(logits[good]).astype(np.int64)
    answers = np.full((len(logits), decided.shape[1]), -1, np.int64)
    answers[good] = decided
    return answers
