"""`python -m benchmarks.eight_models SOURCE`: eight architectures through the whole pipeline.

Each trains for one epoch on the same 12,000 images of FashionMNIST (SOURCE is the folder of its IDX
files), with one recipe for all, is exported, and the exported file is evaluated on all test images:
by the commands that a user types, in processes of their own. One recipe and one epoch: the table
shows that each works and what it costs, not which is best.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import finish
from benchmarks.launching import call, train
from distcls.data.prepare import PrepareOptions, prepare
from distcls.imaging import Preprocess
from distcls.models import factory
from distcls.models.classifier import count_macs, count_parameters
from distcls.models.config import ModelConfig

MODELS = (
    *("simple_cnn", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0"),
    *("efficientnet_b0", "resnet18", "regnet_y_400mf", "convnext_atto"),
)
"""One per family, of those whose epoch takes a minute or two on two cores."""
SIDE = 32
"""Pixels: a ConvNeXt halves its 4x4 patches three times, and of 28 nothing would be left."""
RECIPE = [
    *("--input.size", str(SIDE)),
    *("--epochs", "1", "--batch-size", "64", "--lr", "2e-3", "--schedule.warmup", "10%"),
    *("--augment.flip", "0.5", "--augment.crop-padding", "2", "--log-every", "10"),
]


def measure(name: str, data: Path, out: Path, images: int) -> dict[str, Any]:
    """Train, export and evaluate one network."""
    train(data, out, *RECIPE, "--limit", images, "--model.name", name)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    [epoch] = [line for line in lines if line["kind"] == "epoch"]
    certificate = call("export", "--ckpt", out / "best.pth", "--json", "--quiet")
    model = ["--model", out / "best.onnx", "--data", data, "--split", "test"]
    metrics = call("evaluate", *model, "--json", "--quiet")
    parity = certificate["results"]
    return {
        "seconds": round(epoch["seconds"], 1),
        "images_per_s": round(epoch["images_per_s"], 1),
        "top1": metrics["top1"],
        "parity_images": certificate["images"],
        "agreement": min(result["top1_agreement"] for result in parity),
        "largest_logit_difference": max(result["max_logit_difference"] for result in parity),
    }


def sizes(name: str) -> dict[str, Any]:
    """Parameters, and multiply-accumulates per image, as it is trained."""
    size = (SIDE, SIDE)
    model = factory.build(ModelConfig(name=name), 10, Preprocess(size=size))
    return {"parameters": count_parameters(model), "macs": count_macs(model, size)}


def row(name: str, found: dict[str, Any]) -> str:
    """A line of the printed table."""
    return (
        f"{name:<22}{found['parameters'] / 1e6:>9.2f} M{found['macs'] / 1e6:>9.1f} M"
        f"{found['seconds']:>9.1f}{found['images_per_s']:>9.1f}{found['top1']:>9.4f}"
        f"{found['agreement']:>9.2%}{found['largest_logit_difference']:>10.1e}"
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder of FashionMNIST's IDX files")
    parser.add_argument("--images", type=int, default=12_000, help="for training")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="file for the JSON line, too")
    given = parser.parse_args()
    heads = ("parameters", "MACs", "epoch, s", "images/s", "top-1", "agree", "largest")
    widths = (11, 11, 9, 9, 9, 9, 10)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "fashion")
        prepare(PrepareOptions(source=given.source, out=data, val_fraction=0.05, quiet=True))
        print(f"{'one epoch, test images':<22}", end="")
        print(*(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)), sep="")
        for name in given.models:
            found = sizes(name) | measure(name, data, Path(scratch, name), given.images)
            print(row(name, found), flush=True)
            figures[name] = found
    finish("eight_models", out=given.out, images=given.images, recipe=RECIPE, models=figures)


if __name__ == "__main__":
    main()
