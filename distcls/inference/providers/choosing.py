"""`--provider auto`: the fastest way to run this model on this machine that answers the same.

The candidates are measured for a second or two, on the input's own first images, through the real
pipeline; each is compared with the CPU in fp32, and one that disagrees is never chosen. The choice
is remembered for the model, the machine and the versions.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from distcls import log
from distcls.errors import BadValue, DistclsError
from distcls.inference.inputs import Source
from distcls.inference.providers import remembered
from distcls.inference.providers.candidates import unmeasured
from distcls.inference.providers.installed import require_installed
from distcls.inference.providers.plan import TITLES, Asked, Plan, ProviderName
from distcls.inference.providers.rehearsal import Rehearsal, disagreement
from distcls.inference.providers.trials import Trial, fastest, measure, tolerance_of
from distcls.inference.session import OnnxModel

WORTH_MEASURING = 256
"""Inputs below which measuring takes longer than it saves."""
SMALL = (32, 32)
"""Stands for the size of an input that is not known yet."""
COMPARED_UNMEASURED = 8
"""Images on which a provider is compared that is used without being measured."""


def open_fastest(path: Path, asked: Asked, source: Source | None = None) -> OnnxModel:
    """Open a model as it runs fastest here, and say which way that is, and why.

    A choice that was remembered is taken; few images are not worth measuring and get the CPU.
    Raises UsageError if the provider asked for is not installed, DistclsError if it disagrees.
    """
    if asked.provider != "auto":
        require_installed(asked.provider)
    key = remembered.key_of(path, provider=asked.provider, batch=asked.batch_size, on=asked.cores)
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
    trials = measure(reference, asked, Rehearsal.of(source), lambda plan: OnnxModel(path, plan))
    best = pick(trials)
    assert best.model is not None  # the fastest is still open
    why = explain(best, trials)
    log.say(f"provider: {best.plan}; {why} (measured in {time.perf_counter() - began:.1f} s)")
    remembered.keep(key, {"plan": best.plan.to_json(), "why": why})
    return best.model


def pick(trials: list[Trial]) -> Trial:
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


def explain(best: Trial, trials: list[Trial]) -> str:
    """Why it was chosen: its speed, and the best of each of the others."""
    others: dict[str, Trial] = {}
    for trial in trials:
        if trial.problem is None and trial.plan.session != best.plan.session:
            name = f"{TITLES[trial.plan.provider]} ({trial.plan.layout})"
            if name not in others or others[name].rate < trial.rate:
                others[name] = trial
    slower = "".join(f", {trial.rate:,.0f} with {name}" for name, trial in others.items())
    return f"{best.rate:,.0f} images/s here{slower}"


def _reference(path: Path, asked: Asked) -> OnnxModel:
    """The model on the CPU in fp32, whatever was asked for."""
    model = OnnxModel(path, unmeasured("cpu", cores=asked.cores, side=SMALL))
    plan = unmeasured("cpu", cores=asked.cores, side=model.card.preprocess.size)
    return model.replanned(plan) or model


def _unmeasured(reference: OnnxModel, asked: Asked, source: Source | None) -> OnnxModel:
    """The model with the plan for few images. Raises DistclsError if the provider disagrees."""
    name: ProviderName = "cpu" if asked.provider == "auto" else asked.provider
    side, batch_size = reference.card.preprocess.size, asked.batch_size
    plan = unmeasured(name, cores=asked.cores, side=side, batch_size=batch_size)
    model = reference.replanned(plan) or OnnxModel(reference.path, plan)
    if name == "cpu":
        return model
    rehearsal = Rehearsal.of(source, COMPARED_UNMEASURED)
    count = len(rehearsal.images)
    _, expected = rehearsal.run(reference, reference.plan, count, None)
    _, found = rehearsal.run(model, plan, count, None)
    targets, tolerance = reference.card.resolved_targets, tolerance_of(reference)
    problem = disagreement(expected, found, plan, targets=targets, tolerance=tolerance)
    if problem is not None:
        raise DistclsError(f"provider: {name} is not used: {problem}")
    return model


def _recalled(key: str) -> tuple[Plan, str] | None:
    values = remembered.recall(key)
    if values is None:
        return None
    try:
        return Plan.from_json(values["plan"]), str(values["why"])
    except (KeyError, TypeError, BadValue):
        return None
