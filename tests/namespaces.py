"""Machines on one machine: network namespaces, each with an address of its own, and a cable."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest


def ip(*words: str) -> str:
    """Call `ip`; what it said. Raises CalledProcessError if it could not."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """A network namespace."""

    space: str
    cable: str
    """Its interface."""
    address: str

    def command(self, *call: object) -> list[str]:
        """A command line that runs there; `ip` becomes the program, so its process id is kept."""
        return ["ip", "netns", "exec", self.space, *map(str, call)]

    def plug(self, state: str) -> None:
        """Put the cable's end `up` or `down`."""
        ip("-n", self.space, "link", "set", self.cable, state)

    def set_tcp_retries(self, number: int) -> None:
        """How often its kernel repeats itself before it gives a silent connection up."""
        write = f"echo {number} > /proc/sys/net/ipv4/tcp_retries2"
        subprocess.run(self.command("sh", "-c", write), check=True, capture_output=True)

    def processes(self) -> list[int]:
        """Ids of the processes that run there."""
        return [int(word) for word in ip("netns", "pids", self.space).split()]

    def remove(self) -> None:
        """Kill what still runs there, and delete it."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        ip("netns", "delete", self.space)


@contextlib.contextmanager
def two_machines() -> Iterator[list[Machine]]:
    """Two machines that are connected by a cable; gone afterwards, with all that runs there.

    Skips the test where this user may not make network namespaces.
    """
    names = [
        Machine(space=f"distcls{os.getpid()}{side}", cable=f"cable{side}", address=f"10.87.0.{n}")
        for n, side in enumerate("ab", start=1)
    ]
    with contextlib.ExitStack() as made:
        try:
            for machine in names:
                ip("netns", "add", machine.space)
                made.callback(machine.remove)
            _connect(*names)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this user may not make network namespaces")
        yield names


def _connect(one: Machine, other: Machine) -> None:
    peer = ["type", "veth", "peer", "name", other.cable, "netns", other.space]
    ip("-n", one.space, "link", "add", one.cable, *peer)
    for machine in (one, other):
        ip("-n", machine.space, "address", "add", f"{machine.address}/24", "dev", machine.cable)
        ip("-n", machine.space, "link", "set", "lo", "up")
        machine.plug("up")
