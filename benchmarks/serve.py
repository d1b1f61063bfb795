"""`python -m benchmarks.serve`: an image classifier over HTTP, the common servers and ours.

All answer JPEGs of about 500x375 with the label that MobileNetV3-Large at 224 pixels gives them, on
the same cores, on one ONNX Runtime thread a worker:

- distcls: `distcls serve --provider cpu`, with engine processes and with threads;
- Starlette: a plain route on uvicorn (uvloop, httptools), a pool of as many threads as cores;
- LitServe, MLServer, Ray Serve: workers = cores, batches of up to 8;
- Triton tensors: a real tritonserver whose Python backend runs ONNX Runtime, batching what waits.
  It is sent preprocessed pixels, so it decodes nothing.

Each but ours lives in a virtual environment of its own in the cache folder, made once. One that
cannot be installed or started, or whose labels are not those of `distcls predict`, is left out.

Requests come at times of a Poisson process (`benchmarks.open_loop`), at fractions of the rate of
`distcls predict` over the same photographs; at each all contestants take turns, and whoever is
not measured is paused.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import predict_ways
from benchmarks.common import Apart, Contestant, NotStarted, finish
from benchmarks.open_loop import SLOWEST, Outcome, offer
from benchmarks.photographs import model_for, photographs
from benchmarks.serve_contestants import Running, ways
from distcls import log, plotting
from distcls.cli import run
from distcls.errors import UsageError, did_you_mean
from distcls.runtime.providers import versions

LEVELS = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
"""Offered load, as a share of the rate of `distcls predict`."""
LOWER, HIGHER = (0.075, 0.15), (1.15, 1.3, 1.5)
"""More of them for one that is too slow at the first, or within the limit at the one before."""
LIMIT, LOST = 100.0, 1000.0
"""p99 in ms: of what counts as served well, and above which higher levels are left out."""
CHECKED, BODIES = 20, 100
"""Photographs whose labels are compared first, and that the requests are made of."""
OVERLOAD = 10
"""How many times the capacity is offered to a server that has to refuse."""
HEALTH = b"GET /v2/health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
HEALTH_RATE = 20


@dataclasses.dataclass
class Figures:
    """What was measured of a contestant."""

    ready: float
    """Seconds from its start to its first answer."""
    idle: float
    """Megabytes before the first load."""
    loaded: float = 0.0
    """The most megabytes after a level."""
    levels: dict[float, list[Outcome]] = dataclasses.field(default_factory=dict)
    """By rate, an outcome a round, fewer where rounds left it out."""
    alone: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """Requests one after the other, a measurement a round."""
    half: list[Outcome] = dataclasses.field(default_factory=list)
    """At half of `best`, a round each."""
    overload: dict[str, Any] | None = None

    def p99(self, rounds: int) -> dict[float, float]:
        """By rate, the median over the rounds; infinite for a round that left it out."""
        return {
            rate: statistics.median(
                [each.percentile(99) for each in found] + [math.inf] * (rounds - len(found))
            )
            for rate, found in sorted(self.levels.items())
        }

    @property
    def peak(self) -> float:
        """The most answers a second in one run."""
        return max(each.goodput for found in self.levels.values() for each in found)


def sustained(p99: dict[float, float], limit: float = LIMIT) -> float:
    """The rate up to which the p99 stays within the limit, between two levels by its logarithm.

    It counts from the highest level within it, as a lower one may have met other work on the
    machine. 0 if none is; the highest level if that is.
    """
    rates = sorted(p99)
    good = [place for place, rate in enumerate(rates) if p99[rate] <= limit]
    if not good or good[-1] == len(rates) - 1:
        return rates[good[-1]] if good else 0.0
    low, high = rates[good[-1] : good[-1] + 2]
    before, after = math.log(p99[low]), math.log(min(p99[high], 1000 * SLOWEST))
    return low + (math.log(limit) - before) / (after - before) * (high - low)


def load(server: Running, rate: float, seconds: float, seed: int) -> Outcome:
    """Offer it a load, from a process of its own."""
    job = {
        **{"files": [str(body) for body in server.bodies], "path": server.way.path},
        **{"headers": dict(server.way.headers), "port": server.port},
        **{"rate": rate, "seconds": seconds, "seed": seed},
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.open_loop"],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Outcome(**json.loads(done.stdout))


class Comparison:
    """Contestants that run, and what is measured of them."""

    def __init__(self, given: argparse.Namespace, predict: Contestant) -> None:
        self._predict = predict
        log.say("distcls predict over the photographs: loads are shares of its rate")
        predict()  # warms up
        self.predict = [predict()]
        """Images a second of `distcls predict`, before all and in each round."""
        self.reference = self.predict[0]
        self.rounds: int = given.rounds
        self.seconds: float = given.seconds
        self._levels = given.levels
        self._servers: dict[str, Running] = {}
        self.figures: dict[str, Figures] = {}

    def enter(self, server: Running, labels: Sequence[str]) -> None:
        """Have a server take part. Raises NotStarted if its labels are wrong."""
        name = server.way.name
        wrong = [n for n, label in enumerate(labels) if server.answer(n)[0] != label]
        if wrong:
            server.pause()
            raise NotStarted(f"{len(wrong)} of {len(labels)} labels are not those of predict")
        self._servers[name] = server
        self.figures[name] = Figures(ready=server.ready, idle=server.memory())
        log.say(
            f"{name}: ready after {server.ready:.1f} s, {self.figures[name].idle:.0f} MB, "
            f"{len(labels)} labels as predict's"
        )
        server.pause()

    def measure(self) -> None:
        """All but the overload."""
        slow = self._warm_up()
        for turn in range(self.rounds):
            self.predict.append(self._predict())
            for name, server in self._servers.items():
                with server.turn():
                    self.figures[name].alone.append(server.alone(self.seconds / 2))
            self._levels_of(turn, slow)
        for turn in range(self.rounds):
            for name, server in self._servers.items():
                rate = self.best(name) / 2
                if rate:
                    found = self._load(name, server, rate, 1000 + turn)
                    self.figures[name].half.append(found)

    def best(self, name: str) -> float:
        """Requests a second at a p99 within the limit."""
        return sustained(self.figures[name].p99(self.rounds))

    def best_text(self, name: str) -> str:
        """The same as a text that says when it lies outside what was measured."""
        p99, best = self.figures[name].p99(self.rounds), self.best(name)
        if not best:
            return f"< {min(p99):.0f}"
        return f">= {best:.0f}" if best == max(p99) else f"{best:.0f}"

    def _warm_up(self) -> set[str]:
        """A load that does not count; those that are too slow at the lowest level."""
        slow = set()
        for name, server in self._servers.items():
            log.say(f"{name}: warming up")
            with server.turn():
                seconds = max(2.0, self.seconds / 3)
                found = load(server, self._levels[0] * self.reference, seconds, 0)
            if found.percentile(99) > LIMIT:
                slow.add(name)
        return slow

    def _levels_of(self, turn: int, slow: set[str]) -> None:
        lost: set[str] = set()
        for place, level in enumerate((*LOWER, *self._levels)):
            for name, server in self._servers.items():
                if name in lost or (level in LOWER and name not in slow):
                    continue
                rate = round(level * self.reference, 2)
                found = self._load(name, server, rate, 100 * turn + place)
                self.figures[name].levels.setdefault(rate, []).append(found)
                most = LIMIT if level >= max(LEVELS) else LOST
                if found.percentile(99) > most:
                    lost.add(name)  # for the rest of this round

    def _load(self, name: str, server: Running, rate: float, seed: int) -> Outcome:
        with server.turn():
            found = load(server, rate, self.seconds, seed)
            self.figures[name].loaded = max(self.figures[name].loaded, server.memory())
        lost = len(found.refused) + found.failed
        log.say(
            f"{name}: {rate:.0f} a second offered, {found.goodput:.0f} answered, "
            f"p99 {_ms(found.percentile(99))}" + (f", {lost} refused or failed" if lost else "")
        )
        return found

    def overload(self, seconds: float) -> None:
        """Far more than ours can serve: what is refused, how soon, and what is still served."""
        for name, server in self._servers.items():
            if not name.startswith("distcls"):
                continue
            peak = self.figures[name].peak
            log.say(f"{name}: {OVERLOAD * peak:.0f} a second for {seconds:.0f} s, too many")
            with server.turn():
                before = server.memory()
                health: list[Outcome] = []
                probing = threading.Thread(
                    target=lambda server=server, health=health: health.append(
                        asyncio.run(offer(server.port, [HEALTH], HEALTH_RATE, seconds))
                    )
                )
                probing.start()
                found = load(server, OVERLOAD * peak, seconds, 7)
                probing.join()
                after = server.memory()
            self.figures[name].overload = {
                "offered": round(OVERLOAD * peak, 1),
                "refused": round(len(found.refused) / _total(found), 4),
                "failed": found.failed,
                "p99_of_refusals_ms": _percentile(found.refused),
                "p99_of_answers_ms": _percentile(found.latencies),
                "goodput_over_peak": round(found.goodput / peak, 3),
                "memory_mb": [round(before), round(after)],
                "health_p99_ms": _percentile(health[0].latencies),
                "health_failed": health[0].failed + len(health[0].refused),
            }


def _total(found: Outcome) -> int:
    return max(1, len(found.latencies) + len(found.refused) + found.failed)


def _percentile(values: list[float], share: float = 0.99) -> float | None:
    """In ms."""
    if not values:
        return None
    return round(1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))], 1)


def _ms(value: float) -> str:
    return f"{value:.1f} ms" if math.isfinite(value) else "none (over 1 % unanswered)"


def predicted(folder: Path, model: Path, count: int) -> dict[str, str]:
    """The labels of `distcls predict`, by file name."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "pre.csv"
        words = ["predict", folder, "--model", model, "--out", out, "--provider", "cpu", "--quiet"]
        call = [sys.executable, "-m", "distcls", *words, "--limit", count]
        subprocess.run(list(map(str, call)), check=True)
        with out.open(encoding="utf-8", newline="") as file:
            return {row["image_id"]: row["label"] for row in csv.DictReader(file)}


def compare(
    given: argparse.Namespace, folder: Path, model: Path
) -> tuple[Comparison, dict[str, str]]:
    """Start the contestants, measure them, end them; and why others are left out."""
    entered = ways()
    for name in given.only or ():
        if name not in entered:
            raise UsageError(f"only: there is no {name!r}{did_you_mean(name, entered)}")
    files = sorted(folder.glob("*.jpg"))
    chosen = files[:: max(1, len(files) // BODIES)][:BODIES]
    expected = predicted(folder, model, len(files))
    labels = [expected[path.name] for path in chosen[:CHECKED]]
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        predict = stack.enter_context(Apart(predict_ways.ours, folder, model, "cpu"))
        found = Comparison(given, predict)
        for place, (name, way) in enumerate(entered.items()):
            if given.only is not None and name not in given.only:
                continue
            log.say(f"{name}: starting")
            try:
                server = Running(way, model, chosen, scratch / str(place))
                stack.callback(server.end)
                found.enter(server, labels)
            except NotStarted as error:
                log.warn(f"{name} is left out: {error}")
                left_out[name] = str(error)
        found.measure()
        found.overload(3 * given.seconds)
    return found, left_out


def table(found: Comparison) -> str:
    """A line a contestant."""
    heads = ["at p99", "of", "half: p50", "p99", "alone", "added", "ready", "idle", "loaded"]
    units = ["<= 100 ms", "predict", "ms", "ms", "ms", "ms", "s", "MB", "MB"]
    lines = ["".join([f"{'':<20}", *(f"{text:>10}" for text in texts)]) for texts in (heads, units)]
    for name, own in found.figures.items():
        best = found.best(name)
        values = [
            found.best_text(name),
            f"{best / statistics.median(found.predict):.0%}",
            *(f"{_middle(own.half, share):.1f}" for share in (50, 99)),
            f"{statistics.median(each['round_trip_ms'] for each in own.alone):.1f}",
            f"{statistics.median(each['added_ms'] for each in own.alone):.2f}",
            *(f"{own.ready:.1f}", f"{own.idle:.0f}", f"{own.loaded:.0f}"),
        ]
        lines.append(f"{name:<20}" + "".join(f"{text:>10}" for text in values))
    return "\n".join(lines)


def _middle(outcomes: list[Outcome], share: float) -> float:
    if not outcomes:
        return math.nan
    return statistics.median(each.percentile(share) for each in outcomes)


def draw(found: Comparison, path: Path) -> None:
    """The p99 against the offered load, a line a contestant."""
    figure = plotting.new_figure(9, 5.5)
    axes = figure.subplots()
    colours = {
        **{"distcls processes": plotting.BLUE, "distcls threads": "#6fa8dc"},
        **{"Starlette": plotting.GREY, "LitServe": plotting.ORANGE, "MLServer": plotting.GREEN},
        **{"Ray Serve": plotting.RED, "Triton tensors": "#7b3fa0"},
    }
    for marker, (name, own) in zip("osD^vPX", found.figures.items(), strict=False):
        points = [(r, v) for r, v in own.p99(found.rounds).items() if math.isfinite(v)]
        ours = name.startswith("distcls")
        axes.plot(
            *([point[side] for point in points] for side in (0, 1)),
            color=colours[name],
            marker=marker,
            lw=2.4 if ours else 1.4,
            label=f"{name}: {found.best_text(name)}",
        )
    axes.set_yscale("log")
    axes.set_ylim(5, 20_000)
    axes.set_yticks([10 * 10**power * step for power in range(4) for step in (1, 2, 5)][:-1])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.minorticks_off()
    axes.axhline(LIMIT, color="black", ls="--", lw=1)
    axes.axvline(found.reference, color="black", ls=":", lw=1)
    axes.text(1, LIMIT, " 100 ms", va="center", transform=axes.get_yaxis_transform(), size=8)
    axes.text(found.reference, 0.01, "distcls predict ", ha="right", size=8,
              transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_xlabel("requests a second that were due (open loop, Poisson)")
    axes.set_ylabel("p99 of the latency, ms")
    axes.legend(title="requests/s at a p99 of 100 ms", loc="upper left",
                bbox_to_anchor=(1, 1), frameon=False)  # fmt: skip
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    plotting.save(figure, path)


def results(found: Comparison) -> dict[str, Any]:
    """All figures as plain values; None where over 1 % was not answered."""
    told = {}
    for name, own in found.figures.items():
        levels = [
            {
                "offered": rate,
                "goodput": [round(each.goodput, 1) for each in outcomes],
                "p50_ms": [_plain(each.percentile(50)) for each in outcomes],
                "p99_ms": [_plain(each.percentile(99)) for each in outcomes],
                "refused": [len(each.refused) for each in outcomes],
                "failed": [each.failed for each in outcomes],
            }
            for rate, outcomes in sorted(own.levels.items())
        ]
        told[name] = {
            "per_s_at_100_ms": round(found.best(name), 1),
            "levels": levels,
            "at_half": {f"p{share}_ms": [_plain(each.percentile(share)) for each in own.half]
                        for share in (50, 99)},
            "alone": [{key: round(value, 3) for key, value in each.items()} for each in own.alone],
            "ready_s": round(own.ready, 2),
            "memory_mb": {"idle": round(own.idle), "loaded": round(own.loaded)},
            "overload": own.overload,
        }  # fmt: skip
    return told


def _plain(value: float) -> float | None:
    return round(value, 2) if math.isfinite(value) else None


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True, help="folder of large photographs")
    parser.add_argument("--count", type=int, default=1000, help="photographs to cut out of them")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a contestant at a level")
    parser.add_argument("--rounds", type=int, default=3, help="of all levels")
    parser.add_argument("--only", nargs="+", help="contestants, by their names in the table")
    parser.add_argument("--quick", action="store_true", help="2 seconds, 1 round, two levels")
    parser.add_argument("--picture", type=Path, default=Path("serve.png"), help="the picture")
    parser.add_argument("--out", type=Path, help="file for the JSON line")
    parser.set_defaults(levels=(*LEVELS, *HIGHER))
    given = parser.parse_args(arguments)
    if given.quick:
        given.seconds, given.rounds, given.levels = 2.0, 1, (0.3, 0.7)
    folder = photographs(given.pictures, given.count)
    model = model_for(folder)
    found, left_out = compare(given, folder, model)
    if not found.figures:
        raise UsageError("no contestant starts on this machine")
    middle = statistics.median(found.predict)
    print(f"distcls predict: {middle:.1f} images/s; HTTP, JPEGs of 500x375")
    print(table(found))
    for name, own in found.figures.items():
        if own.overload is not None:
            print(f"{name}, {OVERLOAD} times its peak: {json.dumps(own.overload)}")
    draw(found, given.picture)
    finish(
        "serve",
        out=given.out,
        seconds=given.seconds,
        rounds=given.rounds,
        predict_per_s=[round(rate, 1) for rate in found.predict],
        contestants=results(found),
        left_out=left_out,
        versions=versions(),
        packages={name: list(way.packages) for name, way in ways().items() if way.packages},
    )


if __name__ == "__main__":
    run(main)
