"""docs/serving.md is true: its clients are run, its tables say what the options say."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="distcls[serve] is not installed")
from distcls.commands.serve import COMMAND
from distcls.config.schema import field_docs
from distcls.serving.app import App
from distcls.serving.body import LEAST_RATE, MOST_RATIO
from distcls.serving.options import Limits
from distcls.serving.protocol import MOST_JSON_NUMBERS
from tests.e2e.commands import ROOT
from tests.environments import environment
from tests.pictures import encode, smooth
from tests.serving import PHOTO, WHOLE, Server, serving

PAGE = (ROOT / "docs" / "serving.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.M | re.S)
CLIENTS = [(kind, text) for kind, text in BLOCKS if "127.0.0.1:8000" in text]
PROGRAMS = {
    "sh": ["bash", "-euc"],
    "python": [sys.executable, "-c"],
    "js": ["node", "--input-type=module", "-e"],
}
PACKAGES = ("requests", "httpx", "tritonclient", "kserve")
OWN = {"tritonclient": "tritonclient[http,grpc]==2.73.0", "kserve": "kserve==0.21.0"}
"""What is installed for a block, in an environment of its own."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader of the page stands: two pictures, and a run directory."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "photo.jpg").write_bytes(PHOTO)
    (folder / "other.png").write_bytes(encode(smooth(30, 50, 4), "PNG"))
    (folder / "runs" / "photos").mkdir(parents=True)
    shutil.copyfile(WHOLE, folder / "runs" / "photos" / "best.onnx")
    return folder


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Server]:
    words = ("--engine", "threads", "--workers", 1)
    with serving(place, *words, model=place / "runs" / "photos") as found:
        yield found


def name_of(block: tuple[str, str]) -> str:
    kind, text = block
    used = [package for package in PACKAGES if re.search(rf"import {package}|from {package}", text)]
    return f"{kind}-{used[0] if used else CLIENTS.index(block)}"


def parameter(block: tuple[str, str]) -> Any:
    name = name_of(block)
    slow = name.partition("-")[2] in OWN
    return pytest.param(block, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("block", [parameter(block) for block in CLIENTS])
def test_a_client_of_the_page(block: tuple[str, str], place: Path, server: Server) -> None:
    kind, text = block
    name = name_of(block).partition("-")[2]
    call = list(PROGRAMS[kind])
    if shutil.which(call[0]) is None:
        pytest.skip(f"{call[0]} is not installed")
    if name in OWN:
        call[0] = str(environment(OWN[name]))
    elif name in PACKAGES:
        pytest.importorskip(name)
    done = subprocess.run(
        [*call, text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    best = server.post("/predict", PHOTO).json["predictions"][0]
    classes = server.get("/card").json["classes"]
    if kind == "sh":
        answers = json.loads(f"[{done.stdout.replace('}{', '},{')}]")
        assert len(answers) == text.count("curl")
        assert not [answer for answer in answers if "error" in answer]
    said = {
        **{"requests": f"{best['label']}\n", "kserve": f"{classes.index(best['label'])}\n"},
        "tritonclient": f":{classes.index(best['label'])}:{best['label']}\n",
        "httpx": f"photo.jpg {best['label']}\nother.png ",
    }
    if kind == "js":
        assert done.stdout == f"{best['label']}\n"
    elif name in said:
        assert said[name] in done.stdout


def test_the_answer_that_is_shown_has_the_keys_of_one(server: Server) -> None:
    [shown] = [json.loads(text) for kind, text in BLOCKS if kind == "json"]
    found = server.post("/predict", PHOTO).json
    assert list(shown) == list(found)
    assert list(shown["predictions"][0]) == list(found["predictions"][0])


def test_metrics_and_routes_that_are_named_are_there(server: Server) -> None:
    server.post("/predict", b"no image")
    page = server.get("/metrics").body.decode()
    named = set(re.findall(r"`((?:distcls|nv)_\w+)`", PAGE))
    assert len(named) > 5
    assert [name for name in sorted(named) if f"TYPE {name}" not in page] == []
    for path in set(re.findall(r"`(/(?:v2/health/\w+|docs|metrics|openapi\.json))`", PAGE)):
        assert server.get(path).status == 200, path


def test_the_table_of_limits_is_that_of_the_options() -> None:
    rows = re.findall(r"^\| `--([\w-]+)` \| ([\d.]+).*? \| (.*?) \|$", PAGE, re.M)
    fields = {field.name: field.default for field in dataclasses.fields(Limits)}
    assert {flag.replace("-", "_"): float(value) for flag, value, _ in rows} == fields
    docs = field_docs(Limits)
    for flag, _, answer in rows:
        text = docs[flag.replace("-", "_")]
        for code in re.findall(r"\b[45]\d\d\b", answer):
            assert code in text, flag
        if not re.search(r"\b[45]\d\d\b", answer):
            assert answer in text, flag


def test_the_limits_that_cannot_be_changed() -> None:
    plain = " ".join(PAGE.split())
    for text in (
        f"at most {MOST_RATIO} times its size",
        f"{MOST_JSON_NUMBERS >> 20} MB of JSON",
        f"at {LEAST_RATE // 1000} kB/s at least",
        f"decompressed {2 * Limits().max_body}",
    ):
        assert text in plain, text


def test_every_flag_that_is_named_exists() -> None:
    flags = set(re.findall(r"`?(--[a-z][\w-]+)", "".join(re.findall(r"`[^`]+`", PAGE))))
    known = {f"--{name.replace('_', '-')}" for group in COMMAND.groups.values() for name in group}
    others = {"--config", "--json", "--read-only", "--tmpfs", "--data-binary"}
    assert flags - known - others == set()


def test_the_application_of_the_page_is_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    [text] = [text for kind, text in BLOCKS if kind == "python" and "make_app" in text]
    names: dict[str, object] = {}
    exec(text, names)
    assert isinstance(names["app"], App)
