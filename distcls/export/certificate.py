"""Certificates of exported files: parity in fp32, accuracy in reduced precision.

Both compare the file with its checkpoint on real images. A multi-head or multi-label prediction is
right if it is right in every head or label; the accuracy certificate also counts each head by
itself, and all labels jointly.

A model that answers the same to every image agrees with anything: so both certificates hold how
many different predictions there were, and what is wrong with the answers (`constant_answers`).
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
from distcls.evaluation.metrics import LogitSpread, constant_answers, metric_state
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
    """Fraction of images with the same prediction: top-1 class, of all heads, or all labels."""
    max_logit_difference: float
    """Largest absolute difference of any logit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """Parity of an export in fp32 with its checkpoint; embedded in the exported file."""

    images: int
    """Real images compared at each batch size."""
    split: str
    """Their split of the dataset."""
    tolerance: float
    """Largest logit difference that was allowed."""
    results: tuple[Parity, ...]
    reference: str
    """Provider that ran the checkpoint."""
    provider: str
    """Provider that ran the exported file."""
    distinct_predictions: int
    """Different predictions of the checkpoint on these images."""
    warnings: tuple[str, ...] = ()
    """Why the agreement proves little: the answers hardly depend on the image."""
    machine: str = dataclasses.field(default_factory=platform.machine)

    @property
    def top1_agreement(self) -> float:
        """Fraction of images with the same prediction, at the batch size where it is least."""
        return min(result.top1_agreement for result in self.results)

    @property
    def max_logit_difference(self) -> float:
        """Largest absolute difference of any logit at any batch size."""
        return max(result.max_logit_difference for result in self.results)

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
        return {**values, **{name: list(values[name]) for name in ("results", "warnings")}}

    def lines(self) -> list[str]:
        """A printable summary."""
        agreements = [
            f"batch {result.batch_size:>2}: top-1 agreement {result.top1_agreement:.2%} of "
            f"{self.images:,} images, largest logit difference {result.max_logit_difference:.1e} "
            f"(tolerance {self.tolerance:.0e})"
            for result in self.results
        ]
        return [*agreements, _distinct_line(self)]


def spread_indices(total: int, limit: int) -> Integers:
    """At most `limit` of `total` images, evenly spread: a split is in the order of its classes."""
    return np.linspace(0, total - 1, min(limit, total)).round().astype(np.int64)


def load_images(split: Split, preprocess: Preprocess, limit: int) -> NDArray[np.uint8]:
    """At most `limit` images of a split, evenly spread, preprocessed, uint8 [N, H, W, 3]."""
    split = split.on_background(preprocess.background)
    indices = spread_indices(len(split), limit).tolist()
    return np.stack([preprocess(split.image(index)) for index in indices])


def certify(
    reference: Model,
    exported: Model,
    images: NDArray[np.uint8],
    labels: Integers | None = None,
    *,
    split: str,
    tolerance: float,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Certificate:
    """Compare two models on images, uint8 [N, H, W, 3], the exported one at every batch size.

    With the images' `labels` answers that do not depend on the image are found out. Raises
    DistclsError if the checkpoint's own logits are not finite.
    """
    expected = _in_batches(reference, images, max(batch_sizes))
    if not np.isfinite(expected).all():
        raise DistclsError("the checkpoint's own logits are not finite; there is nothing to export")
    task = reference.card.task
    decide = task.decide
    predictions = decide(expected)
    results = []
    for size in batch_sizes:
        found = _in_batches(exported, images, size)
        same = (predictions == decide(found)).all(axis=1)
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
        distinct_predictions=_distinct(predictions),
        warnings=() if labels is None else _warnings(expected, labels, task),
    )


def _distinct(predictions: Integers) -> int:
    """Different rows of [N, 1 or heads or labels]."""
    return len(np.unique(predictions, axis=0))


def _distinct_line(certificate: Certificate | AccuracyCertificate) -> str:
    number = certificate.distinct_predictions
    if number == 1:
        return (
            f"the same prediction for all of {certificate.images:,} images: their agreement proves "
            "nothing"
        )
    return f"{number:,} distinct predictions among {certificate.images:,} images"


def _warnings(logits: NDArray[np.float32], labels: Integers, task: Task) -> tuple[str, ...]:
    """What is wrong with the answers of a checkpoint on images with these labels."""
    state, spread = metric_state(task), LogitSpread(task)
    state.update(logits, labels)
    spread.update(logits)
    found = constant_answers(state.compute(), spread, task)
    return tuple(f"{problem}; agreement of such predictions proves nothing" for problem in found)


def _in_batches(model: Model, images: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    starts = range(0, len(images), size)
    return np.concatenate([model.logits(images[start : start + size]) for start in starts])


BATCH = 32
"""Images at a time, for accuracy and speed."""
TIMED = 96
"""Images over which a speed is measured, at most."""

Logits = NDArray[np.float32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceOutputs:
    """The checkpoint's outputs on a split."""

    logits: Logits
    """[N, K]."""
    labels: Integers
    """[N]; multi-head [N, heads], multi-label [N, labels]."""
    task: Task
    """The task, with the checkpoint's thresholds."""
    provider: str
    """Provider that ran the checkpoint."""

    @property
    def truths(self) -> Integers:
        """The labels in the shape of `Task.decide`'s predictions, [N, 1 or heads or labels]."""
        return self.labels[:, None] if self.labels.ndim == 1 else self.labels

    @property
    def top1(self) -> float:
        """Fraction of images that are right in every head or label."""
        return _agreement(self.task.decide(self.logits), self.truths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadAccuracy:
    """Accuracy of one head, or of all labels of a multi-label model."""

    name: str
    """Of the head, or `labels`."""
    top1: float
    top1_reference: float
    top1_agreement: float

    @property
    def drop(self) -> float:
        """Lost top-1, in percentage points."""
        return 100 * (self.top1_reference - self.top1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccuracyCertificate:
    """Accuracy of an export in reduced precision beside its checkpoint's; embedded in the file."""

    precision: str
    images: int
    """Number of images: the whole split."""
    split: str
    top1: float
    """Of the exported file: fraction of images that are right in every head or label."""
    top1_reference: float
    """Of the checkpoint."""
    top1_agreement: float
    """Fraction of images with the same prediction."""
    heads: tuple[HeadAccuracy, ...] = ()
    """One for each head, or one for all labels; empty for a single-label model."""
    max_logit_difference: float
    """Largest absolute difference of any logit."""
    max_accuracy_drop: float
    """Top-1 that was allowed to be lost, in percentage points."""
    min_agreement: float
    """Percent of images that had to keep their prediction."""
    images_per_s: float
    """Of the file on this machine, ONNX Runtime's CPU provider, 32 images at a time."""
    images_per_s_fp32: float
    """Of the same graph in fp32."""
    float_layers: tuple[str, ...]
    """Layers that were left in float because they lost too much."""
    reference: str
    """Provider that ran the checkpoint."""
    provider: str
    """Provider that ran the exported file."""
    distinct_predictions: int
    """Different predictions of the checkpoint on these images."""
    warnings: tuple[str, ...] = ()
    """Why the agreement proves little: the answers hardly depend on the image."""
    machine: str = dataclasses.field(default_factory=platform.machine)

    @property
    def drop(self) -> float:
        """Lost top-1, in percentage points; negative if it is better."""
        return 100 * (self.top1_reference - self.top1)

    @property
    def holds(self) -> bool:
        """Whether neither the whole nor a head lost too much, and few predictions changed."""
        same = 100 * self.top1_agreement >= self.min_agreement - 1e-9
        drop = max([self.drop, *(head.drop for head in self.heads)])
        return bool(drop <= self.max_accuracy_drop + 1e-9 and same)

    def to_json(self) -> dict[str, Any]:
        """Plain values for the file's metadata.

        `tolerance` is what another provider's logits may differ by: as much as the file's own.
        """
        values = dataclasses.asdict(self)
        for name in ("float_layers", "heads", "warnings"):
            values[name] = list(values[name])
        return {**values, "tolerance": self.max_logit_difference}

    def lines(self) -> list[str]:
        """A printable summary."""
        kept = f", {len(self.float_layers)} layers left in float" if self.float_layers else ""
        return [
            f"{self.precision}: top-1 {self.top1:.2%}, the checkpoint's {self.top1_reference:.2%} "
            f"({self.drop:+.2f} points lost, {self.max_accuracy_drop:g} allowed) on "
            f"{self.images:,} images of {self.split}{kept}",
            *self._worst_line(),
            f"{self.precision}: top-1 agreement {self.top1_agreement:.2%} (at least "
            f"{self.min_agreement:g}%), largest logit difference {self.max_logit_difference:.1e}",
            f"{self.precision}: {_distinct_line(self)}",
            f"{self.precision}: {self.images_per_s:,.0f} images/s on this machine's CPU, "
            f"fp32 {self.images_per_s_fp32:,.0f}",
        ]

    @property
    def worst(self) -> HeadAccuracy | None:
        """The head that lost most, if there are any."""
        return max(self.heads, key=lambda head: head.drop, default=None)

    def _worst_line(self) -> list[str]:
        head = self.worst
        if head is None:
            return []
        return [
            f"{self.precision}: worst head {head.name!r}: top-1 {head.top1:.2%}, the "
            f"checkpoint's {head.top1_reference:.2%}, agreement {head.top1_agreement:.2%}"
        ]


def predict_logits(model: Model, split: Split) -> Logits:
    """A model's logits for all images of a split, float32 [N, K].

    Raises DistclsError if an image cannot be read or its logits are not finite.
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


def reference_outputs(reference: Model, split: Split) -> ReferenceOutputs:
    """A checkpoint's outputs on a split; raises as `predict_logits` does."""
    return ReferenceOutputs(
        logits=predict_logits(reference, split),
        labels=split.labels,
        task=reference.card.task,
        provider=reference.provider,
    )


def certify_accuracy(
    exported: Model,
    split: Split,
    expected: ReferenceOutputs,
    *,
    precision: str,
    max_accuracy_drop: float,
    min_agreement: float,
    float_layers: tuple[str, ...] = (),
    speeds: tuple[float, float],
) -> AccuracyCertificate:
    """Compare an export with the checkpoint on all images of a split.

    `speeds` are images per second of the export and of the same graph in fp32.
    """
    logits = predict_logits(exported, split)
    predictions, wanted = map(expected.task.decide, (logits, expected.logits))
    return AccuracyCertificate(
        precision=precision,
        images=len(logits),
        split=split.name,
        top1=_agreement(predictions, expected.truths),
        top1_reference=expected.top1,
        top1_agreement=_agreement(predictions, wanted),
        heads=_heads(expected, predictions, wanted),
        max_logit_difference=float(np.abs(logits - expected.logits).max()),
        max_accuracy_drop=max_accuracy_drop,
        min_agreement=min_agreement,
        images_per_s=speeds[0],
        images_per_s_fp32=speeds[1],
        float_layers=float_layers,
        reference=expected.provider,
        provider=exported.provider,
        distinct_predictions=_distinct(wanted),
        warnings=_warnings(expected.logits, expected.labels, expected.task),
    )


def _agreement(left: Integers, right: Integers) -> float:
    """Fraction of images, rows of [N, 1 or heads or labels], that are the same in every column."""
    return float((left == right).all(axis=1).mean())


def _heads(
    expected: ReferenceOutputs, predictions: Integers, wanted: Integers
) -> tuple[HeadAccuracy, ...]:
    """Accuracy by head; `predictions` are the export's, `wanted` the checkpoint's."""
    task, truths = expected.task, expected.truths
    if task.single:
        return ()
    if not task.heads:
        return (_head("labels", predictions, wanted, truths),)
    return tuple(
        _head(head.name, *(each[:, place] for each in (predictions, wanted, truths)))
        for place, head in enumerate(task.heads)
    )


def _head(name: str, predictions: Integers, wanted: Integers, truths: Integers) -> HeadAccuracy:
    return HeadAccuracy(
        name=name,
        top1=float((predictions == truths).mean()),
        top1_reference=float((wanted == truths).mean()),
        top1_agreement=float((predictions == wanted).mean()),
    )


def measure_speeds(models: tuple[Model, Model], images: NDArray[np.uint8]) -> tuple[float, float]:
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
