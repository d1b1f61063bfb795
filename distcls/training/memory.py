"""Passes tried before the first step: what fits into memory, and what torch.compile gains.

Under DDP a process that runs out of memory within a step leaves the others waiting for its
gradients. So the trial uses the bare model, which talks to nobody, and the processes compare their
verdicts afterwards.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch._inductor.exc import InductorError

from distcls.errors import DistclsError
from distcls.log import say, warn
from distcls.models.classifier import Classifier
from distcls.training.distributed import SyncNorm
from distcls.training.engine import Engine
from distcls.training.loader import Batch

HEADROOM = 1.25
"""Images of a trial for one of a step: memory in use breaks into pieces, others take some too."""
MOMENTS = 3
"""Copies of the weights that an optimiser keeps at most: Ranger has two means and slow weights."""
LIBRARIES = ("ALLOC_FAILED", "could not create a", "could not execute a primitive")
"""How cuBLAS, cuDNN and oneDNN put it when they get no memory for their own."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of a GPU or of the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LIBRARIES)


def fit_into_memory(engine: Engine) -> None:
    """Double `engine.accumulate`, and halve the batch of evaluation, until a trial of each fits.

    The global batch stays. The model's state and all random states are as before. All processes
    have to call this; they come to the same numbers. Raises DistclsError if no part is left that
    could be halved.
    """
    before = engine.micro_batch
    while not _fits_everywhere(engine, _try_training):
        if not engine.can_accumulate(2 * engine.accumulate):
            raise DistclsError(
                f"out of memory with {engine.micro_batch} images at a time, and batch "
                "normalisation needs two in every part: choose a smaller --input.size or "
                "--model.name, or more processes"
            )
        engine.accumulate *= 2
    if engine.micro_batch != before:
        warn(
            f"{before} images at a time do not fit into memory: now {engine.micro_batch}, in "
            f"{engine.accumulate} parts a step; the global batch stays {engine.config.batch_size}"
        )
    while not _fits_everywhere(engine, _try_evaluation):
        if engine.evaluation_batch == 1:
            raise DistclsError(
                "out of memory evaluating a single image: choose a smaller --input.size"
            )
        engine.evaluation_batch //= 2


@contextlib.contextmanager
def explained(engine: Engine) -> Iterator[None]:
    """Turn running out of memory in the middle of a run into a DistclsError that says what helps.

    The step is not taken again: other processes may already wait for its gradients.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DistclsError(_advice(engine)) from error


def _advice(engine: Engine) -> str:
    what = f"out of memory with {engine.micro_batch} images at a time"
    if engine.config.auto_micro_batch:
        return (
            f"{what}, which fitted before the first step: something else takes memory too; "
            "--resume auto tries anew what fits"
        )
    if not engine.can_accumulate(2 * engine.accumulate):
        return f"{what}; choose a smaller --input.size or --model.name, or more processes"
    if engine.sharding.on:
        return f"{what}; --accumulate {2 * engine.accumulate} halves them, the global batch stays"
    return (
        f"{what}; --auto-micro-batch true (with --resume auto to continue) finds out how many fit "
        f"and --accumulate {2 * engine.accumulate} halves them; both keep the global batch"
    )


def _fits_everywhere(engine: Engine, trial: Callable[[Engine], None]) -> bool:
    fits = _fits(engine, trial)
    if not fits:  # only now have the exception's frames let go of their tensors
        clear_device_cache(garbage_collection=True)
    [failed] = engine.any_of(not fits)
    return not failed


def _fits(engine: Engine, trial: Callable[[Engine], None]) -> bool:
    try:
        with unchanged(engine):
            trial(engine)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


@contextlib.contextmanager
def unchanged(engine: Engine) -> Iterator[None]:
    """Put back batch norm's statistics, the modules' modes and the random states afterwards."""
    buffers = [(buffer, buffer.clone()) for buffer in engine.model.buffers()]
    modes = [(module, module.training) for module in engine.model.modules()]
    device = engine.accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for buffer, saved in buffers:
                buffer.copy_(saved)


def _try_training(engine: Engine) -> None:
    """A trial over more than the largest part of a step, beside all else that a step holds."""
    kept = _reserve(engine)
    try_pass(engine, math.ceil(HEADROOM * engine.micro_batch))
    del kept


def try_pass(engine: Engine, count: int) -> None:
    """A forward and a backward pass over `count` images of random pixels, on this process alone."""
    model, device = engine.model.train(), engine.accelerator.device
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm | SyncNorm):
            module.eval()  # in training it would wait for a process that has run out of memory
    images = _pixels(engine, count, engine.augment.canvas)
    indices = np.arange(count) % len(engine.data.train)
    labels = torch.from_numpy(engine.data.train.labels[indices]).to(device)
    examples = engine.objective.examples(0, Batch(images, labels, indices))
    loss = engine.objective.losses(model(examples.images), examples).sum()
    torch.autograd.grad(loss, _trainable(engine), allow_unused=True)


def _try_evaluation(engine: Engine) -> None:
    """A forward pass over a batch of evaluation."""
    kept = _reserve(engine)
    with torch.inference_mode():
        images = _pixels(engine, engine.evaluation_batch, engine.preprocess.size)
        for model in engine.candidates.values():
            Classifier.forward(model.eval(), images)
    del kept


def _reserve(engine: Engine) -> list[Tensor]:
    """Memory that a step has in use besides the pass: gradients of its parts before, moments."""
    made = engine.optimizer.optimizer.state
    return [
        torch.empty_like(p)
        for p in _trainable(engine)
        for _ in range(1 if p in made else 1 + MOMENTS)
    ]


def _trainable(engine: Engine) -> list[nn.Parameter]:
    return [parameter for parameter in engine.model.parameters() if parameter.requires_grad]


def _pixels(engine: Engine, count: int, size: tuple[int, int]) -> Tensor:
    device = engine.accelerator.device
    return torch.randint(256, (count, *size, 3), dtype=torch.uint8, device=device)


PASSES = 5
"""Passes timed before and after; their median counts."""


def compile_step(engine: Engine) -> None:
    """Compile the model in place, and say how long that took and how long a step takes now.

    The passes that are timed see random pixels and leave no trace, so a run that is resumed
    computes as one that never stopped. Raises DistclsError if there is no compiler.
    """
    with unchanged(engine):
        before = _seconds(engine)
        engine.model.compile()
        began = time.perf_counter()
        try:
            _pass(engine)
        except InductorError as error:
            reason = str(error).strip().splitlines()[0]
            raise DistclsError(f"compile: torch.compile failed: {reason}") from error
        cost = time.perf_counter() - began
        after = _seconds(engine)
    say(f"compiled   {cost:.0f} s; {_verdict(before, after, cost)}")


def _verdict(before: float, after: float, cost: float) -> str:
    passes = f"forward and backward {1000 * before:.0f} ms before, {1000 * after:.0f} ms now"
    if after >= before:
        return f"{passes}: it does not pay here, leave --compile off"
    return f"{passes}: it pays after {cost / (before - after):,.0f} steps"


def _seconds(engine: Engine) -> float:
    """Median time of a pass over the largest part of a step, after one that warms up."""
    times = []
    for _ in range(1 + PASSES):
        began = time.perf_counter()
        _pass(engine)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _pass(engine: Engine) -> None:
    try_pass(engine, engine.micro_batch)
    if engine.accelerator.device.type == "cuda":
        torch.cuda.synchronize(engine.accelerator.device)
