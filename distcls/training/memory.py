"""Trials before the first step: what fits into memory, and what torch.compile gains.

Under DDP a process that runs out of memory within a step leaves all others waiting for its
gradients. So a trial runs on each process alone, and the processes compare the outcomes afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections.abc import Callable, Iterator

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch._inductor.exc import InductorError

from distcls.errors import DistclsError
from distcls.log import say, warn
from distcls.training.config import TrainConfig
from distcls.training.distributed import any_process
from distcls.training.engine import Engine
from distcls.training.fsdp import is_requested

HEADROOM = 1.25
"""Images of a trial per image of a step: a margin for fragmentation and other processes."""
LIBRARIES = (
    *("ALLOC_FAILED", "could not create a", "could not execute a primitive"),
    "can't start new thread",
)
"""Messages of cuBLAS, cuDNN and oneDNN when their own allocations fail, and Python's of a stack."""
PASSES = 5
"""Passes timed; their median counts."""
ENOUGH_FASTER = 1.1
"""Times the speed of a smaller batch, from which a larger one is worth it."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of a GPU or of the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LIBRARIES)


def fit_into_memory(engine: Engine) -> None:
    """Double the micro-batches of a step, and halve the batch of evaluation, until a trial of each
    fits.

    The global batch stays. The model's state and all random states are as before. All processes
    have to call this; they get the same numbers. Raises DistclsError if the micro-batch cannot
    be halved any more.
    """
    batching = engine.micro_batching
    before = batching.size
    while not _fits_everywhere(lambda: engine.trial_step(math.ceil(HEADROOM * batching.size))):
        if batching.doubled is None:
            raise DistclsError(
                f"out of memory with {batching.size} images at a time, and batch normalisation "
                "needs two in every micro-batch: choose a smaller --input.size or --model.name, "
                "or more processes"
            )
        batching.accumulate = batching.doubled
    if batching.size != before:
        warn(
            f"{before} images at a time do not fit into memory: reduced to {batching.size}, in "
            f"{batching.accumulate} micro-batches per step; the global batch stays "
            f"{batching.sampler.batch_size}"
        )
    while not _fits_everywhere(engine.trial_evaluation):
        if batching.evaluation_batch == 1:
            raise DistclsError(
                "out of memory evaluating a single image: choose a smaller --input.size"
            )
        batching.evaluation_batch //= 2


@contextlib.contextmanager
def explain_out_of_memory(config: TrainConfig, engine: Engine) -> Iterator[None]:
    """Turn running out of memory in the middle of a run into a DistclsError with advice.

    The step is not taken again: other processes may already wait for its gradients.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DistclsError(_advice(config, engine)) from error


def _advice(config: TrainConfig, engine: Engine) -> str:
    batching = engine.micro_batching
    what = f"out of memory with {batching.size} images at a time"
    if config.auto_micro_batch:
        return (
            f"{what}, which fitted before the first step: something else takes memory too; "
            "--resume auto searches again for what fits"
        )
    if batching.doubled is None:
        return f"{what}; choose a smaller --input.size or --model.name, or more processes"
    if is_requested():
        return f"{what}; --accumulate {batching.doubled} halves them, the global batch stays"
    return (
        f"{what}; --auto-micro-batch true (with --resume auto to continue) finds out how many fit "
        f"and --accumulate {batching.doubled} halves them; both keep the global batch"
    )


def _fits_everywhere(trial: Callable[[], object]) -> bool:
    fits = _fits(trial)
    if not fits:  # only now have the exception's frames released their tensors
        clear_device_cache(garbage_collection=True)
    [failed] = any_process(not fits)
    return not failed


def _fits(trial: Callable[[], object]) -> bool:
    try:
        trial()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def batch_speeds(engine: Engine, smallest: int, largest: int) -> dict[int, float]:
    """Images a second by batch size, from `smallest` on, doubled as long as the batch fits into
    memory, is no larger than `largest`, and one of the last two sizes was faster than all before.

    Passes over random pixels, which leave no trace. Raises DistclsError if the smallest does not
    fit.
    """
    speeds: dict[int, float] = {}
    size, slower = smallest, 0
    while size <= max(largest, smallest) and slower < 2:
        most = math.ceil(HEADROOM * size)
        if not _fits_everywhere(functools.partial(engine.trial_step, most)):
            break
        speed = size / _median_seconds(engine, size)
        slower = slower + 1 if speed < ENOUGH_FASTER * max(speeds.values(), default=0) else 0
        speeds[size] = speed
        size *= 2
    if not speeds:
        raise DistclsError(
            f"out of memory with {smallest} images at a time: choose a smaller --input.size or "
            "--model.name"
        )
    return speeds


def compile_step(engine: Engine) -> None:
    """Compile the model in place, and print how long that took and how long a step takes now.

    The passes that are timed see random pixels and leave no trace, so a run that is resumed
    computes as one that never stopped. Raises DistclsError if there is no compiler.
    """
    images = engine.micro_batching.size
    before = _median_seconds(engine, images)
    engine.compile()
    try:
        cost = engine.trial_step(images)
    except InductorError as error:
        reason = str(error).strip().splitlines()[0]
        raise DistclsError(f"compile: torch.compile failed: {reason}") from error
    after = _median_seconds(engine, images)
    say(f"compiled   {cost:.0f} s; {_comparison(before, after, cost)}")


def _comparison(before: float, after: float, cost: float) -> str:
    passes = f"forward and backward {1000 * before:.0f} ms before, {1000 * after:.0f} ms now"
    if after >= before:
        return f"{passes}: it does not pay here, leave --compile off"
    return f"{passes}: it pays after {cost / (before - after):,.0f} steps"


def _median_seconds(engine: Engine, images: int) -> float:
    """Of a pass over the largest micro-batch, after one that warms up."""
    return statistics.median([engine.trial_step(images) for _ in range(1 + PASSES)][1:])
