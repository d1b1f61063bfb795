"""Training on Ray: refused with advice where Ray is missing, the same run where it is there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distcls.errors import UsageError
from distcls.launch.ray_train import absolute, main
from distcls.training.config import TrainConfig
from tests.e2e.commands import ROOT, SMALL


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r'not installed; pip install "distcls\[ray,train\]"'):
        main(["--data", "data", "--out", "out", "--processes", "2"])


def test_the_number_of_workers_has_to_be_given() -> None:
    with pytest.raises(UsageError, match="processes is missing; give it as --processes"):
        main(["--data", "data", "--out", "out"])


def test_workers_get_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(data=Path("data"), out=Path("runs/mine"), epochs=3)
    found = absolute(config)
    assert (found.data, found.out) == (tmp_path / "data", tmp_path / "runs/mine")
    assert (found.epochs, found.model) == (config.epochs, config.model)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_two_workers_train_together(digits: Path, tmp_path: Path) -> None:
    options = ["--data", digits, "--out", tmp_path / "run", "--processes", 2, *SMALL]
    done = subprocess.run(
        [sys.executable, "-m", "launch.ray_train", *map(str, options)],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout + done.stderr
    assert (tmp_path / "run" / "best.pth").is_file()
