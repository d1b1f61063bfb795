"""The options of `distcls serve`, and the limits of the server."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Literal

from distcls.errors import UsageError, require

EngineKind = Literal["processes", "threads"]
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
"""Names of models."""
MB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server takes from a client, each with what it answers beyond."""

    max_body: int = 32
    """Megabytes of a request's body, and twice as many once it is decompressed; beyond: 413."""
    max_images: int = 64
    """Images in one request; beyond: 400."""
    max_wait: float = 1.0
    """Seconds of work that may be waiting; beyond, new requests get 503 with Retry-After."""
    timeout: float = 30.0
    """Seconds in which the computing of a request has to begin; beyond: 504. A request may ask for
    less in its parameter `timeout`."""
    header_timeout: float = 10.0
    """Seconds in which the headers of a request have to arrive, and that a connection may be silent
    between two requests; beyond, it is closed, with 408 if a part of them has come."""
    body_timeout: float = 30.0
    """Seconds in which a body has to arrive, and at 10 kB/s at least after the first 5 s; beyond:
    408."""
    write_timeout: float = 30.0
    """Seconds in which a client has to read an answer; beyond, it is closed."""
    max_connections: int = 4096
    """Open connections; beyond, new ones get 503."""

    def __post_init__(self) -> None:
        for name in ("max_body", "max_images", "max_connections"):
            value = getattr(self, name)
            require(1 <= value <= 1 << 20, name, value, "1 to 1,048,576")
        for name in ("max_wait", "timeout", "header_timeout", "body_timeout", "write_timeout"):
            value = getattr(self, name)
            require(0 < value <= 86_400, name, value, "seconds above 0, at most a day")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions(Limits):
    """Options of `distcls serve`."""

    model: Path | None = None
    """Model file: best.onnx, or a run directory with one."""
    models: Path | None = None
    """Instead of --model: folder of models, NAME.onnx each, or NAME/VERSION/model.onnx as in a
    Triton repository, of which the highest version is served."""
    name: str = ""
    """Name of the model for clients; default: that of its run directory or file."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every interface of this machine."""
    port: int = 8000
    """TCP port to listen on; 0 takes a free one."""
    grpc_port: int | None = None
    """Port for the same protocol over gRPC; default: none. Needs the extra `serve-grpc`."""
    provider: str = "auto"
    """Execution provider: auto (the fastest installed one whose predictions match those of the
    CPU), cpu, openvino, cuda, tensorrt."""
    engine: EngineKind = "processes"
    """Where images are decoded and computed: processes (a decoder that crashes takes one batch with
    it) or threads of this process."""
    workers: int | None = None
    """Compute processes or threads of each model; default: one per core, on a GPU two."""
    batch_size: int | None = None
    """Maximum batch size; default: 64 images, fewer for large inputs on the CPU."""
    reload: float | None = None
    """Look for new model files every so many seconds, and serve them once they are proven; default:
    on SIGHUP only."""
    token_file: Path | None = None
    """File with the bearer token that requests have to carry; default: the environment variable
    DISTCLS_TOKEN, else none is wanted."""
    tls_cert: Path | None = None
    """PEM file with the certificate for HTTPS; needs --tls-key."""
    tls_key: Path | None = None
    """PEM file with its private key."""
    cors: str = ""
    """Origin of the web pages elsewhere that may call the server, such as https://shop.example;
    default: none."""
    base_path: str = ""
    """Path below which all routes lie, behind a proxy: /vision."""
    explain: bool = False
    """Let clients ask what a prediction rests on (`/predict?explain=true`, a button of the page);
    some 270 times the work of a prediction."""
    control: bool = False
    """Let clients load and unload models over the protocol's repository API."""
    drain_delay: float = 0.0
    """Seconds between SIGTERM and the end of listening, in which new requests are still served and
    readiness is 503 already."""
    drain_timeout: float = 30.0
    """Seconds that requests under way may take after that."""
    access_log: bool = False
    """Print a line of JSON on standard output for each request."""
    check: bool = False
    """Open and warm up the models, print what would be served, and leave."""
    json: bool = False
    """With --check: print it as one JSON object on standard output."""
    quiet: bool = False
    """Print warnings and errors only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) == (self.models is None):
            raise UsageError("model: give --model FILE, or --models FOLDER, and not both")
        if self.name and self.models is not None:
            raise UsageError("name: is for --model; in --models each has the name of its file")
        known = not self.name or NAME.fullmatch(self.name) is not None
        require(known, "name", self.name, "letters, digits, _, - and .")
        require(0 <= self.port <= 65_535, "port", self.port, "0 to 65535")
        port = self.grpc_port
        require(port is None or 0 <= port <= 65_535, "grpc_port", port, "0 to 65535")
        same = port is not None and 0 < port == self.port
        require(not same, "grpc_port", port, "another port than --port")
        for key in ("workers", "batch_size"):
            value = getattr(self, key)
            require(value is None or 1 <= value <= 4096, key, value, "1 to 4096")
        for key in ("drain_delay", "drain_timeout"):
            value = getattr(self, key)
            require(0 <= value <= 3600, key, value, "0 to 3600 seconds")
        require(self.reload is None or self.reload > 0, "reload", self.reload, "seconds above 0")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("tls_cert: HTTPS needs both --tls-cert and --tls-key")
        valid = not self.base_path or re.fullmatch(r"(/[A-Za-z0-9_.-]+)+", self.base_path)
        require(bool(valid), "base_path", self.base_path, "a path such as /vision")
        valid = not self.cors or re.fullmatch(r"https?://[^\s/,*]+", self.cors)
        require(bool(valid), "cors", self.cors, "an origin such as https://shop.example")
        if self.json and not self.check:
            raise UsageError("json: is for --check; --access-log prints the requests as JSON")

    @property
    def request(self) -> dict[str, object]:
        """What a compute process is asked for."""
        return {
            "provider": self.provider,
            "batch_size": self.batch_size,
            "workers": self.workers,
            "execution": None,
        }
