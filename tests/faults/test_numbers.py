"""Losses that are no numbers: row 12."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distcls.training.checkpointing import newest_intact
from tests.faults.survival import ONE_AND_TWO, STEPS, finish, start


@pytest.mark.row(12)
@pytest.mark.parametrize("processes", ONE_AND_TWO)
def test_a_bad_number_on_one_rank_is_skipped_by_all(
    processes: int, digits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    poison = f"4:{processes - 1}"
    said = finish(start(digits, out, processes=processes, POISON=poison))
    assert "step 5: loss or gradient is not finite (images digits/" in said
    assert (out / "metrics.jsonl").read_text().count('"skipped"') == 1
    state = newest_intact(out / "last")
    assert state is not None
    assert state[1]["progress"]["step"] == STEPS
    moments = state[1]["tensors"]["optimizer"]["state"]
    assert {float(values["step"]) for values in moments.values()} == {STEPS - 1}
    for name, tensor in state[1]["tensors"]["model"].items():
        assert np.isfinite(tensor.float().numpy()).all(), name


@pytest.mark.row(12)
def test_bad_numbers_without_end_stop_the_run(digits: Path, tmp_path: Path) -> None:
    more = ("--lr", "1e30", "--schedule.warmup", "0 steps", "--max-bad-steps", "3")
    said = finish(start(digits, tmp_path / "run", *more), code=1)
    assert "3 steps in a row without a finite gradient" in said
    assert "images digits/" in said
    assert "Traceback" not in said
