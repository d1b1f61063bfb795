"""The proof that a variant in lower precision is good enough: its accuracy on the whole split.

Of a model with several heads the whole answer counts, and each head by itself; of labels all
decisions of an image, and each by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls.data.dataset import Split
from distcls.errors import DistclsError
from distcls.inference.inputs import from_split
from distcls.inference.model import Model
from distcls.inference.pipeline import stream
from distcls.targets import Integers, Targets

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
    targets: Targets
    """What they are answers to, with the checkpoint's thresholds."""
    provider: str
    """What computed it."""

    @property
    def truths(self) -> Integers:
        """The labels as `Targets.decide` gives answers, [N, parts]."""
        return self.labels[:, None] if self.labels.ndim == 1 else self.labels

    @property
    def top1(self) -> float:
        """Part of the images whose whole answer is right."""
        return _same(self.targets.decide(self.logits), self.truths)


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
        logits=answers(reference, split),
        labels=split.labels,
        targets=reference.card.resolved_targets,
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
    given, wanted = (expected.targets.decide(logits) for logits in (found, expected.logits))
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
    targets, truths = expected.targets, expected.truths
    if targets.single:
        return ()
    if not targets.heads:
        return (_part("labels", given, wanted, truths),)
    return tuple(
        _part(head.name, *(each[:, place] for each in (given, wanted, truths)))
        for place, head in enumerate(targets.heads)
    )


def _part(name: str, given: Integers, wanted: Integers, truths: Integers) -> PartAccuracy:
    return PartAccuracy(
        name=name,
        top1=float((given == truths).mean()),
        top1_reference=float((wanted == truths).mean()),
        top1_agreement=float((given == wanted).mean()),
    )
