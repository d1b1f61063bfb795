"""Common to all benchmarks: alternating rounds, the table, the machine, the JSON line."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from distcls import __version__, log
from distcls.errors import DistclsError
from distcls.files import write_text

Contestant = Callable[[], float]
"""Runs one round and returns its rate (images/s, higher is better)."""


def alternate(contestants: dict[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """Let the contestants take turns, A B A B ..., after one round each that does not count.

    So a drift of the machine's speed affects all of them. One that does not start, such as an
    execution provider without its hardware, is left out, and that is said.
    """
    started = {}
    for name, run in contestants.items():
        log.say(f"{name}: warming up")
        try:
            run()
        except NotStarted as error:
            log.warn(f"{name} does not start and is left out: {error}")
        else:
            started[name] = run
    rates: dict[str, list[float]] = {name: [] for name in started}
    for number in range(1, rounds + 1):
        for name, run in started.items():
            rates[name].append(run())
            log.say(f"{name}: round {number} of {rounds}, {rates[name][-1]:,.1f} a second")
    return rates


class NotStarted(DistclsError):
    """A contestant whose process ended, or that cannot run here; the text is the reason."""


class Apart:
    """A contestant in a process of its own, which waits without computing while others run."""

    def __init__(self, make: Callable[..., Contestant], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Contestant:
        return self._run

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(timeout=30)
        self._process.kill()

    def _run(self) -> float:
        try:
            self._pipe.send("run")
            answer: float | str = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=30)
            code = self._process.exitcode
            raise NotStarted(f"its process ended with code {code}") from error
        if isinstance(answer, str):
            raise NotStarted(answer)
        return answer


def _serve(pipe: Connection, make: Callable[..., Contestant], arguments: tuple[Any, ...]) -> None:
    with contextlib.suppress(EOFError):  # the other end closes: the benchmark is over
        try:
            run = make(*arguments)
            while True:
                pipe.recv()
                pipe.send(run())
        except (DistclsError, ModuleNotFoundError) as error:  # any other is a bug, with a traceback
            pipe.send(str(error))


def table(rates: dict[str, list[float]], baseline: str) -> str:
    """Median, extremes and the median of the round-by-round ratio to the baseline."""
    lines = [f"{'':<24}{'images/s':>9}{'min':>9}{'max':>9}{'ratio':>8}"]
    for name, values in rates.items():
        middle = statistics.median(values)
        lines.append(
            f"{name:<24}{middle:>9.1f}{min(values):>9.1f}{max(values):>9.1f}"
            f"{ratio(rates, name, baseline):>8.2f}"
        )
    return "\n".join(lines)


def ratio(rates: dict[str, list[float]], name: str, baseline: str) -> float:
    """Median over the rounds of a contestant's rate over the baseline's."""
    pairs = zip(rates[name], rates[baseline], strict=True)
    return statistics.median(own / other for own, other in pairs)


def machine() -> dict[str, Any]:
    """The hardware and versions that a figure belongs to."""
    info = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "distcls": __version__,
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


def finish(benchmark: str, *, out: Path | None = None, **figures: Any) -> None:
    """Print the JSON line that ends a benchmark, and write it to `out` if that is given."""
    line = json.dumps({"benchmark": benchmark, **figures, "machine": machine()})
    if out is not None:
        write_text(out, line + "\n")
    print(line)


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
