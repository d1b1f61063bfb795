"""One epoch as a run sees it: steps with their records, and the moments to save or to stop."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from distcls.errors import Stopped
from distcls.evaluation.metrics import Metrics
from distcls.log import warn
from distcls.training.checkpoints import Checkpoints
from distcls.training.config import TrainConfig
from distcls.training.display import Bar, Stopwatch
from distcls.training.engine import Engine, StepReport
from distcls.training.records import Records
from distcls.training.signals import StopSignals
from distcls.training.state import Progress, to_content

LOOK_EVERY = 10
"""Steps between two moments at which several processes ask each other whether to save or stop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run under way."""

    config: TrainConfig
    engine: Engine
    progress: Progress
    signals: StopSignals
    records: Records | None
    """On the main process alone, as the checkpoints are."""
    checkpoints: Checkpoints | None

    def save(self, tensors: dict[str, Any] | None = None) -> None:
        """Save the full state as it is now; `tensors` are the engine's, if they are at hand.

        All processes have to call this: sharded weights take all of them to be gathered.
        """
        tensors = self.engine.tensors() if tensors is None else tensors
        if self.checkpoints is not None:
            content = to_content(self.config, self.progress, tensors)
            self.checkpoints.save(self.progress.step, content)

    def stop(self) -> None:
        """Leave once the state is on disk. Raises Stopped, on all processes."""
        if self.checkpoints is not None:
            self.checkpoints.wait()
        self.engine.accelerator.wait_for_everyone()
        cause = self.signals.received.name if self.signals.received else "another process"
        raise Stopped(
            f"stopped by {cause} after step {self.progress.step}, state saved; "
            "--resume auto continues"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an epoch came to."""

    row: dict[str, float]
    """Its row of history.csv."""
    candidate: str
    """Which of the engine's candidates is the one to be saved."""
    metrics: Metrics
    """That one's, on validation."""


def train_and_evaluate(run: Run) -> Outcome:
    """Finish the epoch that `run.progress` is in."""
    progress, monitor = run.progress, run.config.monitor
    began = time.perf_counter()
    row = _train(run)
    found = run.engine.evaluate()
    monitored = {name: metrics.scalars()[monitor.metric] for name, metrics in found.items()}
    candidate = monitor.best_of(monitored)
    progress.epoch += 1
    progress.epoch_step, progress.loss_sum = 0, 0.0
    seconds = time.perf_counter() - began
    progress.seconds += seconds
    scores = {f"val_{name}": value for name, value in found[candidate].scalars().items()}
    if len(found) > 1:
        scores |= {f"val_{monitor.metric}_{name}": value for name, value in monitored.items()}
    row = {"epoch": progress.epoch, "step": progress.step, **row, **scores, "seconds": seconds}
    return Outcome(row=row, candidate=candidate, metrics=found[candidate])


def _train(run: Run) -> dict[str, float]:
    config, engine, progress = run.config, run.engine, run.progress
    mine = progress.loss_sum if engine.accelerator.is_main_process else 0.0
    loss_sum = torch.full((), mine, device=engine.accelerator.device)
    watch, whole = Stopwatch(engine.train_loader), Stopwatch(engine.train_loader)
    lr = 0.0
    with Bar(progress, config.epochs, engine.order.steps) as bar:
        for report in engine.train_epoch(progress.epoch, progress.epoch_step):
            progress.step, lr = report.step, report.lr
            progress.epoch_step += 1
            loss_sum += report.loss * report.images
            watch.count(report.images)
            whole.count(report.images)
            bar.step()
            if report.step % config.log_every == 0:
                _log(run, report, watch, bar)
            _note_skipped(run, report)
            _note_spikes(run)
            _save_or_stop(run, loss_sum)
    _note_spikes(run, now=True)
    speed, wait = whole.lap()
    train_loss = engine.total(loss_sum) / engine.order.samples
    return {"lr": lr, "train_loss": train_loss, "images_per_s": speed, "data_wait": wait}


def _log(run: Run, report: StepReport, watch: Stopwatch, bar: Bar) -> None:
    loss = run.engine.total(report.loss)
    speed, wait = watch.lap()
    bar.rates(loss, speed, wait)
    if run.records is not None:
        run.records.line(
            "step",
            step=report.step,
            epoch=run.progress.epoch + 1,
            loss=loss,
            lr=report.lr,
            images_per_s=round(speed, 1),
            data_wait=round(wait, 4),
        )


def _note_skipped(run: Run, report: StepReport) -> None:
    if run.records is not None:
        for step in report.skipped:
            run.records.line("skipped", step=step, epoch=run.progress.epoch + 1)


def _note_spikes(run: Run, *, now: bool = False) -> None:
    for spike in run.engine.spikes.look(now=now):
        if spike.first:  # of many in a row, one warning; metrics.jsonl has them all
            warn(f"step {spike.step}: loss {spike.loss:.3g}, usual lately {spike.usual:.3g}")
        if run.records is not None:
            figures = {"loss": spike.loss, "usual": spike.usual}
            run.records.line("spike", step=spike.step, epoch=run.progress.epoch + 1, **figures)


def _save_or_stop(run: Run, loss_sum: Tensor) -> None:
    """Save or stop within the epoch, if any process has a reason to; all do it at the same step."""
    engine, progress = run.engine, run.progress
    if progress.epoch_step == engine.order.steps:
        return  # the end of the epoch saves, and stops
    every = run.config.checkpoint.every_steps
    alone = engine.accelerator.num_processes == 1
    if not (alone or progress.step % LOOK_EVERY == 0 or (every and progress.step % every == 0)):
        return
    due = run.checkpoints is not None and run.checkpoints.due(progress.step)
    stop, save = engine.any_of(run.signals.received is not None, due)
    if stop or save:
        _note_spikes(run, now=True)  # the state holds no losses that wait for a look
        progress.loss_sum = engine.total(loss_sum)
        run.save()
    if stop:
        run.stop()
