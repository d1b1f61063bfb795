"""The templates of launch/: accelerate, the shell and Kubernetes take them for what they are."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from distcls.files import ENDINGS, TEMPLATES

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
MANIFEST = LAUNCH / "kubernetes.yaml"
SERVING = {"kubernetes_serve", "kserve"}
"""Manifests of servers, which test_serving_templates.py has."""
COUNTS = {
    "one_process": (1, 1),
    "one_gpu": (1, 1),
    "two_cpu_processes": (2, 1),
    "eight_gpus": (8, 1),
    "two_nodes_of_eight": (16, 2),
    "fsdp": (8, 1),
}
"""Processes and machines that each config is to start."""


def test_the_files_of_launch_are_those_that_are_installed() -> None:
    linked = {path.resolve() for path in LAUNCH.iterdir() if path.is_symlink()}
    assert linked == set(TEMPLATES.paths().values())
    shipped = [path for path in TEMPLATES.folder.iterdir() if path.is_file()]
    assert len(linked) == len(shipped)
    assert {path.suffix for path in shipped} == set(ENDINGS)


@pytest.mark.parametrize("name", TEMPLATES.paths())
def test_a_template_calls_nothing_that_others_may_be_called(name: str) -> None:
    """`launch` and `export` may be a folder of the user's project, or another package."""
    text = TEMPLATES.find(name).read_text()
    assert not re.search(r"-m (launch|export)\b", text)


def test_every_config_is_counted() -> None:
    assert {path.stem for path in LAUNCH.glob("*.yaml")} - {MANIFEST.stem} - SERVING == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_accelerate_reads_the_config(name: str) -> None:
    path = LAUNCH / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.num_processes, config.num_machines) == COUNTS[name]
    comment = path.read_text().partition("compute_environment")[0]
    assert f"accelerate launch --config_file launch/{name}.yaml" in comment


@pytest.mark.parametrize("name", [name for name, count in COUNTS.items() if count > (1, 1)])
def test_several_processes_meet_at_a_port_that_is_theirs(name: str) -> None:
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    alone = config.num_machines == 1
    assert config.main_process_port == 0 if alone else config.main_process_port not in (0, 29500)


def test_accelerate_makes_fsdp2_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--config_file", str(LAUNCH / "fsdp.yaml"), "train.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.min_num_params == 1_000_000
    assert plugin.auto_wrap_policy is not None


@pytest.mark.parametrize("script", ["launch/slurm.sh", "launch/elastic.sh", ".ci/run"])
def test_shellcheck_finds_nothing(script: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", ROOT / script], check=True)


def test_shellcheck_finds_nothing_in_the_manifest() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    script = manifest()["spec"]["trainer"]["command"][2]
    subprocess.run(["shellcheck", "--shell=bash", "-"], input=script, text=True, check=True)


def manifest() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(MANIFEST.read_text())
    return content


def read_back(content: dict[str, Any]) -> dict[str, Any]:
    """What the schema of Kubeflow's SDK keeps of a manifest: unknown fields fall away."""
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    job = TrainerV1alpha1TrainJob.from_dict(content)
    assert job is not None
    kept: dict[str, Any] = job.to_dict()
    return kept


def test_kubeflow_knows_every_field_of_the_manifest() -> None:
    assert read_back(manifest()) == manifest()


@pytest.mark.parametrize(
    "where", [(), ("spec",), ("spec", "trainer"), ("spec", "runtimePatches", 0)]
)
def test_a_field_that_kubeflow_does_not_know_is_noticed(where: tuple[str | int, ...]) -> None:
    content = manifest()
    place: Any = content
    for step in where:
        place = place[step]
    place["podTemplateOverrides"] = [{"targetJobs": [{"name": "node"}]}]
    assert read_back(content) != content


def test_the_numbers_of_the_manifest_agree() -> None:
    trainer = manifest()["spec"]["trainer"]
    processes = trainer["numNodes"] * trainer["numProcPerNode"]
    assert re.findall(r"--processes (\d+)", trainer["command"][2]) == [str(processes)] * 2
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == str(trainer["numProcPerNode"])
    environment = {entry["name"]: entry["value"] for entry in trainer["env"]}
    [patch] = manifest()["spec"]["runtimePatches"]
    [job] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    to_save = int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert pod["terminationGracePeriodSeconds"] > to_save
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


TORCHRUN = """#!/bin/bash
if [[ $2 = distcls.launch.preflight ]]; then
  exec "$PYTHON" -m torch.distributed.run "$@" --free-gib 0 --timeout 20
fi
printf '%s\\n' "$@" > "pod-$PET_NODE_RANK"
"""
"""torchrun, except that a training only leaves its arguments."""


@pytest.mark.slow
def test_two_pods_with_the_variables_that_kubeflow_sets_form_one_run(tmp_path: Path) -> None:
    (tmp_path / "torchrun").write_text(TORCHRUN)
    (tmp_path / "torchrun").chmod(0o755)
    trainer = manifest()["spec"]["trainer"]
    shell, flag, script, name = trainer["command"]
    script = script.replace("/shared", str(tmp_path)).replace("--processes 16", "--processes 2")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pods = []
    for node in range(trainer["numNodes"]):
        place = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
        numbers = {"PET_NNODES": "2", "PET_NODE_RANK": str(node), "PET_NPROC_PER_NODE": "1"}
        paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
        code = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        pods.append(
            subprocess.Popen(
                [shell, flag, script, name, *trainer["args"]],
                env={**os.environ, **place, **numbers, **paths, **code},
                cwd=tmp_path,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    said = [pod.communicate(timeout=60)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    assert "preflight: 2 processes, no problems" in said[0]
    for node in range(2):
        arguments = (tmp_path / f"pod-{node}").read_text().splitlines()
        own = ["--processes", "2", "--resume", "auto"]
        assert arguments == ["-m", "distcls.train", *trainer["args"], *own]
