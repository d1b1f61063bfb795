"""A training run, from its config to its best model."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from distcls.bundle import ModelCard
from distcls.evaluation.metrics import Metrics
from distcls.log import say
from distcls.models import zoo
from distcls.models.checkpoint import save_checkpoint
from distcls.models.pretrained import apply_weights, find_weights
from distcls.training.config import TrainConfig
from distcls.training.display import Bar, Stopwatch, banner, epoch_line
from distcls.training.engine import Engine
from distcls.training.environment import start
from distcls.training.input import choose_preprocess, open_input
from distcls.training.records import BEST, LAST, Records, require_free
from distcls.training.state import Progress, load_state, save_state


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
    step.
    """
    zoo.require_known(config.model.name)
    require_free(config.out, config.resume)
    accelerator = start(config)
    engine = _make_engine(config, accelerator)
    progress = _resume(config, engine)
    accelerator.wait_for_everyone()  # all have looked at the run directory before it is written to
    with _records(config, engine, progress) as records:
        for line in banner(config, engine):
            say(line)
        while progress.epoch < config.epochs and not progress.out_of_patience(config.monitor):
            row, metrics = _epoch(config, engine, progress, records)
            progress.history.append(row)
            # the main process's score, so that all processes draw the same conclusions from it
            [score] = broadcast_object_list([metrics.scalars()[config.monitor.metric]])
            best = progress.judge(score, config.monitor)
            say(epoch_line(row, config.epochs, best))
            if records is not None:
                _save(config, engine, progress, metrics, records, best=best)
            accelerator.wait_for_everyone()
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
        for line in apply_weights(model, weights).lines():
            say(line)
    return Engine(config, accelerator, data, model, preprocess)


def _resume(config: TrainConfig, engine: Engine) -> Progress:
    saved = load_state(config.out / LAST, config) if config.resume == "auto" else None
    if saved is None:
        return Progress()
    progress, tensors = saved
    engine.load_tensors(tensors)
    say(f"resumed from {config.out / LAST} after epoch {progress.epoch}")
    return progress


@contextlib.contextmanager
def _records(config: TrainConfig, engine: Engine, progress: Progress) -> Any:
    """The run's records on the main process, None on the others."""
    if not engine.accelerator.is_main_process:
        yield None
        return
    with contextlib.closing(Records(config, progress.step)) as records:
        yield records


def _epoch(
    config: TrainConfig, engine: Engine, progress: Progress, records: Records | None
) -> tuple[dict[str, float], Metrics]:
    """Train and evaluate one epoch; returns its row of history.csv and its metrics."""
    began = time.perf_counter()
    loss_sum = torch.zeros((), device=engine.accelerator.device)
    watch, whole = Stopwatch(engine.train_loader), Stopwatch(engine.train_loader)
    lr = 0.0
    with Bar(progress.epoch + 1, config.epochs, engine.order.steps) as bar:
        for report in engine.train_epoch(progress.epoch):
            progress.step, lr = report.step, report.lr
            loss_sum += report.loss * report.images
            watch.count(report.images)
            whole.count(report.images)
            bar.step()
            if report.step % config.log_every == 0:
                loss = engine.mean_loss(report.loss)
                speed, wait = watch.lap()
                bar.rates(loss, speed, wait)
                if records is not None:
                    records.line(
                        "step",
                        step=report.step,
                        epoch=progress.epoch + 1,
                        loss=loss,
                        lr=lr,
                        images_per_s=round(speed, 1),
                        data_wait=round(wait, 4),
                    )
    train_loss = engine.mean_loss(loss_sum) / engine.order.samples
    speed, wait = whole.lap()
    metrics = engine.evaluate()
    progress.epoch += 1
    seconds = time.perf_counter() - began
    progress.seconds += seconds
    scores = {f"val_{name}": value for name, value in metrics.scalars().items()}
    rates = {"images_per_s": speed, "data_wait": wait, "seconds": seconds}
    return {
        "epoch": progress.epoch,
        "step": progress.step,
        "lr": lr,
        "train_loss": train_loss,
        **scores,
        **rates,
    }, metrics


def _save(
    config: TrainConfig,
    engine: Engine,
    progress: Progress,
    metrics: Metrics,
    records: Records,
    *,
    best: bool,
) -> None:
    """Write what the epoch just finished left; `last/` comes last, since a resume starts there."""
    row = progress.history[-1]
    records.line("epoch", **row)
    if best:
        card = ModelCard(
            architecture=dataclasses.asdict(config.model) | {"pretrained": None},
            classes=engine.data.classes,
            preprocess=engine.preprocess,
            training={
                "epoch": progress.epoch,
                "step": progress.step,
                "dataset": str(config.data.resolve()),
                "validation": metrics.scalars(),
            },
        )
        save_checkpoint(config.out / BEST, engine.best_model, card)
    records.epochs(progress.history)
    save_state(config.out / LAST, config, progress, engine.tensors())
