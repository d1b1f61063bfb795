"""A checkpoint to ONNX, compared with it on real images: a file with a certificate, or no file.

The graph takes pixels: input `images`, uint8 [N, H, W, 3] RGB; normalisation and layout change are
inside. Outputs `logits` and `probabilities`, float32 [N, classes], and `features`, float32 [N, D],
the input of the last layer. N is dynamic.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distcls import log
from distcls.cli import packages_for
from distcls.config import build, options_layer
from distcls.errors import DistclsError, UsageError, require
from distcls.files import given_path, require_distinct
from distcls.model_card import best_model

if TYPE_CHECKING:
    from distcls.export.certificate import AccuracyCertificate, Certificate
    from distcls.model_card import ModelCard
    from distcls.models.checkpoint import TorchModel
    from distcls.models.classifier import Classifier
    from distcls.predictor import Predictor

OPSETS = range(18, 24)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `distcls export`."""

    ckpt: Path
    """Checkpoint to export, such as runs/digits/best.pth, or its run directory."""
    out: Path | None = None
    """File to write; default: the checkpoint's name with .onnx, .fp16.onnx or .int8.onnx."""
    data: Path | None = None
    """Dataset directory to compare on; default: the one it was trained on."""
    split: str = "val"
    """Split whose images are compared."""
    limit: int = 512
    """Maximum number of images compared; with int8 also of the calibration images."""
    tolerance: float = 1e-3
    """Maximum absolute difference of the logits in fp32."""
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """fp16 halves the file, for GPUs; int8 quarters it, with calibration on images of the split.
    The accuracy of both is measured on the whole split."""
    max_accuracy_drop: float = 0.2
    """Maximum loss of top-1 accuracy in fp16 or int8, in percentage points, overall and for each
    head; above it no file is written."""
    min_agreement: float = 99.8
    """Minimum percentage of images whose prediction in fp16 or int8 is that of the checkpoint."""
    opset: int = 18
    """ONNX operator set, 18 to 23."""
    overwrite: bool = False
    """Replace the file if it exists."""
    json: bool = False
    """Print the certificate as one JSON object on standard output."""
    quiet: bool = False
    """Print warnings and errors only."""

    def __post_init__(self) -> None:
        require(self.limit >= 1, "limit", self.limit, "at least 1")
        require(self.tolerance > 0, "tolerance", self.tolerance, "a number above 0")
        drop = self.max_accuracy_drop
        require(
            0 <= drop <= 100,
            "max_accuracy_drop",
            drop,
            "a number of percentage points from 0 to 100",
        )
        same = self.min_agreement
        require(0 <= same <= 100, "min_agreement", same, "a percentage from 0 to 100")
        allowed = f"{OPSETS.start} to {OPSETS.stop - 1}"
        require(self.opset in OPSETS, "opset", self.opset, allowed)

    @property
    def target(self) -> Path:
        """The file to write."""
        ending = ".onnx" if self.precision == "fp32" else f".{self.precision}.onnx"
        return self.out or self.checkpoint.with_suffix(ending)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint, in a run directory its best.pth. Raises UsageError without one."""
        return best_model(self.ckpt, exported=False, key="ckpt")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class ExportResult:
    """An exported file, and how it agrees with its checkpoint."""

    path: Path
    """The file."""
    certificate: Certificate | AccuracyCertificate
    """The comparison with the checkpoint on real images, as the file holds it."""

    @property
    def agreement(self) -> float:
        """Fraction of the compared images, 0 to 1, whose prediction is the checkpoint's."""
        return self.certificate.top1_agreement

    @property
    def max_logit_difference(self) -> float:
        """Largest absolute difference of any logit from the checkpoint's."""
        return self.certificate.max_logit_difference

    @property
    def images(self) -> int:
        """Number of images compared."""
        return self.certificate.images

    def load(self, **options: Any) -> Predictor:
        """The exported model, ready to predict; `options` are those of `distcls.load`."""
        from distcls.predictor import load

        return load(self.path, **options)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `distcls export --json` prints them."""
        return {"out": str(self.path), **self.certificate.to_json()}

    def __repr__(self) -> str:
        same = f"agreement={self.agreement:.2%} of {self.images:,} images"
        most = f"max_logit_difference={self.max_logit_difference:.1e}"
        return f"ExportResult({str(self.path)!r}, {same}, {most})"


def export_onnx(
    ckpt: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    data: str | os.PathLike[str] | None = None,
    split: str = "val",
    limit: int = 512,
    tolerance: float = 1e-3,
    max_accuracy_drop: float = 0.2,
    min_agreement: float = 99.8,
    opset: int = 18,
    overwrite: bool = False,
    quiet: bool = False,
) -> ExportResult:
    """Export a checkpoint to ONNX and compare the two on real images, as `distcls export` does.

        exported = distcls.export_onnx("runs/photos")
        print(exported.path, exported.agreement, exported.max_logit_difference)

    Args:
        ckpt: a best.pth, or the run directory that it is in.
        out: file to write; by default the checkpoint's name with .onnx, .fp16.onnx or .int8.onnx.
        precision: fp16 halves the file, for GPUs; int8 quarters it, calibrated on the images.
        data: dataset directory to compare on; by default the one it was trained on.
        split: split that the images are taken from: train, val or test.
        limit: the most images that are compared, evenly spread over the split; fp16 and int8 are
            measured on the whole split.
        tolerance: largest difference of any logit that is allowed in fp32.
        max_accuracy_drop: percentage points of top-1 that fp16 and int8 may lose.
        min_agreement: percent of the images that keep their prediction in fp16 and int8.
        opset: ONNX operator set, 18 to 23.
        overwrite: replace the file if there is one.
        quiet: print warnings and errors only.

    Returns:
        The file and its certificate.

    Raises:
        UsageError: for a checkpoint or data that cannot be read, a file that exists, a wrong value,
            and where the packages of distcls[train] are not installed.
        DistclsError: if the exported model disagrees with the checkpoint; nothing is written then.
    """
    given = {**locals(), "ckpt": given_path(ckpt, "ckpt")}
    options = build(ExportOptions, options_layer(ExportOptions, given))
    with packages_for("export"), log.hushed(options.quiet):
        return ExportResult(path=options.target, certificate=export(options))


def export(options: ExportOptions) -> Certificate | AccuracyCertificate:
    """Export, compare with the checkpoint, and write the file with its certificate.

    Raises UsageError for wrong input; DistclsError if the two models disagree, or reduced precision
    loses too much accuracy, and writes nothing.
    """
    require_distinct({"out": options.target}, {"ckpt": [options.checkpoint]})
    if options.target.exists() and not options.overwrite:
        raise UsageError(f"{options.target} exists already; --overwrite replaces it")
    if options.target.is_dir():
        raise UsageError(f"out: {options.target} is a folder, expected the name of a file")
    if not options.checkpoint.exists():
        raise UsageError(f"ckpt: {options.ckpt} does not exist")
    from distcls.data.dataset import Dataset
    from distcls.evaluation.classes import match_classes
    from distcls.export.certificate import load_images, spread_indices
    from distcls.export.reduced_precision import Reduction, reduce_precision
    from distcls.files import atomic_path
    from distcls.models.checkpoint import open_checkpoint

    reference = open_checkpoint(options.checkpoint, device="cpu")
    trained_on = Path(reference.card.training.get("dataset") or "")
    # an exported file may be published: a path would reveal details of this machine
    training = {**reference.card.training, "dataset": trained_on.name}
    reference.card = dataclasses.replace(reference.card, training=training)
    folder = options.data or trained_on
    dataset = Dataset.open(folder)
    split = match_classes(dataset.split(options.split), reference.card.task, str(folder)).split
    images = load_images(split, reference.card.preprocess, options.limit)
    graph = to_onnx(reference.model, reference.card, options.opset)
    with atomic_path(options.target) as temporary:
        if options.precision == "fp32":
            labels = split.labels[spread_indices(len(split), options.limit)]
            return _write_fp32(options, reference, graph, (images, labels), temporary)
        reduction = Reduction(
            precision=options.precision,
            reference=reference,
            graph=graph,
            split=split,
            images=images,
            max_accuracy_drop=options.max_accuracy_drop,
            min_agreement=options.min_agreement,
        )
        certificate = reduce_precision(reduction, temporary)
        _say(certificate)
        return certificate


def _write_fp32(
    options: ExportOptions, reference: TorchModel, graph: Any, data: Any, temporary: Path
) -> Certificate:
    """Write the graph, compare it with the checkpoint on images and labels, add the certificate."""
    from distcls.export.certificate import certify
    from distcls.export.graph import write
    from distcls.runtime.golden import golden_metadata
    from distcls.runtime.model import OnnxModel

    write(temporary, graph, reference.card)
    exported = OnnxModel(temporary)
    certificate = certify(
        reference,
        exported,
        *data,
        split=options.split,
        tolerance=options.tolerance,
    )
    _say(certificate)
    if not certificate.holds:
        raise DistclsError(
            f"{options.checkpoint}: the exported graph disagrees with the checkpoint beyond the "
            f"tolerance; {options.target} was not written"
        )
    card = dataclasses.replace(reference.card, certificate=certificate.to_json())
    write(temporary, graph, card, golden_metadata(exported))
    return certificate


def _say(certificate: Certificate | AccuracyCertificate) -> None:
    for line in certificate.lines():
        log.say(line)
    for warning in certificate.warnings:
        log.warn(warning)


def to_onnx(model: Classifier, card: ModelCard, opset: int) -> Any:
    """The network with its probabilities, and its features, as an ONNX ModelProto."""
    import torch

    from distcls.export.graph import add_features, hushed, strip_debug_information

    task = card.task

    class WithProbabilities(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = model

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.classifier(images)
            if task.single:
                return logits, torch.softmax(logits, dim=1)
            if task.kind == "multi_label":
                return logits, torch.sigmoid(logits)
            parts = [torch.softmax(logits[:, part], dim=1) for part in task.slices]
            return logits, torch.cat(parts, dim=1)

    example = torch.zeros(2, *card.preprocess.size, 3, dtype=torch.uint8)
    with hushed():
        program = torch.onnx.export(
            WithProbabilities().eval(),
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits", "probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            opset_version=opset,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    strip_debug_information(proto)
    add_features(proto)
    return proto
