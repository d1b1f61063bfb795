"""Commands without a terminal: closed streams, a full one, and text that cannot be encoded."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_dataset, tiny_onnx
from tests.e2e.commands import ROOT
from tests.pictures import smooth
from tests.sources import put

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
CLASSES = ("röd", "緑", "🔵")


def distcls(
    *arguments: object, shell: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell that redirects its streams, such as `2>&-`."""
    call = shlex.join([sys.executable, "-m", "distcls.cli", *map(str, arguments)])
    return subprocess.run(
        ["/bin/sh", "-c", f"{call} {shell}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos") / "in"
    for place, name in enumerate(CLASSES):
        for index in range(8):
            put(folder / name / f"{index}.png", smooth(12, 12, 10 * index + place))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images, labels = tiny_dataset.coloured(48)
    splits = ["train", "val", "test", "train"] * 12
    folder = tmp_path_factory.mktemp("data") / "d"
    return tiny_dataset.write(folder, list(images), labels, CLASSES, splits=splits)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    return tiny_onnx.write(path, tiny_onnx.card(CLASSES))


def commands(
    photos: Path, data: Path, model: Path, out: Path
) -> dict[str, tuple[list[object], Path]]:
    """The arguments of each command, and a file that it leaves."""
    small = ["--epochs", "1", "--model.name", "simple_nn", "--batch-size", "8"]
    return {
        "prepare": (["prepare", photos, "--out", out / "d", "--json"], out / "d" / "dataset.json"),
        "predict": (
            ["predict", photos, "--model", model, "--out", out / "pre.csv", "--json"],
            out / "pre.csv",
        ),
        "evaluate": (
            ["evaluate", "--model", model, "--data", data, "--out", out / "e", "--json"],
            out / "e" / "metrics.json",
        ),
        "train": (
            ["train", "--data", data, "--out", out / "run", *small, "--json"],
            out / "run" / "best.pth",
        ),
    }


@pytest.mark.parametrize("command", ["prepare", "predict", "evaluate", "train"])
def test_every_stream_closed(
    photos: Path, data: Path, model: Path, tmp_path: Path, command: str
) -> None:
    arguments, left = commands(photos, data, model, tmp_path)[command]
    done = distcls(*arguments, shell="<&- >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")  # the JSON is nowhere
    assert left.stat().st_size > 0
    left.unlink()


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_result_that_cannot_be_printed_is_one_line(
    photos: Path, data: Path, model: Path, tmp_path: Path, command: str
) -> None:
    arguments, left = commands(photos, data, model, tmp_path)[command]
    done = distcls(*arguments, "--quiet", shell=">/dev/full")
    assert done.returncode == 1
    assert done.stderr == "error: standard output cannot be written: No space left on device\n"
    assert left.stat().st_size > 0
    rows = ("predict", photos, "--model", model, "--out", "-", "--quiet")
    for shell, reason in ((">/dev/full", "No space left on device"), (">&-", "is closed")):
        done = distcls(*rows, shell=shell)
        assert done.returncode == 1
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "case",
    [("prepare", "2>&-"), ("evaluate", "2>&-"), ("predict", "2>/dev/full")],
    ids=lambda case: case[0],
)
def test_standard_error_closed_or_full(
    photos: Path, data: Path, model: Path, tmp_path: Path, case: tuple[str, str]
) -> None:
    """Messages are lost, and do not go to standard output instead; no work ends."""
    command, shell = case
    arguments, left = commands(photos, data, model, tmp_path)[command]
    done = distcls(*arguments, shell=shell)
    assert done.returncode == 0
    assert isinstance(json.loads(done.stdout), dict)
    assert left.stat().st_size > 0


def test_a_mistake_is_still_code_2() -> None:
    assert distcls("evaluate", "--model", "x.onnx", "--data", "y", shell="2>&-").returncode == 2
    assert distcls("nonsense", shell=">&- 2>&-").returncode == 2


def test_children_inherit_streams_that_lead_nowhere(tmp_path: Path) -> None:
    """A file that is opened later must not get descriptor 2: C libraries write there."""
    program = (
        "import os, subprocess, sys\nfrom distcls.cli import run\n"
        "def main(arguments):\n"
        f"    file = os.open({str(tmp_path / 'result')!r}, os.O_CREAT | os.O_WRONLY)\n"
        "    assert file > 2\n"
        "    os.write(2, b'a warning of a C library')\n"
        "    subprocess.run([sys.executable, '-c', 'import sys; sys.stderr.write(\"x\")'],"
        " check=True)\n"
        "    os.write(file, b'done')\n"
        "run(main)"
    )
    call = shlex.join([sys.executable, "-c", program])
    done = subprocess.run(["/bin/sh", "-c", f"{call} <&- 2>&-"], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert (tmp_path / "result").read_text() == "done"


@pytest.mark.parametrize(
    ("command", "environment"),
    [
        *((command, ASCII) for command in ("predict", "evaluate", "train")),
        ("evaluate", {"LANG": "C", "LC_ALL": ""}),
    ],
)
def test_class_names_that_cannot_be_printed(  # noqa: PLR0917
    photos: Path,
    data: Path,
    model: Path,
    tmp_path: Path,
    command: str,
    environment: dict[str, str],
) -> None:
    arguments, left = commands(photos, data, model, tmp_path)[command]
    if command == "predict":  # the names of files are bytes in such a locale
        arguments[1] = data
    done = distcls(*arguments, **environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert left.stat().st_size > 0
    if command == "evaluate":
        assert list(found["per_class"]) == list(CLASSES)
        assert json.loads(left.read_text(encoding="utf-8")) == found


def test_the_table_escapes_what_cannot_be_printed(data: Path, model: Path) -> None:
    done = distcls("evaluate", "--model", model, "--data", data, **ASCII)
    assert done.returncode == 0, done.stderr
    rows = [line.split()[0] for line in done.stdout.splitlines()[1:4]]
    assert rows == [r"r\xf6d", r"\u7dd1", r"\U0001f535"]


def test_prepare_prints_valid_json_in_any_encoding(photos: Path, tmp_path: Path) -> None:
    more = {"PYTHONIOENCODING": "ascii"}
    done = distcls("prepare", photos, "--out", tmp_path / "d", "--json", **more)
    assert done.returncode == 0, done.stderr
    assert sorted(json.loads(done.stdout)["classes"]) == sorted(CLASSES)
