"""The plans that are worth trying on this machine, in families that share a session."""

from __future__ import annotations

import dataclasses

from distcls.inference.providers.plan import Plan, Precision, ProviderName

ON_CPU = (1, 4, 16, 64)
ON_GPU = (8, 32, 128)
"""Batch sizes to try."""

PIXELS_ON_CPU = 2**20
PIXELS_ON_GPU = 2**24
"""Most pixels of a batch. MobileNetV3-Large takes some 10 MB for an image of 224x224 while it is
computed, so that a batch of 64 would take 640 MB for each thread that computes one."""

SLOWEST = 0.4
"""Seconds that computing one batch on one core may take; a larger batch is not worth the wait."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Plans that differ in their batch size only, the smallest first."""

    plans: tuple[Plan, ...]
    first: bool
    """Whether it is tried however long that takes; the others only while there is time."""


def families(
    provider: ProviderName,
    *,
    cores: int,
    side: tuple[int, int],
    batch_size: int | None = None,
    seconds: float = 0.0,
) -> list[Family]:
    """The families of one provider, the likeliest to be fast first.

    `side` is height and width of the model's input, `seconds` what one image takes on one core;
    a `batch_size` that is given is the only one.
    """
    sizes = (batch_size,) if batch_size else _sizes(provider, side, seconds)

    def family(first: bool, plan: Plan) -> Family:
        return Family(tuple(dataclasses.replace(plan, batch_size=size) for size in sizes), first)

    both: tuple[Precision, ...] = ("reduced", "fp32")
    if provider in ("cuda", "tensorrt"):
        # two callers: one copies while the other computes
        plans = [Plan(provider=provider, precision=kind, threads=1, callers=2) for kind in both]
        return [family(True, plan) for plan in plans]
    if provider == "cpu":
        found = [family(True, _workers(cores, "cpu", "fp32"))]
        return found + ([family(False, _shared(cores, "cpu", "fp32"))] if cores > 1 else [])
    return [
        family(True, _workers(cores, "openvino", "reduced")),
        *([family(False, _shared(cores, "openvino", "reduced"))] if cores > 1 else []),
        family(True, _workers(cores, "openvino", "fp32")),
    ]


def unmeasured(
    provider: ProviderName,
    *,
    cores: int,
    side: tuple[int, int],
    batch_size: int | None = None,
    precision: Precision = "fp32",
) -> Plan:
    """The plan to take where measuring does not pay: fp32, small batches, a worker a core."""
    if provider in ("cuda", "tensorrt"):
        plan, most, largest = Plan(provider=provider, precision=precision), PIXELS_ON_GPU // 8, 32
        plan = dataclasses.replace(plan, threads=1, callers=2)
    else:
        plan, most, largest = _workers(cores, provider, precision), PIXELS_ON_CPU // 2, 64
    fits = max(1, min(largest, most // (side[0] * side[1])))
    return dataclasses.replace(plan, batch_size=batch_size or 2 ** (fits.bit_length() - 1))


def _workers(cores: int, provider: ProviderName, precision: Precision) -> Plan:
    return Plan(provider=provider, precision=precision, layout="workers", threads=1, callers=cores)


def _shared(cores: int, provider: ProviderName, precision: Precision) -> Plan:
    return Plan(provider=provider, precision=precision, layout="stages", threads=cores, callers=1)


def _sizes(provider: ProviderName, side: tuple[int, int], seconds: float) -> tuple[int, ...]:
    gpu = provider in ("cuda", "tensorrt")
    known, most = (ON_GPU, PIXELS_ON_GPU) if gpu else (ON_CPU, PIXELS_ON_CPU)
    fitting = [size for size in known if size * side[0] * side[1] <= most]
    if not gpu:
        fitting = [size for size in fitting if size * seconds <= SLOWEST]
    return tuple(fitting[-2:]) or known[:1]
