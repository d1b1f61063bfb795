"""Rows of predictions out of logits: the columns that each kind of answer has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls.errors import UsageError
from distcls.inference.pipeline import Chunk
from distcls.inference.writers import Columns, shortest
from distcls.targets import Targets


class Rows:
    """Turns answered chunks into columns of a table.

    image_id, label, probability, then for one class an image the next likely ones (label_2,
    probability_2, ...), for heads each one's own (label:HEAD, probability:HEAD), then where asked
    for p:CLASS, and error. The probability of several answers is that of all of them together, as
    if they were independent.
    """

    def __init__(self, targets: Targets, *, top_k: int = 1, probabilities: bool = False) -> None:
        """Raises UsageError for more classes than there are, and for several of heads or labels."""
        if not targets.single and top_k > 1:
            raise UsageError(
                f"top_k: {top_k} is for one class an image, the model has {targets.summary()}; "
                "--probabilities gives them all"
            )
        if top_k > len(targets.classes):
            number = len(targets.classes)
            raise UsageError(f"top_k: {top_k} is more than the model's {number} classes")
        self._targets = targets
        self._top_k = top_k
        self._all = [f"p:{name}" for name in targets.classes] if probabilities else []
        endings = [f"_{rank + 1}" if rank else "" for rank in range(top_k)]
        endings += [f":{head.name}" for head in targets.heads]
        self._pairs = [(f"label{ending}", f"probability{ending}") for ending in endings]

    @property
    def names(self) -> list[str]:
        """All columns in order."""
        pairs = [name for pair in self._pairs for name in pair]
        return ["image_id", *pairs, *self._all, "error"]

    @property
    def numbers(self) -> set[str]:
        """The columns that hold numbers."""
        return {probability for _, probability in self._pairs} | set(self._all)

    def __call__(self, chunk: Chunk, image_ids: Sequence[str]) -> Columns:
        """The rows of a chunk; a bad image's are empty but for its name and the error."""
        good = np.array([error is None for error in chunk.errors])
        logits = chunk.logits[good]
        probabilities = self._targets.probabilities(logits)
        answer = self._ranked if self._targets.single else self._several
        columns: Columns = {"image_id": [image_ids[index] for index in chunk.indices]}
        found = answer(logits, probabilities)
        for (label, probability), (texts, values) in zip(self._pairs, found, strict=True):
            columns[label] = _spread(good, texts)
            columns[probability] = _spread(good, shortest(values))
        for place, name in enumerate(self._all):
            columns[name] = _spread(good, shortest(probabilities[:, place]))
        columns["error"] = chunk.errors
        return columns

    def _ranked(
        self, logits: NDArray[np.float32], probabilities: NDArray[np.float32]
    ) -> list[tuple[list[str], NDArray[np.float32]]]:
        """Names and probabilities of the likeliest class, the next, and so on."""
        if self._top_k == 1:
            ranked = self._targets.decide(logits)
        else:  # of equal logits the lower class comes first
            ranked = np.argsort(-logits, axis=1, kind="stable")[:, : self._top_k]
        of_rank = np.take_along_axis(probabilities, ranked, axis=1)
        named = np.array(self._targets.classes, object)[ranked]
        return [(named[:, rank].tolist(), of_rank[:, rank]) for rank in range(self._top_k)]

    def _several(
        self, logits: NDArray[np.float32], probabilities: NDArray[np.float32]
    ) -> list[tuple[list[str], NDArray[np.float32]]]:
        """Text and probability of the whole answer, then of each head's."""
        answers = self._targets.decide(logits)
        whole = self._targets.confidence(probabilities, answers)
        found = [(self._targets.texts(answers), whole)]
        if self._targets.heads:
            own = self._targets.of_answers(probabilities, answers)
            for place, head in enumerate(self._targets.heads):
                names = [head.classes[index] for index in answers[:, place].tolist()]
                found.append((names, own[:, place]))
        return found


def _spread(good: NDArray[np.bool_], values: list[Any]) -> list[Any]:
    """`values` at the places that are good, None at the others."""
    if good.all():
        return values
    left = iter(values)
    return [next(left) if fine else None for fine in good.tolist()]
