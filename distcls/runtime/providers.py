"""Which execution providers are installed, and how a session is told to use one.

CUDA and TensorRT come inside `onnxruntime-gpu`. OpenVINO is a plug-in beside plain `onnxruntime`:
a library that is registered by its path, whose devices a session is then given
(https://onnxruntime.ai/docs/execution-providers/plugin-ep-libraries/usage.html).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import json
from importlib import metadata
from typing import Any, Literal, Protocol, get_args

from distcls.errors import UsageError, require
from distcls.system import available_cores

ProviderName = Literal["cpu", "openvino", "cuda", "tensorrt"]
ProviderChoice = Literal["auto", "cpu", "openvino", "cuda", "tensorrt"]
Precision = Literal["fp32", "reduced"]
Layout = Literal["workers", "stages"]

PROVIDERS: tuple[ProviderName, ...] = get_args(ProviderName)
TITLES: dict[ProviderName, str] = {
    "cpu": "CPU",
    "openvino": "OpenVINO",
    "cuda": "CUDA",
    "tensorrt": "TensorRT",
}
"""What people call them."""

BATCH_SIZE = 64
"""Images at a time where nothing was measured: of a PyTorch model, and of a plain session."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """One way to run a model; what `--provider auto` chooses between."""

    provider: ProviderName = "cpu"
    """The execution provider."""
    precision: Precision = "fp32"
    """fp32, or reduced: whatever is fastest on the hardware (bf16, fp16, TF32)."""
    layout: Layout = "stages"
    """workers: each thread decodes a batch and computes it itself, with no hand-over;
    stages: threads decode ahead of others that compute."""
    threads: int = 0
    """Threads that share the computing of one batch; 0: one a core. Of no meaning on a GPU."""
    streams: int = 1
    """Batches that are computed at the same time."""
    batch_size: int = BATCH_SIZE
    """Images of a batch."""

    def __post_init__(self) -> None:
        for name, kind in (
            ("provider", ProviderName),
            ("precision", Precision),
            ("layout", Layout),
        ):
            value, choices = getattr(self, name), get_args(kind)
            require(value in choices, name, value, f"one of {', '.join(choices)}")
        for name, least in (("threads", 0), ("streams", 1), ("batch_size", 1)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            require(whole and value >= least, name, value, f"a whole number, at least {least}")

    @property
    def session(self) -> tuple[str, str, int, int]:
        """What a session is opened for; plans that differ in nothing else can share one."""
        return self.provider, self.precision, self.threads, self.streams

    def __str__(self) -> str:
        name = TITLES[self.provider]
        if self.precision == "reduced":
            name += " in reduced precision"
        if self.provider in ("cuda", "tensorrt"):
            return f"{name}, batches of {self.batch_size}"
        if self.layout == "workers":
            who = f"{_count(self.streams, 'worker')} of {_count(self.threads or 1, 'thread')}"
        else:
            who = f"{_count(self.threads, 'thread')} a batch" if self.threads else "a thread a core"
        return f"{name}, {who}, batches of {self.batch_size}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> ExecutionConfig:
        """The inverse of `to_json`. Raises TypeError or BadValue for anything else."""
        if not isinstance(values, dict):
            raise TypeError(f"a plan is a mapping, not {type(values).__name__}")
        return cls(**values)


class Options(Protocol):
    """What of a command's options is about running the model."""

    @property
    def provider(self) -> ProviderChoice:
        """One provider, or auto."""

    @property
    def batch_size(self) -> int | None:
        """Images at a time."""

    @property
    def workers(self) -> int | None:
        """Threads."""

    @property
    def limit(self) -> int | None:
        """The first images only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionRequest:
    """What the user says about how a model is run."""

    provider: ProviderChoice = "auto"
    """One provider, or the fastest of those installed."""
    batch_size: int | None = None
    """The batch size, if it is not to be chosen."""
    workers: int | None = None
    """Threads, if not one a core."""
    images: int | None = None
    """How many there are; unset, nobody knows, which counts as many."""

    @classmethod
    def of(cls, options: Options, images: int) -> ExecutionRequest:
        """What a command's options say, for an input of so many images."""
        return cls(
            provider=options.provider,
            batch_size=options.batch_size,
            workers=options.workers,
            images=min(images, options.limit or images),
        )

    @property
    def cores(self) -> int:
        """Threads to plan for."""
        return self.workers or available_cores()


def execution_of(model: object) -> ExecutionConfig:
    """The plan that a model was opened with; models without one take a batch after the other."""
    plan = getattr(model, "plan", None)
    return plan if isinstance(plan, ExecutionConfig) else ExecutionConfig()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


EXECUTION: dict[ProviderName, str] = {
    "cpu": "CPUExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""ONNX Runtime's own names."""

PLUGIN = "onnxruntime_ep_openvino"
"""The module of the OpenVINO plug-in."""

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-openvino", "tensorrt")
"""Distributions whose versions decide how fast a provider is, and how exact."""


def installed() -> list[ProviderName]:
    """The providers that this machine has, the likeliest to be fast first; always the CPU."""
    order: tuple[ProviderName, ...] = ("tensorrt", "cuda", "openvino", "cpu")
    return [name for name in order if missing(name) is None]


def missing(name: ProviderName) -> str | None:
    """What to do about a provider that is not installed, in one clause; None if it is.

    Whether it really works is only known once a session is open.
    """
    if name == "cpu":
        return None
    if name == "openvino":
        if importlib.util.find_spec(PLUGIN) is not None:
            return None
        return "is not installed; pip install 'distcls[openvino]'"
    if EXECUTION[name] in _runtime_s_own():
        return None
    if _version("onnxruntime-gpu") and _version("onnxruntime"):
        # the two lay their files over each other, and the one without CUDA came last
        return (
            "is hidden by the package onnxruntime; pip uninstall onnxruntime, then "
            "pip install --force-reinstall --no-deps onnxruntime-gpu"
        )
    return "is not installed; pip install 'distcls[gpu]'" + (
        " tensorrt" if name == "tensorrt" else ""
    )


def require_installed(name: ProviderName) -> None:
    """Raise UsageError, saying what to install, unless this machine has the provider."""
    problem = missing(name)
    if problem is not None:
        others = ", ".join(other for other in PROVIDERS if missing(other) is None)
        raise UsageError(f"provider: {name} {problem} (installed: {others})")


def versions() -> dict[str, str | None]:
    """Versions of the packages that compute."""
    return {package: _version(package) for package in PACKAGES}


def use(plan: ExecutionConfig, options: Any) -> list[Any]:
    """Prepare ONNX Runtime's SessionOptions for a plan; the `providers` to open a session with.

    Raises UsageError for a provider that is not installed or cannot be loaded.
    """
    require_installed(plan.provider)
    # one thread: the caller's own, without a pool; the default would pin threads to cores
    options.intra_op_num_threads = plan.threads or available_cores()
    if plan.provider == "cpu":
        return [EXECUTION["cpu"]]
    if plan.provider == "openvino":
        options.add_provider_for_devices([_openvino_cpu()], _openvino_options(plan))
        return []
    _load_gpu_libraries(plan.provider)
    fast = plan.precision == "reduced"
    cuda = (EXECUTION["cuda"], {"use_tf32": int(fast), "cudnn_conv_algo_search": "HEURISTIC"})
    if plan.provider == "cuda":
        return [cuda, EXECUTION["cpu"]]
    tensorrt = (EXECUTION["tensorrt"], {"trt_fp16_enable": fast})
    return [tensorrt, cuda, EXECUTION["cpu"]]


def _openvino_options(plan: ExecutionConfig) -> dict[str, str]:
    """OpenVINO's own settings; the plug-in takes threads and precision in no other way."""
    threads = plan.threads or available_cores()
    settings = {
        "INFERENCE_NUM_THREADS": str(threads * plan.streams),
        "NUM_STREAMS": str(plan.streams),
    }
    if plan.precision == "fp32":
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    return {"load_config": json.dumps({"CPU": settings})}


@functools.cache
def _openvino_cpu() -> Any:
    """The plug-in's device for this machine's CPU; registers the plug-in the first time."""
    import onnxruntime

    try:
        plugin = importlib.import_module(PLUGIN)
        onnxruntime.register_execution_provider_library(PLUGIN, plugin.get_library_path())
        devices = onnxruntime.get_ep_devices()
    except Exception as error:  # the runtime's own types, and whatever the plug-in's import raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"provider: openvino is installed but does not load beside onnxruntime "
            f"{onnxruntime.__version__}: {reason}"
        ) from error
    for device in devices:
        if device.ep_name == EXECUTION["openvino"] and device.ep_metadata.get("ov_device") == "CPU":
            return device
    raise UsageError("provider: openvino is installed but finds no CPU that it supports")


def _runtime_s_own() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


@functools.cache
def _load_gpu_libraries(name: ProviderName) -> None:
    """Load CUDA, cuDNN and TensorRT from Python's packages, where they are of those."""
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        onnxruntime.preload_dlls()  # prints, and raises OSError, for what it does not find
    if name == "tensorrt":
        with contextlib.suppress(ImportError):
            importlib.import_module("tensorrt")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
