"""Processes, device, precision and threads of a run; sums over all processes."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import re
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    reduce,
)
from torch import Tensor

from distcls.cli import leave_process_group
from distcls.errors import BadValue, DistclsError, Reported, UsageError
from distcls.log import counted, world_size
from distcls.system import (
    available_cores,
    end_with_parent,
    hand_back_freed_memory,
    keep_freed_memory,
)
from distcls.training.config import TrainConfig
from distcls.training.fsdp import require_shardable

V = TypeVar("V")

MEETING = 1.0
"""Seconds between two all-reduces while all processes wait for the main one's work."""


def start(config: TrainConfig) -> Accelerator:
    """Join the other processes and set up device, precision and threads.

    Raises UsageError if the number of processes is not the configured one or exceeds that of the
    GPUs, if the device lacks the precision, or if the weights are to be sharded with options that
    exclude it.
    """
    check_processes(config.processes)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # a launcher killed alone (kill -9) leaves its workers, and they would train to the end
        end_with_parent()
    precision = choose_precision(config.precision)
    require_shardable(config, precision)
    if config.auto_micro_batch:
        hand_back_freed_memory()
    else:
        keep_freed_memory()
    # torch's default buckets copy every gradient once more
    parallel = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    handlers = [parallel, process_group_timeout(config.collective_timeout)]
    mixed = "no" if precision == "fp32" else precision
    # accelerate keeps the precision of an earlier run of this process, and refuses any other
    AcceleratorState._reset_state()
    # without cpu=True, accelerate ignores the other processes on a machine that has no GPU
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(
        mixed_precision=mixed,
        cpu=cpu,
        kwargs_handlers=handlers,
        log_with=config.tracker,
        project_dir=config.out,
    )
    atexit.register(leave_process_group)
    # after accelerate, which takes all cores where the launcher left OMP_NUM_THREADS open, as
    # torchrun does with one process per machine
    set_threads(config.threads)
    if accelerator.num_processes != world_size():
        raise DistclsError(
            f"{world_size()} processes were started, but accelerate sees "
            f"{accelerator.num_processes}; each would train and write on its own"
        )
    return accelerator


def set_project_folder(accelerator: Accelerator, folder: Path) -> None:
    """The run directory, where accelerate's trackers write; it may be chosen after the start."""
    project = accelerator.project_configuration
    project.project_dir = project.logging_dir = str(folder)


def check_processes(wanted: int | None) -> None:
    """Raise UsageError if the number of processes is not the one that the config requires, or if
    this machine has GPUs, but not one for each of its processes."""
    found = world_size()
    if wanted is not None and found != wanted:
        raise UsageError(
            f"processes: {wanted} requested, {found} running; start them with "
            f"`accelerate launch --multi_gpu --num_processes {wanted} -m distcls.train ...` "
            "(with --multi_gpu also on CPUs)"
        )
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    # what starts processes itself, as srun does, may let each see one GPU of its own
    shared = gpus > 1 or "TORCHELASTIC_RUN_ID" in os.environ
    if here > gpus > 0 and shared:
        raise UsageError(
            f"{here} processes on this machine and {counted(gpus, 'GPU')}, but each process needs "
            f"one of its own: start {gpus}, or train on the CPU with CUDA_VISIBLE_DEVICES= (empty)"
        )
    # accelerate's launcher sets a rendezvous address for N processes, then starts a single one
    # where it finds neither GPUs nor mpirun (1.15: --cpu --num_processes 2)
    rendezvous = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if rendezvous and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            "accelerate was told to start several processes but started one; on CPUs add "
            "--multi_gpu, or use `torchrun --standalone --nproc_per_node N -m distcls.train ...`"
        )


def process_group_timeout(seconds: float) -> InitProcessGroupKwargs:
    """The timeout of collective operations.

    Without it gloo waits half an hour, NCCL 10 minutes. A process group that a launcher (Ray) has
    made already keeps its own.
    """
    # accelerate 1.15 drops a limit that equals its default (600 s), whatever the backend's is, so
    # gloo would take its half hour
    return InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=seconds, microseconds=1))


@contextlib.contextmanager
def explain_lost_processes(limit: float, *, begun: bool = True) -> Iterator[None]:
    """Turn the failure of a collective operation into a DistclsError.

    Its cause is another process, which may have printed an error of its own. `begun`: whether the
    run has, and can be continued.
    """
    try:
        yield
    except RuntimeError as error:
        # NCCL's and the store's have their own class, gloo's only a file name in the message
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()):
            raise
        what = (str(error).splitlines() or [""])[0].strip()
        # gloo's line begins with the place in its source and ends in general advice
        what = re.sub(r"^\[\S+\] ", "", what).partition(". This is typically")[0]
        if not begun:
            raise DistclsError(
                "another process failed, or cannot be reached, before the first step; its own "
                f"error says why (collective_timeout {limit:.0f} s): {what}"
            ) from error
        raise DistclsError(
            f"another process has died, or did not respond within {limit:.0f} s "
            f"(collective_timeout): {what}; --resume auto continues from the last state"
        ) from error


def choose_precision(wanted: str) -> str:
    """`fp32`, `bf16` or `fp16`. Raises BadValue if the device does not support it."""
    cuda = torch.cuda.is_available()
    if wanted == "auto":
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launcher in ("bf16", "fp16"):
            wanted = launcher
        elif not cuda:
            return "fp32"
        else:
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if wanted == "fp16" and not cuda:
        raise BadValue("precision", wanted, "auto, fp32 or bf16: fp16 needs a GPU")
    return wanted


@contextlib.contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Put PyTorch's random numbers back afterwards: a run seeds them anew in each step, and what a
    notebook draws after it would be the same after every run."""
    begun: Callable[[], bool] = torch.cuda.is_initialized
    seed, there = torch.initial_seed(), begun()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if there else []):
        yield
    if not there and begun():  # nothing was drawn there before
        torch.cuda.manual_seed_all(seed)


def set_threads(wanted: int | None) -> None:
    """Divide the cores among this machine's processes (launchers leave one thread to each)."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(wanted or max(1, available_cores() // local))


def any_process(*flags: bool) -> list[bool]:
    """For each flag, whether any process has set it. All processes have to call this."""
    state = PartialState()
    if state.num_processes == 1:
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.float32, device=state.device)
    return [bool(count) for count in reduce(raised, reduction="sum").tolist()]


def from_main(work: Callable[[], V]) -> V:
    """What `work` returns on the main process, which alone calls it; all processes have to call
    this, and get it.

    It may take longer than the timeout of collective operations: meanwhile the processes meet every
    second. Its error ends all of them; the others raise `Reported`.
    """
    state = PartialState()
    if state.num_processes == 1:
        return work()
    if not state.is_main_process:
        while not any(any_process(False)):
            pass  # blocked in the all-reduce
        value, code = broadcast_object_list([None, 0])
        if code:
            raise Reported(code)
        return typing.cast(V, value)
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)  # an interrupt does not wait for the work
    while not any(any_process(bool(wait([future], MEETING).done))):
        pass
    error = future.exception()
    code = getattr(error, "exit_code", DistclsError.exit_code) if error else 0
    broadcast_object_list([None if error else future.result(), code])
    return future.result()


def sum_over_processes(term: Tensor) -> float:
    """The sum of each process's term, []. All processes have to call this."""
    return sums_over_processes(term[None])[0]


def sums_over_processes(terms: Tensor) -> list[float]:
    """The sums of each process's terms, [N]. All processes have to call this."""
    sums: list[float] = reduce(terms, reduction="sum").tolist()
    return sums
