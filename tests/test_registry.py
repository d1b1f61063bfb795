"""The registry: names, import paths, options, and a user's own implementations in a real run."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from distcls.errors import BadValue, UsageError
from distcls.registry import IMPORTS, Registry
from distcls.training.config import OPTIMIZERS
from tests import forked
from tests.conftest import registered_here

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    name: str | None = "plain"
    size: int | None = None
    speed: float | None = None


def registry(**more: Any) -> Registry[str]:
    made: Registry[str] = Registry("shape", "shape.name", **more)
    made.register("plain", size=3)("a plain one")
    made.register("fast", speed=2.0)("a fast one")
    return made


def test_find_and_fill() -> None:
    shapes = registry()
    assert shapes.names() == ("plain", "fast")
    assert shapes.find("fast").value == "a fast one"
    assert shapes.filled(Section()) == Section(size=3)
    assert shapes.filled(Section(size=7)) == Section(size=7)
    assert shapes.filled(Section(name=None)) == Section(name=None)


@pytest.mark.parametrize(
    ("section", "field", "why"),
    [
        (
            Section(name="fats"),
            "name",
            "did you mean 'fast'.*choices: plain, fast",
        ),
        (Section(speed=1.0), "speed", r"null, as plain does not read it \(it reads size\)"),
        (Section(name=None, size=1), "size", "null without shape.name"),
    ],
)
def test_what_is_refused(section: Section, field: str, why: str) -> None:
    with pytest.raises(BadValue, match=why) as caught:
        registry().check(section)
    assert caught.value.field == field


def test_a_name_is_taken_once() -> None:
    with pytest.raises(UsageError, match="shape 'plain' is registered already"):
        registry().register("plain")("another")


PLUGIN = """
import torch
from torch import nn

from distcls.models.registry import NETWORKS
from distcls.training.config import LOSSES, OPTIMIZERS, POLICIES
from distcls.training.losses import cross_entropy
from distcls.training.schedule import SCHEDULES, Schedule


@NETWORKS.register("mine")
class Net(nn.Module):
    def __init__(self, classes, size, dropout=0.25):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(3 * size[0] * size[1], classes)
        )

    def forward(self, pixels):
        return self.layers(pixels)


@LOSSES.register("double")
def double(logits, targets, config, weights):
    return 2 * cross_entropy(logits, targets, config, weights)


@OPTIMIZERS.register("slow", weight_decay=0.0, momentum=0.5)
def slow(groups, lr, config):
    return torch.optim.SGD(groups, lr=lr / 10, momentum=config.momentum)


def undecorated(groups, lr, config):
    return torch.optim.SGD(groups, lr=lr)


@SCHEDULES.register("half")
class Half(Schedule):
    def fraction(self, step):
        return 0.5


class Invert:
    draws = 1

    def __call__(self, images, draws):
        return 255 - images


@POLICIES.register("invert")
def invert(config):
    return Invert()
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    return tmp_path


def call(*words: object) -> subprocess.CompletedProcess[str]:
    process = forked.start("distcls.cli", words)
    out, err = process.communicate()
    return subprocess.CompletedProcess([], process.wait(), out, err)


def chosen(prefix: str, names: tuple[str, ...]) -> list[str]:
    keys = ("model.name", "loss.name", "optimizer.name", "schedule.name", "augment.policy")
    return [f"--{key}={prefix}{name}" for key, name in zip(keys, names, strict=True)]


WAYS = {
    "by import path": ("plugin:", ("Net", "double", "slow", "Half", "invert"), ""),
    "by name": ("", ("mine", "double", "slow", "half", "invert"), "plugin"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_with_a_users_own(
    way: str, plugin: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, names, imports = WAYS[way]
    if imports:
        monkeypatch.setenv(IMPORTS, imports)
    out = plugin / "run"
    few = ("--limit", 64, "--epochs", 1, "--data", digits)
    done = call("train", *few, "--out", out, *chosen(prefix, names))
    assert done.returncode == 0, done.stderr
    written = (out / "config.yaml").read_text()
    assert "momentum: 0.5" in written
    assert "dropout: 0.25" in written
    # the same again, and one that its option does not go with
    done = call("train", "--config", out / "config.yaml", "--out", plugin / "again")
    assert done.returncode == 0, done.stderr
    done = call("train", *few, "--out=no", *chosen(prefix, names), "--optimizer.eps=1")
    assert done.returncode == 2
    assert f"optimizer.eps: 1.0 is not valid, expected null, as {prefix}slow" in done.stderr
    # a model file opens where its code was imported by the user, and does not get it imported
    evaluate = ("evaluate", "--model", out / "best.pth", "--data", digits, "--limit", 16)
    monkeypatch.setenv(IMPORTS, "plugin")
    assert call(*evaluate, "--out", plugin / "evaluation").returncode == 0
    monkeypatch.delenv(IMPORTS)
    refused = call(*evaluate, "--out", plugin / "evaluation2")
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    if not imports:
        assert "set DISTCLS_IMPORT=plugin" in refused.stderr


def test_an_undecorated_one_reads_no_option(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(plugin))
    with registered_here():
        assert OPTIMIZERS.find("plugin:undecorated").defaults == {}
        for name in ("Net", "slow"):
            assert "plugin" in OPTIMIZERS.find(f"plugin:{name}").value.__module__


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no_such_module_here:Net", "no module 'no_such_module_here'; is it on PYTHONPATH"),
        ("math:squareroot", "shape.name: math has no 'squareroot'"),
        ("math:sqrtt", "did you mean 'sqrt'"),
    ],
)
def test_import_paths_that_lead_nowhere(name: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        registry().find(name)


def test_a_librarys_prefix_is_no_import_path() -> None:
    shapes = registry(prefixes=("math",))
    assert "math:sqrt" not in shapes
    with pytest.raises(BadValue, match="a known shape"):
        shapes.find("math:sqrt")
    assert "math:sqrt" in registry()


def test_an_error_inside_the_module_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugin_with_a_broken_import.py").write_text("import no_such_module_here\n")
    importlib.invalidate_caches()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_module_here"):
        registry().find("plugin_with_a_broken_import:Net")


def test_a_list_of_imports_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IMPORTS, "math, no_such_module_here")
    with pytest.raises(UsageError, match=r"^DISTCLS_IMPORT: no module 'no_such_module_here'"):
        registry().names()
