"""How a model is run: on what, by how many threads, how many images at a time."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Protocol, get_args

from distcls.cores import available_cores
from distcls.errors import require

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
class Plan:
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
    callers: int = 1
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
        for name, least in (("threads", 0), ("callers", 1), ("batch_size", 1)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            require(whole and value >= least, name, value, f"a whole number, at least {least}")

    @property
    def session(self) -> tuple[str, str, int, int]:
        """What a session is opened for; plans that differ in nothing else can share one."""
        return self.provider, self.precision, self.threads, self.callers

    def __str__(self) -> str:
        name = TITLES[self.provider]
        if self.precision == "reduced":
            name += " in reduced precision"
        if self.provider in ("cuda", "tensorrt"):
            return f"{name}, batches of {self.batch_size}"
        if self.layout == "workers":
            who = f"{_count(self.callers, 'worker')} of {_count(self.threads or 1, 'thread')}"
        else:
            who = f"{_count(self.threads, 'thread')} a batch" if self.threads else "a thread a core"
        return f"{name}, {who}, batches of {self.batch_size}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> Plan:
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
class Asked:
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
    def of(cls, options: Options, images: int) -> Asked:
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


def plan_of(model: object) -> Plan:
    """The plan that a model was opened with; models without one take a batch after the other."""
    plan = getattr(model, "plan", None)
    return plan if isinstance(plan, Plan) else Plan()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
