"""What a run tells: banner and progress bar, metrics.jsonl, history.csv, curves.png, trackers."""

from __future__ import annotations

import csv
import io
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils.dataclasses import LoggerType
from tqdm import tqdm

from distcls import log
from distcls.config import dump_yaml, flatten
from distcls.errors import UsageError, did_you_mean
from distcls.files import require_writable, write_text
from distcls.models.classifier import count_macs, count_parameters
from distcls.models.factory import stem_stride
from distcls.plotting import curves
from distcls.training.checkpointing import Progress
from distcls.training.config import TrainConfig
from distcls.training.engine import Engine
from distcls.training.loader import Loader

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
    layout = "contiguous, weights sharded (FSDP)" if engine.sharding.on else config.memory_format
    counts = f"{len(data.train_samples):,} train, {len(data.val_samples):,} val"
    size = f"{parameters / 1e6:.2f} M parameters, {macs / 1e6:.1f} M MACs at {height}x{width}"
    return [
        f"device     {_device(accelerator)}, {processes}, {precision}, {layout}",
        f"model      {config.model.name}, stem stride {stride}, {size}",
        f"data       {config.data}: {counts}, {data.task.summary()}, from {store}",
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


PROJECT = "distcls"

Track = Callable[[dict[str, float], int], None]
"""Takes named figures and the step that they belong to."""


def require_tracker(name: str | None) -> None:
    """Raise UsageError unless the tracker is known and its package installed."""
    if name is None:
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        known = sorted(LOGGER_TYPE_TO_CLASS)
        raise UsageError(f"tracker: unknown tracker {name!r}{did_you_mean(name, known)}")
    if LoggerType(name) not in get_available_trackers():
        raise UsageError(f"tracker: {name} is not installed; `pip install {name}`")


def open_tracker(config: TrainConfig, accelerator: Accelerator, step: int) -> Track:
    """Begin, or go on after `step` steps; what it returns does nothing if none was asked for.

    TensorBoard's files go to `distcls/` in the run directory; others follow their own settings.
    """
    if config.tracker is None:
        return lambda values, step: None
    # what a run that was killed has written beyond the state that it is resumed from
    own = {"tensorboard": {"purge_step": step}} if step else {}
    settings = flatten(yaml.safe_load(dump_yaml(config)))
    values = {key: _plain(value) for key, value in settings.items()}
    accelerator.init_trackers(PROJECT, config=values, init_kwargs=own)
    return lambda values, step: accelerator.log(values, step=step)


def _plain(value: object) -> bool | int | float | str:
    """What every tracker takes as a setting."""
    return value if isinstance(value, bool | int | float | str) else str(value)


CONFIG, METRICS, HISTORY, CURVES = "config.yaml", "metrics.jsonl", "history.csv", "curves.png"
PLACES = ("step", "epoch")
"""What says where a figure belongs and is none itself."""
CURVES_SHARE = 0.005
"""Share of the time that drawing may take: one takes 0.2 to 0.5 s, some epochs little more."""
BEST, LAST = "best.pth", "last"


def require_free(out: Path, resume: str) -> None:
    """Raise UsageError if `out` holds a run that this one would overwrite."""
    if resume == "none" and (out / CONFIG).exists():
        raise UsageError(
            f"{out} holds a run already; choose another --out, or continue it with --resume auto"
        )


class Records:
    """config.yaml, metrics.jsonl, history.csv and curves.png of a run directory."""

    def __init__(self, config: TrainConfig, step: int, track: Track | None = None) -> None:
        """Open the records of a run that has finished `step` steps; later lines are dropped.

        Numbers of later lines also go to `track`.
        """
        self.folder = config.out
        self._track = track
        self._monitor = config.monitor.metric
        self._mode = config.monitor.resolved_mode
        self._undrawn: list[dict[str, float]] = []
        self._next_drawing = 0.0
        require_writable(self.folder)
        write_text(self.folder / CONFIG, dump_yaml(config))
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8") if step and path.exists() else ""
        # a kill or a full disk may have left half of the last line
        whole = [line for line in lines.splitlines(keepends=True) if line.endswith("\n")]
        write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= step))
        self._metrics = path.open("a", encoding="utf-8")

    def line(self, kind: str, **values: Any) -> None:
        """Append one JSON line to metrics.jsonl; it carries `kind` (step or epoch) and `step`."""
        self._metrics.write(json.dumps({"kind": kind, **values}) + "\n")
        self._metrics.flush()
        if self._track is not None:
            numbers = {f"{kind}/{name}": v for name, v in values.items() if name not in PLACES}
            self._track(numbers, values["step"])

    def epochs(self, history: list[dict[str, float]]) -> None:
        """Rewrite history.csv, and now and then curves.png, from all epochs so far."""
        table = io.StringIO()
        writer = csv.DictWriter(table, list(history[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_text(self.folder / HISTORY, table.getvalue())
        self._undrawn = history
        if time.monotonic() >= self._next_drawing:
            self._draw()

    def close(self) -> None:
        """Draw what is not drawn yet and close metrics.jsonl."""
        if self._undrawn:
            self._draw()
        self._metrics.close()

    def _draw(self) -> None:
        began = time.monotonic()
        curves(self._undrawn, self.folder / CURVES, self._monitor, self._mode)
        ended = time.monotonic()
        self._undrawn, self._next_drawing = [], ended + (ended - began) / CURVES_SHARE
