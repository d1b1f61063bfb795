"""The collectives of a preflight, over the network that training will use; imports torch."""

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
"""Values of the all-reduce, 4 MiB: with a wrong MTU short messages pass and long ones hang."""
T = TypeVar("T")


def choose_device() -> tuple[torch.device, str]:
    """This rank's device and its name. Raises UsageError if there is no GPU left for it."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), f"cpu, {available_cores()} cores"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise UsageError(
            f"{socket.gethostname()}: no GPU for its process number {local}, there are "
            f"{torch.cuda.device_count()}; start one process per GPU"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local), f"cuda:{local} {torch.cuda.get_device_name(local)}"


def join(device: torch.device, seconds: float) -> None:
    """Form the process group, with NCCL on GPUs and gloo on CPUs, as training does.

    Raises RuntimeError if that fails, or after `seconds` where the backend has timeouts.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size() == 1:
        # needs no launcher: a free port of its own
        dist.init_process_group(backend, "tcp://127.0.0.1:0", rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=seconds))


def check_all_reduce(device: torch.device) -> tuple[bool, float]:
    """All-reduce known values: whether the sum is right, and the seconds it took."""
    ranks = dist.get_world_size()
    values = torch.full((FLOATS,), rank() + 1.0, device=device)
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(values)
    right = bool((values == ranks * (ranks + 1) / 2).all())
    return right, time.perf_counter() - began


def clock_after_barrier() -> float:
    """Unix time in seconds, read after a common barrier."""
    dist.barrier()
    return time.time()


def all_gather(value: T) -> list[T]:
    """Every rank's value, by rank."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return typing.cast(list[T], values)


def leave() -> None:
    """Destroy the process group once no rank needs the rendezvous any more."""
    dist.barrier()
    dist.destroy_process_group()
