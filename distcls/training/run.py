"""A training run, from its config to its best model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from distcls.bundle import ModelCard
from distcls.files import second_name
from distcls.log import say
from distcls.models import zoo
from distcls.models.checkpoint import save_checkpoint
from distcls.models.pretrained import apply_weights, find_weights
from distcls.training.checkpoints import Checkpoints
from distcls.training.compiling import compile_step
from distcls.training.config import TrainConfig
from distcls.training.display import banner, epoch_line
from distcls.training.engine import Engine
from distcls.training.environment import lost_processes_explained, start
from distcls.training.epoch import Outcome, Run, train_and_evaluate
from distcls.training.input import choose_preprocess, open_input
from distcls.training.kept import Epoch, keep
from distcls.training.memory import explained, fit_into_memory
from distcls.training.optimizer import require_usable
from distcls.training.records import BEST, LAST, Records, require_free
from distcls.training.signals import StopSignals
from distcls.training.state import Progress, load_kept_state, load_state, to_content
from distcls.training.trackers import open_tracker, require_tracker


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
    zoo.require_known(config.model.name)
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
    model = zoo.build(config.model, len(data.classes), preprocess)
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
            if config.checkpoint.whole:
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
    targets = dataclasses.replace(engine.data.targets, thresholds=outcome.metrics.thresholds)
    return ModelCard(
        architecture=dataclasses.asdict(config.model) | {"pretrained": None},
        classes=targets.classes,
        targets=None if targets.single else targets,
        preprocess=engine.preprocess,
        training={
            "epoch": progress.epoch,
            "step": progress.step,
            "dataset": str(config.data.resolve()),
            "weights": outcome.candidate,
            "validation": outcome.metrics.scalars(),
        },
    )
