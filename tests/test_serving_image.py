"""The Dockerfile without Docker: its lines are run one after the other, the server as its user."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.commands import ROOT
from tests.serving import PHOTO, WHOLE

LINES = [
    tuple(line.split(maxsplit=1))
    for line in (ROOT / "Dockerfile").read_text().splitlines()
    if line and not line.startswith("#")
]
IGNORE = [
    line
    for line in (ROOT / ".dockerignore").read_text().splitlines()
    if line and not line.startswith("#")
]


def values(instruction: str) -> list[str]:
    return [value for name, value in LINES if name == instruction]


def command(text: str) -> list[str]:
    """A command in exec form; the shell form, which keeps signals to itself, is no JSON."""
    found = json.loads(text)
    assert all(isinstance(word, str) for word in found)
    return list(found)


def test_the_server_is_the_first_process_and_not_root() -> None:
    [entry], [more], [user] = values("ENTRYPOINT"), values("CMD"), values("USER")
    assert command(entry)[:2] == ["distcls", "serve"]
    assert command(more) == ["--model", "/model"]
    assert int(user.partition(":")[0]) >= 1000
    [check] = values("HEALTHCHECK")
    assert "curl" not in check
    assert command(check.partition(" CMD ")[2])[0] == "python"
    assert not [value for value in values("RUN") if "train" in value or "torch" in value]
    assert "ORT_DISABLE_TELEMETRY=1" in values("ENV")


def test_only_what_the_package_is_built_from_is_sent_to_docker() -> None:
    assert IGNORE[0] == "*"
    kept = {line[1:] for line in IGNORE if line.startswith("!")}
    assert kept == {"distcls", "export", "launch", "pyproject.toml", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in kept)


def python() -> str | None:
    """A Python that other users may run, too."""
    for found in (sys.executable, "/usr/bin/python3.12", "/usr/bin/python3.11", "/usr/bin/python3"):
        path = Path(found).resolve()
        able = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"
        if path.exists() and all(each.stat().st_mode & 0o001 for each in (path, *path.parents)):
            done = subprocess.run([path, "-c", able], capture_output=True, check=False)
            if done.returncode == 0:
                return str(path)
    return None


@contextlib.contextmanager
def root() -> Iterator[Path]:
    """The place of the image's files, readable for everybody."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def build(folder: Path, interpreter: str) -> None:
    """Run COPY and RUN of the first stage, below the folder."""
    for name, value in LINES[: [name for name, _ in LINES].index("FROM", 1)]:
        if name == "COPY":
            source, target = value.split()
            assert source == "."
            place = folder / target.lstrip("/")
            place.mkdir()
            for kept in (line[1:] for line in IGNORE if line.startswith("!")):
                if (ROOT / kept).is_dir():
                    skipped = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / kept, place / kept, symlinks=True, ignore=skipped)
                else:
                    shutil.copyfile(ROOT / kept, place / kept)
        elif name == "RUN":
            line = re.sub(r"(^|[ \"])/(opt|src)\b", rf"\g<1>{folder}/\2", value)
            line = re.sub(r"^python ", f"{interpreter} ", line)
            done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which root alone may")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed (util-linux)")
def test_its_lines_build_and_run_a_server() -> None:
    interpreter = python()
    if interpreter is None:
        pytest.skip("no Python that other users may run")
    with root() as folder:
        (folder / "opt").mkdir()
        build(folder, interpreter)
        (folder / "model").mkdir()
        shutil.copyfile(WHOLE, folder / "model" / "best.onnx")
        installed = {path.name for path in (folder / "opt").glob("*/lib/*/site-packages/*")}
        assert "uvicorn" in installed
        assert not installed & {"torch", "pyarrow", "matplotlib", "sklearn"}
        serve(folder)


def serve(folder: Path) -> None:
    """Run ENTRYPOINT, CMD and HEALTHCHECK with ENV as USER, who may write to the cache alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = dict(word.split("=", 1) for line in values("ENV") for word in line.split())
    own = environment["DISTCLS_CACHE"] = f"{folder}/cache/distcls"
    environment["PATH"] = environment["PATH"].replace("/opt/", f"{folder}/opt/")
    user = values("USER")[0].partition(":")[0]
    Path(own).parent.mkdir()
    os.chown(Path(own).parent, int(user), int(user))
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs"]
    become += ["--inh-caps=-all", "--bounding-set=-all", "env", "-i"]
    become += [f"{name}={value}" for name, value in environment.items()]
    words = command(values("ENTRYPOINT")[0]) + command(values("CMD")[0])
    words = [f"{folder}{word}" if word == "/model" else word for word in words]
    check = values("HEALTHCHECK")[0].partition(" CMD ")[2].replace(":8000/", f":{port}/")

    def healthy() -> bool:
        done = subprocess.run([*become, *command(check)], capture_output=True, check=False)
        return done.returncode == 0

    assert not healthy()
    process = subprocess.Popen(
        [*become, *words, "--port", port], cwd="/", stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 120
        while not healthy():
            assert process.poll() is None
            assert time.monotonic() < end
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.findall(r"^(?:Uid|CapEff):\t(\w+)", status, re.M) == [user, "0" * 16]
        head = {"Content-Type": "image/jpeg"}
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/predict", PHOTO, head)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert json.load(answer)["predictions"][0]["label"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
    finally:
        process.kill()
        process.communicate()
    places = ["/tmp", "/var/tmp", "/dev/shm", "/run"]
    call = ["find", *places, "-xdev", "-user", user, "-type", "f"]
    written = subprocess.run(call, capture_output=True, text=True, check=False).stdout.split()
    assert [path for path in written if not path.startswith(f"{folder}/cache/")] == []
