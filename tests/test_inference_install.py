"""What `pip install .` alone can do: predict without torch and pyarrow, and advise on the rest.

And what it installs: the wheel, built from the source distribution, used outside of the checkout.
"""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from distcls import __version__
from distcls.cli import COMMANDS
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


def run(
    *arguments: object, folder: Path = ROOT, packages: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """A command of distcls where only what its base install brings can be imported."""
    program = (
        f"import sys\nfor name in {(*EXTRA, 'pyarrow')!r}:\n    sys.modules[name] = None\n"
        "from distcls.cli import main\nmain()"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(packages)},
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
        (["prepare", "IN", "--out", "pre.data"], r"pyarrow.*distcls\[parquet\]"),
        (["train", "--data", "digits", "--out", "run"], r"distcls\[\w+\]"),
        (["export", "--ckpt", "IN"], r"distcls\[\w+\]"),
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds; the wheel is built from the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("distcls", "export", "launch"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    build(source, "sdist", folder)
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        members.extractall(folder, filter="data")
    build(folder / archive.name.removesuffix(".tar.gz"), "wheel", folder)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as contents:
        contents.extractall(folder / "installed")
    return folder / "installed"


def build(source: Path, kind: str, out: Path) -> None:
    """Build as pip does, with the setuptools of this environment."""
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    call = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(call, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_what_the_package_reads(installed: Path) -> None:
    ours = [path for path in (ROOT / "distcls").rglob("*") if path.is_file()]
    ours = [path.relative_to(ROOT) for path in ours if path.suffix != ".pyc"]
    assert {path.suffix for path in ours} == {
        *(".py", ".yaml", ".sh", ".conf", ".typed"),
        *(".html", ".css", ".js"),
    }
    for path in ours:
        assert (installed / path).read_bytes() == (ROOT / path).read_bytes()
    top = {path.name for path in installed.iterdir()} - {f"distcls-{__version__}.dist-info"}
    assert top == {"distcls", "export", "launch"}
    for alias in ("export", "launch"):
        assert {path.suffix for path in (installed / alias).iterdir()} == {".py"}


def test_the_metadata_of_the_wheel(installed: Path) -> None:
    text = (installed / f"distcls-{__version__}.dist-info" / "METADATA").read_text()
    found = email.message_from_string(text)
    assert found["Version"] == __version__
    assert found["License-Expression"] == "Apache-2.0"
    classifiers = found.get_all("Classifier", [])
    assert "Typing :: Typed" in classifiers
    least = found["Requires-Python"].removeprefix(">=")
    pythons = [text.rpartition(" ")[2] for text in classifiers if "Python :: 3." in text]
    assert pythons[0] == least
    running = "{}.{}".format(*sys.version_info)
    assert running in pythons


def test_installed_commands_run_beside_a_users_own_packages(
    installed: Path, tmp_path: Path
) -> None:
    packages, folder = tmp_path / "packages", tmp_path / "project"
    shutil.copytree(installed, packages)
    for place in (packages / "launch", folder / "launch", folder / "export"):  # pip install launch
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        (place / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    for arguments, said in (
        (["--help"], "usage: distcls COMMAND"),
        (["-V"], f"distcls {__version__}\n"),
        (["recipes"], "captcha "),
        (["recipes", "digits"], "# Handwritten digits"),
        (["templates", "slurm"], "#!/bin/bash\n"),
        (["completion", "bash"], "# bash completion"),
        *(([command, "--help"], f"usage: distcls {command} ") for command in COMMANDS),
    ):
        done = run(*arguments, folder=folder, packages=packages)
        assert (done.returncode, done.stderr) == (0, ""), arguments
        assert done.stdout.startswith(said)
    done = run("train", "--config", "digits", "--data", "digits", folder=folder, packages=packages)
    assert re.search(r"not installed; pip install", done.stderr)
    program = "from distcls.launch.search_space import LAUNCHER; print(LAUNCHER.read_text())"
    call = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    launcher = subprocess.run(call, cwd=folder, env=environment, capture_output=True, check=True)
    assert b"num_processes: 2" in launcher.stdout


def test_the_aliases_advise_as_the_commands_do(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{installed}"}
    (tmp_path / "best.pth").write_text("")
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(name='torch')\n")
    for arguments in (["--help"], ["--ckpt", "best.pth"]):
        call = [sys.executable, "-m", "export.onnx", *arguments]
        done = subprocess.run(
            call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        if arguments == ["--help"]:
            assert done.stdout.startswith("usage: distcls export ")
        else:
            assert done.returncode == 2
            assert "needs torch, which is not installed" in done.stderr
