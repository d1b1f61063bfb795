"""The output of a run: banner, progress bar, metrics.jsonl, curves.png, experiment trackers."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

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
from distcls.imaging import Preprocess
from distcls.log import warn
from distcls.plotting import curves
from distcls.task import class_list
from distcls.training.checkpointing import TrainingState
from distcls.training.config import TrainConfig, chosen
from distcls.training.engine import EngineSummary, StepReport
from distcls.training.inputs import TrainingInput
from distcls.training.stability import Anomalies

BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"


class Stopwatch:
    """Rates since the last lap, from a clock that never jumps."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._images, self._waited = 0, 0.0

    def count(self, report: StepReport) -> None:
        """Count a step's images and its wait for them."""
        self._images += report.images
        self._waited += report.data_wait

    def lap(self) -> tuple[float, float]:
        """Images per second and fraction of time spent waiting for data, since the last lap."""
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        rates = self._images / seconds, min(1.0, self._waited / seconds)
        self._start, self._images, self._waited = now, 0, 0.0
        return rates


def banner(
    config: TrainConfig,
    accelerator: Accelerator,
    data: TrainingInput,
    preprocess: Preprocess,
    model: EngineSummary,
) -> list[str]:
    """What runs where, in a few lines."""
    height, width = preprocess.size
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    store = "pack" if data.train.packed else "files"
    processes = f"{accelerator.num_processes} process(es)"
    layout = "contiguous, weights sharded (FSDP)" if model.sharded else config.memory_format
    counts = f"{len(data.train_samples):,} train, {len(data.val_samples):,} val"
    stride = model.stem_stride or "none"
    start = f"from {config.model.pretrained or 'scratch'}"
    own = [config.augment.transform or "", *config.callbacks]
    yours = [f"yours      {', '.join(filter(None, own))}"] if any(own) else []
    cost = f"{model.parameters / 1e6:.2f} M parameters, {model.macs / 1e6:.1f} M MACs"
    return [
        f"device     {_device(accelerator)}, {processes}, {precision}, {layout}",
        f"model      {config.model.name} {start}, stem stride {stride}, {cost} at {height}x{width}",
        f"data       {config.data}: {counts}, {data.task.summary()}, from {store}",
        f"classes    {class_list(data.classes)}",
        f"steps      {config.epochs} epochs of {model.steps_per_epoch}, "
        f"global batch {config.batch_size} = {processes} x {model.accumulate} micro-batch(es)",
        f"optimiser  {config.optimizer.name}, {config.schedule.name} schedule, "
        f"learning rate up to {chosen(config.lr):g}",
        *yours,
        f"writes to  {config.out}",
    ]


def _device(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    machine = platform.processor() or platform.machine()
    return f"{accelerator.device.type} ({machine}, {torch.get_num_threads()} threads)"


def epoch_line(row: dict[str, float], epochs: int, mark: str, monitored: str = "top1") -> str:
    """One finished epoch, with the monitored metric, and its mark (`best`, or nothing)."""
    names = dict.fromkeys(("exact", monitored))
    more = [name for name in names if name not in ("loss", "top1") and f"val_{name}" in row]
    figures = "".join(f"  val {name} {row[f'val_{name}']:.4f}" for name in more)
    return (
        f"epoch {row['epoch']:>3.0f}/{epochs}  train loss {row['train_loss']:.4f}  "
        f"val loss {row['val_loss']:.4f}  val top-1 {row['val_top1']:.4f}{figures}  "
        f"{row['images_per_s']:,.0f} img/s  data wait {row['data_wait']:.0%}  "
        f"{row['seconds']:.0f} s  {mark}"
    ).rstrip()


class Bar:
    """The live bar of an epoch: step, loss, images/s, time left, fraction of waiting for data."""

    def __init__(self, state: TrainingState, epochs: int, steps: int) -> None:
        self._bar = tqdm(
            total=steps,
            initial=state.epoch_step,
            desc=f"epoch {state.epoch + 1}/{epochs}",
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
        """Show new figures."""
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, {images_per_s:,.0f} img/s, data wait {data_wait:.0%}"
        )


PROJECT = "distcls"

Track = Callable[[dict[str, float], int], None]
"""Takes named metrics and their step."""


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
    """Start, or continue after `step` steps; the result does nothing without a tracker.

    TensorBoard's files go to `distcls/` in the run directory; other trackers have their
    own settings.
    """
    if config.tracker is None:
        return lambda values, step: None
    # lines of a killed run beyond the state that it is resumed from
    own = {"tensorboard": {"purge_step": step}} if step else {}
    settings = flatten(yaml.safe_load(dump_yaml(config)))
    values = {key: _plain(value) for key, value in settings.items()}
    accelerator.init_trackers(PROJECT, config=values, init_kwargs=own)
    return lambda values, step: accelerator.log(values, step=step)


def _plain(value: object) -> bool | int | float | str:
    """What every tracker takes as a setting."""
    return value if isinstance(value, bool | int | float | str) else str(value)


CONFIG, METRICS, CURVES = "config.yaml", "metrics.jsonl", "curves.png"
PLACES = ("step", "epoch")
"""Keys of a line that locate its figures in time, and are no figures themselves."""
DRAWING_TIME = 0.005
"""Fraction of the time that drawing may take: one takes 0.2 to 0.5 s, some epochs little more."""
FIRST_DRAWING = 10.0
"""Seconds from the start to the first drawing; a shorter run is drawn once, at its end."""


class Records:
    """config.yaml, metrics.jsonl and curves.png of a run directory, and the tracker.

    Only the main process writes: on all others nothing is opened, and every method does nothing.
    """

    def __init__(
        self,
        config: TrainConfig,
        step: int,
        track: Track | None = None,
        *,
        main_process: bool = True,
    ) -> None:
        """Open the records of a run that has finished `step` steps; later lines are dropped.

        Numbers of new lines also go to `track`.
        """
        self._metrics: TextIO | None = None
        self.folder = config.out
        self._track = track
        self._monitor = config.monitor.figure
        self._mode = config.monitor.resolved_mode
        self._undrawn: list[dict[str, float]] = []
        self._next_drawing = time.monotonic() + FIRST_DRAWING
        if not main_process:
            return
        require_writable(self.folder)
        write_text(self.folder / CONFIG, dump_yaml(config))
        path = self.folder / METRICS
        write_text(path, "".join(_lines_up_to(step, path)) if step else "")
        self._metrics = path.open("a", encoding="utf-8")

    def line(self, kind: str, **values: Any) -> None:
        """Append one JSON line to metrics.jsonl; it carries `kind` (step or epoch) and `step`."""
        if self._metrics is None:
            return
        self._metrics.write(json.dumps({"kind": kind, **values}) + "\n")
        self._metrics.flush()
        if self._track is not None:
            numbers = {f"{kind}/{name}": v for name, v in values.items() if name not in PLACES}
            self._track(numbers, values["step"])

    def step(self, epoch: int, report: StepReport, loss: float, speed: float, wait: float) -> None:
        """Append the line of a step of `epoch`, counted from 1: its loss over all processes, and
        the rates of `Stopwatch.lap`."""
        self.line(
            "step",
            step=report.step,
            epoch=epoch,
            loss=loss,
            lr=report.lr,
            images_per_s=round(speed, 1),
            data_wait=round(wait, 4),
        )

    def anomalies(self, epoch: int, found: Anomalies) -> None:
        """Append a line for each skipped step and each spike of `epoch`, counted from 1, and warn
        of spikes: of many in a row once."""
        for step in found.skipped:
            self.line("skipped", step=step, epoch=epoch)
        for spike in found.spikes:
            if spike.first:
                warn(f"step {spike.step}: loss {spike.loss:.3g}, recent median {spike.usual:.3g}")
            self.line("spike", step=spike.step, epoch=epoch, loss=spike.loss, usual=spike.usual)

    def curves(self, history: list[dict[str, float]]) -> None:
        """Redraw curves.png from all epochs so far, unless it was drawn recently."""
        if self._metrics is None:
            return
        self._undrawn = history
        if time.monotonic() >= self._next_drawing:
            self._draw()

    def close(self) -> None:
        """Draw the remaining epochs and close metrics.jsonl."""
        if self._undrawn:
            self._draw()
        if self._metrics is not None:
            self._metrics.close()

    def _draw(self) -> None:
        began = time.monotonic()
        curves(self._undrawn, self.folder / CURVES, self._monitor, self._mode)
        ended = time.monotonic()
        self._undrawn, self._next_drawing = [], ended + (ended - began) / DRAWING_TIME


def _lines_up_to(step: int, path: Path) -> list[str]:
    """The lines of a metrics.jsonl that a run has written in its first `step` steps.

    A kill or a full disk may have left half of the last one; others that are none are counted.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    complete = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    steps = [_step_of(line) for line in complete]
    if strange := steps.count(None):
        warn(f"{path}: {strange} of {len(steps)} lines are not log lines and are dropped")
    return [line for line, at in zip(complete, steps, strict=True) if at is not None and at <= step]


def _step_of(line: str) -> int | None:
    """The step of a line; None if it has none."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return step if type(step) is int else None
