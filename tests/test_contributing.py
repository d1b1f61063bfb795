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
HEAD = re.compile(r"# (distcls/\S+\.py)(?:, (before|in place of) `(.+)`)?")
"""The comment over the lines of a file."""


def examples() -> list[tuple[re.Match[str], str]]:
    """What goes where: the head, and the text under it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    found: list[tuple[re.Match[str], str]] = []
    for line in "".join(blocks).splitlines(keepends=True):
        if head := HEAD.fullmatch(line.rstrip("\n")):
            found.append((head, ""))
        else:
            found[-1] = found[-1][0], found[-1][1] + line
    return found


def carry_out(folder: Path, head: re.Match[str], text: str) -> None:
    """Change the file below `folder` as the example says."""
    path, how, place = folder / head[1], head[2], head[3]
    lines = path.read_text().splitlines(keepends=True)
    if how is None:
        lines += ["\n\n", text]
    else:
        at = next(i for i, line in enumerate(lines) if line.strip().startswith(place))
        lines[at : at + (how == "in place of")] = [text]
    path.write_text("".join(lines))


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with all examples in it."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(ROOT / "distcls", folder / "distcls")
    for head, text in examples():
        carry_out(folder, head, text)
    return folder


def test_each_touches_one_room() -> None:
    rooms = {str(Path(head[1]).parent) for head, _ in examples()}
    assert rooms == {"distcls/models", "distcls/training", "distcls/training/losses"}
    assert len(examples()) == 7


def test_a_run_with_all_of_them(changed: Path, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    chosen = ["--model.name", "logistic", "--loss.name", "poly", "--optimizer.name", "adamax"]
    chosen += ["--schedule.name", "line", "--schedule.warmup", "2 steps", "--schedule.final", "0.1"]
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
