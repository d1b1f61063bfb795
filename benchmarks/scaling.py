"""`python -m benchmarks.scaling`: training throughput of processes against threads on the CPU.

The contestants take turns, each in processes of its own as a user starts them: 1 process of 1
thread, 2 processes of 1 thread, 1 process of 2 threads, and 2 independent runs of 1 thread, with
half the batch each: no exchange of gradients, so the limit of the machine.
All train on the same photographs; what counts is a run's own images/s after its first steps.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Contestant, alternate, finish, ratio, table
from benchmarks.launching import train
from benchmarks.train_step import write_photographs
from distcls.data.prepare import PrepareOptions, prepare

SETTINGS = {32: 128, 96: 64}
"""Side of the images: global batch."""
CONTESTANTS = {
    "1 process x 1 thread": (1, 1, 1),
    "2 processes x 1": (1, 2, 1),
    "1 process x 2": (1, 1, 2),
    "2 runs apart": (2, 1, 1),
}
"""Runs at a time, processes of each, threads of each process."""
ALONE, TWO_PROCESSES, TWO_THREADS, APART = CONTESTANTS
LAP = 8
"""Steps of a lap; the first lap of a run warms up."""


def measure(
    data: Path,
    scratch: Path,
    options: list[object],
    contestant: tuple[int, int, int],
    numbers: itertools.count[int],
) -> float:
    """Total images per second of all runs, of each the median of its laps but the first."""
    runs, processes, threads = contestant

    def one(number: int) -> float:
        out = scratch / f"run{number}"
        steps = train(data, out, *options, processes=processes, threads=threads)
        return statistics.median(float(step["images_per_s"]) for step in steps[1:])

    with concurrent.futures.ThreadPoolExecutor(runs) as pool:
        return sum(pool.map(one, [next(numbers) for _ in range(runs)]))


def compare(
    model: str, side: int, rounds: int, laps: int, more: list[object]
) -> dict[str, list[float]]:
    """Images per second of all contestants at one size."""
    batch = SETTINGS[side]
    options: list[object] = ["--epochs", 1, "--log-every", LAP, "--model.name", model]
    options += ["--input.size", f"{side},{side}", "--augment.flip", 0.5, *more]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        images, prepared = scratch / "images", scratch / "prepared"
        count = batch * LAP * (1 + laps)
        write_photographs(images / "train", side, count)
        write_photographs(images / "val", side, batch)
        prepare(PrepareOptions(source=str(images), out=prepared, test_fraction=0, quiet=True))
        numbers = itertools.count()
        contestants: dict[str, Contestant] = {
            name: functools.partial(
                measure,
                prepared,
                scratch,
                [*options, "--batch-size", batch // contestant[0]],
                contestant,
                numbers,
            )
            for name, contestant in CONTESTANTS.items()
        }
        return alternate(contestants, rounds)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mobilenet_v3_small")
    parser.add_argument("--sides", type=int, nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--laps", type=int, default=4, help=f"laps of {LAP} steps that count")
    parser.add_argument(
        "--sync-batch-norm", action="store_true", help="with synchronised batch norm"
    )
    given = parser.parse_args()
    figures: dict[str, Any] = {}
    for side in given.sides:
        more: list[object] = ["--sync-batch-norm"] if given.sync_batch_norm else []
        rates = compare(given.model, side, given.rounds, given.laps, more)
        print(f"training {given.model}, {side}x{side}, global batch {SETTINGS[side]}")
        print(table(rates, ALONE), end="\n\n", flush=True)
        figures[f"two_processes_over_one_{side}"] = round(ratio(rates, TWO_PROCESSES, ALONE), 2)
        figures[f"two_runs_apart_over_one_{side}"] = round(ratio(rates, APART, ALONE), 2)
        over = ratio(rates, TWO_PROCESSES, TWO_THREADS)
        figures[f"two_processes_over_two_threads_{side}"] = round(over, 2)
        figures[f"images_per_s_{side}"] = {k: [round(r, 1) for r in v] for k, v in rates.items()}
    finish("scaling", model=given.model, sync_batch_norm=given.sync_batch_norm, **figures)


if __name__ == "__main__":
    main()
