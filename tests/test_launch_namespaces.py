"""The preflight on two machines: network namespaces, each with an address of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.commands import ROOT

ADDRESSES = ("10.87.0.1", "10.87.0.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[tuple[str, str]]]:
    """Namespace and interface of two machines that are connected by a cable."""
    names = [(f"distcls{os.getpid()}{side}", f"cable{side}") for side in "ab"]
    made = []
    try:
        for space, _ in names:
            ip("netns", "add", space)
            made.append(space)
        (one, near), (other, far) = names
        ip("-n", one, "link", "add", near, "type", "veth", "peer", "name", far, "netns", other)
        for (space, cable), address in zip(names, ADDRESSES, strict=True):
            ip("-n", space, "address", "add", f"{address}/24", "dev", cable)
            for link in ("lo", cable):
                ip("-n", space, "link", "set", link, "up")
    except (OSError, subprocess.CalledProcessError):
        for space in made:
            ip("netns", "delete", space)
        pytest.skip("this user may not make network namespaces")
    yield names
    for space in made:
        ip("netns", "delete", space)


def preflight(
    machines: list[tuple[str, str]], shared: Path, *, name_interface: bool
) -> list[tuple[int, str]]:
    """Exit code and output of a rank on each machine."""
    started = []
    for rank, (space, cable) in enumerate(machines):
        meeting = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29471", "LOCAL_RANK": "0"}
        numbers = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        interface = {"GLOO_SOCKET_IFNAME": cable} if name_interface else {}
        options = ["--processes", 2, "--shared", shared, "--free-gib", 0, "--timeout", 5]
        call = [sys.executable, "-m", "launch.preflight", *options]
        process = subprocess.Popen(
            ["ip", "netns", "exec", space, *map(str, call)],
            env={**os.environ, **meeting, **numbers, **interface, "PYTHONWARNINGS": "ignore"},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        started.append(process)
    said = [process.communicate(timeout=60)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def test_two_machines_meet(machines: list[tuple[str, str]], tmp_path: Path) -> None:
    (code, said), (other, _) = preflight(machines, tmp_path, name_interface=True)
    assert (code, other) == (0, 0), said
    assert "cablea 10.87.0.1  10.87.0.1:29471" in said
    assert "cableb 10.87.0.2  10.87.0.1:29471" in said


def test_a_machine_without_its_cable_is_told_what_to_check(
    machines: list[tuple[str, str]], tmp_path: Path
) -> None:
    space, cable = machines[1]
    ip("-n", space, "link", "set", cable, "down")
    (code, said), (other, cut_off) = preflight(machines, tmp_path, name_interface=True)
    assert code == 1
    assert "check that all 2 processes run, that port 29471 of 10.87.0.1 is open" in said
    assert "cablea 10.87.0.1 is the interface to use" in said
    assert other == 2
    assert "MASTER_ADDR: '10.87.0.1' cannot be reached from" in cut_off
    assert "Network is unreachable" in cut_off
