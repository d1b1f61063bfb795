"""Where a run runs: processes, device, precision and threads, checked before the first step."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import sys
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from distcls.cores import available_cores
from distcls.errors import BadValue, DistclsError, UsageError
from distcls.log import world_size
from distcls.training.config import TrainConfig
from distcls.training.sharding import require_shardable


def start(config: TrainConfig) -> Accelerator:
    """Join the other processes and set up device, precision and threads.

    Raises UsageError if the run did not get the processes it was told to use, if the device has no
    such precision, or if the weights are to be sharded together with what that excludes.
    """
    check_processes(config.processes)
    precision = choose_precision(config.precision)
    require_shardable(config, precision)
    if config.auto_micro_batch:
        hand_back_freed_memory()
    else:
        keep_freed_memory()
    # torch's default buckets copy every gradient once more
    parallel = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    handlers = [parallel, time_limit(config.collective_timeout)]
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
    # after accelerate, which takes all cores where the launcher left OMP_NUM_THREADS open, as
    # torchrun does with one process a machine
    set_threads(config.threads)
    if accelerator.num_processes != world_size():
        raise DistclsError(
            f"{world_size()} processes were started, but accelerate sees "
            f"{accelerator.num_processes}; each would train and write alone"
        )
    return accelerator


def check_processes(wanted: int | None) -> None:
    """Raise UsageError if there are not as many processes as were asked for."""
    found = world_size()
    if wanted is not None and found != wanted:
        raise UsageError(
            f"processes: {wanted} asked for, {found} running; start them with "
            f"`accelerate launch --multi_gpu --num_processes {wanted} -m distcls.train ...` "
            "(with --multi_gpu also on CPUs)"
        )
    # accelerate's launcher names a meeting point for several processes, then starts a single one
    # where it finds neither GPUs nor mpirun (1.15: --cpu --num_processes 2)
    meeting_point = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if meeting_point and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            "accelerate was told to start several processes but started one; on CPUs add "
            "--multi_gpu, or use `torchrun --standalone --nproc_per_node N -m distcls.train ...`"
        )


def time_limit(seconds: float) -> InitProcessGroupKwargs:
    """How long a process waits for the others in a collective operation.

    Without it gloo waits half an hour, NCCL 10 minutes. A process group that a launcher (Ray) has
    made already keeps its own.
    """
    # accelerate 1.15 drops a limit that equals its default (600 s), whatever the backend's is, so
    # gloo would take its half hour
    return InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=seconds, microseconds=1))


@contextlib.contextmanager
def lost_processes_explained(limit: float) -> Iterator[None]:
    """Turn the failure of a collective operation into a DistclsError.

    Its cause is another process, which has its own last words or none.
    """
    try:
        yield
    except RuntimeError as error:
        # NCCL's and the store's have a class of their own, gloo's only a file name in the message
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()):
            raise
        what = (str(error).splitlines() or [""])[0].strip()
        raise DistclsError(
            f"another process is gone, or did not answer within {limit:.0f} s "
            f"(collective_timeout): {what}; --resume auto continues from the last state"
        ) from error


def choose_precision(wanted: str) -> str:
    """`fp32`, `bf16` or `fp16`. Raises BadValue if the device cannot do what is wanted."""
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


def set_threads(wanted: int | None) -> None:
    """Share the cores among this machine's processes (launchers leave one thread to each)."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(wanted or max(1, available_cores() // local))


def keep_freed_memory() -> None:
    """Have glibc keep what it freed: a step frees and takes the same gigabyte again and again.

    Handed back to the system, it comes back page by page. Measured on 2 cores, MobileNetV3-Large at
    224 px, batch 32: 33.4 to 39.1 img/s, page faults 2.4 to 0.7 million; at 32 px no difference.
    """
    _set_malloc(mmap_threshold=1 << 30, trim_threshold=(1 << 31) - 1)


def hand_back_freed_memory() -> None:
    """Have glibc hand large arrays back to the system when they are freed.

    Where memory is scarce: kept in the heap, what a trial that failed had taken is lost to all that
    does not come from there, such as the code that oneDNN generates.
    """
    _set_malloc(mmap_threshold=1 << 16, trim_threshold=1 << 20)


def _set_malloc(*, mmap_threshold: int, trim_threshold: int) -> None:
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is not None:
        mallopt(-3, mmap_threshold)  # M_MMAP_THRESHOLD of malloc.h
        mallopt(-1, trim_threshold)  # M_TRIM_THRESHOLD
