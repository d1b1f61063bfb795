"""`--provider auto`: the search space, the measurements, the choice, and its cache.

A choice holds for one model file, one machine and one set of versions. Nothing depends on the
cache: a file that is damaged, of another version or cannot be written is as good as none.

The candidates are measured for a second or two, on the input's own first images, through the real
pipeline; each is compared with the CPU in fp32, and one that disagrees is never chosen. The choice
is remembered for the model, the machine and the versions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distcls import __version__, log
from distcls.data.source import ImageSource
from distcls.errors import BadValue, DistclsError
from distcls.files import digest, write_json
from distcls.runtime.benchmark import TOLERANCE, Benchmark, disagreement, images_needed
from distcls.runtime.model import OnnxModel
from distcls.runtime.providers import (
    TITLES,
    ExecutionConfig,
    ExecutionRequest,
    Precision,
    ProviderName,
    installed,
    require_installed,
    versions,
)
from distcls.system import _gpu_names, available_cores, cache_folder, cpu_name

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

    plans: tuple[ExecutionConfig, ...]
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

    def family(first: bool, plan: ExecutionConfig) -> Family:
        return Family(tuple(dataclasses.replace(plan, batch_size=size) for size in sizes), first)

    both: tuple[Precision, ...] = ("reduced", "fp32")
    if provider in ("cuda", "tensorrt"):
        # two streams: one copies while the other computes
        plans = [
            ExecutionConfig(provider=provider, precision=kind, threads=1, streams=2)
            for kind in both
        ]
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
) -> ExecutionConfig:
    """The plan to take where measuring does not pay: fp32, small batches, a worker a core."""
    if provider in ("cuda", "tensorrt"):
        plan, most, largest = (
            ExecutionConfig(provider=provider, precision=precision),
            PIXELS_ON_GPU // 8,
            32,
        )
        plan = dataclasses.replace(plan, threads=1, streams=2)
    else:
        plan, most, largest = _workers(cores, provider, precision), PIXELS_ON_CPU // 2, 64
    fits = max(1, min(largest, most // (side[0] * side[1])))
    return dataclasses.replace(plan, batch_size=batch_size or 2 ** (fits.bit_length() - 1))


def _workers(cores: int, provider: ProviderName, precision: Precision) -> ExecutionConfig:
    return ExecutionConfig(
        provider=provider, precision=precision, layout="workers", threads=1, streams=cores
    )


def _shared(cores: int, provider: ProviderName, precision: Precision) -> ExecutionConfig:
    return ExecutionConfig(
        provider=provider, precision=precision, layout="stages", threads=cores, streams=1
    )


def _sizes(provider: ProviderName, side: tuple[int, int], seconds: float) -> tuple[int, ...]:
    gpu = provider in ("cuda", "tensorrt")
    known, most = (ON_GPU, PIXELS_ON_GPU) if gpu else (ON_CPU, PIXELS_ON_CPU)
    fitting = [size for size in known if size * side[0] * side[1] <= most]
    if not gpu:
        fitting = [size for size in fitting if size * seconds <= SLOWEST]
    return tuple(fitting[-2:]) or known[:1]


WORTH_BUILDING = 20_000
"""Inputs below which TensorRT, which takes a minute to build an engine, is no candidate of auto."""
SECONDS = 2.0
"""Time after which only those families are still tried that are tried in any case."""
SECONDS_OF_REFERENCE = 0.3
"""Time for the answers that the others are compared with; of a slow model, fewer images."""

Open = Callable[[ExecutionConfig], OnnxModel]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """A plan that was tried."""

    plan: ExecutionConfig
    rate: float = 0.0
    """Images per second, decoding included."""
    problem: str | None = None
    """Why it cannot be chosen."""
    model: OnnxModel | None = None
    """Its open session; only the fastest keeps it."""


def measure(
    model: OnnxModel, asked: ExecutionRequest, rehearsal: Benchmark, open_plan: Open
) -> list[Measurement]:
    """Try the candidates; `model` is the reference, an open one on the CPU in fp32.

    A plan that fails or disagrees has a problem; nothing is raised for it.
    """
    bench = _Bench(model, asked, rehearsal, open_plan)
    trials: list[Measurement] = []
    for provider in _candidates(asked):
        own: list[Measurement] = []
        for family in families(
            provider,
            cores=asked.cores,
            side=model.card.preprocess.size,
            batch_size=asked.batch_size,
            seconds=bench.seconds,
        ):
            if bench.worth(family, own):
                own += bench.run(family)
                trials, own = _let_go(trials, own)
        trials += own
    return trials


def fastest(trials: Sequence[Measurement]) -> Measurement | None:
    """The fastest of those that can be used, if there is one."""
    usable = [trial for trial in trials if trial.problem is None]
    return max(usable, key=lambda trial: trial.rate, default=None)


def _let_go(*lists: list[Measurement]) -> list[list[Measurement]]:
    """The same trials without the sessions of the slower ones, which hold much memory."""
    best = fastest([trial for trials in lists for trial in trials])
    return [
        [trial if trial is best else dataclasses.replace(trial, model=None) for trial in trials]
        for trials in lists
    ]


class _Bench:
    """The images, the answers expected, and the clock."""

    def __init__(
        self, model: OnnxModel, asked: ExecutionRequest, rehearsal: Benchmark, open_plan: Open
    ) -> None:
        self._began = time.perf_counter()
        self._reference = model
        self._workers = asked.workers
        self._open = open_plan
        self.seconds = _seconds_of_one(model, rehearsal)
        """What one image takes on one core."""
        number = int(SECONDS_OF_REFERENCE * asked.cores / max(self.seconds, 1e-6))
        self._rehearsal = rehearsal.first(max(1, number))
        self._known = len(self._rehearsal.images)
        _, self._expected = self._rehearsal.run(model, model.plan, self._known, asked.workers)
        self._task = model.card.task
        self._tolerance = tolerance_of(model)

    def worth(self, family: Family, tried: list[Measurement]) -> bool:
        """Whether to try a family, after those of the same provider that were `tried`."""
        plan = family.plans[0]
        late = time.perf_counter() - self._began > SECONDS
        alike = [trial for trial in tried if trial.plan.precision == plan.precision]
        if any(trial.problem is not None for trial in alike) or (late and not family.first):
            return False
        # what agrees in reduced precision is not slower than the same in fp32
        others = [trial for trial in tried if trial.plan.precision != plan.precision]
        return not any(trial.problem is None for trial in others)

    def run(self, family: Family) -> list[Measurement]:
        """Time a family's plans, up to the first that has a problem or is slower than before."""
        trials: list[Measurement] = []
        try:
            opened = self._reference.replanned(family.plans[0]) or self._open(family.plans[0])
            for plan in family.plans:
                model = opened.replanned(plan)
                assert model is not None  # plans of a family share their session
                trials.append(self._time(model, plan))
                slower = len(trials) > 1 and trials[-1].rate < trials[-2].rate
                if slower or trials[-1].problem is not None:
                    break
        except DistclsError as error:  # it does not load, or cannot compute this model
            trials.append(Measurement(plan=family.plans[0], problem=str(error)))
        return trials

    def _time(self, model: OnnxModel, plan: ExecutionConfig) -> Measurement:
        run, workers = self._rehearsal.run, self._workers
        rate, _ = run(model, plan, plan.streams * plan.batch_size, workers)  # to warm up
        count = images_needed(plan, self._known, rate)
        rate, found = run(model, plan, count, workers)
        problem = None  # the CPU is the measure of the others, in any number of threads
        if plan.provider != "cpu":
            problem = disagreement(
                self._expected, found, plan, task=self._task, tolerance=self._tolerance
            )
        return Measurement(plan=plan, rate=rate, problem=problem, model=model)


def _candidates(asked: ExecutionRequest) -> list[ProviderName]:
    if asked.provider != "auto":
        return [asked.provider]
    few = asked.images is not None and asked.images < WORTH_BUILDING
    return [name for name in installed() if not (few and name == "tensorrt")]


def tolerance_of(model: OnnxModel) -> float:
    """Largest difference of a logit that the model's certificate allows."""
    return float((model.card.certificate or {}).get("tolerance", TOLERANCE))


def _seconds_of_one(model: OnnxModel, rehearsal: Benchmark) -> float:
    image = model.card.preprocess(rehearsal.images[0])[None]
    model.logits(image)  # the first time is slower
    began = time.perf_counter()
    model.logits(image)
    return time.perf_counter() - began


FORMAT = 1


def key_of(model: Path, **asked: Any) -> str:
    """What a choice holds for: the model's bytes, the machine, the versions, what was asked."""
    facts = {
        "model": digest(model),
        "cpu": cpu_name(),
        "cores": available_cores(),
        "gpus": _gpu_names(),
        "versions": versions(),
        "distcls": __version__,
        "asked": asked,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def recall(key: str) -> dict[str, Any] | None:
    """What was kept under a key; None if there is nothing that can be read."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # the last: no home folder
        values = json.loads(_file(key).read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("format") == FORMAT:
            return values
    return None


def keep(key: str, values: dict[str, Any]) -> bool:
    """Keep values under a key, atomically; False if the folder cannot be written."""
    try:
        write_json(_file(key), {"format": FORMAT, **values})
    except (DistclsError, OSError, RuntimeError):
        return False
    return True


def _file(key: str) -> Path:
    return cache_folder() / "providers" / f"{key}.json"


WORTH_MEASURING = 256
"""Inputs below which measuring takes longer than it saves."""
SMALL = (32, 32)
"""Stands for the size of an input that is not known yet."""
COMPARED_UNMEASURED = 8
"""Images on which a provider is compared that is used without being measured."""


def open_fastest(
    path: Path, asked: ExecutionRequest, source: ImageSource | None = None
) -> OnnxModel:
    """Open a model as it runs fastest here, and say which way that is, and why.

    A choice that was remembered is taken; few images are not worth measuring and get the CPU.
    Raises UsageError if the provider asked for is not installed, DistclsError if it disagrees.
    """
    if asked.provider != "auto":
        require_installed(asked.provider)
    key = key_of(path, provider=asked.provider, batch=asked.batch_size, on=asked.cores)
    known = _recalled(key)
    if known is not None:
        plan, why = known
        with contextlib.suppress(DistclsError):  # it worked once; choose anew if it does no more
            model = OnnxModel(path, plan)
            log.say(f"provider: {plan}; {why} (remembered)")
            return model
    reference = _reference(path, asked)
    if asked.images is not None and asked.images < WORTH_MEASURING:
        return _unmeasured(reference, asked, source)
    began = time.perf_counter()
    trials = measure(reference, asked, Benchmark.of(source), lambda plan: OnnxModel(path, plan))
    best = pick(trials)
    assert best.model is not None  # the fastest is still open
    why = explain(best, trials)
    log.say(f"provider: {best.plan}; {why} (measured in {time.perf_counter() - began:.1f} s)")
    keep(key, {"plan": best.plan.to_json(), "why": why})
    return best.model


def pick(trials: list[Measurement]) -> Measurement:
    """The fastest that can be used; one warning for each provider of which nothing can.

    Raises DistclsError if there is none.
    """
    best = fastest(trials)
    for name in dict.fromkeys(trial.plan.provider for trial in trials):
        own = [trial.problem for trial in trials if trial.plan.provider == name]
        if all(problem is not None for problem in own):
            text = f"{name} is not used: {own[-1]}"
            if best is None:
                raise DistclsError(f"provider: {text}")
            log.warn(text)
    assert best is not None  # or some provider would have raised
    return best


def explain(best: Measurement, trials: list[Measurement]) -> str:
    """Why it was chosen: its speed, and the best of each of the others."""
    others: dict[str, Measurement] = {}
    for trial in trials:
        if trial.problem is None and trial.plan.session != best.plan.session:
            name = f"{TITLES[trial.plan.provider]} ({trial.plan.layout})"
            if name not in others or others[name].rate < trial.rate:
                others[name] = trial
    slower = "".join(f", {trial.rate:,.0f} with {name}" for name, trial in others.items())
    return f"{best.rate:,.0f} images/s here{slower}"


def _reference(path: Path, asked: ExecutionRequest) -> OnnxModel:
    """The model on the CPU in fp32, whatever was asked for."""
    model = OnnxModel(path, unmeasured("cpu", cores=asked.cores, side=SMALL))
    plan = unmeasured("cpu", cores=asked.cores, side=model.card.preprocess.size)
    return model.replanned(plan) or model


def _unmeasured(
    reference: OnnxModel, asked: ExecutionRequest, source: ImageSource | None
) -> OnnxModel:
    """The model with the plan for few images. Raises DistclsError if the provider disagrees."""
    name: ProviderName = "cpu" if asked.provider == "auto" else asked.provider
    side, batch_size = reference.card.preprocess.size, asked.batch_size
    plan = unmeasured(name, cores=asked.cores, side=side, batch_size=batch_size)
    model = reference.replanned(plan) or OnnxModel(reference.path, plan)
    if name == "cpu":
        return model
    rehearsal = Benchmark.of(source, COMPARED_UNMEASURED)
    count = len(rehearsal.images)
    _, expected = rehearsal.run(reference, reference.plan, count, None)
    _, found = rehearsal.run(model, plan, count, None)
    task, tolerance = reference.card.task, tolerance_of(reference)
    problem = disagreement(expected, found, plan, task=task, tolerance=tolerance)
    if problem is not None:
        raise DistclsError(f"provider: {name} is not used: {problem}")
    return model


def _recalled(key: str) -> tuple[ExecutionConfig, str] | None:
    values = recall(key)
    if values is None:
        return None
    try:
        return ExecutionConfig.from_json(values["plan"]), str(values["why"])
    except (KeyError, TypeError, BadValue):
        return None
