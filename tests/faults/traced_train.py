"""`distcls.train` with a witness: which samples each step took, and faults on demand.

TRACE=FOLDER      writes FOLDER/RANK.jsonl, a line a batch: epoch, step, samples
POISON=STEP:RANK  the losses of that step on that rank are not a number
SLOW=SECONDS      each step takes at least so long, so that a signal can hit it
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch

from distcls.data.loader import Batch
from distcls.door import run
from distcls.train import main
from distcls.training.engine import Engine

TRACE, POISON = os.environ.get("TRACE"), os.environ.get("POISON")
RANK = os.environ.get("RANK", "0")
SLOW = float(os.environ.get("SLOW", "0"))

losses_of, step_of = Engine._losses, Engine._step
current = {"step": 0}


def traced_step(self: Engine, epoch: int, step: int, *rest: object) -> object:
    """Remember which step it is."""
    current["step"] = step
    time.sleep(SLOW)
    return step_of(self, epoch, step, *rest)


def traced_losses(self: Engine, epoch: int, batch: Batch) -> torch.Tensor:
    """Write down what the network is shown, and spoil it where asked."""
    if TRACE:
        line = {"epoch": epoch, "step": current["step"], "samples": batch.indices.tolist()}
        with (Path(TRACE) / f"{RANK}.jsonl").open("a") as handle:
            handle.write(json.dumps(line) + "\n")
    losses = losses_of(self, epoch, batch)
    if POISON and f"{current['step']}:{RANK}" == POISON:
        losses = losses * torch.tensor([float("nan")] + [1.0] * (len(losses) - 1))
    return losses


Engine._step, Engine._losses = traced_step, traced_losses
if __name__ == "__main__":
    run(main)
