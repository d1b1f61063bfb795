"""What a person sees of a run: the banner at its start, the bar while it goes on."""

from __future__ import annotations

import platform
import time

import torch
from accelerate import Accelerator
from tqdm import tqdm

from distcls import log
from distcls.data.loader import Loader
from distcls.models.classifier import count_macs, count_parameters
from distcls.models.stem import stem_stride
from distcls.training.config import TrainConfig
from distcls.training.engine import Engine
from distcls.training.state import Progress

BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"


class Stopwatch:
    """Rates since the last lap, from a clock that never jumps."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._start = time.perf_counter()
        self._waited = loader.waited
        self._images = 0

    def count(self, images: int) -> None:
        """Take note of images that were trained on."""
        self._images += images

    def lap(self) -> tuple[float, float]:
        """Images per second and share of time spent waiting for data, since the last lap."""
        now, waited = time.perf_counter(), self._loader.waited
        seconds = max(now - self._start, 1e-9)
        rates = self._images / seconds, min(1.0, (waited - self._waited) / seconds)
        self._start, self._waited, self._images = now, waited, 0
        return rates


def banner(config: TrainConfig, engine: Engine) -> list[str]:
    """What runs where, in a few lines."""
    accelerator, preprocess = engine.accelerator, engine.preprocess
    height, width = preprocess.size
    macs = count_macs(engine.model, preprocess.size)
    parameters = count_parameters(engine.model)
    stride = stem_stride(engine.model.backbone) or "none"
    data = engine.data
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    store = "pack" if data.train.packed else "files"
    processes = f"{accelerator.num_processes} process(es)"
    layout = "contiguous, weights sharded (FSDP)" if engine.sharding.on else config.layout
    counts = f"{len(data.train_samples):,} train, {len(data.val_samples):,} val"
    size = f"{parameters / 1e6:.2f} M parameters, {macs / 1e6:.1f} M MACs at {height}x{width}"
    return [
        f"device     {_device(accelerator)}, {processes}, {precision}, {layout}",
        f"model      {config.model.name}, stem stride {stride}, {size}",
        f"data       {config.data}: {counts}, {data.targets.summary()}, from {store}",
        f"steps      {config.epochs} epochs of {engine.order.steps}, "
        f"global batch {config.batch_size} = {processes} x {engine.accumulate} part(s)",
        f"optimiser  {config.optimizer.name}, {config.schedule.name} schedule, "
        f"learning rate up to {config.lr:g}",
        f"writes to  {config.out}",
    ]


def _device(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    machine = platform.processor() or platform.machine()
    return f"{accelerator.device.type} ({machine}, {torch.get_num_threads()} threads)"


def epoch_line(row: dict[str, float], epochs: int, called: str) -> str:
    """One finished epoch, and what it is called (`best`, or nothing)."""
    exact = f"  val exact {row['val_exact']:.4f}" if "val_exact" in row else ""
    return (
        f"epoch {row['epoch']:>3.0f}/{epochs}  train loss {row['train_loss']:.4f}  "
        f"val loss {row['val_loss']:.4f}  val top-1 {row['val_top1']:.4f}{exact}  "
        f"{row['images_per_s']:,.0f} img/s  data wait {row['data_wait']:.0%}  "
        f"{row['seconds']:.0f} s  {called}"
    ).rstrip()


class Bar:
    """The live bar of an epoch: step, loss, images/s, time left, share of waiting for data."""

    def __init__(self, progress: Progress, epochs: int, steps: int) -> None:
        self._bar = tqdm(
            total=steps,
            initial=progress.epoch_step,
            desc=f"epoch {progress.epoch + 1}/{epochs}",
            disable=not log.show_progress(),
            leave=False,
            unit="step",
            bar_format=BAR,
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self) -> None:
        """One more step is done."""
        self._bar.update()

    def rates(self, loss: float, images_per_s: float, data_wait: float) -> None:
        """Show fresh figures."""
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, {images_per_s:,.0f} img/s, data wait {data_wait:.0%}"
        )
