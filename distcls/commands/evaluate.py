"""`distcls evaluate`: metrics of a `.pth` or `.onnx` model on a split of a dataset directory.

`accelerate launch -m distcls.evaluate` divides the images over several processes.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.cli import run
from distcls.config import parse
from distcls.data.dataset import Dataset
from distcls.data.source import from_split
from distcls.errors import DistclsError, UsageError
from distcls.evaluation.evaluate import (
    EvaluateOptions,
    Share,
    check_task,
    evaluate_share,
    to_json,
    to_text,
    write_results,
)
from distcls.evaluation.metrics import AnyTally, tally_of
from distcls.files import require_writable
from distcls.predictor import load_model
from distcls.task import Task

ABOUT = "Measure a model on a split: loss, top-1, top-5, per-class precision, recall and F1."
MOST_NAMED = 10
"""Bad images that an error names; the rest are counted."""

Sum = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def main(arguments: Sequence[str]) -> None:
    """Parse, evaluate, tell."""
    options = parse(EvaluateOptions, arguments, prog="distcls evaluate", about=ABOUT)
    log.set_quiet(options.quiet)
    dataset = Dataset.open(options.data)
    split = dataset.split(options.split)
    if options.out is not None and log.rank() == 0:
        require_writable(options.out)
    with _processes(options.model) as (device, total):
        source = from_split(split, dataset.classes)
        model = load_model(options.model, device, options.asked(len(split)), source)
        task = model.card.task
        check_task(task, dataset.task, str(options.data))
        began = time.monotonic()
        share = evaluate_share(
            model,
            split,
            batch_size=options.batch_size,
            limit=options.limit,
            workers=options.workers,
            rank=log.rank(),
            world_size=log.world_size(),
        )
        tally = _whole(share, task, total)
        seconds = time.monotonic() - began
    if log.rank() != 0:
        return
    metrics, classes = tally.metrics(), dataset.classes
    about = {"model": str(options.model), "data": str(options.data), "split": split.name}
    log.say(f"{metrics.count / seconds:,.0f} images/s on {model.provider}")
    if options.out is not None:
        write_results(options.out, metrics, task, about)
        log.say(f"written: {options.out}")
    if options.json:
        print(json.dumps({**about, **to_json(metrics, classes)}, ensure_ascii=False))
    else:
        print(to_text(metrics, classes))


@contextlib.contextmanager
def _processes(model: Path) -> Iterator[tuple[str, Sum]]:
    """The device of this process, and a function that sums a vector over all processes."""
    if log.world_size() == 1:
        yield "auto", lambda vector: vector
        return
    if model.suffix.lower() != ".pth":
        raise UsageError(f"model: {model} runs in one process, {log.world_size()} were started")
    import torch
    from accelerate import PartialState
    from accelerate.utils import reduce

    state = PartialState(cpu=not torch.cuda.is_available())

    def total(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        summed = reduce(torch.from_numpy(vector).to(state.device), "sum")
        return np.asarray(summed.cpu().numpy(), np.float64)

    try:
        yield str(state.device), total
    finally:
        state.destroy_process_group()


def _whole(share: Share, task: Task, total: Sum) -> AnyTally:
    """The tally of all processes. Raises DistclsError, in all of them, if any image was bad."""
    for line in share.bad[:MOST_NAMED]:
        log.fail(line)
    vector = total(np.append(share.tally.vector(), len(share.bad)))
    bad = round(float(vector[-1]))
    if bad:
        raise DistclsError(f"{bad:,} images cannot be evaluated; the data has to be repaired first")
    return tally_of(vector[:-1], task)


if __name__ == "__main__":
    run(main)
