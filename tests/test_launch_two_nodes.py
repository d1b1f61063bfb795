"""launch/elastic.sh on two machines: processes, a whole machine, or the cable between them fail."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distcls.training.checkpointing import states
from tests.e2e.commands import ROOT
from tests.faults.survival import (
    OPTIONS,
    STEPS,
    assert_bit_equal,
    assert_every_sample_once_an_epoch,
    global_batches,
    kill_all,
    steps_done,
    wait_for,
    workers,
)
from tests.namespaces import Machine, two_machines

pytestmark = pytest.mark.slow

LIMIT = 150
"""Seconds after which nothing may still be running."""


class Job:
    """A training over both machines, in a folder that both see."""

    def __init__(self, machines: list[Machine], data: Path, folder: Path) -> None:
        self.machines = machines
        self.agents: list[subprocess.Popen[str]] = []
        self.out, self.trace = folder / "run", folder / "trace"
        self.trace.mkdir(parents=True)
        self._data, self._folder = data, folder
        # torchrun's own name for its workers' interpreter: the one that has the witness along
        self._python = folder / "python"
        witness = '"${@/#distcls.train/tests.faults.traced_train}"'
        self._python.write_text(f"#!/bin/bash\nexec {sys.executable} {witness}\n")
        self._python.chmod(0o755)

    def start(self, number: int, *more: object, **environment: str) -> subprocess.Popen[str]:
        """Start the script on a machine, one process of one thread, as its scheduler would."""
        machine = self.machines[number]
        settings = {
            **{"PROCESSES": "1", "MACHINES": "2", "ADDRESS": machine.address},
            **{"MEETING": f"{self.machines[0].address}:29400", "PYTHON": sys.executable},
            **{"GLOO_SOCKET_IFNAME": machine.cable, "PYTHON_EXEC": str(self._python)},
            **{"TRACE": str(self.trace), "SLOW": "0.2", "PYTHONWARNINGS": "ignore"},
        }
        options = ["--data", self._data, "--out", self.out, *OPTIONS, "--threads", 1, *more]
        with (self._folder / f"{number}.txt").open("ab") as said:
            agent = subprocess.Popen(
                machine.command(ROOT / "launch" / "elastic.sh", *options),
                cwd=ROOT,
                env={**os.environ, **settings, **environment},
                stdout=said,
                stderr=said,
                text=True,
            )
        self.agents.append(agent)
        return agent

    def said(self, number: int) -> str:
        """What the agents of a machine and their processes have printed."""
        return (self._folder / f"{number}.txt").read_text()

    def finish(self) -> list[int]:
        """Wait until nothing of it runs; the exit codes in the order of the starts."""
        deadline = time.monotonic() + LIMIT
        codes = [agent.wait(max(0.0, deadline - time.monotonic())) for agent in self.agents]
        assert not [left for machine in self.machines for left in machine.processes()]
        return codes

    def in_the_middle(self) -> None:
        """Wait until there is a state within the first epoch, and steps beyond it."""

        def begun() -> bool:
            return steps_done(self.out) >= 5 and bool(states(self.out / "last"))

        assert wait_for(begun, self.agents[0]), self.said(0)


@contextlib.contextmanager
def job_on_two_machines(data: Path, folder: Path) -> Iterator[Job]:
    with two_machines() as machines:
        job = Job(machines, data, folder)
        try:
            yield job
        finally:
            for agent in job.agents:
                kill_all(agent)


@pytest.fixture
def job(digits: Path, tmp_path: Path) -> Iterator[Job]:
    with job_on_two_machines(digits, tmp_path) as job:
        yield job


@pytest.fixture(scope="module")
def unbroken(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A training over both machines that nothing happened to."""
    with job_on_two_machines(digits, tmp_path_factory.mktemp("unbroken")) as job:
        for number in (0, 1):
            job.start(number, SLOW="0")
        assert job.finish() == [0, 0], job.said(0)
        assert_every_sample_once_an_epoch(job.trace)
        assert {path.name for path in job.trace.iterdir()} == {"0.jsonl", "1.jsonl"}
        return job


def assert_went_on_as(unbroken: Job, job: Job) -> None:
    """The same weights, and the same samples in the same steps."""
    assert job.said(0).count("resumed from") == 1
    assert_bit_equal(unbroken.out, job.out)
    assert_every_sample_once_an_epoch(job.trace)
    assert global_batches(job.trace) == global_batches(unbroken.trace)


def test_a_run_over_both(unbroken: Job) -> None:
    assert "2 processes" in unbroken.said(0)
    assert ", 1 thread" in unbroken.said(0)
    assert not unbroken.said(1).count("epoch")  # the main process alone speaks


def test_a_machines_processes_are_killed(unbroken: Job, job: Job) -> None:
    agents = [job.start(number) for number in (0, 1)]
    job.in_the_middle()
    for victim in workers(agents[1]):
        victim.kill()
    assert job.finish() == [0, 0], job.said(0)
    assert_went_on_as(unbroken, job)


def test_a_whole_machine_dies_and_comes_back(unbroken: Job, job: Job) -> None:
    agents = [job.start(number) for number in (0, 1)]
    job.in_the_middle()
    kill_all(agents[1])
    time.sleep(3)
    assert agents[0].poll() is None
    job.start(1)
    assert job.finish() == [0, -9, 0], job.said(0)
    assert_went_on_as(unbroken, job)


def test_without_the_dead_machine_where_one_is_enough(unbroken: Job, job: Job) -> None:
    few = {"MACHINES": "1:2", "LAST_CALL": "3"}
    agents = [job.start(number, **few) for number in (0, 1)]
    job.in_the_middle()
    kill_all(agents[1])
    assert job.finish() == [0, -9], job.said(0)
    assert "1 process" in job.said(0)
    assert_every_sample_once_an_epoch(job.trace)
    assert global_batches(job.trace) == global_batches(unbroken.trace)


def test_a_machine_that_comes_later_is_taken_in(unbroken: Job, job: Job) -> None:
    few = {"MACHINES": "1:2", "LAST_CALL": "1", "SLOW": "1.5"}
    job.start(0, **few)
    job.in_the_middle()
    job.start(1, **few)
    assert job.finish() == [0, 0], job.said(0)
    first, _, second = job.said(0).partition("resumed from")
    assert "1 process" in first
    assert "2 processes" in second
    assert_every_sample_once_an_epoch(job.trace)
    assert global_batches(job.trace) == global_batches(unbroken.trace)


def test_a_network_that_is_silent_for_seconds_costs_seconds(unbroken: Job, job: Job) -> None:
    for number in (0, 1):
        job.start(number)
    job.in_the_middle()
    job.machines[1].plug("down")
    time.sleep(5)
    before = steps_done(job.out)
    job.machines[1].plug("up")
    assert job.finish() == [0, 0], job.said(0)
    assert before < STEPS  # it was held up
    assert "resumed from" not in job.said(0)
    assert_bit_equal(unbroken.out, job.out)


def test_a_cable_is_pulled_and_put_back(unbroken: Job, job: Job) -> None:
    agents = [job.start(number, "--collective-timeout", 20) for number in (0, 1)]
    job.in_the_middle()
    job.machines[1].plug("down")
    assert wait_for(lambda: "exitcode" in job.said(0), agents[0]), job.said(0)
    job.machines[1].plug("up")
    assert job.finish() == [0, 0], job.said(0)
    assert_went_on_as(unbroken, job)


def test_a_cable_that_stays_unplugged_ends_the_run(job: Job) -> None:
    for number, machine in enumerate(job.machines):
        # torchrun away from the meeting point ends when its kernel does, by default in 15 minutes
        machine.set_tcp_retries(5)
        job.start(number, "--collective-timeout", 20, JOIN="20")
    job.in_the_middle()
    job.machines[1].plug("down")
    assert job.finish() == [1, 1]
    assert "RendezvousTimeoutError" in job.said(0)


def test_the_machine_of_the_meeting_point_dies(unbroken: Job, job: Job) -> None:
    agents = [job.start(number) for number in (0, 1)]
    job.in_the_middle()
    kill_all(agents[0])
    assert job.finish() == [-9, 1], job.said(1)
    for number in (0, 1):
        job.start(number)
    assert job.finish() == [-9, 1, 0, 0], job.said(0)
    assert_went_on_as(unbroken, job)
