"""The proof that an exported file answers as its checkpoint does, on real images."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls.data.dataset import Split
from distcls.errors import DistclsError
from distcls.imaging import Preprocess
from distcls.inference.model import Model

BATCH_SIZES = (1, 7, 32)
"""One, an odd one and a full one: a graph with a fixed batch fails at two of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity:
    """How two models agree at one batch size."""

    batch_size: int
    top1_agreement: float
    """Share of images on which both answer the same: the first class, all heads', all labels."""
    max_logit_difference: float
    """Largest absolute difference of any logit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was compared, and the outcome; embedded in the exported file."""

    images: int
    """Real images compared at each batch size."""
    split: str
    """Split of the dataset they are of."""
    tolerance: float
    """Largest logit difference that was allowed."""
    results: tuple[Parity, ...]
    reference: str
    """What computed the checkpoint's answers."""
    provider: str
    """What computed the exported file's."""
    machine: str = dataclasses.field(default_factory=platform.machine)

    @property
    def holds(self) -> bool:
        """Whether all logits are within the tolerance and no image changed its class."""
        return all(
            result.max_logit_difference <= self.tolerance and result.top1_agreement == 1
            for result in self.results
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for the file's metadata."""
        values = dataclasses.asdict(self)
        return {**values, "results": list(values["results"])}

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"batch {result.batch_size:>2}: top-1 agreement {result.top1_agreement:.2%} of "
            f"{self.images:,} images, largest logit difference {result.max_logit_difference:.1e} "
            f"(tolerance {self.tolerance:.0e})"
            for result in self.results
        ]


def load_images(split: Split, preprocess: Preprocess, limit: int) -> NDArray[np.uint8]:
    """The first `limit` images of a split, preprocessed, uint8 [N, H, W, 3]."""
    count = min(limit, len(split))
    return np.stack([preprocess(split.image(index)) for index in range(count)])


def certify(
    reference: Model,
    exported: Model,
    images: NDArray[np.uint8],
    *,
    split: str,
    tolerance: float,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Certificate:
    """Compare two models on the same images, the exported one at every batch size."""
    expected = _in_batches(reference, images, max(batch_sizes))
    if not np.isfinite(expected).all():
        raise DistclsError("the checkpoint's own logits are not finite; there is nothing to export")
    decide = reference.card.resolved_targets.decide
    answers = decide(expected)
    results = []
    for size in batch_sizes:
        found = _in_batches(exported, images, size)
        same = (answers == decide(found)).all(axis=1)
        difference = np.abs(expected - found).max()
        results.append(
            Parity(
                batch_size=size,
                top1_agreement=float(same.mean()),
                # a NaN compares false with everything; it must not pass as a small difference
                max_logit_difference=float(difference) if np.isfinite(difference) else float("inf"),
            )
        )
    return Certificate(
        images=len(images),
        split=split,
        tolerance=tolerance,
        results=tuple(results),
        reference=reference.provider,
        provider=exported.provider,
    )


def _in_batches(model: Model, images: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    starts = range(0, len(images), size)
    return np.concatenate([model.logits(images[start : start + size]) for start in starts])
