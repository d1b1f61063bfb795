"""`python -m launch.preflight`: what would break an expensive job, found before it starts.

Started as the job will be, it runs on every rank:

    accelerate launch --config_file C -m launch.preflight --processes 16 --shared runs

Exit codes: 0 all is well, 1 a check failed or nobody answered in time, 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import uuid
from collections.abc import Sequence
from pathlib import Path

import distcls
from distcls import log
from distcls.config import parse
from distcls.door import run
from distcls.errors import DistclsError, require
from launch.folder import Trial
from launch.place import Place
from launch.verdict import Row, failures, table, warnings


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
    from distcls.training.environment import check_processes
    from launch import ranks

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
        trial = Trial(options.shared, ranks.gather(uuid.uuid4().hex)[0], log.rank())
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
