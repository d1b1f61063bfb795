"""The examples of CONTRIBUTING.md, carried out on a copy of the code and trained with."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = re.compile(r"```python\n# (distcls/\S+\.py)\n(.*?)```", re.DOTALL)
"""A block whose first line names the file that the rest is added to."""


def examples() -> list[tuple[str, str]]:
    """The file and the text of each."""
    return EXAMPLE.findall((ROOT / "CONTRIBUTING.md").read_text())


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with all examples in it."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(ROOT / "distcls", folder / "distcls")
    for name, text in examples():
        path = folder / name
        path.write_text(f"{path.read_text()}\n\n{text}")
    return folder


def test_each_touches_one_file() -> None:
    files = ["models/simple.py", "training/losses.py", "training/optim.py", "training/schedule.py"]
    assert [name for name, _ in examples()] == [f"distcls/{name}" for name in files]


def test_a_run_with_all_of_them(changed: Path, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    chosen = ["--model.name", "logistic", "--loss.name", "poly", "--optimizer.name", "adamax"]
    chosen += [
        "--schedule.name",
        "linear",
        "--schedule.warmup",
        "2 steps",
        "--schedule.final",
        "0.1",
    ]
    run: list[object] = ["--data", digits, "--out", out, "--lr", "1e-4", "--log-every", "1"]
    run += ["--epochs", "2", "--limit", "320", "--batch-size", "32"]
    call = [sys.executable, "-m", "distcls.train", *map(str, run), *chosen]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        call, cwd=changed, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert len(steps) == 20
    # a line from 1 in step 2 (counted from 0) to 0.1 in step 20, which is not taken any more
    expected = [0.5e-4, 1e-4, *(1e-4 * (1 - 0.9 * step / 18) for step in range(18))]
    assert [line["lr"] for line in steps] == pytest.approx(expected)
    # cross-entropy of ten classes is 2.3 for one who knows nothing, and 1 - p is 0.9
    assert steps[0]["loss"] == pytest.approx(3.2, abs=1)
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
