"""Which execution providers are installed, and how a session is told to use one.

CUDA and TensorRT come inside `onnxruntime-gpu`. OpenVINO is a plug-in beside plain `onnxruntime`:
a library that is registered by its path, whose devices a session is then given
(https://onnxruntime.ai/docs/execution-providers/plugin-ep-libraries/usage.html).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import json
from importlib import metadata
from typing import Any

from distcls.cores import available_cores
from distcls.errors import UsageError
from distcls.inference.providers.plan import PROVIDERS, Plan, ProviderName

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


def use(plan: Plan, options: Any) -> list[Any]:
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


def _openvino_options(plan: Plan) -> dict[str, str]:
    """OpenVINO's own settings; the plug-in takes threads and precision in no other way."""
    threads = plan.threads or available_cores()
    settings = {
        "INFERENCE_NUM_THREADS": str(threads * plan.callers),
        "NUM_STREAMS": str(plan.callers),
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
