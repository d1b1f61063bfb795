"""Trying plans: each candidate is timed, and its answers are compared with the CPU's in fp32."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from distcls.errors import DistclsError
from distcls.inference.providers.candidates import Family, families
from distcls.inference.providers.installed import installed
from distcls.inference.providers.plan import Asked, Plan, ProviderName
from distcls.inference.providers.rehearsal import (
    TOLERANCE,
    Rehearsal,
    disagreement,
    images_needed,
)
from distcls.inference.session import OnnxModel

WORTH_BUILDING = 20_000
"""Inputs below which TensorRT, which takes a minute to build an engine, is no candidate of auto."""
SECONDS = 2.0
"""Time after which only those families are still tried that are tried in any case."""
SECONDS_OF_REFERENCE = 0.3
"""Time for the answers that the others are compared with; of a slow model, fewer images."""

Open = Callable[[Plan], OnnxModel]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A plan that was tried."""

    plan: Plan
    rate: float = 0.0
    """Images per second, decoding included."""
    problem: str | None = None
    """Why it cannot be chosen."""
    model: OnnxModel | None = None
    """Its open session; only the fastest keeps it."""


def measure(model: OnnxModel, asked: Asked, rehearsal: Rehearsal, open_plan: Open) -> list[Trial]:
    """Try the candidates; `model` is the reference, an open one on the CPU in fp32.

    A plan that fails or disagrees has a problem; nothing is raised for it.
    """
    bench = _Bench(model, asked, rehearsal, open_plan)
    trials: list[Trial] = []
    for provider in _candidates(asked):
        own: list[Trial] = []
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


def fastest(trials: Sequence[Trial]) -> Trial | None:
    """The fastest of those that can be used, if there is one."""
    usable = [trial for trial in trials if trial.problem is None]
    return max(usable, key=lambda trial: trial.rate, default=None)


def _let_go(*lists: list[Trial]) -> list[list[Trial]]:
    """The same trials without the sessions of the slower ones, which hold much memory."""
    best = fastest([trial for trials in lists for trial in trials])
    return [
        [trial if trial is best else dataclasses.replace(trial, model=None) for trial in trials]
        for trials in lists
    ]


class _Bench:
    """The images, the answers expected, and the clock."""

    def __init__(
        self, model: OnnxModel, asked: Asked, rehearsal: Rehearsal, open_plan: Open
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
        self._targets = model.card.resolved_targets
        self._tolerance = tolerance_of(model)

    def worth(self, family: Family, tried: list[Trial]) -> bool:
        """Whether to try a family, after those of the same provider that were `tried`."""
        plan = family.plans[0]
        late = time.perf_counter() - self._began > SECONDS
        alike = [trial for trial in tried if trial.plan.precision == plan.precision]
        if any(trial.problem is not None for trial in alike) or (late and not family.first):
            return False
        # what agrees in reduced precision is not slower than the same in fp32
        others = [trial for trial in tried if trial.plan.precision != plan.precision]
        return not any(trial.problem is None for trial in others)

    def run(self, family: Family) -> list[Trial]:
        """Time a family's plans, up to the first that has a problem or is slower than before."""
        trials: list[Trial] = []
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
            trials.append(Trial(plan=family.plans[0], problem=str(error)))
        return trials

    def _time(self, model: OnnxModel, plan: Plan) -> Trial:
        run, workers = self._rehearsal.run, self._workers
        rate, _ = run(model, plan, plan.callers * plan.batch_size, workers)  # to warm up
        count = images_needed(plan, self._known, rate)
        rate, found = run(model, plan, count, workers)
        problem = None  # the CPU is the measure of the others, in any number of threads
        if plan.provider != "cpu":
            problem = disagreement(
                self._expected, found, plan, targets=self._targets, tolerance=self._tolerance
            )
        return Trial(plan=plan, rate=rate, problem=problem, model=model)


def _candidates(asked: Asked) -> list[ProviderName]:
    if asked.provider != "auto":
        return [asked.provider]
    few = asked.images is not None and asked.images < WORTH_BUILDING
    return [name for name in installed() if not (few and name == "tensorrt")]


def tolerance_of(model: OnnxModel) -> float:
    """Largest difference of a logit that the model's certificate allows."""
    return float((model.card.certificate or {}).get("tolerance", TOLERANCE))


def _seconds_of_one(model: OnnxModel, rehearsal: Rehearsal) -> float:
    image = model.card.preprocess(rehearsal.images[0])[None]
    model.logits(image)  # the first time is slower
    began = time.perf_counter()
    model.logits(image)
    return time.perf_counter() - began
