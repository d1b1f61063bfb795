"""`python -m distcls.launch.preflight`: checks of processes, network and storage before a job.

Started as the job will be, it runs on every rank:

    accelerate launch --config_file C -m distcls.launch.preflight --processes 16 --shared runs

Every rank checks its own machine and sends a `RankReport` to all ranks; rank 0 prints them. Exit
codes: 0 no failure, 1 a check failed or timed out, 2 wrong usage.
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
from distcls.config import Command
from distcls.errors import DistclsError, UsageError, require
from distcls.files import write_text

CLOCK_LIMIT = 1.0
"""Seconds between two clocks beyond which log and file times of the machines mislead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreflightOptions:
    """Options of `python -m distcls.launch.preflight`."""

    processes: int
    """Number of processes of the job."""
    shared: Path
    """Folder on a shared file system, such as the one that will hold the run directory."""
    timeout: float = 120.0
    """Timeout in seconds of the rendezvous, the all-reduce and the shared folder, each."""
    free_gib: float = 10.0
    """Free space in GiB that the shared folder must have."""
    json: bool = False
    """Print the reports as one JSON object on standard output."""

    def __post_init__(self) -> None:
        require(self.processes >= 1, "processes", self.processes, "at least 1")
        require(self.timeout > 0, "timeout", self.timeout, "a number of seconds above 0")
        require(self.free_gib >= 0, "free_gib", self.free_gib, "0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank measured."""

    rank: int
    host: str
    interface: str
    """Name and address of the interface that leads to the rendezvous: `eth0 10.0.0.7`."""
    rendezvous: str
    """Its endpoint: `10.0.0.1:29500`."""
    device: str
    all_reduce_correct: bool
    """Whether the all-reduce of known values gave the right sum."""
    all_reduce_ms: float
    """Its duration in milliseconds."""
    clock: float
    """Unix time in seconds, read after a common barrier."""
    free_gib: float
    """Free space in the shared folder."""
    write_error: str
    """Why this rank could not write there; empty if it could."""
    unseen: list[int]
    """Ranks whose files this rank did not see there."""
    versions: dict[str, str]


COMMAND = Command(
    options=PreflightOptions,
    prog="python -m distcls.launch.preflight",
    about="Check processes, network, clocks, shared folder and versions before a job.",
    examples=(
        "accelerate launch --config_file launch/two_cpu_processes.yaml "
        "-m distcls.launch.preflight --processes 2 --shared runs",
    ),
)


def main(arguments: Sequence[str]) -> None:
    """Parse, check, print."""
    options = COMMAND.parse(arguments)
    reports = run_checks(options)
    found = failures(reports, options.shared, options.free_gib)
    if log.rank() == 0:
        for line in warnings(reports):
            log.warn(line)
        content = {"rows": [dataclasses.asdict(report) for report in reports], "failures": found}
        print(json.dumps(content) if options.json else table(reports), flush=True)
        for line in found:
            log.fail(line)
    if found:
        raise DistclsError(f"preflight: {log.counted(len(found), 'problem')}, listed by rank 0")
    log.say(f"preflight: {log.counted(len(reports), 'process', 'processes')}, no problems")


def run_checks(options: PreflightOptions) -> list[RankReport]:
    """The reports of all ranks, by rank; the same list on each of them.

    Raises UsageError if the launcher started another number of processes or set no endpoint,
    DistclsError if they cannot reach each other; exits the process if they time out.
    """
    from distcls.launch import ranks
    from distcls.training.distributed import check_processes

    check_processes(options.processes)
    rendezvous, limit = Rendezvous.from_environment(), options.timeout
    device, name = ranks.choose_device()
    with rendezvous.time_limit(limit, f"rendezvous at {rendezvous.endpoint}"):
        ranks.join(device, seconds=4 * limit)  # ours ends first: its message tells what to check
    with rendezvous.time_limit(limit, "an all-reduce of 4 MiB"):
        correct, seconds = ranks.check_all_reduce(device)
    with rendezvous.time_limit(3 * limit, "comparing clocks and the shared folder"):
        clock = ranks.clock_after_barrier()
        token = ranks.all_gather(uuid.uuid4().hex)[0]
        folder = SharedFolderCheck(options.shared, token, log.rank())
        write_error = folder.write()
        writers = [rank for rank, error in enumerate(ranks.all_gather(write_error)) if not error]
        unseen = [] if write_error else folder.wait_for(writers, limit)
        report = RankReport(
            rank=log.rank(),
            host=rendezvous.host,
            interface=rendezvous.interface,
            rendezvous=rendezvous.endpoint,
            device=name,
            all_reduce_correct=correct,
            all_reduce_ms=1000 * seconds,
            clock=clock,
            free_gib=folder.free_gib(),
            write_error=write_error,
            unseen=unseen,
            versions=_versions(),
        )
        reports = [RankReport(**row) for row in ranks.all_gather(dataclasses.asdict(report))]
        folder.remove()  # all ranks have checked: they have sent their reports
        ranks.leave()
    return reports


def _versions() -> dict[str, str]:
    """What has to be equal on all ranks: two versions may compute, or save, differently."""
    import torch

    return {
        "python": platform.python_version(),
        "distcls": distcls.__version__,
        "torch": torch.__version__,
        "accelerate": importlib.metadata.version("accelerate"),
        "CUDA": torch.version.cuda or "none",
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """The endpoint of the rendezvous, as this process sees it."""

    host: str
    address: str
    """Of the endpoint: MASTER_ADDR."""
    port: str
    """Of the endpoint: MASTER_PORT."""
    interface: str
    """Name and address of the interface that leads there: `eth0 10.0.0.7`."""

    @property
    def endpoint(self) -> str:
        """`10.0.0.1:29500`."""
        return f"{self.address}:{self.port}"

    @classmethod
    def from_environment(cls) -> Rendezvous:
        """Raises UsageError if the launcher set no endpoint, or if there is no route to it."""
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
    def time_limit(self, seconds: float, operation: str) -> Iterator[None]:
        """Turn a failure of the block, or its timeout, into an error that lists what to check.

        A collective hangs in C code, where no exception reaches it: then the process exits.
        """

        def message(why: str) -> str:
            return f"{operation}: {why} on {self.host}; {self.advice()}"

        def exit_process() -> None:
            log.fail(message(f"no answer within {seconds:g} s"))
            os._exit(DistclsError.exit_code)

        timer = threading.Timer(seconds, exit_process)
        timer.daemon = True
        timer.start()
        try:
            yield
        except RuntimeError as error:  # what torch.distributed raises
            reason = str(error).strip().partition("\n")[0]
            raise DistclsError(message(f"failed with {reason!r}")) from error
        finally:
            timer.cancel()

    def advice(self) -> str:
        """What to check when this process does not reach the other ranks."""
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

    Raises UsageError if the address cannot be resolved here or there is no route to it.
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
    """Where gloo listens: the host name's address, unless set or all ranks are on this machine."""
    on_one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == log.world_size()
    if on_one_machine or "GLOO_SOCKET_IFNAME" in os.environ:
        return None
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


class SharedFolderCheck:
    """Writes a file named by rank and a unique token, and waits for those of the other ranks."""

    def __init__(self, folder: Path, token: str, rank: int) -> None:
        self.folder = folder
        self.token = token
        self.rank = rank

    def write(self) -> str:
        """Write this rank's file; returns the error, empty if there was none."""
        if not self.folder.is_dir():
            # created here, it would hide that a mount is missing
            return f"{self.folder} is not a folder; create it, or mount it"
        try:
            write_text(self._path(self.rank), self.token)
        except DistclsError as error:
            return str(error)
        return ""

    def wait_for(self, ranks: list[int], seconds: float) -> list[int]:
        """Wait for the files of `ranks`; returns the ranks whose file was not visible in time."""
        deadline = time.monotonic() + seconds
        while ranks := [rank for rank in ranks if not self._is_visible(rank)]:
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

    def _is_visible(self, rank: int) -> bool:
        try:
            return self._path(rank).read_text(encoding="utf-8") == self.token
        except OSError:
            return False


def failures(reports: list[RankReport], shared: Path, free_gib: float) -> list[str]:
    """One line for each problem that would break a job, with the ranks that have it."""
    found: dict[str, list[int]] = {}
    for report in reports:
        for text in _failures_of(report, shared, free_gib):
            found.setdefault(text, []).append(report.rank)
    lines = [f"{_with_hosts(ranks, reports)}: {text}" for text, ranks in found.items()]
    return lines + [_difference(reports, name) for name in _differing_versions(reports)]


def warnings(reports: list[RankReport]) -> list[str]:
    """One line for each problem that breaks nothing."""
    first = min(reports, key=lambda report: report.clock)
    last = max(reports, key=lambda report: report.clock)
    offset = last.clock - first.clock
    if offset <= CLOCK_LIMIT:
        return []
    return [
        f"the clocks of rank {first.rank} ({first.host}) and rank {last.rank} ({last.host}) are "
        f"{offset:.1f} s apart; start NTP or chrony there"
    ]


def table(reports: list[RankReport]) -> str:
    """The reports as a table, then the versions of rank 0."""
    cells = [
        [
            *("rank", "host", "interface", "rendezvous", "device"),
            *("all-reduce", "clock", "free", "shared"),
        ]
    ]
    for report in reports:
        late = report.clock - reports[0].clock
        shared = "refused" if report.write_error else "unseen" if report.unseen else "ok"
        cells.append(
            [
                *(
                    str(report.rank),
                    report.host,
                    report.interface,
                    report.rendezvous,
                    report.device,
                ),
                f"{report.all_reduce_ms:.1f} ms" if report.all_reduce_correct else "WRONG",
                f"{late:+.3f} s",
                f"{report.free_gib:.0f} GiB",
                shared,
            ]
        )
    versions = ", ".join(f"{name} {value}" for name, value in reports[0].versions.items())
    return "\n".join([*log.aligned(cells), f"versions: {versions}"])


def _failures_of(report: RankReport, shared: Path, free_gib: float) -> Iterable[str]:
    if not report.all_reduce_correct:
        yield "the all-reduce gave wrong values; take this machine out and test its network and GPU"
    if report.write_error:
        yield report.write_error
    if report.unseen:
        yield (
            f"{shared} does not show the files of {_numbers(report.unseen)}; it has to be one "
            "folder that all machines mount"
        )
    if report.free_gib < free_gib and not report.write_error:
        free = math.floor(report.free_gib)
        yield f"{free} GiB free in {shared}, {free_gib:g} required (--free-gib)"


def _differing_versions(reports: list[RankReport]) -> list[str]:
    names = reports[0].versions
    return [name for name in names if len({report.versions.get(name) for report in reports}) > 1]


def _difference(reports: list[RankReport], name: str) -> str:
    """`torch differs: 2.14.1 on ranks 0, 1; 2.13.0 on rank 2`."""
    ranks: dict[str, list[int]] = {}
    for report in reports:
        ranks.setdefault(str(report.versions.get(name)), []).append(report.rank)
    parts = [f"{version} on {_numbers(who)}" for version, who in ranks.items()]
    return f"{name} differs: {'; '.join(parts)}"


def _with_hosts(ranks: list[int], reports: list[RankReport]) -> str:
    if len(ranks) == len(reports):
        return "every rank"
    hosts = sorted({report.host for report in reports if report.rank in ranks})
    return f"{_numbers(ranks)} ({', '.join(hosts)})"


def _numbers(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


if __name__ == "__main__":
    run(main)
