"""docs/coming-from.md: our lines run in the page's order, and our flags are taken."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import distcls
from distcls.commands.train import main as train
from distcls.errors import UsageError
from tests.pictures import encode, smooth

PAGE = (Path(__file__).parent.parent / "docs" / "coming-from.md").read_text(encoding="utf-8")
JOBS, WORDS = PAGE.partition("\n## Words\n")[::2]
OURS = re.compile(r"^# distcls\b.*\n((?:(?!# (?:timm|Ultralytics|fastai|Keras)\b|```).*\n)+)", re.M)


def lines() -> Iterator[str]:
    """Our blocks, and our commands and expressions in rows and text, in the page's order."""
    for found in re.finditer(rf"{OURS.pattern}|^(?:\| here|Here it is)(.*)$", JOBS, re.M):
        block, row = found.groups()
        inside = re.findall(r"`([^`]+)`", row or "")
        for line in [block] if block else inside:
            if block or "distcls" in line or line.startswith("evaluation."):
                yield small(line.strip())


def small(line: str) -> str:
    """The line with a small network in place of one for photographs."""
    line = line.replace("--input.size 96", "--input.size 32 --model simple_cnn")
    return line.replace('input={"size": 96}', 'input={"size": 32}, model="simple_cnn"')


def command(line: str) -> None:
    """Run a command line of ours in this process; what two GPUs train is only parsed."""
    launcher = "accelerate launch --multi_gpu --num_processes 2 -m distcls.train "
    if line.startswith(launcher):
        return parsed(line.removeprefix(launcher))
    words = shlex.split(line.removeprefix("PYTHONPATH=. "))
    return importlib.import_module(f"distcls.commands.{words[1]}").main(words[2:])


def parsed(flags: str) -> None:
    """See that `distcls train` takes these flags."""
    with pytest.raises(SystemExit) as ended:
        train([*shlex.split(flags), "--print-config"])
    assert not ended.value.code, flags


def test_our_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for number, name in enumerate(("cat", "dog", "fox")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for image in range(10):
            picture = smooth(seed=number) // 2 + image
            (tmp_path / "photos" / name / f"{image}.jpg").write_bytes(encode(picture, "JPEG"))
    (tmp_path / "new").mkdir()
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "new" / name).write_bytes(encode(smooth(), "JPEG"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    variables: dict[str, Any] = {"distcls": distcls, "files": ["new/1.jpg", "new/2.jpg"]}
    done = {"commands": 0, "python": 0}
    for line in lines():
        if "def poly(" in line:
            Path("mine.py").write_text(line)
        elif re.match(r"(PYTHONPATH=\. )?(distcls|accelerate) ", line):
            command(line)
            done["commands"] += 1
        else:
            exec(line, variables)
            done["python"] += 1
    assert done == {"commands": 8, "python": 7}

    Path("mine.py").unlink()
    del sys.modules["mine"]
    assert distcls.load("runs/own")("new/1.jpg").error is None
    assert "mine:poly" in Path("runs/own/config.yaml").read_text()
    assert "balanced" in Path("runs/weights/config.yaml").read_text()
    assert pd.read_csv("runs/photos/history.csv")["epoch"].tolist() == [1, 2, 3]
    rows = pd.read_csv("pre.csv")
    assert rows["image_id"].tolist() == variables["files"]
    assert rows["error"].isna().all()
    assert variables["frame"].columns.tolist()[-4:] == ["p:cat", "p:dog", "p:fox", "error"]
    assert {path.name for path in Path("evaluation").iterdir()} >= {
        "per_class.csv",
        "confusion.png",
    }
    assert variables["evaluation"].confusion.shape == (3, 3)
    assert variables["exported"].path == Path("runs/python/best.onnx")
    assert variables["history"]["val_top1"].notna().tolist() == [True, True]
    assert "processes: 2" in capsys.readouterr().out


def test_our_words() -> None:
    rows = [row for row in WORDS.splitlines() if row.startswith("| ")][1:]
    flags = [flag for row in rows for flag in re.findall(r"`(--[^`]+)`", row.split("|")[5])]
    for flag in flags:
        parsed(f"--data photos {flag}")
    assert (len(rows), len(flags)) == (33, 34)
    with pytest.raises(UsageError) as answer:
        train(["--data", "photos", "--amp"])
    assert str(answer.value).partition("; see")[0] in WORDS
