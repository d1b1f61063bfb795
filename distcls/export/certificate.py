"""The proof that an exported file answers as its checkpoint does, and how fast each is.

Of a model with several heads the whole answer counts, and each head by itself; of labels all
decisions of an image, and each by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls.data.dataset import Split
from distcls.errors import DistclsError
from distcls.imaging import Preprocess
from distcls.runtime.model import Model
from distcls.runtime.pipeline import stream
from distcls.task import Integers, Task

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
    decide = reference.card.task.decide
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


BATCH = 32
"""Images at a time when models are compared."""

Logits = NDArray[np.float32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """What the checkpoint answers to a split."""

    logits: Logits
    """[N, K]."""
    labels: Integers
    """[N]; of several answers [N, heads] or [N, labels]."""
    task: Task
    """What they are answers to, with the checkpoint's thresholds."""
    provider: str
    """What computed it."""

    @property
    def truths(self) -> Integers:
        """The labels as `Task.decide` gives answers, [N, parts]."""
        return self.labels[:, None] if self.labels.ndim == 1 else self.labels

    @property
    def top1(self) -> float:
        """Part of the images whose whole answer is right."""
        return _same(self.task.decide(self.logits), self.truths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartAccuracy:
    """A head by itself, or all decisions about labels, each by itself."""

    name: str
    """The head's, or `labels`."""
    top1: float
    top1_reference: float
    top1_agreement: float

    @property
    def drop(self) -> float:
        """Points of top-1 that are lost."""
        return 100 * (self.top1_reference - self.top1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantCertificate:
    """What was compared, and the outcome; embedded in the exported variant."""

    precision: str
    images: int
    """All of the split."""
    split: str
    top1: float
    """Of the variant: share of images whose whole answer, all heads' or labels, is right."""
    top1_reference: float
    """Of the checkpoint."""
    top1_agreement: float
    """Share of images to which both give the same answer."""
    parts: tuple[PartAccuracy, ...] = ()
    """Of several heads each, of labels all together; empty where an image has one class."""
    max_logit_difference: float
    """Largest absolute difference of any logit."""
    max_accuracy_drop: float
    """Points of top-1 that were allowed to be lost."""
    min_agreement: float
    """Percent of images to which both had to give the same answer."""
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
        """Whether no more accuracy is lost than was allowed, in no part, and few answers change."""
        same = 100 * self.top1_agreement >= self.min_agreement - 1e-9
        drop = max([self.drop, *(part.drop for part in self.parts)])
        return bool(drop <= self.max_accuracy_drop + 1e-9 and same)

    def to_json(self) -> dict[str, Any]:
        """Plain values for the file's metadata.

        `tolerance` is what another provider's logits may differ by: as much as the variant's own.
        """
        values = dataclasses.asdict(self)
        for name in ("float_layers", "parts"):
            values[name] = list(values[name])
        return {**values, "tolerance": self.max_logit_difference}

    def lines(self) -> list[str]:
        """For people."""
        kept = f", {len(self.float_layers)} layers left in float" if self.float_layers else ""
        return [
            f"{self.precision}: top-1 {self.top1:.2%}, the checkpoint's {self.top1_reference:.2%} "
            f"({self.drop:+.2f} points lost, {self.max_accuracy_drop:g} allowed) on "
            f"{self.images:,} images of {self.split}{kept}",
            *self._of_worst(),
            f"{self.precision}: top-1 agreement {self.top1_agreement:.2%} (at least "
            f"{self.min_agreement:g}%), largest logit difference {self.max_logit_difference:.1e}",
            f"{self.precision}: {self.images_per_second:,.0f} images/s on this machine's CPU, "
            f"fp32 {self.images_per_second_fp32:,.0f}",
        ]

    @property
    def worst(self) -> PartAccuracy | None:
        """The part that loses most, if there are any."""
        return max(self.parts, key=lambda part: part.drop, default=None)

    def _of_worst(self) -> list[str]:
        part = self.worst
        if part is None:
            return []
        return [
            f"{self.precision}: {part.name!r}, which loses most: top-1 {part.top1:.2%}, the "
            f"checkpoint's {part.top1_reference:.2%}, agreement {part.top1_agreement:.2%}"
        ]


def answers(model: Model, split: Split) -> Logits:
    """A model's logits for all images of a split, [N, K].

    Raises DistclsError if an image cannot be read or an answer is not finite.
    """
    chunks = stream(split, model, batch_size=BATCH)
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
        logits=answers(reference, split),
        labels=split.labels,
        task=reference.card.task,
        provider=reference.provider,
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
    given, wanted = (expected.task.decide(logits) for logits in (found, expected.logits))
    return VariantCertificate(
        precision=precision,
        images=len(found),
        split=split.name,
        top1=_same(given, expected.truths),
        top1_reference=expected.top1,
        top1_agreement=_same(given, wanted),
        parts=_parts(expected, given, wanted),
        max_logit_difference=float(np.abs(found - expected.logits).max()),
        max_accuracy_drop=max_accuracy_drop,
        min_agreement=min_agreement,
        images_per_second=speeds[0],
        images_per_second_fp32=speeds[1],
        float_layers=float_layers,
        reference=expected.provider,
        provider=variant.provider,
    )


def _same(left: Integers, right: Integers) -> float:
    """Share of images, [N, parts] each, whose answers are the same in all parts."""
    return float((left == right).all(axis=1).mean())


def _parts(expected: Expected, given: Integers, wanted: Integers) -> tuple[PartAccuracy, ...]:
    """The parts of several answers, `given` by the variant and `wanted` by the checkpoint."""
    task, truths = expected.task, expected.truths
    if task.single:
        return ()
    if not task.heads:
        return (_part("labels", given, wanted, truths),)
    return tuple(
        _part(head.name, *(each[:, place] for each in (given, wanted, truths)))
        for place, head in enumerate(task.heads)
    )


def _part(name: str, given: Integers, wanted: Integers, truths: Integers) -> PartAccuracy:
    return PartAccuracy(
        name=name,
        top1=float((given == truths).mean()),
        top1_reference=float((wanted == truths).mean()),
        top1_agreement=float((given == wanted).mean()),
    )


BATCH = 32
"""Images at a time."""
TIMED = 96
"""Images over which a speed is measured, at most."""

Images = NDArray[np.uint8]


def measure_speeds(models: tuple[Model, Model], images: Images) -> tuple[float, float]:
    """Images per second of two models that take turns, so that neither has the quieter moment."""
    batches = [images[start : start + BATCH] for start in range(0, min(len(images), TIMED), BATCH)]
    for model in models:
        model.logits(batches[0])  # the first time is slower
    spent = [0.0, 0.0]
    for batch in batches:
        for place, model in enumerate(models):
            began = time.perf_counter()
            model.logits(batch)
            spent[place] += time.perf_counter() - began
    count = sum(map(len, batches))
    return count / max(spent[0], 1e-9), count / max(spent[1], 1e-9)
