"""`python -m launch.preflight`: what would break an expensive job, found before it starts.

Started as the job will be, it runs on every rank:

    accelerate launch --config_file C -m launch.preflight --processes 16 --shared runs

Exit codes: 0 all is well, 1 a check failed or nobody answered in time, 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import ipaddress
import json
import math
import os
import platform
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import distcls
from distcls import log
from distcls.cli import run
from distcls.config import parse
from distcls.errors import DistclsError, UsageError, require
from distcls.files import write_text


class SharedFolderCheck:
    """One file a rank, named by rank and by a token that no other run has."""

    def __init__(self, folder: Path, token: str, rank: int) -> None:
        self.folder = folder
        self.token = token
        self.rank = rank

    def write(self) -> str:
        """Write this rank's file. Returns why that failed; empty if it did not."""
        if not self.folder.is_dir():
            # created here, it would hide that a mount is missing
            return f"{self.folder} is no folder; create it, or mount it"
        try:
            write_text(self._path(self.rank), self.token)
        except DistclsError as error:
            return str(error)
        return ""

    def wait_for(self, ranks: list[int], seconds: float) -> list[int]:
        """Look for the files of `ranks`; returns those that did not show within `seconds`."""
        deadline = time.monotonic() + seconds
        while ranks := [rank for rank in ranks if not self._shows(rank)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)  # network file systems take seconds to show what another host wrote
        return ranks

    def remove(self) -> None:
        """Remove this rank's file."""
        with contextlib.suppress(OSError):
            self._path(self.rank).unlink()

    def free_gib(self) -> float:
        """Free space in GiB; 0 if there is no such folder."""
        try:
            return shutil.disk_usage(self.folder).free / 2**30
        except OSError:
            return 0.0

    def _path(self, rank: int) -> Path:
        return self.folder / f".preflight-{self.token}-{rank}"

    def _shows(self, rank: int) -> bool:
        try:
            return self._path(rank).read_text(encoding="utf-8") == self.token
        except OSError:
            return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """This process and its meeting point, known before it has met the others."""

    host: str
    address: str
    """Of the meeting point: MASTER_ADDR."""
    port: str
    interface: str
    """Name and address of the interface that leads there: `eth0 10.0.0.7`."""

    @classmethod
    def look(cls) -> Place:
        """Raises UsageError if the launcher named no meeting point, or if no route leads there."""
        alone = log.world_size() == 1
        address = os.environ.get("MASTER_ADDR", "127.0.0.1" if alone else "")
        port = os.environ.get("MASTER_PORT", "0" if alone else "")
        if not address or not port:
            raise UsageError(
                "MASTER_ADDR and MASTER_PORT are not set; start the processes with accelerate "
                "launch, torchrun or launch/slurm.sh"
            )
        host = socket.gethostname()
        return cls(host=host, address=address, port=port, interface=interface_to(address))

    @contextlib.contextmanager
    def within(self, seconds: float, doing: str) -> Iterator[None]:
        """Let the block fail, or hang, with an error that says what to check.

        A collective hangs in C code, where no exception reaches it: then the process ends.
        """

        def message(why: str) -> str:
            return f"{doing}: {why} on {self.host}; {self.advice()}"

        def end() -> None:
            log.fail(message(f"no answer within {seconds:g} s"))
            os._exit(DistclsError.exit_code)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are of this kind
            reason = str(error).strip().partition("\n")[0]
            raise DistclsError(message(f"failed with {reason!r}")) from error
        finally:
            timer.cancel()

    def advice(self) -> str:
        """What to look at when the ranks do not reach each other from here."""
        text = (
            f"check that all {log.world_size()} processes run, that port {self.port} of "
            f"{self.address} is open to {self.host} and taken by no other job, and that "
            f"{self.interface} is the interface to use (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
            "name another)"
        )
        listening = _gloo_address()
        if listening is not None and ipaddress.ip_address(listening).is_loopback:
            name = self.interface.split()[0]
            text += (
                f"; the name {self.host} leads to {listening}, which other machines cannot reach: "
                f"without GPUs set GLOO_SOCKET_IFNAME={name}"
            )
        return text


def interface_to(address: str) -> str:
    """Name and address of the interface that leads to `address`, such as `eth0 10.0.0.7`.

    Raises UsageError if the address has no meaning here or nothing leads there.
    """
    import psutil

    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # chooses a route and sends nothing
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise UsageError(
            f"MASTER_ADDR: {address!r} cannot be reached from {socket.gethostname()}: "
            f"{error.strerror}; give an address of rank 0 that this machine knows"
        ) from error
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in addresses):
            return f"{name} {own}"
    return own


def _gloo_address() -> str | None:
    """Where gloo listens, unless it is told to or all ranks are on this machine: by its name."""
    on_one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == log.world_size()
    if on_one_machine or "GLOO_SOCKET_IFNAME" in os.environ:
        return None
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreflightOptions:
    """What `python -m launch.preflight` can be told."""

    processes: int
    """Processes that the job is to have."""
    shared: Path
    """Folder that all of them are to share, such as the one that will hold the run directory."""
    timeout: float = 120.0
    """Seconds they may take to meet, to exchange data and to see each other's files."""
    free_gib: float = 10.0
    """GiB that have to be free in the shared folder."""
    json: bool = False
    """Print the rows as one JSON object on standard output."""

    def __post_init__(self) -> None:
        require(self.processes >= 1, "processes", self.processes, "at least 1")
        require(self.timeout > 0, "timeout", self.timeout, "a number of seconds above 0")
        require(self.free_gib >= 0, "free_gib", self.free_gib, "0 or more")


def main(arguments: Sequence[str]) -> None:
    """The command."""
    options = parse(
        PreflightOptions,
        arguments,
        prog="python -m launch.preflight",
        about="Check processes, network, clocks, shared folder and versions before a job.",
    )
    rows = inspect(options)
    found = failures(rows, options.shared, options.free_gib)
    if log.rank() == 0:
        for line in warnings(rows):
            log.warn(line)
        content = {"rows": [dataclasses.asdict(row) for row in rows], "failures": found}
        print(json.dumps(content) if options.json else table(rows), flush=True)
        for line in found:
            log.fail(line)
    if found:
        raise DistclsError(f"preflight: {len(found)} problem(s), listed by rank 0")
    log.say(f"preflight: {len(rows)} process(es), nothing wrong")


def inspect(options: PreflightOptions) -> list[Row]:
    """What the ranks found, by rank; the same list on each of them.

    Raises UsageError if the launcher started another number of processes or named no meeting point,
    DistclsError if they cannot reach each other; ends the process if they do not answer in time.
    """
    from distcls.launch import ranks
    from distcls.training.distributed import check_processes

    check_processes(options.processes)
    place, limit = Place.look(), options.timeout
    meeting = f"{place.address}:{place.port}"
    device, name = ranks.choose_device()
    with place.within(limit, f"meeting at {meeting}"):
        ranks.join(device, seconds=4 * limit)  # ours ends first: it says what to check
    with place.within(limit, "an all-reduce of 4 MiB"):
        sum_right, seconds = ranks.add_up(device)
    with place.within(3 * limit, "comparing clocks and the shared folder"):
        clock = ranks.clock()
        trial = SharedFolderCheck(options.shared, ranks.gather(uuid.uuid4().hex)[0], log.rank())
        refused = trial.write()
        writers = [rank for rank, why in enumerate(ranks.gather(refused)) if not why]
        unseen = [] if refused else trial.wait_for(writers, limit)
        row = Row(
            rank=log.rank(),
            host=place.host,
            interface=place.interface,
            meeting=meeting,
            device=name,
            sum_right=sum_right,
            reduce_ms=1000 * seconds,
            clock=clock,
            free_gib=trial.free_gib(),
            refused=refused,
            unseen=unseen,
            versions=_versions(),
        )
        rows = [Row(**content) for content in ranks.gather(dataclasses.asdict(row))]
        trial.remove()  # all have looked: they have sent their rows
        ranks.leave()
    return rows


def _versions() -> dict[str, str]:
    """What has to be equal everywhere: two versions may compute, or save, differently."""
    import torch

    return {
        "python": platform.python_version(),
        "distcls": distcls.__version__,
        "torch": torch.__version__,
        "accelerate": importlib.metadata.version("accelerate"),
        "CUDA": torch.version.cuda or "none",
    }


if __name__ == "__main__":
    run(main)
