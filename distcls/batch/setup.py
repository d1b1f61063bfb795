"""What a batch prediction reads and runs, and the fingerprint that `--resume` compares.

The JPEG decoder scales as part of its transform, and so has a fraction of the pixels to compute:
photographs of 12 megapixels come several times as fast. The pixels are not those of training to
the last bit, so it is done by choice only, and refused if too many answers change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from distcls import __version__, log
from distcls.batch.options import PredictOptions
from distcls.batch.parts import Identity, begun_with
from distcls.data.formats.detect import open_source
from distcls.data.source import ImageSource
from distcls.errors import BadValue, DistclsError, UsageError
from distcls.files import digest
from distcls.imaging import decode
from distcls.predictor import load_model
from distcls.runtime.ensemble import Ensemble, FlipAveraged, executions_of, opened_models
from distcls.runtime.generic_onnx import GenericOnnxModel, read_classes
from distcls.runtime.model import Model, OnnxModel, WithFeatures
from distcls.runtime.pipeline import stream
from distcls.runtime.providers import ExecutionConfig, ExecutionRequest

if TYPE_CHECKING:
    pass

PLANS = "plans"


def begun_plans(options: PredictOptions) -> list[ExecutionConfig | None]:
    """How the run that `--resume` continues ran each of its models; None where nobody knows.

    What `--provider auto` finds fastest may be another way the next time.
    """
    unknown: list[ExecutionConfig | None] = [None] * len(options.models)
    if not options.resume or options.provider != "auto":
        return unknown
    try:
        plans = [ExecutionConfig.from_json(values) for values in begun_with(options.out)[PLANS]]
    except (KeyError, TypeError, ValueError, BadValue):
        return unknown
    return [*plans] if len(plans) == len(unknown) else unknown


def fingerprint_of(model: Model, source: ImageSource, options: PredictOptions) -> Identity:
    """Digests of the inputs (names, sizes, times) and of the model files, and what decides a row.

    Numbers may differ in their last digits between providers, threads and sizes of batches, so
    these count as well.
    """
    plans = executions_of(model)
    opened = zip(opened_models(model), options.models, strict=True)
    files = [
        each.sha256 if isinstance(each, OnnxModel | GenericOnnxModel) else digest(path)
        for each, path in opened
    ]
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
        "batch_size": options.batch_size or model.execution.batch_size,
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


CHECKED = 128
"""Images, spread over the input, that are answered both ways."""
SAME = 0.998
"""Share of them whose answer has to stay, as for a model in reduced precision."""


def shrunk(source: ImageSource, model: Model) -> ImageSource:
    """The same images, JPEGs decoded no larger than the model's preprocessing needs them.

    Raises UsageError if there are no files to decode.
    """
    if source.read is None:
        raise UsageError("scaled_decode: this input is decoded already; leave it out")
    read, preprocess = source.read, model.card.preprocess

    def load(index: int) -> NDArray[np.uint8]:
        return decode(read(index), shrinks=preprocess.shrinks)

    return dataclasses.replace(source, load=load)


def check_shrunk(source: ImageSource, fast: ImageSource, model: Model) -> None:
    """Raise UsageError if the model answers otherwise to `fast`, made of `source` by `shrunk`."""
    every = range(0, len(source), -(-len(source) // CHECKED))
    usual, other = _answers(source, model, every), _answers(fast, model, every)
    known = (usual >= 0).all(axis=1) & (other >= 0).all(axis=1)
    changed = int((usual[known] != other[known]).any(axis=1).sum())
    said = f"the answer of {changed} of {known.sum()} images changes"
    if changed > (1 - SAME) * known.sum():
        raise UsageError(f"scaled_decode: {said} ({1 - SAME:.1%} may); leave it out")
    log.say(f"scaled decoding: {said}")


def _answers(source: ImageSource, model: Model, indices: range) -> NDArray[np.int64]:
    """What the model decides, [n, answers]; -1 for a bad image."""
    task = model.card.task
    with contextlib.closing(stream(source, model, indices=indices)) as chunks:
        logits = np.concatenate([chunk.logits for chunk in chunks])[:, : len(task.classes)]
    good = np.isfinite(logits).all(axis=1)
    decided = task.decide(logits[good]).astype(np.int64)
    answers = np.full((len(logits), decided.shape[1]), -1, np.int64)
    answers[good] = decided
    return answers


def open_predictor(
    options: PredictOptions,
    source: ImageSource,
    plans: Sequence[ExecutionConfig | None] | None = None,
) -> Model:
    """The model, or models, that batch prediction asks for; raises as `load_model` does.

    They are run by `plans`, or unless given as the run that is continued ran them, where possible.
    """
    asked, paths = options.asked(len(source)), options.models
    if options.classes is None:
        plans = begun_plans(options) if plans is None else plans
        models = [
            _reopened(path, plan) or load_model(path, "auto", asked, source)
            for path, plan in zip(paths, plans, strict=True)
        ]
    else:
        models = [_open_foreign(path, options, asked) for path in paths]
    model: Model = models[0]
    if len(models) > 1:
        model = Ensemble(models, [str(path) for path in paths])
    if options.features is not None:
        return WithFeatures(model)
    return FlipAveraged(model) if options.tta == "flip" else model


def reopen(options: PredictOptions, plans: Sequence[ExecutionConfig]) -> tuple[Model, ImageSource]:
    """Model and input of a batch prediction once more, in another process, run by `plans`."""
    source = open_source(options.input, options.split, options.fetch_timeout)
    model = open_predictor(options, source, plans)
    return model, shrunk(source, model) if options.scaled_decode else source


def _reopened(path: Path, plan: ExecutionConfig | None) -> Model | None:
    """An exported model run as before, for a run that goes on; None if that cannot be."""
    if plan is None or path.suffix.lower() != ".onnx" or not path.is_file():
        return None
    try:
        return OnnxModel(path, plan)
    except DistclsError:  # what it ran on is gone; the run is refused if that makes a difference
        return None


def _open_foreign(path: Path, options: PredictOptions, asked: ExecutionRequest) -> Model:
    if path.suffix.lower() != ".onnx" or not path.is_file():
        raise UsageError(f"classes: {path} is no ONNX file; others carry their classes")
    assert options.classes is not None
    return GenericOnnxModel(
        path,
        read_classes(options.classes),
        asked,
        size=options.size,
        mean=options.mean or (0.0, 0.0, 0.0),
        std=options.std or (1.0, 1.0, 1.0),
    )
