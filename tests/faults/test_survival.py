"""Kills, signals, damaged states, bad numbers and stalled files: rows 1 to 15 of the fault table.

KILLS=30 python -m pytest tests/faults/test_survival.py     the large number of repetitions
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits

from distcls.data.prepare import PrepareOptions, prepare
from distcls.training.checkpoints import newest_whole, states
from tests.e2e.commands import ROOT, command
from tests.faults.survival import (
    OPTIONS,
    STEPS,
    assert_bit_equal,
    assert_every_sample_once_an_epoch,
    finish,
    global_batches,
    kill_all,
    start,
    steps_done,
    wait_for,
    workers,
)

KILLS = int(os.environ.get("KILLS", "2"))
"""Times a run is killed before it may finish."""


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def unbroken(
    request: pytest.FixtureRequest, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path, Path]:
    """Number of processes, run directory and trace of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "trace").mkdir()
    process = start(digits, folder / "run", processes=request.param, TRACE=str(folder / "trace"))
    finish(process)
    assert_every_sample_once_an_epoch(folder / "trace")
    return request.param, folder / "run", folder / "trace"


def test_killed_at_random_steps_it_ends_with_the_same_weights(
    unbroken: tuple[int, Path, Path], digits: Path, tmp_path: Path
) -> None:
    processes, reference, trace = unbroken
    rng = random.Random(0)
    out, own_trace = tmp_path / "run", tmp_path / "trace"
    own_trace.mkdir()
    for number in range(KILLS):
        if steps_done(out) >= STEPS:  # the next life
            finish(start(digits, out, processes=processes, TRACE=str(own_trace)))
            assert_bit_equal(reference, out)
            shutil.rmtree(out)
        target = rng.randint(steps_done(out) + 1, STEPS)
        process = start(digits, out, processes=processes, TRACE=str(own_trace))
        wait_for(lambda target=target: steps_done(out) >= target, process)
        kill_all(process)
        print(f"kill {number + 1}: aimed at step {target}, hit after step {steps_done(out)}")
    finish(start(digits, out, processes=processes, TRACE=str(own_trace)))
    assert_bit_equal(reference, out)
    assert_every_sample_once_an_epoch(own_trace)
    assert global_batches(own_trace) == global_batches(trace)


def test_no_half_state_is_ever_taken(digits: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    out = tmp_path / "run"
    for _ in range(KILLS):
        process = start(digits, out, "--checkpoint.every-steps", "1")
        wait_for(lambda: bool(list((out / "last").glob("*step_*"))), process)
        time.sleep(rng.uniform(0, 0.5))
        kill_all(process)
        for path in states(out / "last"):
            assert newest_whole(out / "last") is not None, path
    finish(start(digits, out, "--checkpoint.every-steps", "1"))
    assert not list((out / "last").glob(".step_*"))


def test_when_one_process_dies_the_others_end(digits: Path, tmp_path: Path) -> None:
    process = start(digits, tmp_path / "run", processes=2, SLOW="0.2")
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, process)
    family = workers(process)
    assert len(family) == 2
    family[1].kill()
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode != 0
    assert "SIGKILL" in said or "Signal 9" in said
    assert not [worker for worker in family if worker.is_running()]


def test_resumed_with_another_number_of_processes(
    unbroken: tuple[int, Path, Path], digits: Path, tmp_path: Path
) -> None:
    processes, _, trace = unbroken
    out, own_trace = tmp_path / "run", tmp_path / "trace"
    own_trace.mkdir()
    process = start(digits, out, processes=processes, TRACE=str(own_trace))
    wait_for(lambda: steps_done(out) >= 5, process)
    kill_all(process)
    finish(start(digits, out, processes=3 - processes, TRACE=str(own_trace)))
    assert_every_sample_once_an_epoch(own_trace)
    assert global_batches(own_trace) == global_batches(trace)


def test_two_jobs_on_one_host(digits: Path, tmp_path: Path) -> None:
    both = [start(digits, tmp_path / name, processes=2) for name in ("one", "other")]
    for process in both:
        finish(process)
    assert_bit_equal(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_leaves(number: signal.Signals, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(digits, out, "--checkpoint.every-steps", "1000", SLOW="0.1")
    wait_for(lambda: steps_done(out) >= 3, process)
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)  # a second one during the save
    said = finish(process, code=75)
    assert "--resume auto continues" in said
    assert "Traceback" not in said
    found = newest_whole(out / "last")
    assert found is not None
    assert 3 <= found[1]["progress"]["step"] < STEPS


def test_a_signal_to_one_process_stops_all_at_one_step(
    unbroken: tuple[int, Path, Path], digits: Path, tmp_path: Path
) -> None:
    processes, reference, trace = unbroken
    if processes == 1:
        pytest.skip("a matter of several processes")
    out, own_trace = tmp_path / "run", tmp_path / "trace"
    own_trace.mkdir()
    process = start(digits, out, processes=2, TRACE=str(own_trace), SLOW="0.1")
    wait_for(lambda: steps_done(out) >= 2, process)
    workers(process)[1].send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode != 0
    found = newest_whole(out / "last")
    assert found is not None
    assert found[1]["progress"]["step"] < STEPS
    finish(start(digits, out, processes=2, TRACE=str(own_trace)))
    assert_bit_equal(reference, out)
    assert global_batches(own_trace) == global_batches(trace)


def test_a_full_disk_keeps_the_state_before(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(digits, out, SLOW="0.1")
    wait_for(lambda: bool(states(out / "last")), process)
    kill_all(process)
    before = states(out / "last")
    limited = subprocess.run(
        command("--data", digits, "--out", out, *OPTIONS, module="distcls.train"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        # the state is some 25 MB: a file of that size cannot be written any more
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12 << 20, 12 << 20)),
    )
    assert limited.returncode == 1
    assert str(out / "last") in limited.stderr
    assert "MiB free there" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert states(out / "last") == before
    assert newest_whole(out / "last") is not None


def test_a_flipped_bit_falls_back_to_the_state_before(
    unbroken: tuple[int, Path, Path], digits: Path, tmp_path: Path
) -> None:
    processes, reference, _ = unbroken
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    newest = states(out / "last")[0]
    data = bytearray(newest.read_bytes())
    data[len(data) // 3] ^= 16
    newest.write_bytes(data)
    said = finish(start(digits, out, processes=processes))
    assert f"{newest} is damaged" in said
    assert_bit_equal(reference, out)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_number_on_one_rank_is_skipped_by_all(
    processes: int, digits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    poison = f"4:{processes - 1}"
    said = finish(start(digits, out, processes=processes, POISON=poison))
    assert "step 5: loss or gradient is not finite (images digits/" in said
    assert (out / "metrics.jsonl").read_text().count('"skipped"') == 1
    state = newest_whole(out / "last")
    assert state is not None
    assert state[1]["progress"]["step"] == STEPS
    moments = state[1]["tensors"]["optimizer"]["state"]
    assert {float(values["step"]) for values in moments.values()} == {STEPS - 1}
    for name, tensor in state[1]["tensors"]["model"].items():
        assert np.isfinite(tensor.float().numpy()).all(), name


def test_bad_numbers_without_end_stop_the_run(digits: Path, tmp_path: Path) -> None:
    more = ("--lr", "1e30", "--schedule.warmup", "0 steps", "--max-bad-steps", "3")
    said = finish(start(digits, tmp_path / "run", *more), code=1)
    assert "3 steps in a row without a finite gradient" in said
    assert "images digits/" in said
    assert "Traceback" not in said


def test_a_file_that_hangs_is_named(tmp_path: Path) -> None:
    digits, labels = load_digits(return_X_y=True)
    for number, (pixels, label) in enumerate(zip(digits[:200], labels[:200], strict=True)):
        folder = tmp_path / "images" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image = (pixels.reshape(8, 8) * 15).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number:03d}.png"), image)
    data = tmp_path / "data"
    source = str(tmp_path / "images")
    prepare(PrepareOptions(source=source, out=data, pack="off", val_fraction=0.3, quiet=True))
    for path in (tmp_path / "images" / "3").iterdir():
        path.unlink()
        os.mkfifo(path)  # opens for reading when somebody opens it for writing: never
    began = time.monotonic()
    said = finish(start(data, tmp_path / "run", "--loader.timeout", "3"), code=1)
    assert time.monotonic() - began < 60
    assert "no batch came for 3 s; still reading: 3/" in said
    assert "Traceback" not in said
