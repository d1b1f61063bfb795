"""`python -m benchmarks.many`: a million small inputs: peak memory, the first row, images/s.

The handwritten digits as PNG files, listed again and again in a manifest, go through `distcls
predict` with a MobileNetV3-Small of random weights at 28 pixels, as a user starts it. Memory is
what the system counts as resident (VmRSS, and its peak VmHWM); the first row is there once the file
of the first part holds more than the header.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from benchmarks.common import finish
from distcls import plotting
from distcls.imaging import Preprocess
from distcls.model_card import ModelCard
from distcls.task import Task

SIDE = 28
INTERVAL = 0.25
"""Seconds between two polls of the process."""


def write_images(folder: Path) -> list[str]:
    """scikit-learn's 1,797 digits as PNG files of 28x28; their names."""
    from sklearn.datasets import load_digits

    names = []
    for index, image in enumerate(load_digits().images):
        grey = cv2.resize((image * 255 / 16).astype(np.uint8), (SIDE, SIDE))
        names.append(f"{index:04d}.png")
        cv2.imwrite(str(folder / names[-1]), grey)
    return names


def write_model(path: Path) -> None:
    """MobileNetV3-Small for ten classes with random weights."""
    import onnx
    import torch

    from distcls.export.onnx import to_onnx
    from distcls.models import factory
    from distcls.models.config import ModelConfig

    torch.manual_seed(0)
    classes = tuple("0123456789")
    preprocess = Preprocess(size=(SIDE, SIDE))
    model = factory.build(ModelConfig(name="mobilenet_v3_small"), len(classes), preprocess).eval()
    card = ModelCard(
        architecture={"name": "mobilenet_v3_small"},
        task=Task(classes=classes),
        preprocess=preprocess,
    )
    graph = to_onnx(model, card, 18)
    onnx.helper.set_model_props(graph, card.to_metadata())
    path.write_bytes(graph.SerializeToString())


def watch(process: subprocess.Popen[bytes], out: Path) -> tuple[list[float], float, float]:
    """Resident MB at each poll, their peak, and the seconds until the first row."""
    resident, peak, first = [], 0.0, 0.0
    began = looked = time.monotonic()
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status))
        if "VmRSS" in found and time.monotonic() - looked >= INTERVAL:
            looked = time.monotonic()
            resident.append(int(found["VmRSS"]) / 1000)
        peak = max(peak, int(found.get("VmHWM", 0)) / 1000)
        if not first and _has_row(out):
            first = time.monotonic() - began
        time.sleep(0.01 if not first else INTERVAL)
    return resident, peak, first


def _has_row(out: Path) -> bool:
    parts = out.with_name(out.name + ".parts")
    try:
        files = [path for path in parts.iterdir() if ".csv" in path.name]
        return any(b"\n" in path.read_bytes().partition(b"\n")[2] for path in files)
    except OSError:
        return False


def draw(resident: list[float], seconds: float, path: Path) -> None:
    """Resident memory over time."""
    figure = plotting.new_figure(7, 3)
    axes = figure.subplots()
    axes.plot(np.linspace(0, seconds, len(resident)), resident, color=plotting.BLUE)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("resident memory, MB")
    plotting.save(figure, path)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="inputs")
    parser.add_argument("--provider", default="auto")
    parser.add_argument("--out", type=Path, default=Path("many.png"), help="the picture")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        names = write_images(folder)
        write_model(folder / "m.onnx")
        with (folder / "list.csv").open("w") as handle:
            handle.write("path\n")
            handle.writelines(f"{names[row % len(names)]}\n" for row in range(given.count))
        command = [sys.executable, "-m", "distcls.commands.predict", str(folder / "list.csv")]
        command += ["--model", str(folder / "m.onnx"), "--out", str(folder / "pre.csv")]
        command += ["--provider", given.provider]
        began = time.monotonic()
        with subprocess.Popen(command) as process:
            resident, peak, first = watch(process, folder / "pre.csv")
        seconds = time.monotonic() - began
        if process.returncode:
            sys.exit(process.returncode)
        with (folder / "pre.csv").open() as handle:
            assert sum(1 for _ in handle) == given.count + 1
    later = resident[len(resident) // 4 :]
    print(f"{given.count:,} images in {seconds:.0f} s, {given.count / seconds:,.0f} images/s")
    print(
        f"first row after {first:.2f} s; peak {peak:.0f} MB; later {min(later):.0f} MB to", end=" "
    )
    print(f"{max(later):.0f} MB")
    draw(resident, seconds, given.out)
    finish(
        "many",
        count=given.count,
        images_per_s=round(given.count / seconds, 1),
        first_row_s=round(first, 2),
        peak_mb=round(peak),
        later_mb=[round(min(later)), round(max(later))],
    )


if __name__ == "__main__":
    main()
