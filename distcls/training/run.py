"""A training run, from its config to its best model."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from distcls.errors import Stopped
from distcls.evaluation.metrics import Metrics
from distcls.files import second_name
from distcls.log import say, warn
from distcls.model_card import ModelCard
from distcls.models import factory
from distcls.models.checkpoint import save_checkpoint
from distcls.models.pretrained import apply_weights, find_weights
from distcls.training.checkpointing import (
    Checkpoints,
    Epoch,
    Progress,
    keep,
    load_kept_state,
    load_state,
    to_content,
)
from distcls.training.config import TrainConfig
from distcls.training.distributed import lost_processes_explained, start
from distcls.training.engine import Engine, StepReport
from distcls.training.inputs import choose_preprocess, open_input
from distcls.training.logging import (
    BEST,
    LAST,
    Bar,
    Records,
    Stopwatch,
    banner,
    epoch_line,
    open_tracker,
    require_free,
    require_tracker,
)
from distcls.training.memory import compile_step, explained, fit_into_memory
from distcls.training.optim import require_usable
from distcls.training.signals import StopSignals

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended."""

    out: Path
    best_epoch: int
    """Epoch of best.pth, counted from 1."""
    best_score: float
    """Its value of the monitored metric."""
    epochs: int
    """Epochs trained."""
    seconds: float
    """Time spent training and evaluating."""

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {**dataclasses.asdict(self), "out": str(self.out)}


def train(config: TrainConfig) -> TrainResult:
    """Train as the config says and write the run directory.

    Raises UsageError for a config, dataset or output folder that cannot work, before the first
    step; Stopped when a signal ended the run and its state is saved.
    """
    factory.require_known(config.model.name)
    require_usable(config.optimizer)
    require_tracker(config.tracker)
    require_free(config.out, config.resume)
    accelerator = start(config)
    engine = _make_engine(config, accelerator)
    progress = _resume(config, engine)
    if config.auto_micro_batch:
        fit_into_memory(engine)
    if config.compile:
        compile_step(engine)
    accelerator.wait_for_everyone()  # all have looked at the run directory before it is written to
    with (
        _run(config, engine, progress) as run,
        explained(engine),
        lost_processes_explained(config.collective_timeout),
    ):
        for line in banner(config, engine):
            say(line)
        while progress.epoch < config.epochs and not progress.out_of_patience(config.monitor):
            outcome = train_and_evaluate(run)
            progress.history.append(outcome.row)
            # the main process's score, so that all processes draw the same conclusions from it
            score = outcome.metrics.scalars()[config.monitor.metric]
            [score] = broadcast_object_list([score])
            best = progress.judge(score, config.monitor)
            say(epoch_line(outcome.row, config.epochs, _called(best, outcome, engine)))
            if engine.schedule.judged(progress.step, best):
                rate = engine.schedule.rate(progress.step)
                say(f"no better {config.monitor.metric}: the learning rate falls to {rate:.3g}")
            _save(run, outcome, best=best)
            [asked] = engine.any_of(run.signals.received is not None)
            if asked and progress.epoch < config.epochs:
                run.stop()
    if progress.epoch < config.epochs:
        say(f"stopped early: no better {config.monitor.metric} in {config.monitor.patience} epochs")
    accelerator.end_training()
    return TrainResult(
        out=config.out,
        best_epoch=progress.best_epoch,
        best_score=progress.best_score or 0.0,
        epochs=progress.epoch,
        seconds=progress.seconds,
    )


def _make_engine(config: TrainConfig, accelerator: Any) -> Engine:
    """Dataset, preprocessing and network, each following what the one before says."""
    data = open_input(config)
    weights = find_weights(config.model)
    known = weights.preprocess if weights is not None else None
    preprocess = choose_preprocess(config.input, data.train, known)
    torch.manual_seed(config.seed)  # the fresh weights, the same on every process
    model = factory.build(config.model, len(data.classes), preprocess)
    if weights is not None:
        report = apply_weights(model, weights, allow_partial=config.model.allow_partial)
        for line in report.lines():
            say(line)
    return Engine(config, accelerator, data, model, preprocess)


def _resume(config: TrainConfig, engine: Engine) -> Progress:
    if config.resume == "none":
        return Progress()
    source = config.out / LAST if config.resume == "auto" else Path(config.resume)
    auto = config.resume == "auto"
    saved = load_state(source, config) if auto else load_kept_state(source, config)
    if saved is None:
        return Progress()
    progress, tensors = saved
    engine.load_tensors(tensors)
    engine.accumulate = progress.accumulate or engine.accumulate
    engine.evaluation_batch = progress.evaluation_batch or engine.evaluation_batch
    engine.check_batch_size()  # the parts may have been cut for fewer processes
    say(f"resumed from {source} after step {progress.step}, epoch {progress.epoch}")
    return progress


@contextlib.contextmanager
def _run(config: TrainConfig, engine: Engine, progress: Progress) -> Iterator[Run]:
    """The run with its files open on the main process, and signals noted on all."""
    with contextlib.ExitStack() as stack:
        # first in, last out: a signal must not kill the run while the files below are closed
        signals = stack.enter_context(StopSignals())
        records = checkpoints = None
        if engine.accelerator.is_main_process:
            track = open_tracker(config, engine.accelerator, progress.step)
            opened = Records(config, progress.step, track)
            records = stack.enter_context(contextlib.closing(opened))
            states = Checkpoints(config.out / LAST, config.checkpoint, progress.step)
            checkpoints = stack.enter_context(contextlib.closing(states))
        _note_parts(engine, progress, records)
        yield Run(
            config=config,
            engine=engine,
            progress=progress,
            signals=signals,
            records=records,
            checkpoints=checkpoints,
        )


def _note_parts(engine: Engine, progress: Progress, records: Records | None) -> None:
    """Have the state remember how many images are taken at a time: a resumed run does the same."""
    parts = {"accumulate": engine.accumulate, "evaluation_batch": engine.evaluation_batch}
    known = {name: getattr(progress, name) for name in parts}
    if records is not None and engine.config.auto_micro_batch and parts != known:
        images = engine.micro_batch
        records.line("micro_batch", step=progress.step, images=images, **parts)
    progress.accumulate, progress.evaluation_batch = parts.values()


def _called(best: bool, outcome: Outcome, engine: Engine) -> str:
    """The word at the end of an epoch's line."""
    several = len(engine.candidates) > 1
    return "" if not best else f"best ({outcome.candidate})" if several else "best"


def _save(run: Run, outcome: Outcome, *, best: bool) -> None:
    """Write what the epoch just finished left; the state comes last: a resume starts there."""
    config, engine, progress = run.config, run.engine, run.progress
    tensors = engine.tensors()
    if run.records is not None:
        run.records.line("epoch", **progress.history[-1])
        card, weights = _card(run, outcome), engine.weights_of(outcome.candidate, tensors)
        if best:
            save_checkpoint(config.out / BEST, weights, card)
        score = outcome.metrics.scalars()[config.monitor.metric]
        epoch = Epoch(number=progress.epoch, step=progress.step, score=score, best=best)

        def write(path: Path) -> None:
            if config.checkpoint.save_training_state:
                save_checkpoint(path, weights, card, to_content(config, progress, tensors))
            elif best:  # the same content, just written: not serialised and flushed again
                second_name(config.out / BEST, path)
            else:
                save_checkpoint(path, weights, card)

        keep(config, progress, epoch, write)
        run.records.epochs(progress.history)
    run.save(tensors)


def _card(run: Run, outcome: Outcome) -> ModelCard:
    """What the model as it is now says of itself."""
    config, engine, progress = run.config, run.engine, run.progress
    task = dataclasses.replace(engine.data.task, thresholds=outcome.metrics.thresholds)
    return ModelCard(
        architecture=dataclasses.asdict(config.model) | {"pretrained": None},
        task=task,
        preprocess=engine.preprocess,
        training={
            "epoch": progress.epoch,
            "step": progress.step,
            "dataset": str(config.data.resolve()),
            "weights": outcome.candidate,
            "validation": outcome.metrics.scalars(),
        },
    )
