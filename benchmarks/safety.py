"""`python -m benchmarks.safety`: the overhead of fault tolerance, against training without it.

All train the same network on the same batches of scikit-learn's digits (repeated to fill an epoch),
with the same augmentation, prefetching, optimiser and schedule; a round is an epoch and the
evaluation of 16 images. Contestants, each in a separate process:

- plain: forward, backward, clipping (part of the recipe: it changes the result), optimiser step,
  nothing else. Left out are the non-finite guard and the copy of batch norm's statistics that a
  skipped step goes back to,
  the watch for loss spikes, the seed of each step's dropout, the check for signals, metrics.jsonl,
  history.csv, curves.png and the running mean of the loss, the reader's time limit and its watch
  over the reading thread, and all states.
- default cadence: `distcls train` as it is, a checksummed state every 10 minutes and after each
  epoch; the state's writing is waited for before the round's clock stops.
- every N steps: the same with a state every `--every-steps` as well.

The check of the pack's length before each batch remains in all.
"""

from __future__ import annotations

import argparse
import atexit
import collections
import contextlib
import itertools
import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from benchmarks.common import Apart, Contestant, alternate, finish, ratio, table
from distcls.data.prepare import PrepareOptions, prepare
from distcls.imaging import Preprocess
from distcls.models import factory
from distcls.models.config import ModelConfig
from distcls.system import available_cores
from distcls.training.augment import DRAWS
from distcls.training.checkpointing import CheckpointManager, TrainingState
from distcls.training.config import (
    AugmentConfig,
    CheckpointConfig,
    MonitorConfig,
    TrainConfig,
    chosen,
)
from distcls.training.distributed import start
from distcls.training.engine import Engine
from distcls.training.inputs import TrainingInput, choose_preprocess, open_input
from distcls.training.loader import Batch, Loader
from distcls.training.run import decide, evaluate, open_run, save_epoch, train_steps
from distcls.training.sampler import Indices, uniforms

PLAIN, DEFAULT = "plain", "default cadence"
EVALUATED = 16


def recipe(data: Path, out: Path, model: str, batch: int, every: int | None = None) -> TrainConfig:
    """What all contestants train."""
    return TrainConfig(
        data=data,
        out=out,
        epochs=10_000,
        batch_size=batch,
        lr=1e-3,
        # no epoch after the first, which does not count, is the best: its files are no state
        monitor=MonitorConfig(min_delta=1.0, patience=None),
        model=ModelConfig(name=model),
        augment=AugmentConfig(crop_padding=2, rotate=10),
        checkpoint=CheckpointConfig(every_steps=every),
    )


def make_input(config: TrainConfig, steps: int) -> tuple[TrainingInput, Preprocess]:
    """The input of a run whose epochs have `steps` steps."""
    found = open_input(config)
    data = TrainingInput(
        classes=found.classes,
        train=found.train,
        val=found.val,
        train_samples=np.resize(found.train_samples, steps * chosen(config.batch_size)),
        val_samples=found.val_samples[:EVALUATED],
    )
    return data, choose_preprocess(config.input, data.train, None)


def make_engine(
    config: TrainConfig, accelerator: Accelerator, data: TrainingInput, preprocess: Preprocess
) -> Engine:
    """The engine of that run."""
    torch.manual_seed(config.seed)
    model = factory.build(config.model, len(data.classes), preprocess)
    return Engine(config, accelerator, data, model, preprocess)


def plain(config: TrainConfig, steps: int) -> Contestant:
    """The training loop of a tutorial."""
    accelerator = start(config)
    engine = make_engine(config, accelerator, *make_input(config, steps))
    epochs = itertools.count()

    def run() -> float:
        began = time.perf_counter()
        images = sum(_plain_epoch(engine, next(epochs)))
        engine.evaluate()
        return images / (time.perf_counter() - began)

    return run


def _plain_epoch(engine: Engine, epoch: int) -> Iterator[int]:
    """Train an epoch; yields the images of each step."""
    model, optimizer, seed = engine._model.train(), engine._optimizer.optimizer, engine._config.seed
    permutation = engine._data.train_samples[engine._sampler.permutation(epoch)]
    index_batches = [
        permutation[slice(*engine._sampler.bounds(step))] for step in range(engine._sampler.steps)
    ]
    parameters = list(model.parameters())
    batches = _read_ahead(engine._train_loader, index_batches, engine._config.loader.prefetch)
    for step, batch in enumerate(batches, epoch * engine._sampler.steps):
        for group in optimizer.param_groups:
            group["lr"] = engine._schedule.rate(step)
        draws = torch.from_numpy(uniforms(seed, epoch, batch.indices, DRAWS))
        logits = model(engine._augment(batch.images, draws))
        torch.autograd.backward(F.cross_entropy(logits, batch.labels))
        torch.nn.utils.clip_grad_norm_(parameters, engine._config.optimizer.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        yield len(batch.indices)


def _read_ahead(loader: Loader, index_batches: Iterable[Indices], ahead: int) -> Iterator[Batch]:
    """Batches in order, with prefetching."""
    waiting: collections.deque[Future[Batch]] = collections.deque()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(available_cores()) as pool:
        for indices in index_batches:
            waiting.append(reader.submit(loader.load, indices, pool))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def safe(config: TrainConfig, steps: int) -> Contestant:
    """The epochs of `distcls train`, with their records and states."""
    accelerator = start(config)
    data, preprocess = make_input(config, steps)
    opened = contextlib.ExitStack()
    atexit.register(opened.close)
    run = opened.enter_context(
        open_run(
            config,
            accelerator,
            data=data,
            preprocess=preprocess,
            engine=make_engine(config, accelerator, data, preprocess),
            checkpoints=CheckpointManager(config),
            state=TrainingState(),
        )
    )

    def epoch() -> float:
        began = time.perf_counter()
        figures = train_steps(run)
        evaluation = evaluate(run)
        best = decide(run, figures, evaluation, time.perf_counter() - began)
        save_epoch(run, evaluation, best=best)
        run.checkpoints.wait()
        return len(data.train_samples) / (time.perf_counter() - began)

    return epoch


def compare(model: str, batch: int, steps: int, every: int, rounds: int) -> dict[str, list[float]]:
    """Images per second of each contestant, round by round."""
    often = f"every {every} steps"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        data = Path(folder, "digits")
        prepare(PrepareOptions(source="digits", out=data, quiet=True))
        entered = {
            name: stack.enter_context(
                Apart(make, recipe(data, Path(folder, name), model, batch, cadence), steps)
            )
            for name, make, cadence in (
                (PLAIN, plain, None),
                (DEFAULT, safe, None),
                (often, safe, every),
            )
        }
        return alternate(entered, rounds)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mobilenet_v3_small")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100, help="steps of an epoch, so of a round")
    parser.add_argument("--every-steps", type=int, default=50, help="steps between two states")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    given = parser.parse_args()
    rates = compare(given.model, given.batch_size, given.steps, given.every_steps, given.rounds)
    print(
        f"training {given.model} on digits, batch {given.batch_size}, {given.steps} steps a round"
    )
    print(table(rates, PLAIN))
    overheads = {
        name: round(100 * (ratio(rates, PLAIN, name) - 1), 2) for name in rates if name != PLAIN
    }
    for name, percent in overheads.items():
        print(f"{name}: {percent:.1f} % more time than {PLAIN}")
    finish(
        "safety",
        model=given.model,
        batch_size=given.batch_size,
        steps=given.steps,
        overhead_percent=overheads,
        images_per_s={name: [round(rate, 1) for rate in values] for name, values in rates.items()},
    )


if __name__ == "__main__":
    main()
