"""`distcls.train` with a witness: which samples each step took, and faults on demand.

TRACE=FOLDER      writes FOLDER/RANK.jsonl, a line a batch: epoch, step, samples, lr
POISON=STEP:RANK  the losses of that step on that rank are not a number
SPIKE=STEP:RANK   the losses of that step on that rank are 50 times what they are
ROOM=MIB          address space left to the process when its model stands
GPU_ROOM=MIB      memory that the process may take of its GPU
SLOW=SECONDS      each step takes at least so long, so that a signal can hit it
SLOW_SAVE=SECONDS each state takes so long to write, half before its bytes and half after
BLIND=RANK        top-1 stands still on that rank and rises on the others
DIE=STEP:RANK:NAME  at that step the threads of that name die on that rank
HANG=FIFO:PART    once the pipe exists, opening files with PART in their paths waits for its writer
CLOCK_LOG=FILE    appends the wall clock's seconds at each step
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from distcls.cli import run
from distcls.commands.train import main
from distcls.evaluation.metrics import Metrics
from distcls.files import atomic_path
from distcls.training import checkpointing
from distcls.training.engine import Engine
from distcls.training.loader import Batch

TRACE, POISON = os.environ.get("TRACE"), os.environ.get("POISON")
BLIND, DIE, CLOCK_LOG = (os.environ.get(name) for name in ("BLIND", "DIE", "CLOCK_LOG"))
RANK = os.environ.get("RANK", "0")
SLOW = float(os.environ.get("SLOW", "0"))
SLOW_SAVE = float(os.environ.get("SLOW_SAVE", "0"))

SPIKE, ROOM, GPU_ROOM = (os.environ.get(name) for name in ("SPIKE", "ROOM", "GPU_ROOM"))

HANG = os.environ.get("HANG")

open_of = os.open
init_of = Engine.__init__
losses_of, step_of, evaluate_of = Engine._losses, Engine._step, Engine.evaluate
current = {"step": 0, "evaluations": 0}


def hanging_open(path: Any, *rest: Any, **named: Any) -> int:
    """A file of a file system that does not answer."""
    pipe, _, part = str(HANG).partition(":")
    if part in str(path) and Path(pipe).exists():
        open_of(pipe, os.O_RDONLY)
    return open_of(path, *rest, **named)


def traced_step(self: Engine, epoch: int, step: int, *rest: Any) -> Any:
    """Remember which step it is."""
    current["step"] = step
    threading.Event().wait(SLOW)  # libfaketime 0.9.10 breaks time.sleep ("Invalid argument")
    if CLOCK_LOG:
        with Path(CLOCK_LOG).open("a") as handle:
            handle.write(f"{time.time()}\n")
    if DIE and DIE.startswith(f"{step}:{RANK}:"):
        die(DIE.split(":")[2])
    return step_of(self, epoch, step, *rest)


def die(name: str) -> None:
    """End threads from outside, wherever they are."""
    victims = [thread for thread in threading.enumerate() if thread.name.startswith(name)]
    assert victims
    for victim in victims:
        assert victim.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(victim.ident), ctypes.py_object(SystemExit)
        )


def traced_losses(self: Engine, epoch: int, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Write down what the network is shown, and spoil it where asked."""
    if TRACE:
        line = {"epoch": epoch, "step": current["step"], "samples": batch.indices.tolist()}
        line["lr"] = self._optimizer.param_groups[0]["lr"]
        with (Path(TRACE) / f"{RANK}.jsonl").open("a") as handle:
            handle.write(json.dumps(line) + "\n")
    losses, right = losses_of(self, epoch, batch)
    if POISON and f"{current['step']}:{RANK}" == POISON:
        losses = losses * torch.tensor([float("nan")] + [1.0] * (len(losses) - 1))
    if SPIKE and f"{current['step']}:{RANK}" == SPIKE:
        losses = losses * 50
    return losses, right


def limited_init(self: Engine, *rest: Any, **named: Any) -> None:
    """Limit the address space to what is taken by now and some room, and the GPU's memory."""
    init_of(self, *rest, **named)
    if GPU_ROOM:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(int(GPU_ROOM) * 2**20 / total)
    if not ROOM:
        return
    taken = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (taken + int(ROOM) * 2**20, resource.RLIM_INFINITY))


def blinded_evaluate(self: Engine, *rest: Any) -> dict[str, Metrics]:
    """Let the ranks come to different conclusions."""
    current["evaluations"] += 1
    top1 = 0.0 if BLIND == RANK else current["evaluations"] / 100
    found = evaluate_of(self, *rest)
    return {name: dataclasses.replace(metrics, top1=top1) for name, metrics in found.items()}


@contextlib.contextmanager
def slow_path(path: Path) -> Iterator[Path]:
    """Take the time of a slow disk."""
    with atomic_path(path) as part:
        time.sleep(SLOW_SAVE / 2)
        yield part
        time.sleep(SLOW_SAVE / 2)


Engine._step = traced_step  # type: ignore[method-assign]
Engine._losses = traced_losses  # type: ignore[method-assign]
if ROOM or GPU_ROOM:
    Engine.__init__ = limited_init
if BLIND:
    Engine.evaluate = blinded_evaluate  # type: ignore[method-assign]
if HANG:
    os.open = hanging_open
if SLOW_SAVE:
    checkpointing.atomic_path = slow_path  # type: ignore[attr-defined]
if __name__ == "__main__":
    run(main)
