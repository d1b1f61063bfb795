"""From the logits of a chunk to rows of the table: labels, probabilities, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls.inference.inputs import Source
from distcls.inference.model import softmax
from distcls.inference.options import PredictOptions
from distcls.inference.pipeline import Chunk
from distcls.inference.writers import Columns, shortest

ABSTAINED = "abstained"
"""The column that says that no class was likely enough; there with --threshold only."""


def columns(options: PredictOptions, classes: tuple[str, ...]) -> tuple[list[str], set[str]]:
    """Names of all columns in order, and of those that hold numbers."""
    names, numbers = ["image_id"], set()
    for rank in range(options.top_k):
        ending = f"_{rank + 1}" if rank else ""
        names += [f"label{ending}", f"probability{ending}"]
        numbers.add(f"probability{ending}")
    if options.probabilities:
        added = [f"p:{name}" for name in classes]
        names += added
        numbers.update(added)
    if options.threshold is not None:
        names.append(ABSTAINED)
    return [*names, "error"], numbers


def rows(
    chunk: Chunk, source: Source, classes: tuple[str, ...], options: PredictOptions
) -> Columns:
    """The rows of a chunk, by column; None wherever an image has an error.

    With a threshold, an answer that is less likely has no label; its probability stays.
    """
    good = np.array([error is None for error in chunk.errors])
    logits = chunk.logits[good]
    probabilities = softmax(logits) if len(logits) else logits
    ranked = _ranked(logits, options.top_k)
    of_rank = np.take_along_axis(probabilities, ranked, axis=1)
    named = np.array(classes, object)[ranked]
    unsure = _unsure(of_rank[:, 0], options.threshold)
    named[unsure, 0] = None
    table: Columns = {"image_id": [source.image_ids[index] for index in chunk.indices]}
    for rank in range(options.top_k):
        ending = f"_{rank + 1}" if rank else ""
        table[f"label{ending}"] = _spread(good, named[:, rank].tolist())
        table[f"probability{ending}"] = _spread(good, shortest(of_rank[:, rank]))
    if options.probabilities:
        for place, name in enumerate(classes):
            table[f"p:{name}"] = _spread(good, shortest(probabilities[:, place]))
    if options.threshold is not None:
        table[ABSTAINED] = _spread(good, unsure.tolist())
    table["error"] = chunk.errors
    return table


def _ranked(logits: NDArray[np.float32], top_k: int) -> NDArray[np.int64]:
    """The classes with the greatest logits, [N, top_k]; of equal ones the lower comes first."""
    if top_k == 1:
        return np.asarray(logits.argmax(axis=1)[:, None], np.int64)
    return np.asarray(np.argsort(-logits, axis=1, kind="stable")[:, :top_k], np.int64)


def _unsure(likeliest: NDArray[np.float32], threshold: float | None) -> NDArray[np.bool_]:
    """Whether each answer is less likely than the threshold, [N]."""
    if threshold is None:
        return np.zeros(len(likeliest), np.bool_)
    return np.asarray(likeliest < threshold, np.bool_)


def _spread(good: NDArray[np.bool_], values: list[Any]) -> list[Any]:
    """`values` at the places that are good, None at the others."""
    if good.all():
        return values
    left = iter(values)
    return [next(left) if fine else None for fine in good.tolist()]
