"""What the ranks do together in a preflight, over the network that training will use."""

from __future__ import annotations

import datetime
import os
import socket
import time
import typing
from typing import TypeVar

import torch
import torch.distributed as dist

from distcls.errors import UsageError
from distcls.log import rank, world_size
from distcls.system import available_cores

FLOATS = 2**20
"""Values of the all-reduce, 4 MiB: where packets are cut to a wrong size, short messages pass and
long ones hang."""
T = TypeVar("T")


def choose_device() -> tuple[torch.device, str]:
    """This rank's device and its name. Raises UsageError if there is no GPU left for it."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), f"cpu, {available_cores()} cores"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise UsageError(
            f"{socket.gethostname()}: no GPU for its process number {local}, there are "
            f"{torch.cuda.device_count()}; start one process a GPU"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local), f"cuda:{local} {torch.cuda.get_device_name(local)}"


def join(device: torch.device, seconds: float) -> None:
    """Meet the other ranks, through NCCL on GPUs and gloo on CPUs, as training does.

    Raises RuntimeError if that fails, or after `seconds` where the backend keeps to them.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size() == 1:
        # needs no launcher: at a free port of its own
        dist.init_process_group(backend, "tcp://127.0.0.1:0", rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=seconds))


def add_up(device: torch.device) -> tuple[bool, float]:
    """All-reduce of known values: whether the sum is right, and the seconds it took."""
    ranks = dist.get_world_size()
    values = torch.full((FLOATS,), rank() + 1.0, device=device)
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(values)
    right = bool((values == ranks * (ranks + 1) / 2).all())
    return right, time.perf_counter() - began


def clock() -> float:
    """Seconds since 1970, read when all ranks have come to the same point."""
    dist.barrier()
    return time.time()


def gather(value: T) -> list[T]:
    """Every rank's value, by rank."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return typing.cast(list[T], values)


def leave() -> None:
    """Go once nobody needs the meeting point any more."""
    dist.barrier()
    dist.destroy_process_group()
