"""Execution providers, and the execution configs that describe how one runs a model.

An execution provider is what ONNX Runtime computes with: the CPU, OpenVINO, CUDA, TensorRT. Each is
one subclass of `Provider`. A new one is such a class under `@register`, here or in a module that
DISTCLS_IMPORT names: the command line offers it, `--provider auto` measures it, and no other code
has to know it.

CUDA and TensorRT are part of `onnxruntime-gpu`. OpenVINO is a plug-in beside plain `onnxruntime`:
a library that is registered by its path, whose devices a session is then given
(https://onnxruntime.ai/docs/execution-providers/plugin-ep-libraries/usage.html).
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import json
import os
from collections.abc import Sequence
from importlib import metadata
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

from distcls.errors import UsageError, did_you_mean, require
from distcls.registry import IMPORTS, import_modules
from distcls.system import available_cores

Precision = Literal["fp32", "reduced"]
Layout = Literal["workers", "stages"]

AUTO = "auto"
"""Instead of a provider's name: the fastest of those installed."""
REFERENCE = "cpu"
"""The provider that is always installed; its fp32 outputs are the reference for all others."""
BATCH_SIZE = 64
"""Images per batch where nothing was measured: of a PyTorch model, and of a plain session."""


LIMITS = (("threads", 0, 4096), ("streams", 1, 4096), ("batch_size", 1, 2**20))
"""Fields of `ExecutionConfig` with their least and largest value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """One way to run a model; what `--provider auto` chooses between."""

    provider: str = REFERENCE
    """Name of the execution provider."""
    precision: Precision = "fp32"
    """fp32, or reduced: whatever is fastest on the hardware (bf16, fp16, TF32)."""
    layout: Layout = "stages"
    """How threads divide the work. workers: each thread decodes a batch and computes it too, with
    no hand-over. stages: some threads decode the next batches while others compute."""
    threads: int = 0
    """Threads that compute one batch (intra-op); 0: one per core. Ignored on a GPU."""
    streams: int = 1
    """Batches that are computed at the same time."""
    batch_size: int = BATCH_SIZE
    """Images per batch."""

    def __post_init__(self) -> None:
        require_provider(self.provider)
        for name, literal in (("precision", Precision), ("layout", Layout)):
            value, choices = getattr(self, name), get_args(literal)
            require(value in choices, name, value, f"one of {', '.join(choices)}")
        for name, least, most in LIMITS:
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            expected = f"a whole number from {least} to {most:,}"
            require(whole and least <= value <= most, name, value, expected)

    @property
    def session(self) -> tuple[str, str, int, int]:
        """Cache key of a session; configs with an equal key share one."""
        return self.provider, self.precision, self.threads, self.streams

    @property
    def gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return PROVIDERS[self.provider].gpu

    def __str__(self) -> str:
        name = PROVIDERS[self.provider].title
        if self.precision == "reduced":
            name += " in reduced precision"
        if self.gpu:
            return f"{name}, batches of {self.batch_size}"
        if self.layout == "workers":
            threads = f"{_count(self.streams, 'worker')} of {_count(self.threads or 1, 'thread')}"
        else:
            unit = "batch" if self.threads else "core"
            threads = f"{_count(self.threads or 1, 'thread')} per {unit}"
        return f"{name}, {threads}, batches of {self.batch_size}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> ExecutionConfig:
        """The inverse of `to_json`. Raises TypeError or BadValue for anything else."""
        if not isinstance(values, dict):
            raise TypeError(f"an execution config is a mapping, not {type(values).__name__}")
        return cls(**values)


class ExecutionOptions(Protocol):
    """The options of a command that control how the model is run."""

    @property
    def provider(self) -> str:
        """Name of a provider, or auto."""

    @property
    def batch_size(self) -> int | None:
        """Images per batch."""

    @property
    def workers(self) -> int | None:
        """Threads."""

    @property
    def limit(self) -> int | None:
        """The first images only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionRequest:
    """The settings that the user fixes for running a model; the rest is chosen."""

    provider: str = AUTO
    """Name of a provider, or auto for the fastest of those installed."""
    batch_size: int | None = None
    """Images per batch; default: chosen."""
    workers: int | None = None
    """Threads; default: one per core."""
    images: int | None = None
    """How many images there are; None if that is unknown, which is treated as many."""

    def __post_init__(self) -> None:
        require_provider(self.provider, or_auto=True)

    @classmethod
    def of(cls, options: ExecutionOptions, images: int) -> ExecutionRequest:
        """The request of a command's options, for an input of this many images."""
        return cls(
            provider=options.provider,
            batch_size=options.batch_size,
            workers=options.workers,
            images=min(images, options.limit or images),
        )

    @property
    def cores(self) -> int:
        """Threads that may be busy at a time."""
        return self.workers or available_cores()


@dataclasses.dataclass(frozen=True)
class SearchGroup:
    """Execution configs that differ in their batch size only, the smallest first."""

    executions: tuple[ExecutionConfig, ...]
    """At least one; they share a session."""
    always: bool
    """Measured however long that takes; all other configs only while there is time."""


class Provider(abc.ABC):
    """An execution provider; the defaults of this class suit one that computes on the CPU."""

    name: ClassVar[str]
    """Name for the user: --provider NAME."""
    title: ClassVar[str]
    """Its name in messages."""
    execution_provider: ClassVar[str]
    """ONNX Runtime's name of it."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions whose versions affect its speed and accuracy."""
    gpu: ClassVar[bool] = False
    """Whether it computes on a GPU."""
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32",)
    """What it can compute in; those worth measuring, the likeliest to be fast first."""
    min_images: ClassVar[int] = 0
    """Fewest images for which auto considers it; more where opening a session takes long."""
    batch_sizes: ClassVar[tuple[int, ...]] = (1, 4, 16, 64)
    """Batch sizes worth measuring."""
    max_pixels: ClassVar[int] = 2**20
    """Most pixels of a batch. MobileNetV3-Large takes some 10 MB per image of 224x224 while it is
    computed, so that a batch of 64 would take 640 MB for each thread that computes one."""
    default_batch: ClassVar[tuple[int, int]] = (64, 2**19)
    """Most images, and most pixels, of a batch where nothing is measured."""
    max_seconds: ClassVar[float | None] = 0.4
    """Seconds that one core may take to compute a batch that is measured; None: any number."""

    @abc.abstractmethod
    def missing(self) -> str | None:
        """Why it cannot be used and what to install, in one clause; None if it is installed.

        Whether it really works is only known once a session is open.
        """

    @abc.abstractmethod
    def configure(self, execution: ExecutionConfig, options: Any) -> list[Any]:
        """Prepare ONNX Runtime's SessionOptions; the `providers` to open a session with.

        Raises UsageError if it cannot be loaded.
        """

    def search_space(self, cores: int, batch_sizes: Sequence[int]) -> list[SearchGroup]:
        """The execution configs worth measuring on this many cores, the likely fastest first."""
        groups = []
        for precision in self.precisions:
            first = precision == self.precisions[0]
            for layout in ("workers", "stages") if cores > 1 and first else ("workers",):
                base = self._execution(cores, precision, layout)
                sized = (dataclasses.replace(base, batch_size=size) for size in batch_sizes)
                groups.append(SearchGroup(tuple(sized), always=layout == "workers"))
        return groups

    def fitting_batch_sizes(self, size: tuple[int, int], seconds: float) -> tuple[int, ...]:
        """The batch sizes worth measuring for a model, the smallest first.

        `size` is height and width of its input in pixels, `seconds` what one core takes for one
        image.
        """
        pixels = size[0] * size[1]
        fitting = [count for count in self.batch_sizes if count * pixels <= self.max_pixels]
        if self.max_seconds is not None:
            fitting = [count for count in fitting if count * seconds <= self.max_seconds]
        return tuple(fitting[-2:]) or self.batch_sizes[:1]

    def default_execution(
        self, cores: int, size: tuple[int, int], batch_size: int | None = None
    ) -> ExecutionConfig:
        """The execution config where measuring does not pay: fp32, small batches."""
        images, pixels = self.default_batch
        fitting = max(1, min(images, pixels // (size[0] * size[1])))
        base = self._execution(cores, "fp32", "workers")
        power_of_two: int = 2 ** (fitting.bit_length() - 1)
        return dataclasses.replace(base, batch_size=batch_size or power_of_two)

    def _execution(self, cores: int, precision: Precision, layout: Layout) -> ExecutionConfig:
        threads, streams = (1, cores) if layout == "workers" else (cores, 1)
        return ExecutionConfig(
            provider=self.name,
            precision=precision,
            layout=layout,
            threads=threads,
            streams=streams,
        )


PROVIDERS: dict[str, Provider] = {}
"""The registered providers by name; of those installed the last one is tried first."""

P = TypeVar("P", bound=type[Provider])


def register(provider: P) -> P:
    """Make a provider known, as a decorator of its class."""
    known = PROVIDERS.get(provider.name)
    # a module that fails while it is loaded is loaded again, and has to fail as before
    again = known is not None and (type(known).__module__, type(known).__qualname__) == (
        provider.__module__,
        provider.__qualname__,
    )
    if provider.name in (AUTO, *PROVIDERS) and not again:
        raise ValueError(f"the provider {provider.name!r} is known already")
    PROVIDERS[provider.name] = provider()
    return provider


def known_providers() -> dict[str, Provider]:
    """All providers by name, those of the modules that DISTCLS_IMPORT names included.

    Raises UsageError for a module that is not there.
    """
    import_modules(os.environ.get(IMPORTS, ""))
    return PROVIDERS


def require_provider(name: object, *, or_auto: bool = False) -> None:
    """Raise BadValue, with the choices, unless `name` is a known provider (or auto)."""
    choices = [AUTO] * or_auto + list(known_providers())
    known = isinstance(name, str) and name in choices
    hint = did_you_mean(str(name), choices)
    require(known, "provider", name, f"a known execution provider{hint}")


def installed() -> list[str]:
    """The providers that this machine has, the likeliest to be fast first; the CPU is always one.

    The order is that of `register`, the last first.
    """
    providers = reversed(known_providers().items())
    return [name for name, provider in providers if provider.missing() is None]


def require_installed(name: str) -> None:
    """Raise UsageError, saying what to install, unless this machine has the provider."""
    problem = PROVIDERS[name].missing()
    if problem is not None:
        others = ", ".join(reversed(installed()))
        raise UsageError(f"provider: {name} {problem} (installed: {others})")


def versions() -> dict[str, str | None]:
    """Versions of the packages that compute; None for one that is not installed."""
    packages = [package for provider in known_providers().values() for package in provider.packages]
    return {package: _version(package) for package in packages}


def configure(execution: ExecutionConfig, options: Any) -> list[Any]:
    """Prepare ONNX Runtime's SessionOptions; the `providers` to open a session with.

    Raises UsageError for a provider that is not installed or cannot be loaded.
    """
    require_installed(execution.provider)
    # 1 is the calling thread itself, without a pool; the default would pin threads to cores
    options.intra_op_num_threads = execution.threads or available_cores()
    return PROVIDERS[execution.provider].configure(execution, options)


@register
class Cpu(Provider):
    """ONNX Runtime's own kernels."""

    name = REFERENCE
    title = "CPU"
    execution_provider = "CPUExecutionProvider"
    packages = ("onnxruntime",)

    def missing(self) -> str | None:
        """See `Provider`; it is always there."""
        return None

    def configure(self, execution: ExecutionConfig, options: Any) -> list[Any]:
        """See `Provider`."""
        return [self.execution_provider]


@register
class OpenVino(Provider):
    """Intel's OpenVINO on the CPU, as a plug-in; its reduced precision is bf16."""

    name = "openvino"
    title = "OpenVINO"
    execution_provider = "OpenVINOExecutionProvider"
    packages = ("onnxruntime-ep-openvino",)
    precisions = ("reduced", "fp32")
    plugin = "onnxruntime_ep_openvino"
    """The module of the plug-in."""

    def missing(self) -> str | None:
        """See `Provider`."""
        if importlib.util.find_spec(self.plugin) is not None:
            return None
        return "is not installed; pip install 'distcls[openvino]'"

    def configure(self, execution: ExecutionConfig, options: Any) -> list[Any]:
        """See `Provider`; the plug-in takes threads and precision in no other way."""
        device, problem = self._device
        if problem is not None:
            raise UsageError(f"provider: openvino is installed but {problem}")
        threads = execution.threads or available_cores()
        settings = {
            "INFERENCE_NUM_THREADS": str(threads * execution.streams),
            "NUM_STREAMS": str(execution.streams),
        }
        if execution.precision == "fp32":
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        options.add_provider_for_devices([device], {"load_config": json.dumps({"CPU": settings})})
        return []

    @functools.cached_property
    def _device(self) -> tuple[Any, str | None]:
        """The plug-in's device for this machine's CPU, or why there is none.

        Registers the plug-in, once. A failure is cached like a success: ONNX Runtime refuses a
        second registration as "already registered", which would hide the first reason.
        """
        import onnxruntime

        try:
            plugin = importlib.import_module(self.plugin)
            onnxruntime.register_execution_provider_library(self.plugin, plugin.get_library_path())
            devices = onnxruntime.get_ep_devices()
        except Exception as error:  # the runtime's own types, and whatever the import raises
            beside = f"does not load beside onnxruntime {onnxruntime.__version__}"
            return None, f"{beside}: {first_line(error)}"
        for device in devices:
            on_cpu = device.ep_metadata.get("ov_device") == "CPU"
            if device.ep_name == self.execution_provider and on_cpu:
                return device, None
        return None, "finds no CPU that it supports"


class _Gpu(Provider):
    """What CUDA and TensorRT have in common."""

    packages = ("onnxruntime-gpu",)
    gpu = True
    precisions = ("reduced", "fp32")
    batch_sizes = (8, 32, 128)
    max_pixels = 2**24
    default_batch = (32, 2**21)
    max_seconds = None
    extra_package: ClassVar[str] = ""

    def missing(self) -> str | None:
        """See `Provider`."""
        if self.execution_provider in _available_in_runtime():
            return None
        if _version("onnxruntime-gpu") and _version("onnxruntime"):
            # the two lay their files over each other, and the one without CUDA came last
            return (
                "is hidden by the package onnxruntime; pip uninstall onnxruntime, then "
                "pip install --force-reinstall --no-deps onnxruntime-gpu"
            )
        return f"is not installed; pip install 'distcls[gpu]'{self.extra_package}"

    def search_space(self, cores: int, batch_sizes: Sequence[int]) -> list[SearchGroup]:
        """See `Provider`; there is one layout, whatever the number of cores."""
        return super().search_space(1, batch_sizes)

    def _execution(self, cores: int, precision: Precision, layout: Layout) -> ExecutionConfig:
        # two streams: one copies while the other computes
        return ExecutionConfig(provider=self.name, precision=precision, threads=1, streams=2)


@register
class Cuda(_Gpu):
    """NVIDIA's GPUs; its reduced precision is TF32."""

    name = "cuda"
    title = "CUDA"
    execution_provider = "CUDAExecutionProvider"

    def configure(self, execution: ExecutionConfig, options: Any) -> list[Any]:
        """See `Provider`; what CUDA cannot compute the CPU does."""
        _load_gpu_libraries()
        settings = {
            "use_tf32": int(execution.precision == "reduced"),
            "cudnn_conv_algo_search": "HEURISTIC",
        }
        return [(self.execution_provider, settings), Cpu.execution_provider]


@register
class TensorRt(_Gpu):
    """NVIDIA's compiler for its GPUs; its reduced precision is fp16."""

    name = "tensorrt"
    title = "TensorRT"
    execution_provider = "TensorrtExecutionProvider"
    packages = ("tensorrt",)
    min_images = 20_000  # it takes a minute to build an engine
    extra_package = " tensorrt"

    def configure(self, execution: ExecutionConfig, options: Any) -> list[Any]:
        """See `Provider`; what TensorRT cannot compute CUDA does."""
        others = PROVIDERS[Cuda.name].configure(execution, options)
        with contextlib.suppress(ImportError):  # loads its libraries
            importlib.import_module("tensorrt")
        settings = {"trt_fp16_enable": execution.precision == "reduced"}
        return [(self.execution_provider, settings), *others]


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _available_in_runtime() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


@functools.cache
def _load_gpu_libraries() -> None:
    """Load CUDA and cuDNN from Python's packages, where they are of those."""
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        onnxruntime.preload_dlls()  # prints, and raises OSError, for what it does not find


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
