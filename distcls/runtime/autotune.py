"""`--provider auto`: measures the search space, chooses the fastest, and caches the choice.

Measuring takes a second or two, on the input's own first images, through the real pipeline. The
outputs of each execution config are compared with those of the CPU in fp32, and one that disagrees
is never chosen.

The cache holds one choice per model file, machine, set of versions and request. Nothing depends on
it: an entry that is damaged, of another version, not in the search space or cannot be written is as
good as none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from distcls import __version__, log, stored
from distcls.data.source import ImageSource
from distcls.errors import BadValue, DistclsError
from distcls.files import write_json
from distcls.runtime.benchmark import TOLERANCE, Benchmark, disagreement, images_needed
from distcls.runtime.model import OnnxModel
from distcls.runtime.onnx_file import OnnxFile
from distcls.runtime.providers import (
    AUTO,
    PROVIDERS,
    REFERENCE,
    ExecutionConfig,
    ExecutionRequest,
    SearchGroup,
    installed,
    require_installed,
    versions,
)
from distcls.system import available_cores, cache_folder, cpu_name, gpu_names

MIN_IMAGES = 256
"""Images below which measuring takes longer than it saves."""
COMPARED_UNMEASURED = 8
"""Images on which a provider is compared that is used without being measured."""
MAX_SECONDS = 2.0
"""Time after which only those groups are still measured that are in any case."""
MAX_REFERENCE_SECONDS = 0.3
"""Time limit for the reference logits; a slow model gets fewer images."""
NEAR_TIE = 0.85
"""Fraction of the best rate from which on another batch size of its session is measured again: one
measurement of half a second differs by a tenth from the next."""
TIE_ROUNDS = 2
"""Further measurements of each of them, in alternation."""

Open = Callable[[ExecutionConfig], OnnxModel]


def open_fastest(
    path: Path | OnnxFile, request: ExecutionRequest, source: ImageSource | None = None
) -> OnnxModel:
    """Open a model as it runs fastest here, and log which way that is, and why.

    A cached choice is taken. For few images measuring does not pay: they get the CPU, or what was
    requested, with its default execution config. Raises UsageError if the requested provider is not
    installed, DistclsError if it disagrees with the CPU.
    """
    if request.provider != AUTO:
        require_installed(request.provider)
    file = path if isinstance(path, OnnxFile) else OnnxFile(path)
    key = cache_key(file.sha256, request)
    cached = read_cache(key, request)
    if cached is not None:
        execution, reason = cached
        with contextlib.suppress(DistclsError):  # it worked once; measure again if no longer
            model = OnnxModel(file, execution)
            log.say(f"provider: {execution}; {reason} (cached)")
            return model
    reference = _open_reference(file, request)
    if request.images is not None and request.images < MIN_IMAGES:
        return _open_unmeasured(file, reference, request, source)
    began = time.perf_counter()
    measured = measure(
        reference, request, Benchmark.of(source), lambda execution: OnnxModel(file, execution)
    )
    best = choose(measured)
    assert best.model is not None  # the fastest is still open
    reason = explain(best, measured)
    seconds = time.perf_counter() - began
    log.say(f"provider: {best.execution}; {reason} (measured in {seconds:.1f} s)")
    write_cache(key, best.execution, reason)
    return best.model


def _open_reference(file: OnnxFile, request: ExecutionRequest) -> OnnxModel:
    """The model on the CPU in fp32, whatever was requested."""
    provider = PROVIDERS[REFERENCE]
    size_unknown = (1, 1)
    model = OnnxModel(file, provider.default_execution(request.cores, size_unknown))
    execution = provider.default_execution(request.cores, model.card.preprocess.size)
    return model.with_execution(execution) or model


def _open_unmeasured(
    file: OnnxFile, reference: OnnxModel, request: ExecutionRequest, source: ImageSource | None
) -> OnnxModel:
    """The model with the execution config for few images. Raises DistclsError if it disagrees."""
    name = REFERENCE if request.provider == AUTO else request.provider
    execution = PROVIDERS[name].default_execution(
        request.cores, reference.card.preprocess.size, request.batch_size
    )
    model = reference.with_execution(execution) or OnnxModel(file, execution)
    if name == REFERENCE:
        return model
    benchmark = Benchmark.of(source, COMPARED_UNMEASURED)
    count = len(benchmark.images)
    _, expected = benchmark.run(reference, reference.execution, count, None)
    _, found = benchmark.run(model, execution, count, None)
    problem = disagreement(
        expected, found, execution, task=reference.card.task, tolerance=_tolerance(reference)
    )
    if problem is not None:
        raise DistclsError(f"provider: {name} is not used: {problem}")
    return model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What measuring one execution config found."""

    execution: ExecutionConfig
    rate: float = 0.0
    """Images per second, decoding included."""
    problem: str | None = None
    """Why it cannot be chosen."""
    model: OnnxModel | None = None
    """Its open session; only that of the fastest stays open."""


def measure(
    reference: OnnxModel, request: ExecutionRequest, benchmark: Benchmark, open_model: Open
) -> list[Measurement]:
    """Measure the search space; `reference` is the model on the CPU in fp32.

    An execution config that fails or disagrees has a problem; nothing is raised for it.
    """
    measurer = _Measurer(reference, request, benchmark, open_model)
    measured: list[Measurement] = []
    for name in _providers(request):
        own: list[Measurement] = []
        provider, size = PROVIDERS[name], reference.card.preprocess.size
        fitting = provider.fitting_batch_sizes(size, measurer.seconds)
        sizes = (request.batch_size,) if request.batch_size else fitting
        for group in provider.search_space(request.cores, sizes):
            if measurer.worthwhile(group, own):
                own += measurer.run(group)
                measured, own = _close_slower(measured, own)
        measured += own
    return measurer.break_tie(measured)


def fastest(measured: Sequence[Measurement]) -> Measurement | None:
    """The fastest of those without a problem, if there is one."""
    usable = [found for found in measured if found.problem is None]
    return max(usable, key=lambda found: found.rate, default=None)


def choose(measured: Sequence[Measurement]) -> Measurement:
    """The fastest without a problem; one warning for each provider that has nothing else.

    Raises DistclsError if there is none.
    """
    best = fastest(measured)
    for name in dict.fromkeys(found.execution.provider for found in measured):
        problems = [found.problem for found in measured if found.execution.provider == name]
        if all(problem is not None for problem in problems):
            text = f"{name} is not used: {problems[-1]}"
            if best is None:
                raise DistclsError(f"provider: {text}")
            log.warn(text)
    assert best is not None  # or some provider would have raised
    return best


def explain(best: Measurement, measured: Sequence[Measurement]) -> str:
    """Why it was chosen: its speed, and the best speed of each other provider."""
    others: dict[str, Measurement] = {}
    for found in measured:
        if found.problem is None and found.execution.session != best.execution.session:
            name = f"{PROVIDERS[found.execution.provider].title} ({found.execution.layout})"
            if name not in others or others[name].rate < found.rate:
                others[name] = found
    slower = "".join(f", {found.rate:,.0f} with {name}" for name, found in others.items())
    return f"{best.rate:,.0f} images/s here{slower}"


class _Measurer:
    """The images, the logits expected, and the clock."""

    def __init__(
        self,
        reference: OnnxModel,
        request: ExecutionRequest,
        benchmark: Benchmark,
        open_model: Open,
    ) -> None:
        self._began = time.perf_counter()
        self._reference = reference
        self._workers = request.workers
        self._open = open_model
        self.seconds = _seconds_per_image(reference, benchmark)
        """What one core takes for one image, without decoding."""
        count = int(MAX_REFERENCE_SECONDS * request.cores / max(self.seconds, 1e-6))
        self._benchmark = benchmark.first(max(1, count))
        self._count = len(self._benchmark.images)
        execution = reference.execution
        _, self._expected = self._benchmark.run(reference, execution, self._count, self._workers)

    def worthwhile(self, group: SearchGroup, measured: Sequence[Measurement]) -> bool:
        """Whether to measure a group, after those of its provider that have been."""
        precision = group.executions[0].precision
        late = time.perf_counter() - self._began > MAX_SECONDS
        same = [found for found in measured if found.execution.precision == precision]
        if any(found.problem is not None for found in same) or (late and not group.always):
            return False
        # what agrees in reduced precision is not slower than the same in fp32
        others = [found for found in measured if found.execution.precision != precision]
        return not any(found.problem is None for found in others)

    def run(self, group: SearchGroup) -> list[Measurement]:
        """Measure a group, up to the first that has a problem or is slower than before."""
        measured: list[Measurement] = []
        first = group.executions[0]
        try:
            opened = self._reference.with_execution(first) or self._open(first)
            for execution in group.executions:
                model = opened.with_execution(execution)
                assert model is not None  # one session per group
                measured.append(self._measure(model, execution))
                slower = len(measured) > 1 and measured[-1].rate < measured[-2].rate
                if slower or measured[-1].problem is not None:
                    break
        except DistclsError as error:  # it does not load, or cannot compute this model
            measured.append(Measurement(execution=first, problem=str(error)))
        return measured

    def break_tie(self, measured: list[Measurement]) -> list[Measurement]:
        """Measure the fastest, and the batch sizes of its session that come near, again.

        The one with the highest median takes the fastest one's rate and place.
        """
        best = fastest(measured)
        if best is None or best.model is None:
            return measured
        near = [
            place
            for place, found in enumerate(measured)
            if found.problem is None
            and found.execution.session == best.execution.session
            and found.rate >= NEAR_TIE * best.rate
        ]
        if len(near) < 2:
            return measured
        rates = {place: [measured[place].rate] for place in near}
        for _ in range(TIE_ROUNDS):
            for place in near:
                execution = measured[place].execution
                model = best.model.with_execution(execution)
                assert model is not None  # the same session
                count = images_needed(execution, self._count, rates[place][0])
                rate, _ = self._benchmark.run(model, execution, count, self._workers)
                rates[place].append(rate)
        chosen = max(near, key=lambda place: statistics.median(rates[place]))
        if measured[chosen] is best:
            return measured
        first, others = measured[chosen], [found for found in measured if found is not best]
        model = best.model.with_execution(first.execution)
        winner = dataclasses.replace(first, rate=best.rate, model=model)
        loser = dataclasses.replace(best, rate=first.rate, model=None)
        return [loser, *(winner if found is first else found for found in others)]

    def _measure(self, model: OnnxModel, execution: ExecutionConfig) -> Measurement:
        run, workers = self._benchmark.run, self._workers
        rate, _ = run(model, execution, execution.streams * execution.batch_size, workers)  # warm
        count = images_needed(execution, self._count, rate)
        rate, found = run(model, execution, count, workers)
        problem = None
        if execution.provider != REFERENCE:
            problem = disagreement(
                self._expected,
                found,
                execution,
                task=self._reference.card.task,
                tolerance=_tolerance(self._reference),
            )
        return Measurement(execution=execution, rate=rate, problem=problem, model=model)


def _close_slower(*lists: list[Measurement]) -> list[list[Measurement]]:
    """The same measurements without the sessions of the slower ones, which hold much memory."""
    best = fastest([found for measured in lists for found in measured])
    return [
        [found if found is best else dataclasses.replace(found, model=None) for found in measured]
        for measured in lists
    ]


def _providers(request: ExecutionRequest) -> list[str]:
    if request.provider != AUTO:
        return [request.provider]
    images = request.images
    return [name for name in installed() if images is None or images >= PROVIDERS[name].min_images]


def _tolerance(model: OnnxModel) -> float:
    """Largest difference of a logit that the model's certificate allows."""
    return float((model.card.certificate or {}).get("tolerance", TOLERANCE))


def _seconds_per_image(model: OnnxModel, benchmark: Benchmark) -> float:
    image = model.card.preprocess(benchmark.images[0])[None]
    model.logits(image)  # the first time is slower
    began = time.perf_counter()
    model.logits(image)
    return time.perf_counter() - began


FORMAT = 2
"""Of the entries of the cache; other versions are not read."""
_MAX_BYTES, _MAX_REASON = 10_000, 1_000


def cache_key(sha256: str, request: ExecutionRequest) -> str:
    """Cache key of a choice: model file (its SHA-256), machine, versions and request."""
    facts = {
        "model": sha256,
        "cpu": cpu_name(),
        "cores": available_cores(),
        "gpus": gpu_names(),
        "versions": versions(),
        "distcls": __version__,
        "provider": request.provider,
        "batch_size": request.batch_size,
        "threads": request.cores,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_cache(key: str, request: ExecutionRequest) -> tuple[ExecutionConfig, str] | None:
    """The cached execution config and why it was chosen; None unless all of it is sound.

    Other users may write to the file, so nothing is taken from it that measuring could not have
    found for the request, and no text that could control a terminal.
    """
    with contextlib.suppress(OSError, ValueError, RuntimeError, KeyError, TypeError, BadValue):
        values = stored.read_json(_cache_file(key), stored.mapping(stored.anything), _MAX_BYTES)
        execution, reason = ExecutionConfig.from_json(values["execution"]), values["reason"]
        sound = isinstance(reason, str) and reason.isprintable() and len(reason) <= _MAX_REASON
        if values["format"] == FORMAT and sound and _in_search_space(execution, request):
            return execution, reason
    return None


def write_cache(key: str, execution: ExecutionConfig, reason: str) -> bool:
    """Write an entry atomically; False if the folder cannot be written."""
    try:
        entry = {"format": FORMAT, "execution": execution.to_json(), "reason": reason}
        write_json(_cache_file(key), entry)
    except (DistclsError, OSError, RuntimeError):  # the last: no home folder
        return False
    return True


def _in_search_space(execution: ExecutionConfig, request: ExecutionRequest) -> bool:
    provider, size = PROVIDERS[execution.provider], execution.batch_size
    if request.provider not in (AUTO, provider.name):
        return False
    if size not in ((request.batch_size,) if request.batch_size else provider.batch_sizes):
        return False
    groups = provider.search_space(request.cores, [size])
    return any(execution in group.executions for group in groups)


def _cache_file(key: str) -> Path:
    return cache_folder() / "providers" / f"{key}.json"
