"""The logits of all images of a split, computed by one process or shared out among several."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.cli import leave_process_group
from distcls.data.dataset import Split
from distcls.errors import DistclsError, UsageError
from distcls.evaluation.metrics import LogitSpread, MetricState, metric_state
from distcls.evaluation.outputs import Outputs, blocks
from distcls.files import zeros
from distcls.predictor import Predictor
from distcls.task import Floats, Task

MAX_NAMED = 10
"""Bad images that a message names; the rest are counted."""

Sum = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Sums a vector over all processes."""


@contextlib.contextmanager
def processes(model: Path) -> Iterator[tuple[str, Sum]]:
    """The device of this process, and a function that sums a vector over all processes."""
    if log.world_size() == 1:
        yield "auto", lambda vector: vector
        return
    if model.suffix.lower() != ".pth":
        raise UsageError(f"model: {model} runs in one process, but {log.world_size()} were started")
    import torch
    from accelerate import PartialState
    from accelerate.utils import reduce

    state = PartialState(cpu=not torch.cuda.is_available())

    def total(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        summed = reduce(torch.from_numpy(vector).to(state.device), "sum")
        return np.asarray(summed.cpu().numpy(), np.float64)

    atexit.register(leave_process_group)  # not now: a script may go on with it
    yield str(state.device), total


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluated:
    """What all processes found together."""

    state: MetricState
    spread: LogitSpread
    logits: Floats
    """As the model gave them, float32 [N, K]."""
    split: Split

    def outputs(self, task: Task) -> Outputs:
        """The probabilities of the images, by a task with or without temperatures."""
        split = self.split
        return Outputs.of(task, self.logits, split.labels, split.image_ids, split.kept)


def evaluate_split(predictor: Predictor, split: Split, total: Sum) -> Evaluated:
    """The logits of a split in the model's terms, each image computed once, and their sums.

    The figures are those of calibrated probabilities where the task has temperatures. Raises
    DistclsError, in all processes, if any image is bad.
    """
    task = predictor.task
    state, spread = metric_state(task.plain), LogitSpread(task)
    logits, bad = zeros((len(split), len(task.classes)), np.float32), []
    indices = range(log.rank(), len(split), log.world_size())
    with (
        contextlib.closing(predictor.chunks(split, indices=indices)) as chunks,
        log.Progress("evaluating", len(indices)) as progress,
    ):
        for chunk in chunks:
            good = np.array([error is None for error in chunk.errors])
            places = np.array(chunk.indices)[good]
            logits[places] = chunk.logits[good]
            state.update(task.scaled(chunk.logits[good]), split.labels[places])
            spread.update(chunk.logits[good])
            for index, error in zip(chunk.indices, chunk.errors, strict=True):
                if error is not None:
                    bad.append(f"{split.image_ids[index]}: {error}")
            progress.update(len(chunk.indices))
    state, spread = _sum_over_ranks((state, spread), bad, task.plain, total)
    if log.world_size() > 1:
        for rows in blocks(*logits.shape):  # of the others' images a process has zeros
            logits[rows] = total(logits[rows].astype(np.float64).ravel()).reshape(
                -1, len(task.classes)
            )
    return Evaluated(state, spread, logits, split)


def _sum_over_ranks(
    own: tuple[MetricState, LogitSpread], bad: list[str], task: Task, total: Sum
) -> tuple[MetricState, LogitSpread]:
    """The sums of all processes. Raises DistclsError, in all of them, if any image was bad."""
    for line in bad[:MAX_NAMED]:
        log.fail(line)
    parts = [part.state() for part in own]
    vector = total(np.concatenate([*parts, [len(bad)]]))
    all_bad = round(float(vector[-1]))
    if all_bad:
        raise DistclsError(f"{log.counted(all_bad, 'image')} cannot be read; repair the data first")
    state, spread = metric_state(task), LogitSpread(task)
    state.merge(vector[: len(parts[0])])
    spread.merge(vector[len(parts[0]) : -1])
    return state, spread
