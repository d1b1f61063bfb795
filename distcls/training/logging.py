"""The output of a run: banner, progress, a line per epoch; metrics.jsonl, curves.png, trackers."""

from __future__ import annotations

import json
import math
import os
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

from distcls import log
from distcls.config import dump_yaml, flatten
from distcls.errors import DistclsError, UsageError, did_you_mean
from distcls.files import require_writable, write_text
from distcls.imaging import Preprocess
from distcls.log import warn
from distcls.models.registry import own_module
from distcls.plotting import curves, metric_title
from distcls.task import class_list
from distcls.training.config import TrainConfig, chosen
from distcls.training.engine import EngineSummary, StepReport
from distcls.training.hooks import own_parts
from distcls.training.inputs import TrainingInput
from distcls.training.stability import Anomalies
from distcls.training.stall import NOTED_WAIT

REMEMBERED = 0.995
"""Weight of a step's time beside that of the step after it."""
HINT_AFTER, LONG = 10.0, 180.0
"""Seconds after which a run says how it can be interrupted, if it has so many left."""


class Stopwatch:
    """Rates since the last lap, from a clock that never jumps."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._images, self._waited = 0, 0.0
        self.seconds = 0.0
        """Of the last lap."""

    def count(self, report: StepReport) -> None:
        """Count a step's images and its wait for them."""
        self._images += report.images
        self._waited += report.data_wait

    def lap(self) -> tuple[float, float]:
        """Images per second and fraction of time spent waiting for data, since the last lap."""
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        rates = self._images / seconds, min(1.0, self._waited / seconds)
        self.seconds = seconds
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
    processes = log.counted(accelerator.num_processes, "process", "processes")
    batches = log.counted(model.accumulate, "micro-batch", "micro-batches")
    layout = "contiguous, weights sharded (FSDP)" if model.sharded else config.memory_format
    counts = f"{len(data.train_samples):,} train, {len(data.val_samples):,} val"
    own_network = own_module(config.model.name) is not None
    stride = "" if own_network else f" stem stride {model.stem_stride or 'none'},"
    start = f"from {config.model.pretrained or 'scratch'}"
    own = [f"{part} {name}" for part, name in own_parts(config).items()]
    yours = [f"yours      {'; '.join(own)}"] if own else []
    cost = f"{log.amount(model.parameters, 2)} parameters, {log.amount(model.macs, 1)} MACs"
    return [
        f"device     {_device(accelerator)}, {processes}, {precision}, {layout}",
        f"model      {config.model.name} {start},{stride} {cost} at {height}x{width}",
        f"data       {config.data}: {counts}, {data.task.summary()}, from {store}",
        f"classes    {class_list(data.classes)}",
        f"steps      {log.counted(chosen(config.epochs), 'epoch')} of {model.steps_per_epoch}, "
        f"global batch {config.batch_size} = {processes} x {batches}",
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


def epoch_line(
    row: dict[str, float], epochs: int, mark: str, left: str, monitored: str = "top1"
) -> str:
    """One finished epoch: the monitored metric beside the usual ones, its mark (`best`, or nothing)
    and the time `left` for the run.

    On a terminal that is too narrow for it, what the bar shows as well is left out.
    """
    names = dict.fromkeys(("exact", monitored))
    more = [name for name in names if name not in ("loss", "top1") and f"val_{name}" in row]
    figures = "".join(f" {metric_title(name)} {row[f'val_{name}']:.4f}" for name in more)
    waited = row["data_wait"]
    wait = f"data wait {waited:.0%}" if waited >= NOTED_WAIT else ""
    parts = [
        f"epoch {row['epoch']:>{len(str(epochs))}.0f}/{epochs}",
        f"train loss {row['train_loss']:.4f} top-1 {row['train_top1']:.4f}",
        f"val loss {row['val_loss']:.4f} top-1 {row['val_top1']:.4f}{figures}",
        f"{row['images_per_s']:,.0f} images/s",
        wait,
        log.duration(row["seconds"]),
        left,
        mark,
    ]
    line = "  ".join(filter(None, parts))
    width = log.columns()
    if width is None or len(line) <= width:
        return line
    return "  ".join(filter(None, [*parts[:3], mark]))


class StepRate:
    """How fast the steps are, lately: the ones before count less and less.

    Measured from one reading of the losses to the next, as only then the host has waited for a GPU.
    """

    def __init__(self) -> None:
        self._readings = 0
        self._known = self._new = (0.0, 0.0, 0.0, 0.0)  # steps, images, seconds, waiting for data
        self._read_at = 0.0

    def begin(self) -> None:
        """Steps begin now, after something else."""
        self._new, self._read_at = (0.0, 0.0, 0.0, 0.0), time.perf_counter()

    def count(self, report: StepReport) -> None:
        """Count a step."""
        steps, images, _, waited = self._new
        self._new = steps + 1, images + report.images, 0.0, waited + report.data_wait
        if report.recent_loss is None:
            return
        seconds = time.perf_counter() - self._read_at
        steps, images, _, waited = self._new
        # the first time is that of the warm-up, and nothing before counts once more is known
        kept = REMEMBERED**steps if self._readings > 1 else 0.0
        new = (steps, images, seconds, waited)
        known = (kept * before + more for before, more in zip(self._known, new, strict=True))
        self._known = tuple(known)  # type: ignore[assignment]
        self._readings += 1
        self.begin()

    @property
    def step(self) -> float | None:
        """Seconds of a step; None until enough are measured."""
        steps, _, seconds, _ = self._known
        return seconds / steps if self._readings > 1 else None

    def words(self) -> list[str]:
        """Images per second, and the fraction of waiting for data if it is worth a look."""
        _, images, seconds, waited = self._known
        if self._readings < 2:
            return []
        wait = min(1.0, waited / seconds)
        speed = f"{images / seconds:,.0f} images/s"
        return [speed, f"data wait {wait:.0%}"] if wait >= NOTED_WAIT else [speed]


class RunProgress:
    """What a run shows while it trains: step, time left for the whole run, loss, images/s.

    All processes may call it, the main one shows something. Nothing is read from the device for it.
    """

    def __init__(self, config: TrainConfig, data: TrainingInput, steps: int) -> None:
        """`steps` are those of an epoch."""
        self._epochs, self._steps = chosen(config.epochs), steps
        self._at_most = "at most " if chosen(config.monitor.patience) is not None else ""
        self._validation, self._batch = max(1, len(data.val_samples)), chosen(config.batch_size)
        self._live, self._rate = log.live(), StepRate()
        self._epoch, self._step, self._validated = 0, 0, 0
        self._loss = ""
        self._ended: float | None = None
        """When the epoch's last step ended."""
        self._measured_pause: float | None = None
        """Seconds between the steps of the last two epochs: evaluation and files."""
        self._hint_at = time.perf_counter() + HINT_AFTER

    def begin_epoch(self, epoch: int, step: int) -> None:
        """Epoch `epoch` begins with its step `step`, both counted from 0."""
        if self._ended is not None:
            self._measured_pause = time.perf_counter() - self._ended
        self._epoch, self._step, self._validated, self._ended = epoch, step, 0, None
        self._rate.begin()
        self._draw()

    def step(self, report: StepReport) -> None:
        """One more step is done."""
        self._step += 1
        self._rate.count(report)
        now = time.perf_counter()
        if report.recent_loss is not None:
            self._loss = f"loss {report.recent_loss:.4f}"
        if self._step == self._steps:
            self._ended = now
        if self._live.due():
            self._draw()
        if now >= self._hint_at and (left := self._left()) is not None:
            self._hint_at = math.inf
            self._hint(left)

    def evaluated(self, images: int) -> None:
        """So many more of this process's images are evaluated."""
        self._validated += images * log.world_size()
        if self._live.due():
            self._draw()

    def left_after_epoch(self) -> str:
        """The time left once this epoch is over, in words; empty if unknown or none."""
        each, epochs = self._rate.step, self._epochs - self._epoch - 1
        return self._words(epochs * (each * self._steps + self._pause(each))) if each else ""

    def close(self) -> None:
        """Show it no longer."""
        self._live.close()

    def _pause(self, each: float) -> float:
        """Seconds between the steps of two epochs, measured or expected."""
        if self._measured_pause is not None:
            return self._measured_pause
        expected = each / 3 * self._validation / self._batch  # a forward pass is a third of a step
        so_far = 0.0 if self._ended is None else time.perf_counter() - self._ended
        return max(expected, so_far)

    def _left_in_epoch(self) -> float | None:
        """Seconds until the next epoch; None if not known yet."""
        if (each := self._rate.step) is None:
            return None
        left = each * (self._steps - self._step) + self._pause(each)
        return left if self._ended is None else max(0.0, left - time.perf_counter() + self._ended)

    def _left(self) -> float | None:
        """Seconds until the end of the run; None if not known yet."""
        if (each := self._rate.step) is None or (here := self._left_in_epoch()) is None:
            return None
        return here + (self._epochs - self._epoch - 1) * (each * self._steps + self._pause(each))

    def _words(self, seconds: float) -> str:
        return f"{self._at_most}{log.duration(seconds)} left" if seconds else ""

    def _hint(self, left: float) -> None:
        """Say once how a long run can be interrupted."""
        if left < LONG:
            return
        how = "Ctrl-C saves the state, --resume auto continues"
        if log.in_notebook():
            how = 'interrupting the kernel saves the state, resume="auto" continues'
        log.say(f"{self._words(left)} at this speed; {how}")

    def _draw(self) -> None:
        title = f"epoch {self._epoch + 1:>{len(str(self._epochs))}}/{self._epochs}"
        fraction = self._step / self._steps
        if self._ended is not None:
            title += " validation"
            fraction = min(1.0, self._validated / self._validation)
        left = self._left()
        details = [self._words(left)] if left is not None else []
        if self._ended is None:
            details += filter(None, [self._loss, *self._rate.words()])
        self._live.draw(title, fraction, details, self._left_in_epoch())


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
        self._best_epoch = 0
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

    def require_in_place(self) -> None:
        """Raise DistclsError if the run directory is not the one that this run writes any more."""
        if self._metrics is None:
            return
        path = self.folder / METRICS
        try:
            same = os.path.samestat(path.stat(), os.fstat(self._metrics.fileno()))
        except OSError:
            same = False
        if not same:
            raise DistclsError(
                f"{path} was removed or replaced while the run was writing it; what is left of the "
                "run directory is incomplete, start over"
            )

    def curves(self, history: list[dict[str, float]], best_epoch: int) -> None:
        """Redraw curves.png from all epochs so far, unless it was drawn recently."""
        if self._metrics is None:
            return
        self._undrawn, self._best_epoch = history, best_epoch
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
        curves(self._undrawn, self.folder / CURVES, self._monitor, self._best_epoch)
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
