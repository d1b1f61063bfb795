"""Clients that others have written, unmodified, each in an environment of its own.

What each does is in tests/clients/: tensors and image files, as JSON and binary, compressed,
classification, health, metadata, statistics and errors. The numbers are those of `distcls predict`.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import distcls
from tests.environments import environment
from tests.pictures import encode, smooth
from tests.serving import WHOLE, Server, serving

pytest.importorskip("uvicorn", reason="distcls[serve] is not installed")
pytest.importorskip("grpc", reason="distcls[serve-grpc] is not installed")
pytestmark = pytest.mark.slow

CLIENTS = Path(__file__).parent / "clients"
PROGRAMS = {
    "triton_http": ("tritonclient[http,grpc]==2.73.0",),
    "triton_grpc": ("tritonclient[http,grpc]==2.73.0",),
    "kserve_clients": ("kserve==0.21.0",),
}
NAMES = {
    "TensorMetadata": "ModelMetadataResponse.TensorMetadata",
    "Parameter": "InferParameter",
    "NamedParameter": "ModelInferRequest.ParametersEntry",
    "Contents": "InferTensorContents",
    "InputTensor": "ModelInferRequest.InferInputTensor",
    "RequestedOutput": "ModelInferRequest.InferRequestedOutputTensor",
    "OutputTensor": "ModelInferResponse.InferOutputTensor",
    "LatestVersions": "config ModelVersionPolicy.Latest",
    "VersionPolicy": "config ModelVersionPolicy",
    "DynamicBatching": "config ModelDynamicBatching",
    "Duration": "StatisticDuration",
    "BatchStatistics": "InferBatchStatistics",
    "ModelIndex": "RepositoryIndexResponse.ModelIndex",
    "ControlRequest": "RepositoryModelLoadRequest",
    "NamedRequest": "ModelReadyRequest",
    **{name: f"config {name}" for name in ("ModelInput", "ModelOutput", "ModelConfig")},
}
"""What the client calls a message, where it is not what we do."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, "--name", "m", "--grpc-port", 0, "--workers", 1) as found:
        yield found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is sent, what has to come back, and the fields of our messages."""
    from distcls.imaging import decode
    from distcls.serving.messages import MESSAGES

    files = [encode(smooth(40, 90, seed), "JPEG", quality=90) for seed in range(3)]
    with distcls.load(WHOLE, provider="cpu") as predictor:
        preprocess = predictor.card.preprocess
        logits = np.stack([each.logits for each in predictor(files)])
        classes = predictor.classes
    pixels = np.stack([preprocess(decode(data)) for data in files])
    messages = {
        name: (
            NAMES.get(name, name),
            [(f.name, f.number, f.type, f.is_repeated) for f in kind.DESCRIPTOR.fields],
        )
        for name, kind in MESSAGES.items()
        if name not in ("Empty", "HealthCheckResponse")
    }
    path = tmp_path_factory.mktemp("expected") / "expected.npz"
    np.savez(
        path,
        pixels=pixels,
        pixel_logits=logits,
        files=np.array(files, object),
        logits=logits,
        classes=np.array(classes),
        messages=json.dumps(messages),
    )
    return path


@pytest.mark.parametrize("program", PROGRAMS)
def test_client(server: Server, expected: Path, program: str) -> None:
    python = environment(*PROGRAMS[program])
    port = re.search(r"gRPC at 127\.0\.0\.1:(\d+)", server.said)
    assert port
    command = [python, "-W", "ignore", CLIENTS / f"{program}.py", server.port, port[1], expected]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stdout + done.stderr
    assert "Traceback" not in server.said
