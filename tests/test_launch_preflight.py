"""The preflight, run by several processes, and what it reports."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distcls.errors import UsageError
from distcls.launch.preflight import PreflightOptions, RankReport, failures, main, table, warnings
from tests.e2e import commands
from tests.e2e.commands import ROOT, run

REPORT = RankReport(
    rank=0,
    host="node0",
    interface="eth0 10.0.0.1",
    rendezvous="10.0.0.1:29471",
    device="cuda:0",
    all_reduce_correct=True,
    all_reduce_ms=4.2,
    clock=1000.0,
    free_gib=800.5,
    write_error="",
    unseen=[],
    versions={"python": "3.12.1", "torch": "2.14.1"},
)
SHARED = Path("/shared")


def other(rank: int, **changes: object) -> RankReport:
    """Another rank's row, on another host."""
    return dataclasses.replace(REPORT, **{"rank": rank, "host": f"node{rank}", **changes})  # type: ignore[arg-type]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spawn(*call: object, **environment: str) -> commands.Process:
    if call[1] == "-m":
        variables = {**os.environ, **environment, "PYTHONWARNINGS": "ignore"}
        return commands.start(list(map(str, call)), variables)
    return subprocess.Popen(
        list(map(str, call)),
        env={**os.environ, **environment, "PYTHONWARNINGS": "ignore"},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def start(rank: int, port: int, *call: object) -> commands.Process:
    """Start one rank of two, as srun does."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    numbers = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return spawn(sys.executable, *call, **place, **numbers)


def preflight(rank: int, port: int, shared: Path, *more: object) -> commands.Process:
    options = ("--processes", 2, "--shared", shared, "--free-gib", 0, *more)
    return start(rank, port, "-m", "launch.preflight", *options)


def test_two_processes_find_nothing_wrong(tmp_path: Path) -> None:
    arguments = ("--processes", 2, "--shared", tmp_path, "--free-gib", 0, "--json")
    done = run(*arguments, module="launch.preflight", processes=2)
    content = json.loads(done.stdout)
    assert content["failures"] == []
    assert [row["rank"] for row in content["rows"]] == [0, 1]
    for row in content["rows"]:
        assert row["host"] == socket.gethostname()
        assert row["interface"].endswith(" 127.0.0.1")
        assert row["all_reduce_correct"]
        assert row["versions"]["torch"] != "none"
    assert content["rows"][0]["rendezvous"] == content["rows"][1]["rendezvous"]
    assert "no problems" in done.stderr
    assert list(tmp_path.iterdir()) == []  # the trial files are gone


def test_two_launchers_with_the_config_of_two_machines_form_one_run(tmp_path: Path) -> None:
    port = free_port()
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", 2]
    config = ["--config_file", "launch/two_nodes_of_eight.yaml"]
    meeting = ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    options = ["--processes", 2, "--shared", tmp_path, "--free-gib", 0]
    machines = []
    for machine in (0, 1):
        call = [*launcher, *config, *meeting, "--machine_rank", machine]
        machines.append(spawn(*call, "-m", "launch.preflight", *options))
    said = [machine.communicate(timeout=120) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    lines = said[0][0].splitlines()
    assert [line.split()[0] for line in lines] == ["rank", "0", "1", "versions:"]
    assert f"127.0.0.1:{port}" in lines[1]
    assert said[1][0] == ""  # one of them speaks


def test_folders_that_only_have_the_same_name_are_noticed(tmp_path: Path) -> None:
    folders = [tmp_path / "disk of 0", tmp_path / "disk of 1"]
    for folder in folders:
        folder.mkdir()
    port = free_port()
    ranks = [preflight(rank, port, folders[rank], "--timeout", 3) for rank in (0, 1)]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], said
    assert f"rank 0 ({socket.gethostname()}): " in said[0]
    assert "does not show the files of rank 1; it has to be one folder" in said[0]
    assert "preflight: 2 problems, listed by rank 0" in said[1]
    assert not [path for folder in folders for path in folder.iterdir()]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_the_other_ends_in_time_and_says_what_to_check(
    rank: int, tmp_path: Path
) -> None:
    port = free_port()
    alone = preflight(rank, port, tmp_path, "--timeout", 3)
    began = time.monotonic()
    said = alone.communicate(timeout=120)[1]
    assert alone.returncode == 1, said
    assert time.monotonic() - began < 60  # three seconds and what it takes to load torch
    [line] = [line for line in said.splitlines() if "error: " in line]
    assert f"rendezvous at 127.0.0.1:{port}: " in line
    assert f"check that all 2 processes run, that port {port} of 127.0.0.1 is open" in line
    assert "GLOO_SOCKET_IFNAME" in line


@pytest.mark.parametrize(
    ("then", "why"),
    [
        pytest.param("time.sleep(600)", "no answer", marks=pytest.mark.slow),
        ("time.sleep(2); os._exit(0)", ""),
    ],
)
def test_a_rank_that_joins_and_then_hangs_ends_the_other(
    then: str, why: str, tmp_path: Path
) -> None:
    port = free_port()
    program = f"import os, time, torch.distributed as d; d.init_process_group('gloo'); {then}"
    silent = start(1, port, "-c", program)
    waiting = preflight(0, port, tmp_path, "--timeout", 6)
    try:
        said = waiting.communicate(timeout=120)[1]
    finally:
        silent.kill()
        silent.communicate()
    assert waiting.returncode == 1, said
    [line] = [line for line in said.splitlines() if "error: " in line]
    assert "error: an all-reduce of 4 MiB: " + why in line
    assert "check that all 2 processes run" in line


def test_one_process_alone_is_checked_too(tmp_path: Path) -> None:
    arguments = ("--processes", 1, "--shared", tmp_path / "missing", "--free-gib", 0)
    done = run(*arguments, module="launch.preflight", code=1)
    assert f"every rank: {tmp_path}/missing is not a folder; create it, or mount it" in done.stderr
    assert "refused" in done.stdout


def test_another_number_of_processes_is_wrong_usage(tmp_path: Path) -> None:
    done = run("--processes", 2, "--shared", tmp_path, module="launch.preflight", code=2)
    assert "2 requested, 1 running" in done.stderr


def test_a_rendezvous_without_a_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="MASTER_ADDR and MASTER_PORT are not set"):
        main(["--processes", "2", "--shared", str(tmp_path)])
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    monkeypatch.setenv("MASTER_PORT", "29471")
    with pytest.raises(UsageError, match=r"MASTER_ADDR: 'no-such-host\.invalid' cannot be reached"):
        main(["--processes", "2", "--shared", str(tmp_path)])


@pytest.mark.parametrize("key", ["processes", "timeout", "free_gib"])
def test_numbers_that_mean_nothing(key: str) -> None:
    values = {"processes": 1, "shared": SHARED, key: -1}
    with pytest.raises(UsageError, match=f"{key}: -1 is not valid"):
        PreflightOptions(**values)  # type: ignore[arg-type]


def test_nothing_wrong() -> None:
    rows = [REPORT, other(1, clock=1000.9)]
    assert failures(rows, SHARED, 10) == []
    assert warnings(rows) == []


def test_clocks_apart() -> None:
    [line] = warnings([REPORT, other(1, clock=998.0), other(2, clock=1000.5)])
    assert line.startswith("the clocks of rank 1 (node1) and rank 2 (node2) are 2.5 s apart")


def test_every_failure_has_its_line() -> None:
    versions = {"python": "3.12.1", "torch": "2.13.0"}
    rows = [
        dataclasses.replace(REPORT, free_gib=3.7),
        other(1, free_gib=3.2, all_reduce_correct=False),
        other(2, write_error="/shared cannot be written", versions=versions),
        other(3, unseen=[0, 1], free_gib=3.9),
    ]
    assert failures(rows, SHARED, 10) == [
        "ranks 0, 1, 3 (node0, node1, node3): 3 GiB free in /shared, 10 required (--free-gib)",
        "rank 1 (node1): the all-reduce gave wrong values; take this machine out and test its "
        "network and GPU",
        "rank 2 (node2): /shared cannot be written",
        "rank 3 (node3): /shared does not show the files of ranks 0, 1; it has to be one folder "
        "that all machines mount",
        "torch differs: 2.14.1 on ranks 0, 1, 3; 2.13.0 on rank 2",
    ]


def test_what_all_ranks_find_is_said_once() -> None:
    rows = [dataclasses.replace(row, free_gib=1.0) for row in (REPORT, other(1))]
    [line] = failures(rows, SHARED, 10)
    assert line.startswith("every rank: 1 GiB free")


def test_the_table_stands_in_columns() -> None:
    lines = table(
        [REPORT, other(1, all_reduce_correct=False, unseen=[0], clock=1000.25)]
    ).splitlines()
    assert len(lines) == 4
    assert lines[0].index("rendezvous") == lines[1].index("10.0.0.1:29471")
    assert "WRONG" in lines[2]
    assert "+0.250 s" in lines[2]
    assert lines[2].endswith("unseen")
    assert lines[3] == "versions: python 3.12.1, torch 2.14.1"
