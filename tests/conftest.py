"""Real data that many tests share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from distcls import cli, log
from distcls.data.prepare import PrepareOptions, prepare
from distcls.system import CACHE_VARIABLE

# Several processes train at once on few cores. Threads that spin at a barrier for a partner which
# is not running take the machine from it (24 instead of 150 images/s); read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# no test goes to the network; those of downloads have a server of their own
os.environ["DISTCLS_OFFLINE"] = "1"

# how long an example takes says how busy the machine is
settings.register_profile("distcls", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("distcls")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own, in this process and in those that it starts."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(folder))
        yield folder


@pytest.fixture(autouse=True)
def _outlives_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cli.run` here never ends this process at once, whatever threads another test has left."""
    monkeypatch.setattr(cli, "_exit", sys.exit)


@pytest.fixture(autouse=True)
def _not_quiet() -> None:
    """A command that another test ran with --quiet in this process silences no other."""
    log.set_quiet(False)


@contextlib.contextmanager
def registered_here() -> Iterator[None]:
    """What is registered within is gone after it."""
    from distcls.evaluation.metrics import METRICS
    from distcls.models.registry import NETWORKS, resolve
    from distcls.training.config import LOSSES, OPTIMIZERS, POLICIES
    from distcls.training.schedule import SCHEDULES

    with pytest.MonkeyPatch.context() as patch:
        for registry in (NETWORKS, LOSSES, OPTIMIZERS, POLICIES, SCHEDULES, METRICS):
            names = registry.names()  # loads the built-in ones, which register once
            patch.setattr(registry, "_entries", {n: registry._entries[n] for n in names})
            patch.setattr(registry, "_found", set(registry._found))
        yield
    resolve.cache_clear()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset directory of scikit-learn's handwritten digits: 1259 train, 179 val, 359 test."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare(PrepareOptions(source="digits", out=folder, split_by="draw", quiet=True))
    return folder
