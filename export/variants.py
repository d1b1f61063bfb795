"""Variants of an export in lower precision, each with its certificate, or refused."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.bundle import ModelCard
from distcls.data.dataset import Split
from distcls.errors import DistclsError
from distcls.inference.model import Model
from distcls.inference.session import OnnxModel
from export.accuracy import VariantCertificate, certify_variant, expect
from export.graph import write
from export.half import to_half
from export.quantize import quantize
from export.speed import measure_speeds

Precision = Literal["fp32", "fp16", "int8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a variant is made from."""

    precision: Precision
    reference: Model
    """The checkpoint."""
    graph: Any
    """Its ModelProto in fp32."""
    split: Split
    """The images that decide."""
    images: NDArray[np.uint8]
    """Some of them, preprocessed, [N, H, W, 3]: they calibrate int8, and speeds are measured."""
    max_accuracy_drop: float
    """Points of top-1 that may be lost."""
    min_agreement: float
    """Percent of images that have to keep their answer."""

    @property
    def card(self) -> ModelCard:
        """The checkpoint's, until there is a certificate."""
        return self.reference.card


def make_variant(recipe: Recipe, part: Path) -> VariantCertificate:
    """Write the variant to `part`, with its certificate in it.

    Raises DistclsError, saying how much is lost, if that is more than may be.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix="distcls-variant-") as name:
        trials = _Trials(recipe, part, Path(name))
        if recipe.precision == "int8":
            quantize(recipe.graph, recipe.images, lambda p, left: trials.good(onnx.load(p), left))
        else:
            trials.good(to_half(recipe.graph), ())
    if not trials.tried[-1].holds:
        best = max(trials.tried, key=lambda certificate: certificate.top1_agreement)
        raise DistclsError(
            f"{recipe.precision} loses too much: {_outcome(best)} on {best.images:,} images of "
            f"{best.split}; --max-accuracy-drop {recipe.max_accuracy_drop:g} and --min-agreement "
            f"{recipe.min_agreement:g} do not allow it"
        )
    return trials.tried[-1]


def _outcome(certificate: VariantCertificate) -> str:
    part = certificate.worst
    more = f" ({part.drop:.2f} of {part.name!r})" if part is not None else ""
    return (
        f"{certificate.drop:.2f} points of top-1{more}, and "
        f"{100 * certificate.top1_agreement:.2f} % keep their answer"
    )


class _Trials:
    """Variants that were tried; the last one is in the file."""

    def __init__(self, recipe: Recipe, part: Path, folder: Path) -> None:
        self.tried: list[VariantCertificate] = []
        self._recipe = recipe
        self._part = part
        self._expected = expect(recipe.reference, recipe.split)
        fp32 = folder / "fp32.onnx"
        write(fp32, recipe.graph, recipe.card)
        self._fp32 = OnnxModel(fp32)

    def good(self, graph: Any, float_layers: tuple[str, ...]) -> bool:
        """Write a variant with its certificate, and tell whether it is good enough."""
        recipe = self._recipe
        write(self._part, graph, recipe.card)
        variant = OnnxModel(self._part)
        certificate = certify_variant(
            variant,
            recipe.split,
            self._expected,
            precision=recipe.precision,
            max_accuracy_drop=recipe.max_accuracy_drop,
            min_agreement=recipe.min_agreement,
            float_layers=float_layers,
            speeds=measure_speeds((variant, self._fp32), recipe.images),
        )
        card = dataclasses.replace(recipe.card, certificate=certificate.to_json())
        write(self._part, graph, card)
        self.tried.append(certificate)
        if not certificate.holds and recipe.precision == "int8":
            kept = f" with {len(float_layers)} layers in float" if float_layers else ""
            log.say(f"int8{kept} loses {_outcome(certificate)}")
        return certificate.holds
