"""`python -m export.onnx --ckpt best.pth`: a checkpoint to ONNX, proven on images, or no file.

The graph takes pixels: input `images`, uint8 [N, H, W, 3] RGB; normalisation and change of layout
are inside. Outputs `logits` and `probabilities`, float32 [N, classes]. N is free.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distcls import log
from distcls.config import parse
from distcls.door import run
from distcls.errors import DistclsError, UsageError, require

if TYPE_CHECKING:
    from distcls.bundle import ModelCard
    from distcls.models.classifier import Classifier
    from export.parity import Certificate

OPSETS = range(18, 24)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What `export.onnx` can be told."""

    ckpt: Path
    """Checkpoint to export, such as runs/digits/best.pth."""
    out: Path | None = None
    """File to write; unset, the checkpoint's name with .onnx."""
    data: Path | None = None
    """Dataset directory whose images prove parity; unset, the one it was trained on."""
    split: str = "val"
    """Split the images are taken from."""
    limit: int = 512
    """Images compared, at most."""
    tolerance: float = 1e-3
    """Largest difference of any logit that is allowed."""
    opset: int = 18
    """ONNX operator set, 18 to 23."""
    overwrite: bool = False
    """Replace the file if there is one."""
    json: bool = False
    """Print the certificate as one JSON object on standard output."""
    quiet: bool = False
    """Print warnings and errors only."""

    def __post_init__(self) -> None:
        require(self.limit >= 1, "limit", self.limit, "at least 1")
        require(self.tolerance > 0, "tolerance", self.tolerance, "a number above 0")
        allowed = f"{OPSETS.start} to {OPSETS.stop - 1}"
        require(self.opset in OPSETS, "opset", self.opset, allowed)

    @property
    def target(self) -> Path:
        """The file to write."""
        return self.out or self.ckpt.with_suffix(".onnx")


def export(options: ExportOptions) -> Certificate:
    """Export, prove parity and write the file with its certificate.

    Raises UsageError for wrong input; DistclsError if the two models disagree, and writes nothing.
    """
    if options.target.exists() and not options.overwrite:
        raise UsageError(f"{options.target} exists already; --overwrite replaces it")
    from distcls.data.dataset import Dataset
    from distcls.files import atomic_path
    from distcls.inference.session import OnnxModel
    from distcls.models.checkpoint import open_checkpoint
    from export.parity import certify, load_images

    reference = open_checkpoint(options.ckpt, device="cpu")
    folder = options.data or Path(reference.card.training["dataset"])
    split = Dataset.open(folder).split(options.split)
    images = load_images(split, reference.card.preprocess, options.limit)
    graph = to_onnx(reference.model, reference.card, options.opset)
    with atomic_path(options.target) as part:
        _write(part, graph, reference.card)
        certificate = certify(
            reference,
            OnnxModel(part),
            images,
            split=options.split,
            tolerance=options.tolerance,
        )
        for line in certificate.lines():
            log.say(line)
        if not certificate.holds:
            raise DistclsError(
                f"{options.ckpt}: the exported graph disagrees with the checkpoint beyond the "
                f"tolerance; {options.target} was not written"
            )
        card = dataclasses.replace(reference.card, certificate=certificate.to_json())
        _write(part, graph, card)
    return certificate


def to_onnx(model: Classifier, card: ModelCard, opset: int) -> Any:
    """The network with its probabilities as an ONNX ModelProto."""
    import torch

    targets = card.resolved_targets

    class WithProbabilities(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = model

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.classifier(images)
            if targets.single:
                return logits, torch.softmax(logits, dim=1)
            if targets.kind == "multi_label":
                return logits, torch.sigmoid(logits)
            parts = [torch.softmax(logits[:, part], dim=1) for part in targets.slices]
            return logits, torch.cat(parts, dim=1)

    example = torch.zeros(2, *card.preprocess.size, 3, dtype=torch.uint8)
    with _hushed():
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
    return program.model_proto


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """The exporter talks of its own internals on standard output, by warnings and by logging."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _write(path: Path, graph: Any, card: ModelCard) -> None:
    """Check the graph, give it its metadata and write it."""
    import onnx

    onnx.checker.check_model(graph, full_check=True)
    onnx.helper.set_model_props(graph, card.to_metadata())
    path.write_bytes(graph.SerializeToString())


def main(arguments: Sequence[str]) -> None:
    """The command."""
    options = parse(
        ExportOptions,
        arguments,
        prog="python -m export.onnx",
        about="Export a checkpoint to ONNX and prove on real images that it answers the same.",
    )
    log.set_quiet(options.quiet)
    certificate = export(options)
    size = options.target.stat().st_size / 1e6
    log.say(f"wrote {options.target} ({size:.1f} MB)")
    if options.json:
        print(json.dumps({"out": str(options.target), **certificate.to_json()}))


if __name__ == "__main__":
    run(main)
