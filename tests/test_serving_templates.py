"""The templates of a server: manifests by schema and against a running server, nginx, Ray Serve."""

from __future__ import annotations

import contextlib
import copy
import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("uvicorn", reason="distcls[serve] is not installed")
from distcls.commands.serve import COMMAND
from distcls.files import TEMPLATES
from distcls.serving.options import Limits, ServeOptions
from tests.e2e.commands import ROOT
from tests.serving import PHOTO, WHOLE, Server, serving

VERSIONS = ("1.29", "1.33", "1.37")
"""Of Kubernetes, by whose schemas the manifests are valid."""
MANIFESTS = ("kubernetes_serve", "kserve")
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
RUNTIME = {
    *("annotations", "supportedModelFormats", "protocolVersions", "containers", "volumes"),
}
"""Fields of KServe's ServingRuntimeSpec (v1alpha1) that are used."""
PREDICTOR = {
    *("minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "model"),
    "terminationGracePeriodSeconds",
}
"""Of its PredictorSpec (v1beta1)."""
MODEL = {"modelFormat", "protocolVersion", "runtime", "storageUri"}


def documents(name: str) -> dict[str, Any]:
    """The documents of a manifest, by their kinds."""
    return {found["kind"]: found for found in yaml.safe_load_all(TEMPLATES.find(name).read_text())}


def container(name: str) -> dict[str, Any]:
    """The container that serves."""
    found = documents(name)
    if name == "kserve":
        [one] = found["ServingRuntime"]["spec"]["containers"]
    else:
        [one] = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    return dict(one)


def options(name: str) -> ServeOptions:
    """The options that the container's arguments are."""
    words = [word.replace("{{.Name}}", "photos") for word in container(name)["args"]]
    return COMMAND.parse(words)


def validate(document: dict[str, Any], version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="distcls[dev] is not installed")
    validator.validate(document, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field_of_the_manifest(version: str) -> None:
    found = documents("kubernetes_serve")
    assert len(found) == 4
    for document in found.values():
        validate(document, version)


def test_a_field_that_kubernetes_does_not_know_is_noticed() -> None:
    deployment = documents("kubernetes_serve")["Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["startupProbes"] = {}
    with pytest.raises(Exception, match="startupProbes"):
        validate(deployment, VERSIONS[-1])


def test_kserve_gets_its_own_fields_and_a_container_of_kubernetes() -> None:
    found = documents("kserve")
    runtime, service = found["ServingRuntime"], found["InferenceService"]
    assert runtime["apiVersion"] == "serving.kserve.io/v1alpha1"
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    assert set(runtime["spec"]) == RUNTIME
    predictor = service["spec"]["predictor"]
    assert set(predictor) == PREDICTOR
    assert set(predictor["model"]) == MODEL
    [known] = runtime["spec"]["supportedModelFormats"]
    assert predictor["model"]["modelFormat"].items() <= known.items()
    assert predictor["model"]["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert predictor["model"]["runtime"] == runtime["metadata"]["name"]
    # the only container that KServe gives the model's files to
    assert container("kserve")["name"] == "kserve-container"
    spec = {key: copy.deepcopy(runtime["spec"][key]) for key in ("containers", "volumes")}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "photos"}, "spec": spec}
    validate(pod, VERSIONS[-1])


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_numbers_of_a_manifest_agree(name: str) -> None:
    one, found = container(name), documents(name)
    asked = options(name)
    pod = (
        found["InferenceService"]["spec"]["predictor"]
        if name == "kserve"
        else found["Deployment"]["spec"]["template"]["spec"]
    )
    assert pod["terminationGracePeriodSeconds"] >= asked.drain_delay + asked.drain_timeout + 5
    probe = one["readinessProbe"]
    noticed = probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
    assert asked.drain_delay >= noticed + 2  # and it takes a moment until no Service sends more
    assert str(asked.workers) == one["resources"]["requests"]["cpu"]
    assert "cpu" not in one["resources"]["limits"]
    [port] = one["ports"]
    assert port["containerPort"] == asked.port
    for each in PROBES:
        assert one[each]["httpGet"]["port"] in (port["name"], port["containerPort"])
    spec = found["ServingRuntime"]["spec"] if name == "kserve" else pod
    assert {mount["name"] for mount in one["volumeMounts"]} == {v["name"] for v in spec["volumes"]}
    [cache] = [entry["value"] for entry in one["env"] if entry["name"] == "DISTCLS_CACHE"]
    assert any(cache.startswith(mount["mountPath"] + "/") for mount in one["volumeMounts"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_container_may_do_nothing_that_it_does_not_need(name: str) -> None:
    one = container(name)
    own = one["securityContext"]
    assert own["readOnlyRootFilesystem"] is True
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    pod = documents(name).get("Deployment", {}).get("spec", {}).get("template", {}).get("spec", {})
    assert {"name": "ORT_DISABLE_TELEMETRY", "value": "1"} in one["env"]
    both = {**pod.get("securityContext", {}), **own}
    assert both["runAsNonRoot"] is True
    assert both["seccompProfile"] == {"type": "RuntimeDefault"}
    [user] = re.findall(r"^USER (\d+):\d+$", (ROOT / "Dockerfile").read_text(), re.M)
    assert both["runAsUser"] == int(user)


def test_services_and_scalers_mean_the_deployment() -> None:
    found = documents("kubernetes_serve")
    deployment = found["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert found["Service"]["spec"]["selector"].items() <= labels.items()
    budget, scaler = found["PodDisruptionBudget"]["spec"], found["HorizontalPodAutoscaler"]["spec"]
    assert budget["selector"]["matchLabels"].items() <= labels.items()
    assert budget["minAvailable"] < scaler["minReplicas"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    [port] = found["Service"]["spec"]["ports"]
    assert port["targetPort"] == container("kubernetes_serve")["ports"][0]["name"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_path_of_a_manifest_is_answered(name: str, tmp_path: Path) -> None:
    one, asked = container(name), options(name)
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copyfile(WHOLE, folder / "best.onnx")
    words = [word.replace("{{.Name}}", "photos") for word in one["args"]]
    words = [re.sub(r"=(/mnt)?/models$", f"={folder}", word) for word in words]
    words = [word for word in words if not word.startswith(("--host", "--port", "--workers"))]
    words += ["--engine", "threads", "--workers", "1"]
    text = TEMPLATES.find(name).read_text()
    [scraped] = re.findall(r"prometheus\S*/path: (\S+)", text)
    [port] = re.findall(r'prometheus\S*/port: "(\d+)"', text)
    assert int(port) == asked.port
    paths = {each: one[each]["httpGet"]["path"] for each in PROBES}
    with serving(tmp_path, *words, model=None) as server:
        for path in [*paths.values(), scraped]:
            assert server.get(path).status == 200, path
        model = "photos" if name == "kserve" else "best"
        assert server.get(f"/v2/models/{model}/ready").status == 200
        _drains(server, paths)
        assert server.stop() == 0  # a second signal ends the delay


def _drains(server: Server, paths: dict[str, str]) -> None:
    """After SIGTERM it is not ready, but lives and serves."""
    server.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + 5
    while server.get(paths["readinessProbe"]).status != 503:
        assert time.monotonic() < end
    assert server.get(paths["livenessProbe"]).status == 200
    assert server.post("/predict", PHOTO).status == 200


# nginx


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def nginx(folder: Path, backend: int) -> Iterator[int]:
    """nginx with our file, on a port of the loopback interface; the port."""
    port = free_port()
    text = TEMPLATES.find("nginx").read_text()
    text = text.replace("127.0.0.1:8000", f"127.0.0.1:{backend}")
    text = text.replace("listen 80;", f"listen 127.0.0.1:{port};")
    (folder / "distcls.conf").write_text(text)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    user = "user root;" if os.geteuid() == 0 else ""  # its temporary folders are in ours
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{\n{places}access_log {folder}/access.log;\n"
        f"include {folder}/distcls.conf;\n}}\n"
    )
    call = ["nginx", "-p", folder, "-c", folder / "nginx.conf"]
    subprocess.run([*call, "-t"], check=True, capture_output=True)
    process = subprocess.Popen(call)
    try:
        end = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert time.monotonic() < end
            time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def test_the_limits_of_nginx_agree_with_ours() -> None:
    text = TEMPLATES.find("nginx").read_text()
    [size] = re.findall(r"client_max_body_size (\d+)m;", text)
    assert int(size) >= Limits().max_body
    [kept] = re.findall(r"^    keepalive_timeout (\d+)s;", text, re.M)
    assert int(kept) < Limits().header_timeout
    [patience] = re.findall(r"proxy_read_timeout (\d+)s;", text)
    assert int(patience) > Limits().timeout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed (nginx-light)")
def test_nginx_in_front(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "--engine", "threads", "--workers", 1, "--access-log") as server,
        nginx(tmp_path, server.port) as port,
    ):

        def ask(method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            with contextlib.closing(connection):
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                return answer.status, answer.read()

        status, answer = ask("POST", "/predict", PHOTO)
        assert status == 200
        direct = server.post("/predict", PHOTO).json["predictions"][0]["probability"]
        assert json.loads(answer)["predictions"][0]["probability"] == direct
        # a chunked body arrives whole
        assert ask("POST", "/predict", iter([PHOTO[:100], PHOTO[100:]]))[0] == 200
        # our own errors pass
        status, answer = ask("POST", "/predict", b"no image")
        assert (status, "error" in json.loads(answer)) == (400, True)
        # its own are as ours are
        status, answer = ask("POST", "/predict", bytes((32 << 20) + 1))
        assert (status, json.loads(answer)) == (413, {"error": "the body is larger than 32 MB"})
        assert ask("GET", "/metrics")[0] == 200
        assert ask("POST", "/v2/repository/index")[0] == 200
        with ThreadPoolExecutor(8) as pool:
            codes = list(pool.map(lambda _: ask("GET", "/v2/health/live"), range(400)))
        assert {status for status, _ in codes} == {200, 429}
        [refused] = {answer for status, answer in codes if status == 429}
        assert json.loads(refused) == {"error": "too many requests"}
        time.sleep(2)
        assert server.stop() == 0
        status, answer = ask("GET", "/v2/health/ready")
        assert (status, json.loads(answer)) == (503, {"error": "the server does not answer"})
    assert "0 requests" in server.said


# Ray Serve

RAY = """
import os, sys, time, urllib.request
import ray
from ray import serve

ray.init(num_cpus=2, include_dashboard=False, logging_level="error")
sys.path.insert(0, os.environ["TEMPLATES"])
import ray_serve

serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["PORT"])})
serve.run(ray_serve.Distcls.options(num_replicas=1).bind())
photo = open(os.environ["PHOTO"], "rb").read()
head = {"Content-Type": "application/octet-stream", "Authorization": "Bearer secret"}
url = f"http://127.0.0.1:{os.environ['PORT']}"
request = urllib.request.Request(url + "/predict", photo, head)
print("predicted", urllib.request.urlopen(request, timeout=60).read().decode())
print("ready", urllib.request.urlopen(url + "/v2/health/ready").read().decode())
try:
    urllib.request.urlopen(urllib.request.Request(url + "/predict", b"x"))
except urllib.error.HTTPError as error:
    print("refused", error.code)
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason="ray[serve] is missing")
def test_ray_serve_runs_the_template(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(PHOTO)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(TEMPLATES.folder)]),
        "TEMPLATES": str(TEMPLATES.folder),
        "DISTCLS_MODEL": str(WHOLE),
        "DISTCLS_TOKEN": "secret",
        "PHOTO": str(tmp_path / "photo.jpg"),
        "PORT": str(free_port()),
        "RAY_ADDRESS": "local",
    }
    call = [sys.executable, "-c", RAY]
    done = subprocess.run(
        call, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    [answer] = re.findall(r"^predicted (.*)$", done.stdout, re.M)
    with serving(tmp_path, "--engine", "threads", "--workers", 1) as server:
        direct = server.post("/predict", PHOTO).json["predictions"][0]
    found = json.loads(answer)["predictions"][0]
    assert (found["label"], found["probability"]) == (direct["label"], direct["probability"])
    assert '"ready":true' in done.stdout
    assert "refused 401" in done.stdout
