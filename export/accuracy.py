"""The proof that a variant in lower precision is good enough: its accuracy on the whole split."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls.data.dataset import Split
from distcls.errors import DistclsError
from distcls.inference.inputs import from_split
from distcls.inference.model import Model
from distcls.inference.pipeline import stream

BATCH = 32
"""Images at a time when models are compared and timed."""
TIMED = 96
"""Images over which a speed is measured, at most."""

Images = NDArray[np.uint8]
Logits = NDArray[np.float32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """What the checkpoint answers to a split."""

    logits: Logits
    """[N, K]."""
    labels: NDArray[np.int64]
    """[N]."""
    provider: str
    """What computed it."""

    @property
    def top1(self) -> float:
        """Part of the images whose class has the greatest logit."""
        return float((self.logits.argmax(axis=1) == self.labels).mean())


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantCertificate:
    """What was compared, and the outcome; embedded in the exported variant."""

    precision: str
    images: int
    """All of the split."""
    split: str
    top1: float
    """Of the variant."""
    top1_reference: float
    """Of the checkpoint."""
    top1_agreement: float
    """Share of images on which both put the same class first."""
    max_logit_difference: float
    """Largest absolute difference of any logit."""
    max_accuracy_drop: float
    """Points of top-1 that were allowed to be lost."""
    min_agreement: float
    """Percent of images on which both had to put the same class first."""
    images_per_second: float
    """Of the variant on this machine, ONNX Runtime's CPU provider, 32 images at a time."""
    images_per_second_fp32: float
    """Of the same graph in fp32."""
    float_layers: tuple[str, ...]
    """Layers that were left in float because they lost too much."""
    reference: str
    """What computed the checkpoint's answers."""
    provider: str
    """What computed the variant's."""
    machine: str = dataclasses.field(default_factory=platform.machine)

    @property
    def drop(self) -> float:
        """Points of top-1 that are lost; below nought if it is better."""
        return 100 * (self.top1_reference - self.top1)

    @property
    def holds(self) -> bool:
        """Whether no more accuracy is lost than was allowed, and few images change their class."""
        same = 100 * self.top1_agreement >= self.min_agreement - 1e-9
        return bool(self.drop <= self.max_accuracy_drop + 1e-9 and same)

    def to_json(self) -> dict[str, Any]:
        """Plain values for the file's metadata.

        `tolerance` is what another provider's logits may differ by: as much as the variant's own.
        """
        values = dataclasses.asdict(self)
        layers = list(values["float_layers"])
        return {**values, "float_layers": layers, "tolerance": self.max_logit_difference}

    def lines(self) -> list[str]:
        """For people."""
        kept = f", {len(self.float_layers)} layers left in float" if self.float_layers else ""
        return [
            f"{self.precision}: top-1 {self.top1:.2%}, the checkpoint's {self.top1_reference:.2%} "
            f"({self.drop:+.2f} points lost, {self.max_accuracy_drop:g} allowed) on "
            f"{self.images:,} images of {self.split}{kept}",
            f"{self.precision}: top-1 agreement {self.top1_agreement:.2%} (at least "
            f"{self.min_agreement:g}%), largest logit difference {self.max_logit_difference:.1e}",
            f"{self.precision}: {self.images_per_second:,.0f} images/s on this machine's CPU, "
            f"fp32 {self.images_per_second_fp32:,.0f}",
        ]


def answers(model: Model, split: Split) -> Logits:
    """A model's logits for all images of a split, [N, K].

    Raises DistclsError if an image cannot be read or an answer is not finite.
    """
    chunks = stream(from_split(split, model.card.classes), model, batch_size=BATCH)
    found = []
    with contextlib.closing(chunks):
        for chunk in chunks:
            for index, error in zip(chunk.indices, chunk.errors, strict=True):
                if error is not None:
                    raise DistclsError(f"{split.image_ids[index]}: {error}")
            found.append(chunk.logits)
    return np.concatenate(found)


def expect(reference: Model, split: Split) -> Expected:
    """What a checkpoint answers to a split; raises as `answers` does."""
    return Expected(
        logits=answers(reference, split), labels=split.labels, provider=reference.provider
    )


def certify_variant(
    variant: Model,
    split: Split,
    expected: Expected,
    *,
    precision: str,
    max_accuracy_drop: float,
    min_agreement: float,
    float_layers: tuple[str, ...] = (),
    speeds: tuple[float, float],
) -> VariantCertificate:
    """Compare a variant with the checkpoint on all images of a split.

    `speeds` are images per second of the variant and of the same graph in fp32.
    """
    found = answers(variant, split)
    best = found.argmax(axis=1)
    return VariantCertificate(
        precision=precision,
        images=len(found),
        split=split.name,
        top1=float((best == expected.labels).mean()),
        top1_reference=expected.top1,
        top1_agreement=float((best == expected.logits.argmax(axis=1)).mean()),
        max_logit_difference=float(np.abs(found - expected.logits).max()),
        max_accuracy_drop=max_accuracy_drop,
        min_agreement=min_agreement,
        images_per_second=speeds[0],
        images_per_second_fp32=speeds[1],
        float_layers=float_layers,
        reference=expected.provider,
        provider=variant.provider,
    )


def measure_speeds(models: tuple[Model, Model], images: Images) -> tuple[float, float]:
    """Images per second of two models that take turns, so that neither has the quieter moment."""
    batches = [images[start : start + BATCH] for start in range(0, min(len(images), TIMED), BATCH)]
    for model in models:
        model.logits(batches[0])  # the first time is slower
    spent = [0.0, 0.0]
    for batch in batches:
        for place, model in enumerate(models):
            with _timed() as seconds:
                model.logits(batch)
            spent[place] += seconds[0]
    count = sum(map(len, batches))
    return count / max(spent[0], 1e-9), count / max(spent[1], 1e-9)


@contextlib.contextmanager
def _timed() -> Iterator[list[float]]:
    seconds = [0.0]
    began = time.perf_counter()
    yield seconds
    seconds[0] = time.perf_counter() - began
