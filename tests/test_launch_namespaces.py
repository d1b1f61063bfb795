"""The preflight on two machines: network namespaces, each with an address of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.commands import ROOT
from tests.namespaces import Machine, two_machines


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    with two_machines() as both:
        yield both


def preflight(
    machines: list[Machine], shared: Path, *, name_interface: bool
) -> list[tuple[int, str]]:
    """Exit code and output of a rank on each machine."""
    started = []
    for rank, machine in enumerate(machines):
        meeting = {"MASTER_ADDR": machines[0].address, "MASTER_PORT": "29471", "LOCAL_RANK": "0"}
        numbers = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        interface = {"GLOO_SOCKET_IFNAME": machine.cable} if name_interface else {}
        options = ["--processes", 2, "--shared", shared, "--free-gib", 0, "--timeout", 5]
        call = [sys.executable, "-m", "launch.preflight", *options]
        process = subprocess.Popen(
            machine.command(*call),
            env={**os.environ, **meeting, **numbers, **interface, "PYTHONWARNINGS": "ignore"},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        started.append(process)
    said = [process.communicate(timeout=60)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def test_two_machines_meet(machines: list[Machine], tmp_path: Path) -> None:
    (code, said), (other, _) = preflight(machines, tmp_path, name_interface=True)
    assert (code, other) == (0, 0), said
    assert "cablea 10.87.0.1  10.87.0.1:29471" in said
    assert "cableb 10.87.0.2  10.87.0.1:29471" in said


@pytest.mark.slow
def test_a_machine_without_its_cable_is_told_what_to_check(
    machines: list[Machine], tmp_path: Path
) -> None:
    machines[1].plug("down")
    (code, said), (other, cut_off) = preflight(machines, tmp_path, name_interface=True)
    assert code == 1
    assert "check that all 2 processes run, that port 29471 of 10.87.0.1 is open" in said
    assert "cablea 10.87.0.1 is the interface to use" in said
    assert other == 2
    assert "MASTER_ADDR: '10.87.0.1' cannot be reached from" in cut_off
    assert "Network is unreachable" in cut_off
