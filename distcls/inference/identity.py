"""What the rows of a batch prediction are made from, so that nothing else is mixed into them."""

from __future__ import annotations

import hashlib

from distcls import __version__
from distcls.errors import BadValue
from distcls.files import digest
from distcls.inference.inputs import Source
from distcls.inference.merge import plans_of
from distcls.inference.model import Model
from distcls.inference.options import PredictOptions
from distcls.inference.parts import Identity, begun_with
from distcls.inference.providers.plan import Plan, plan_of

PLANS = "plans"


def begun_plans(options: PredictOptions) -> list[Plan | None]:
    """How the run that `--resume` continues ran each of its models; None where nobody knows.

    What `--provider auto` finds fastest may be another way the next time.
    """
    unknown: list[Plan | None] = [None] * len(options.models)
    if not options.resume or options.provider != "auto":
        return unknown
    try:
        plans = [Plan.from_json(values) for values in begun_with(options.out)[PLANS]]
    except (KeyError, TypeError, ValueError, BadValue):
        return unknown
    return [*plans] if len(plans) == len(unknown) else unknown


def identity_of(model: Model, source: Source, options: PredictOptions) -> Identity:
    """Digests of the inputs (names, sizes, times) and of the model files, and what decides a row.

    Numbers may differ in their last digits between providers, threads and sizes of batches, so
    these count as well.
    """
    plans = plans_of(model)
    files = [digest(path) for path in options.models]
    if options.classes is not None:
        files.append(digest(options.classes))
    return {
        "distcls": __version__,
        "model": hashlib.sha256("".join(files).encode()).hexdigest(),
        "inputs": source.digest(),
        "images": min(len(source), options.limit or len(source)),
        "provider": model.provider,
        "way of computing": "; ".join(map(str, plans)),
        PLANS: [plan.to_json() for plan in plans],
        "batch_size": options.batch_size or plan_of(model).batch_size,
        "part_rows": options.part_rows,
        "top_k": options.top_k,
        "probabilities": options.probabilities,
        "threshold": options.threshold,
        "tta": options.tta,
        "features": options.features is not None,
        "scaled_decode": options.scaled_decode,
        "show": options.show,
        "seed": options.seed,
        "input size": _plain(options.size),
        "mean": _plain(options.mean),
        "std": _plain(options.std),
    }


def _plain(values: tuple[float, ...] | None) -> list[float] | None:
    return None if values is None else list(values)
