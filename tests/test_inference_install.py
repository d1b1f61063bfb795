"""What `pip install .` alone can do: predict without torch and pyarrow, and advise on the rest."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.e2e.commands import ROOT
from tests.sources import write_manifest
from tests.test_predict_rows import with_features
from tests.test_writers import read

EXTRA = ("torch", "torchvision", "accelerate", "onnx", "matplotlib", "sklearn", "timm", "ray")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return with_features(tmp_path / "m.onnx")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    assert cv2.imwrite(str(tmp_path / "a.png"), np.full((8, 8, 3), 200, np.uint8))
    return write_manifest(tmp_path / "list.csv", [["path"], ["a.png"], ["a.png"]])


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command of distcls where only what its base install brings can be imported."""
    program = (
        f"import sys\nfor name in {(*EXTRA, 'pyarrow')!r}:\n    sys.modules[name] = None\n"
        "from distcls.cli import main\nmain()"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_predicts_a_manifest_to_csv_and_json_lines(
    model: Path, manifest: Path, tmp_path: Path
) -> None:
    for name in ("pre.csv", "pre.jsonl"):
        done = run("predict", manifest, "--model", model, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert [row["image_id"] for row in read(tmp_path / name)] == ["a.png", "a.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predict", "IN", "--out", "pre.parquet"], r"pyarrow.*distcls\[parquet\]"),
        (
            ["predict", "IN", "--out", "pre.csv", "--features", "f.parquet"],
            r"pyarrow.*distcls\[parquet\]",
        ),
        (["predict", "IN", "--out", "pre.csv", "--show", "1"], r"matplotlib.*distcls\[plot\]"),
        (["train", "--data", "nowhere", "--out", "run"], r"distcls\[\w+\]"),
        (["export", "--ckpt", "best.pth"], r"distcls\[\w+\]"),
    ],
)
def test_what_needs_more_says_what_to_install(
    arguments: list[str], said: str, model: Path, manifest: Path, tmp_path: Path
) -> None:
    given = [str(manifest) if text == "IN" else text for text in arguments]
    given = [str(tmp_path / text) if text.startswith(("pre.", "f.")) else text for text in given]
    done = run(*given, *(["--model", model] if given[0] == "predict" else []))
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert "not installed; pip install" in line
    assert re.search(said, line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "list.csv", "m.onnx"]
