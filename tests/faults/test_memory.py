"""Memory that runs out, by a limit on the processes' address space: row 13 of the fault table.

Now and then a native library answers such a limit with a crash of its own, hence none of these in
`make test`; `tests/test_memory.py` is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distcls.training.checkpointing import newest_intact, states
from tests.faults.survival import (
    assert_bit_equal,
    finish,
    global_batches,
    kill_all,
    start,
    steps_done,
    wait_for,
)

pytestmark = [pytest.mark.row(13), pytest.mark.slow]

LARGE = [
    *("--batch-size", "640", "--limit", "1259", "--accumulate", "1"),
    *("--checkpoint.every-steps", "1", "--threads", "1", "--loader.workers", "1"),
]
"""Two steps per epoch; 630 images at a time take some 1,000 MiB on the CPU, 315 take 630."""
AUTO = [*LARGE, "--auto-micro-batch", "true"]
SCARCE = {"ROOM": "860", "MALLOC_ARENA_MAX": "1"}
"""An arena for each thread would take address space, though no memory."""


def chosen(out: Path) -> dict[str, Any]:
    """What the run says of its parts, which has to be said once."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    [row] = [line for line in lines if line["kind"] == "micro_batch"]
    return row


def progress(out: Path) -> dict[str, Any]:
    found = newest_intact(out / "last")
    assert found is not None
    return found[1]["progress"]


@pytest.mark.parametrize("processes", [1, 2])
def test_fewer_images_at_a_time_in_the_same_global_batches(
    processes: int, digits: Path, tmp_path: Path
) -> None:
    free, scarce = tmp_path / "free trace", tmp_path / "scarce trace"
    free.mkdir()
    scarce.mkdir()
    auto = [*AUTO, "--batch-size", 640 * processes]
    plain = finish(start(digits, tmp_path / "free", *auto, processes=processes, TRACE=str(free)))
    assert "do not fit" not in plain
    assert chosen(tmp_path / "free")["accumulate"] == 1
    environment = SCARCE | {"TRACE": str(scarce)}
    said = finish(start(digits, tmp_path / "run", *auto, processes=processes, **environment))
    row = chosen(tmp_path / "run")
    parts = row["accumulate"]
    assert parts in (2, 4, 8)
    assert row["images"] == -(-630 // parts)
    (line,) = [line for line in said.splitlines() if "do not fit" in line]
    assert f"reduced to {row['images']}, in {parts} micro-batches per step" in line
    assert f"the global batch stays {640 * processes}" in line
    assert progress(tmp_path / "run")["accumulate"] == parts
    assert progress(tmp_path / "run")["step"] == 4 // processes
    assert global_batches(scarce) == global_batches(free)
    batches = [len(text.splitlines()) for text in map(Path.read_text, scarce.glob("*.jsonl"))]
    assert batches == [4 // processes * parts] * processes


def test_without_it_the_run_stops_with_advice(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = finish(start(digits, out, *LARGE, "--quiet", **SCARCE), code=1)
    (line,) = said.splitlines()
    assert line.startswith("error: out of memory with 630 images at a time; --auto-micro-batch")
    assert "--accumulate 2" in line
    written = {path.name for path in out.rglob("*") if path.is_file()}
    assert written - {path.name for path in states(out / "last")} == {
        "config.yaml",
        "metrics.jsonl",
    }
    finish(start(digits, out, *AUTO, **SCARCE))  # as it was advised
    assert progress(out)["step"] == 4


def test_what_no_halving_helps_is_refused_before_anything_is_written(
    digits: Path, tmp_path: Path
) -> None:
    more = ("--batch-size", "20")
    out = tmp_path / "run"
    said = finish(start(digits, out, *AUTO, *more, "--quiet", **SCARCE | {"ROOM": "40"}), code=1)
    (line,) = said.splitlines()
    assert line.startswith("error: out of memory with")
    assert "batch normalisation needs two in every micro-batch" in line
    assert not list(out.glob("*"))


def test_a_resumed_run_takes_as_many_images_at_a_time(digits: Path, tmp_path: Path) -> None:
    finish(start(digits, tmp_path / "unbroken", *AUTO, **SCARCE))
    out = tmp_path / "run"
    process = start(digits, out, *AUTO, **SCARCE | {"SLOW": "1"})
    wait_for(lambda: steps_done(out) >= 2, process)
    kill_all(process)
    assert 0 < progress(out)["step"] < 4
    said = finish(start(digits, out, *AUTO, "--auto-micro-batch", "false"))  # with memory again
    assert "do not fit" not in said
    assert f"1 process x {chosen(out)['accumulate']} micro-batches" in said
    assert_bit_equal(tmp_path / "unbroken", out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_memory(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    environment = {"GPU_ROOM": "150"}
    said = finish(start(digits, out, *LARGE, "--quiet", **environment), code=1)
    (line,) = said.splitlines()
    assert "out of memory with 630 images at a time; --auto-micro-batch true" in line
    said = finish(start(digits, out, *AUTO, **environment))
    assert "do not fit into memory: reduced to" in said
    assert chosen(out)["accumulate"] > 1
    assert progress(out)["step"] == 4
