"""What the server counts: for Prometheus, under our names and Triton's, and for the protocol."""

from __future__ import annotations

import bisect
import collections
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

STAGES = ("read", "queue", "decode", "infer", "total")
BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets of durations, in seconds."""
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


_PROTOCOL = {
    **{"total": "success", "queue": "queue", "decode": "compute_input"},
    **{"infer": "compute_infer", "write": "compute_output"},
}
"""The protocol's names of the stages."""


class _Histogram:
    """Counts of durations by bucket."""

    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.buckets[bisect.bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def cumulative(self) -> list[tuple[str, float]]:
        names = [str(bound) for bound in BOUNDS] + ["+Inf"]
        running, found = 0, []
        for name, count in zip(names, self.buckets, strict=True):
            running += count
            found.append((name, float(running)))
        return found


class Statistics:
    """Of one model version, since it was loaded."""

    def __init__(self) -> None:
        self.stages = {stage: _Histogram() for stage in STAGES}
        self.ns: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
        """Count and nanoseconds, by the protocol's names."""
        self.images = 0
        self.failures: collections.Counter[str] = collections.Counter()
        """Requests that failed, by the reason."""
        self.last_ms = 0

    def served(self, seconds: dict[str, float], images: int) -> None:
        """Count a request that was answered, with the seconds of its stages."""
        for stage, spent in seconds.items():
            self.stages[stage].add(spent)
        self.images += images
        self.last_ms = time.time_ns() // 1_000_000
        for stage, name in _PROTOCOL.items():
            self._add(name, seconds.get(stage, 0.0))

    def failed(self, reason: str, seconds: float) -> None:
        """Count a request that got an error."""
        self.failures[reason] += 1
        self._add("fail", seconds)

    def _add(self, name: str, seconds: float) -> None:
        pair = self.ns[name]
        pair[0] += 1
        pair[1] += int(seconds * 1e9)

    def pair(self, name: str) -> dict[str, int]:
        """Count and nanoseconds of one of the protocol's names."""
        count, ns = self.ns[name]
        return {"count": count, "ns": ns}

    def to_json(self, name: str, version: str, counts: Any) -> dict[str, Any]:
        """An entry of `model_stats`, with all of the keys that perf_analyzer reads."""
        keys = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
        pairs = {key: self.pair(key) for key in keys}
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_ms,
            "inference_count": self.images,
            "execution_count": sum(counts.batches.values()),
            "inference_stats": {
                **pairs,
                "cache_hit": {"count": 0, "ns": 0},
                "cache_miss": {"count": 0, "ns": 0},
            },
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": {"count": count, "ns": counts.decode_ns[size]},
                    "compute_infer": {"count": count, "ns": counts.infer_ns[size]},
                    "compute_output": {"count": count, "ns": 0},
                }
                for size, count in sorted(counts.batches.items())
            ],
            "response_stats": {},
            "memory_usage": [],
        }


class Metrics(Collector):  # type: ignore[misc]  # the library has no types
    """The page for Prometheus, made from what models and server have counted when it is asked."""

    def __init__(self, repository: Any) -> None:
        """`repository` is what is served, a `Repository`."""
        self._repository = repository
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self.rejected: collections.Counter[str] = collections.Counter()
        """Requests refused before they had a model, or by the server's limits."""
        self.responses: collections.Counter[tuple[str, str]] = collections.Counter()
        """By route and status."""

    def page(self) -> bytes:
        """The text format of Prometheus."""
        page: bytes = generate_latest(self._registry)
        return page

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names depend on what is served."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        versions = self._repository.counted()
        yield from self._ours(versions)
        yield from self._served()
        yield from self._tritons(versions)

    def _ours(self, versions: list[Any]) -> Iterator[Metric]:
        responses = CounterMetricFamily(
            "distcls_responses", "Answers by route and status.", labels=["route", "status"]
        )
        for (route, status), count in self.responses.items():
            responses.add_metric([route, status], count)
        rejected = CounterMetricFamily(
            "distcls_rejected", "Requests refused, by the reason.", labels=["reason"]
        )
        for reason, count in self.rejected.items():
            rejected.add_metric([reason], count)
        yield responses
        yield rejected
        labels = ["model", "version"]
        stages = HistogramMetricFamily(
            "distcls_request_seconds", "Seconds of a request by stage.", labels=[*labels, "stage"]
        )
        sizes = HistogramMetricFamily("distcls_batch_images", "Images in a batch.", labels=labels)
        dropped = CounterMetricFamily(
            "distcls_dropped", "Images not computed, by the reason.", labels=[*labels, "reason"]
        )
        deaths = CounterMetricFamily(
            "distcls_process_deaths", "Compute processes that ended by themselves.", labels=labels
        )
        for each in versions:
            own = [each.name, each.version]
            for stage, histogram in each.statistics.stages.items():
                stages.add_metric([*own, stage], histogram.cumulative(), histogram.total)
            sizes.add_metric(own, *_batch_buckets(each.engine.counts.batches))
            for reason, count in each.engine.counts.dropped.items():
                dropped.add_metric([*own, reason], count)
            deaths.add_metric(own, each.engine.counts.deaths)
        yield from (stages, sizes, dropped, deaths)

    def _served(self) -> Iterator[Metric]:
        """Of what is served now, and how loading went."""
        labels = ["model", "version"]
        backlog = GaugeMetricFamily(
            "distcls_backlog_seconds", "Seconds of work that are waiting.", labels=labels
        )
        lanes = GaugeMetricFamily("distcls_workers", "Workers that compute.", labels=labels)
        memory = GaugeMetricFamily(
            "distcls_model_memory_bytes",
            "Resident memory of a worker when it began.",
            labels=labels,
        )
        info = GaugeMetricFamily(
            "distcls_model_info", "What is served.", labels=[*labels, "sha256", "provider"]
        )
        loads = CounterMetricFamily(
            "distcls_model_loads", "Files that were loaded.", labels=["model", "outcome"]
        )
        for each in self._repository.versions():
            own, facts = [each.name, each.version], each.engine.facts
            backlog.add_metric(own, round(each.engine.backlog, 6))
            lanes.add_metric(own, len(each.engine.lanes))
            memory.add_metric(own, facts["memory"])
            info.add_metric([*own, facts["sha256"], facts["provider"]], 1)
        for name, outcome, count in self._repository.loads():
            loads.add_metric([name, outcome], count)
        yield from (backlog, lanes, memory, info, loads)

    def _tritons(self, versions: list[Any]) -> Iterator[Metric]:
        """The names of Triton's metrics, so that dashboards made for it work."""
        labels = ["model", "version"]
        durations = {
            "nv_inference_request_duration_us": "success",
            "nv_inference_queue_duration_us": "queue",
            "nv_inference_compute_input_duration_us": "compute_input",
            "nv_inference_compute_infer_duration_us": "compute_infer",
            "nv_inference_compute_output_duration_us": "compute_output",
        }
        for name, key in durations.items():
            family = _Untyped(name, "As Triton has it.", "counter")
            for each in versions:
                ns = each.statistics.ns[key][1]
                family.add(dict(zip(labels, (each.name, each.version), strict=True)), ns / 1000)
            yield family
        counts: dict[str, Callable[[Any], int]] = {
            "nv_inference_request_success": lambda each: each.statistics.ns["success"][0],
            "nv_inference_count": lambda each: each.statistics.images,
            "nv_inference_exec_count": lambda each: sum(each.engine.counts.batches.values()),
        }
        for name, count in counts.items():
            family = _Untyped(name, "As Triton has it.", "counter")
            for each in versions:
                family.add({"model": each.name, "version": each.version}, count(each))
            yield family
        failures = _Untyped("nv_inference_request_failure", "As Triton has it.", "counter")
        pending = _Untyped("nv_inference_pending_request_count", "As Triton has it.", "gauge")
        for each in versions:
            own = {"model": each.name, "version": each.version}
            for reason, number in each.statistics.failures.items():
                failures.add({**own, "reason": reason}, number)
            pending.add(own, each.engine.waiting)
        yield from (failures, pending)


class _Untyped(Metric):  # type: ignore[misc]
    """A metric whose name stays as it is: a counter of Prometheus's own would end in _total."""

    def __init__(self, name: str, documentation: str, kind: str) -> None:
        super().__init__(name, documentation, "gauge" if kind == "counter" else kind)

    def add(self, labels: dict[str, str], value: float) -> None:
        self.add_sample(self.name, labels, value)


def _batch_buckets(batches: dict[int, int]) -> tuple[list[tuple[str, float]], float]:
    buckets = [
        (str(bound), float(sum(count for size, count in batches.items() if size <= bound)))
        for bound in BATCHES
    ]
    images = float(sum(size * count for size, count in batches.items()))
    return [*buckets, ("+Inf", float(sum(batches.values())))], images
