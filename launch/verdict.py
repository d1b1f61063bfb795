"""What the ranks found before a job, side by side: the table, the warnings and the failures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

CLOCK_LIMIT = 1.0
"""Seconds between two clocks from which on logs and file times of the machines mislead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What one rank found."""

    rank: int
    host: str
    interface: str
    """Name and address of the interface that leads to the meeting point: `eth0 10.0.0.7`."""
    meeting: str
    """Where the ranks meet: `10.0.0.1:29500`."""
    device: str
    sum_right: bool
    """Whether the all-reduce of known values gave what it has to give."""
    reduce_ms: float
    """How long it took."""
    clock: float
    """Seconds since 1970, read when all ranks had reached the same barrier."""
    free_gib: float
    """Free space in the shared folder."""
    refused: str
    """Why this rank could not write there; empty if it could."""
    unseen: list[int]
    """Ranks whose files this rank did not see there."""
    versions: dict[str, str]


def failures(rows: list[Row], shared: Path, free_gib: float) -> list[str]:
    """One line for everything that would break a job; the ranks that agree share a line."""
    found: dict[str, list[int]] = {}
    for row in rows:
        for text in _of_one(row, shared, free_gib):
            found.setdefault(text, []).append(row.rank)
    lines = [f"{_who(ranks, rows)}: {text}" for text, ranks in found.items()]
    return lines + [_difference(rows, name) for name in _differing(rows)]


def warnings(rows: list[Row]) -> list[str]:
    """One line for everything that misleads but breaks nothing."""
    first = min(rows, key=lambda row: row.clock)
    last = max(rows, key=lambda row: row.clock)
    offset = last.clock - first.clock
    if offset <= CLOCK_LIMIT:
        return []
    return [
        f"the clocks of rank {first.rank} ({first.host}) and rank {last.rank} ({last.host}) are "
        f"{offset:.1f} s apart; start NTP or chrony there"
    ]


def table(rows: list[Row]) -> str:
    """The ranks' rows for people, then the versions of rank 0."""
    head = [
        "rank",
        "host",
        "interface",
        "meets at",
        "device",
        "4 MiB sum",
        "clock",
        "free",
        "shared",
    ]
    cells = [head]
    for row in rows:
        late = row.clock - rows[0].clock
        shared = "refused" if row.refused else "unseen" if row.unseen else "ok"
        cells.append(
            [
                *(str(row.rank), row.host, row.interface, row.meeting, row.device),
                f"{row.reduce_ms:.1f} ms" if row.sum_right else "WRONG",
                f"{late:+.3f} s",
                f"{row.free_gib:.0f} GiB",
                shared,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    versions = ", ".join(f"{name} {value}" for name, value in rows[0].versions.items())
    return "\n".join([*lines, f"versions: {versions}"])


def _of_one(row: Row, shared: Path, free_gib: float) -> Iterable[str]:
    if not row.sum_right:
        yield "the all-reduce gave wrong values; take this machine out and test its network and GPU"
    if row.refused:
        yield row.refused
    if row.unseen:
        yield (
            f"{shared} does not show the files of {_numbers(row.unseen)}; it has to be one folder "
            "that all machines mount"
        )
    if row.free_gib < free_gib and not row.refused:
        free = math.floor(row.free_gib)
        yield f"{free} GiB free in {shared}, {free_gib:g} asked for (--free-gib)"


def _differing(rows: list[Row]) -> list[str]:
    names = rows[0].versions
    return [name for name in names if len({row.versions.get(name) for row in rows}) > 1]


def _difference(rows: list[Row], name: str) -> str:
    ranks: dict[str, list[int]] = {}
    for row in rows:
        ranks.setdefault(str(row.versions.get(name)), []).append(row.rank)
    parts = [f"{version} on {_numbers(who)}" for version, who in ranks.items()]
    return f"{name} differs: {'; '.join(parts)}"


def _who(ranks: list[int], rows: list[Row]) -> str:
    if len(ranks) == len(rows):
        return "every rank"
    hosts = sorted({row.host for row in rows if row.rank in ranks})
    return f"{_numbers(ranks)} ({', '.join(hosts)})"


def _numbers(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
