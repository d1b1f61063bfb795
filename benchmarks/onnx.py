"""`python -m benchmarks.onnx`: the model alone, PyTorch's modes against each provider.

MobileNetV3-Large at 224 pixels, batches of 1 to 64, 1 and 2 threads; pixels in memory to logits, no
decoding. PyTorch: eager, channels_last, compiled, and in bf16 (autocast, channels_last), each from
the same uint8 pixels. Ours: a session with that number of threads, one batch at a time. Each runs
in a separate process for each number of threads, and cycles through the batch sizes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Apart, Contestant, alternate, finish
from benchmarks.photographs import model_for, photographs, pixels
from distcls import plotting
from distcls.runtime.providers import PROVIDERS, ExecutionConfig, Precision, installed, versions
from distcls.system import available_cores

BATCHES = (1, 4, 16, 64)
SECONDS = 0.5
"""Of one round of one batch size."""

Images = NDArray[np.uint8]


def torch_way(model: Path, images: Images, way: str, threads: int) -> Contestant:
    """PyTorch: eager, channels_last, compiled or bf16."""
    import torch

    from distcls.models.checkpoint import open_checkpoint

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = open_checkpoint(model.with_suffix(".pth"), device).model.eval()
    if way != "eager":
        network = network.to(memory_format=torch.channels_last)
    computed: Any = torch.compile(network) if way == "compiled" else network

    def compute(batch: Images) -> None:
        bf16 = torch.autocast(device, torch.bfloat16, enabled=way == "bf16")
        with torch.inference_mode(), bf16:
            pixels = torch.from_numpy(batch).to(device)
            if way == "eager":  # as most programs lay their images out
                pixels = pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
            computed(pixels).float().cpu()

    return _sweep(compute, images)


def provider_way(
    model: Path, images: Images, provider: str, precision: Precision, threads: int
) -> Contestant:
    """ONNX Runtime with a provider, one batch at a time."""
    from distcls.runtime.model import OnnxModel

    execution = ExecutionConfig(provider=provider, precision=precision, threads=threads)
    opened = OnnxModel(model, execution)
    return _sweep(opened.logits, images)


def _sweep(compute: Callable[[Images], object], images: Images) -> Contestant:
    """A contestant that takes the next batch size each time; the first round goes through all."""
    rounds = -1

    def run() -> float:
        nonlocal rounds
        if rounds < 0:
            for size in BATCHES:
                compute(images[:size])
        size = BATCHES[max(rounds, 0) % len(BATCHES)]
        rounds += 1
        done, began = 0, time.perf_counter()
        while (seconds := time.perf_counter() - began) < SECONDS or not done:
            compute(images[:size])
            done += size
        return done / seconds

    return run


def compare(
    model: Path, images: Images, threads: int, rounds: int, only: Sequence[str] | None
) -> dict[str, dict[int, list[float]]]:
    """Images per second of each contestant with this number of threads, by batch size."""
    entered: dict[str, tuple[Any, ...]] = {
        f"PyTorch {way}": (torch_way, model, images, way, threads)
        for way in ("eager", "channels_last", "compiled", "bf16")
    }
    for provider in reversed(installed()):
        for precision in reversed(PROVIDERS[provider].precisions):
            made = (provider_way, model, images, provider, precision, threads)
            entered[f"{provider} {precision}"] = made
    with ExitStack() as stack:
        contestants = {
            name: stack.enter_context(Apart(*made))
            for name, made in entered.items()
            if only is None or name in only
        }
        rates = alternate(contestants, rounds * len(BATCHES))
    return {
        name: {size: values[place :: len(BATCHES)] for place, size in enumerate(BATCHES)}
        for name, values in rates.items()
    }


def table(rates: dict[str, dict[int, list[float]]]) -> str:
    """Medians by batch size."""
    lines = [f"{'images/s at batch':<26}" + "".join(f"{size:>9}" for size in BATCHES)]
    for name, by_size in rates.items():
        middles = [statistics.median(by_size[size]) for size in BATCHES]
        lines.append(f"{name:<26}" + "".join(f"{middle:>9.1f}" for middle in middles))
    return "\n".join(lines)


def draw(all_rates: dict[int, dict[str, dict[int, list[float]]]], path: Path) -> None:
    """A panel for each number of threads, a line for each contestant."""
    figure = plotting.new_figure(5 * len(all_rates) + 1.5, 4)
    panels = figure.subplots(1, len(all_rates), squeeze=False, sharey=True)[0]
    for panel, (threads, rates) in zip(panels, all_rates.items(), strict=True):
        for name, by_size in rates.items():
            middles = [statistics.median(by_size[size]) for size in BATCHES]
            style = "--" if name.startswith("PyTorch") else "-"
            panel.plot(BATCHES, middles, style, marker="o", ms=3, label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(BATCHES, [str(size) for size in BATCHES])
        panel.set_title(f"{threads} thread" + "s" * (threads != 1), size=10)
        panel.set_xlabel("batch size")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("images/s")
    panels[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    plotting.save(figure, path)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True, help="folder of large photographs")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, min(2, available_cores())])
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    parser.add_argument("--only", nargs="+", help="contestants, by their names in the table")
    parser.add_argument("--out", type=Path, default=Path("onnx.png"), help="the picture")
    given = parser.parse_args()
    folder = photographs(given.pictures, 2000)
    model, images = model_for(folder), pixels(folder, max(BATCHES))
    rates = {}
    for threads in dict.fromkeys(given.threads):
        rates[threads] = compare(model, images, threads, given.rounds, given.only)
        print(f"MobileNetV3-Large at 224, the model alone, {threads} thread(s)")
        print(table(rates[threads]), end="\n\n", flush=True)
    draw(rates, given.out)
    rounded = {
        threads: {
            name: {size: [round(value, 1) for value in values] for size, values in sizes.items()}
            for name, sizes in own.items()
        }
        for threads, own in rates.items()
    }
    finish("onnx", images_per_s=rounded, versions=versions())


if __name__ == "__main__":
    main()
