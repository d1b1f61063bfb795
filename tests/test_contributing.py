"""The examples of CONTRIBUTING.md, carried out on a copy of the code and trained with."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from tests import tiny_onnx

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


def call(changed: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `python -m` in the changed copy."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=changed,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


def test_each_touches_one_file() -> None:
    files = ["models/simple.py", "training/losses.py", "training/optim.py", "training/schedule.py"]
    files += ["data/formats/detect.py", "runtime/providers.py"]
    assert [name for name, _ in examples()] == [f"distcls/{name}" for name in files]


def test_a_run_with_all_of_them(changed: Path, tmp_path: Path) -> None:
    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    np.savez(
        tmp_path / "digits.npz",
        images=np.repeat(grey[..., None], 3, axis=-1),
        labels=np.array([f"digit {label}" for label in bunch.target]),
    )
    data, out = tmp_path / "digits", tmp_path / "run"
    call(changed, "distcls.cli", "prepare", tmp_path / "digits.npz", "--out", data)
    chosen = ["--model.name", "logistic", "--loss.name", "poly", "--optimizer.name", "adamax"]
    chosen += ["--schedule.name", "linear", "--schedule.warmup", "2 steps"]
    run: list[object] = ["--data", data, "--out", out, "--lr", "1e-4", "--log-every", "1"]
    run += ["--epochs", "2", "--limit", "320", "--batch-size", "32", "--schedule.final", "0.1"]
    run += ["--augment.flip", "0", "--augment.crop-padding", "0"]
    call(changed, "distcls.train", *run, *chosen)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert len(steps) == 20
    # a line from 1 in step 2 (counted from 0) to 0.1 in step 20, which is not taken any more
    expected = [0.5e-4, 1e-4, *(1e-4 * (1 - 0.9 * step / 18) for step in range(18))]
    assert [line["lr"] for line in steps] == pytest.approx(expected)
    # cross-entropy of ten classes is 2.3 for one who knows nothing, and 1 - p is 0.9
    assert steps[0]["loss"] == pytest.approx(3.2, abs=1)
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    call(
        changed,
        *("distcls.cli", "predict", tmp_path / "digits.npz", "--model", out / "best.pth"),
        *("--out", tmp_path / "pre.csv", "--limit", "5"),
    )
    rows = (tmp_path / "pre.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == [f"{index:06d}" for index in range(5)]
    assert {row.split(",")[1][:6] for row in rows} == {"digit "}


def test_the_provider_is_offered_and_says_what_it_lacks(changed: Path, tmp_path: Path) -> None:
    tiny_onnx.write(tmp_path / "m.onnx")
    (tmp_path / "list.csv").write_text("path\nx.png\n")
    predict = ["distcls.cli", "predict", tmp_path / "list.csv", "--model", tmp_path / "m.onnx"]
    predict += ["--out", tmp_path / "pre.csv", "--provider"]
    said = call(changed, *predict, "onednn", code=2).stderr
    assert said.startswith("error: provider: onednn is not in this build of onnxruntime")
    assert "onednn" in call(changed, *predict, "nothing", code=2).stderr  # among the choices
