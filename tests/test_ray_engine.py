"""Batch prediction on Ray: refused with advice, shared out fairly, equal to one machine's output.

A cluster of two nodes is started on this machine, on loopback.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distcls.batch.job import check_output
from distcls.batch.options import PredictOptions
from distcls.batch.parts import parts_folder
from distcls.batch.ray import WorkerAllocation
from distcls.errors import UsageError
from tests import tiny_dataset
from tests.e2e.commands import ROOT
from tests.test_predict_rows import with_features

PARTS, ROWS = 12, 4

with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed"
)


def options(**more: Any) -> PredictOptions:
    return PredictOptions(**{"input": "photos", "model": "m.onnx", "engine": "ray", **more})


def test_without_ray_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r'is not installed; pip install "distcls\[ray\]"'):
        check_output(options(out=tmp_path / "pre.csv"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"input": "-"}, "ray cannot read standard input on other machines"),
        ({"profile": Path("p.png")}, "measures the threads of one machine"),
    ],
)
def test_what_other_machines_cannot_do_is_refused(
    more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        check_output(options(out=tmp_path / "pre.csv", **more))


def node(*, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources}


def test_workers_fill_the_nodes() -> None:
    fit = WorkerAllocation.fit
    nodes = [node(CPU=16), node(CPU=8), node(CPU=0), node(alive=False, CPU=64)]
    assert fit(nodes, 4, gpu=False) == WorkerAllocation(workers=6, cpus=4, gpus=0)
    assert fit(nodes, 32, gpu=False) == WorkerAllocation(workers=3, cpus=8, gpus=0)
    with_gpus = [node(CPU=16, GPU=8), node(CPU=8), node(CPU=4, GPU=1)]
    assert fit(with_gpus, 4, gpu=True) == WorkerAllocation(workers=9, cpus=1, gpus=1)
    with pytest.raises(UsageError, match="no node of the Ray cluster has a GPU"):
        fit(nodes, 4, gpu=True)
    with pytest.raises(UsageError, match="no node of the Ray cluster has a CPU"):
        fit([node(CPU=0)], 4, gpu=False)


CLUSTER = """
import sys
from ray.cluster_utils import Cluster

plain = dict(num_cpus=1, object_store_memory=100 * 2**20, node_ip_address="127.0.0.2")
nodes = Cluster(initialize_head=True, head_node_args={**plain, "include_dashboard": False})
nodes.add_node(**plain)
print(nodes.address, flush=True)
sys.stdin.read()
nodes.shutdown()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes of one CPU each.

    127.0.0.2 is loopback too; for 127.0.0.1 Ray would put the address of the network card.
    """
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as nodes:
        assert nodes.stdout is not None
        try:
            yield next(line.strip() for line in nodes.stdout if line.startswith("127.0.0.2:"))
        finally:
            nodes.communicate()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_features(tmp_path_factory.mktemp("m") / "m.onnx")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tiny_dataset.write_images(tmp_path / "in", tiny_dataset.coloured(PARTS * ROWS)[0])
    (place / "005.png").write_bytes(b"no image")
    return place


def start(
    folder: Path, model: Path, out: Path, *more: str, address: str = ""
) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-m", "distcls.cli", "predict", folder.name, "--model", str(model)),
        *("--out", str(out), "--features", f"{out}.features.parquet", "--provider", "cpu"),
        *("--batch-size", "2", "--part-rows", str(ROWS), "--workers", "1", "--json", *more),
    ]
    return subprocess.Popen(
        command,
        cwd=folder.parent,  # a relative input, which the workers have to find as well
        env={**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a run said when it was done; its standard error, if it failed."""
    try:
        said, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return {**json.loads(said), "errors said": errors}


def written(out: Path) -> list[bytes]:
    return [path.read_bytes() for path in (out, Path(f"{out}.features.parquet"))]


@with_ray
@pytest.mark.slow
def test_two_nodes_write_what_one_machine_writes(
    cluster: str, model: Path, folder: Path, tmp_path: Path
) -> None:
    alone, shared = tmp_path / "alone.csv", tmp_path / "shared.csv"
    finish(start(folder, model, alone))
    found = finish(start(folder, model, shared, "--engine", "ray", address=cluster))
    assert (found["images"], found["errors"]) == (PARTS * ROWS, 1)
    assert "Ray: 2 worker(s), 2 node(s)" in found["errors said"]
    assert written(shared) == written(alone)


@with_ray
@pytest.mark.slow
def test_a_killed_run_goes_on(cluster: str, model: Path, folder: Path, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone.csv", tmp_path / "shared.csv"
    finish(start(folder, model, alone))
    process = start(folder, model, shared, "--engine", "ray", address=cluster)
    deadline = time.monotonic() + 60
    while not list(parts_folder(shared).glob("0*.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if not shared.exists():  # it may have been faster
        found = finish(start(folder, model, shared, "--resume", "--engine", "ray", address=cluster))
        assert found["resumed"] >= ROWS
    assert written(shared) == written(alone)


@with_ray
@pytest.mark.slow
def test_another_input_on_the_workers_is_one_line(
    cluster: str, model: Path, folder: Path, tmp_path: Path
) -> None:
    """A worker looks later than whoever asks, and finds one image more."""
    process = start(folder, model, tmp_path / "pre.csv", "--engine", "ray", address=cluster)
    deadline = time.monotonic() + 60
    while not parts_folder(tmp_path / "pre.csv").exists():  # the input is known by now
        assert time.monotonic() < deadline
        time.sleep(0.001)
    extra = folder / "9999.png"
    extra.write_bytes((folder / "000.png").read_bytes())
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1, errors
    assert "input, models and distcls have to be the same on all nodes" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "pre.csv").exists()
