"""The files of a run directory: what a resumed run keeps of them, and how they are closed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest

from distcls.training.checkpointing import _write_history
from distcls.training.config import TrainConfig
from distcls.training.logging import METRICS, Records
from distcls.training.run import train


def test_half_of_a_last_line_is_dropped(tmp_path: Path) -> None:
    config = TrainConfig(data=tmp_path, out=tmp_path / "run")
    records = Records(config, 0)
    for step in (1, 2, 3):
        records.line("step", step=step, loss=0.5)
    records.close()
    path = config.out / METRICS
    with path.open("a") as handle:
        handle.write('{"kind": "step", "step"')  # the disk was full, or a kill came
    records = Records(config, 2)
    records.line("step", step=3, loss=0.25)
    records.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.5), (3, 0.25)]


def test_lines_that_are_none_are_dropped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(data=tmp_path, out=tmp_path / "run")
    config.out.mkdir()
    path = config.out / METRICS
    good = [json.dumps({"kind": "step", "step": step}) for step in (1, 2)]
    junk = ["not JSON", "[1]", "{}", '{"step": "x"}', '{"step": true}', "\udcff"]
    text = "\n".join([good[0], *junk, good[1], ""])
    path.write_bytes(text.encode(errors="surrogateescape"))
    Records(config, 2).close()
    assert path.read_text().splitlines() == good
    assert f"{path}: 6 of 8 lines are not log lines and are dropped" in capsys.readouterr().err


def test_epochs_with_other_figures_share_a_table(tmp_path: Path) -> None:
    before = {"epoch": 1, "val_top1": 0.5, "val_top5": 1.0}  # as of a version that had top-5
    now = {"epoch": 2, "val_top1": 0.75, "val_top1_average": 0.8}
    _write_history(tmp_path / "history.csv", [before, now])
    rows = (tmp_path / "history.csv").read_text().splitlines()
    assert rows == ["epoch,val_top1,val_top1_average,val_top5", "1,0.5,,1.0", "2,0.75,0.8,"]


def test_a_signal_while_the_files_are_closed_does_not_kill(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = Records.close

    def asked_to_stop(self: Records) -> None:
        handler = signal.getsignal(signal.SIGTERM)
        assert handler is not signal.SIG_DFL  # else the next line would end the tests as well
        os.kill(os.getpid(), signal.SIGTERM)
        close(self)

    monkeypatch.setattr(Records, "close", asked_to_stop)
    config = TrainConfig(data=digits, out=tmp_path / "run", epochs=1, limit=40, quiet=True)
    result = train(dataclasses.replace(config, batch_size=20))
    assert result.epochs == 1
    assert (tmp_path / "run" / "history.csv").exists()
