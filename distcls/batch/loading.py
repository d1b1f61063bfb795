"""Opens the models and images of a batch prediction according to its options.

With scaled decoding the JPEG decoder scales as part of its transform and so computes a fraction of
the pixels: photographs of 12 megapixels decode several times as fast. The pixels are not
those of training to the last bit, so it is an option, and refused if too many labels change.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distcls import __version__, log
from distcls.batch.options import PredictOptions
from distcls.batch.parts import EXECUTION, Fingerprint, read_fingerprint
from distcls.data.formats.detect import open_source, registered_formats
from distcls.data.formats.folder import FileSource, is_image_name
from distcls.data.formats.remote import is_url
from distcls.data.source import ImageSource, JoinedSource, with_decoder
from distcls.errors import BadValue, DistclsError, UsageError
from distcls.files import digest
from distcls.imaging import decode
from distcls.predictor import Predictor, load_model
from distcls.runtime.ensemble import Ensemble, FlipAveraged, executions_of, opened_models
from distcls.runtime.generic_onnx import GenericOnnxModel, read_classes
from distcls.runtime.model import Model, OnnxModel, WithFeatures
from distcls.runtime.providers import ExecutionConfig, ExecutionRequest


def open_inputs(options: PredictOptions) -> ImageSource:
    """The images of all inputs; those of several in order, their ids beginning with the input.

    An image file that is not there is a row with its error if other inputs are: one file of
    thousands may vanish after a shell has listed them. Raises UsageError for any other input that
    is not there, or if none is.
    """
    if len(options.inputs) == 1:
        return open_source(options.inputs[0], options.split, options=options.opening)
    parts: list[tuple[str, ImageSource]] = []
    for kind, group in itertools.groupby(options.inputs, key=_kind_of_file):
        if kind is None:
            for text in group:
                source = open_source(text, options.split, options=options.opening)
                parts.append((_prefix(text, source), source))
        elif options.split is not None:
            raise UsageError(f"split: {next(group)} is not a dataset directory and has no splits")
        else:  # thousands of files, which the shell made of a glob
            parts.append(
                (kind, FileSource(Path(kind), (text.removeprefix(kind) for text in group)))
            )
    _tell_missing([text for text in options.inputs if _is_missing(text)], len(options.inputs))
    return JoinedSource(parts)


def _kind_of_file(text: str) -> str | None:
    """`/` for an absolute path of an image file, empty for a relative one, None for all else."""
    # a pipe or a link that leads nowhere is a row with its error, as in a folder; Path's methods
    # would raise for a name that no file can have
    there = os.path.lexists(text) and not os.path.isdir(text)  # noqa: PTH112
    plain = _is_missing(text) or (is_image_name(text) and there)
    plain = plain and not any(each.matches(text) for each in registered_formats().values())
    return text[: text.startswith("/")] if plain else None


def _is_missing(text: str) -> bool:
    """Whether it is the path of an image file that is not there."""
    if not is_image_name(text) or is_url(text) or text.startswith("~"):
        return False
    return not glob.has_magic(text) and not os.path.lexists(text)


def _tell_missing(missing: Sequence[str], inputs: int) -> None:
    if not missing:
        return
    if len(missing) == inputs:
        raise UsageError(f"none of the {inputs:,} inputs exists, first {missing[0]}")
    log.warn(
        f"{len(missing):,} of the {inputs:,} inputs {'does' if len(missing) == 1 else 'do'} not "
        f"exist, first {missing[0]}; each is a row with an error"
    )


def _prefix(text: str, source: ImageSource) -> str:
    """What makes an input's image ids the paths that the user gave."""
    first = source.image_ids[0]
    if text == "-" or (len(source) == 1 and text.endswith(first)):
        return text.removesuffix("-" if text == "-" else first)
    if glob.has_magic(text) and not Path(text).exists() and not text.endswith(".tar"):
        return re.split(r"[*?\[]", text)[0].rpartition("/")[0] + "/" * ("/" in text)
    return text.rstrip("/") + "/"


def load_models(
    options: PredictOptions,
    source: ImageSource,
    executions: Sequence[ExecutionConfig | None] | None = None,
) -> Model:
    """The model, an ensemble, or a model with features or flips; raises as `load_model` does.

    Each model runs with its config of `executions`; default: as in the run that `--resume`
    continues, where possible.
    """
    request, paths = options.execution_request(len(source)), options.models
    if options.classes is None:
        executions = _resumed_executions(options) if executions is None else executions
        models = [
            _load_as_before(path, execution) or load_model(path, "auto", request, source)
            for path, execution in zip(paths, executions, strict=True)
        ]
    else:
        models = [_load_generic(path, options, request) for path in paths]
    model: Model = models[0]
    if len(models) > 1:
        model = Ensemble(models, [str(path) for path in paths])
    if options.features is not None:
        return WithFeatures(model)
    return FlipAveraged(model) if options.tta == "flip" else model


def reopen(
    options: PredictOptions, executions: Sequence[ExecutionConfig]
) -> tuple[Model, ImageSource]:
    """Model and input of a batch prediction once more, in another process, run as given."""
    source = open_inputs(options)
    model = load_models(options, source, executions)
    return model, scale_decoding(source, model) if options.scaled_decode else source


def _resumed_executions(options: PredictOptions) -> list[ExecutionConfig | None]:
    """How the run that `--resume` continues ran each of its models; None where that is unknown.

    The choice of `--provider auto` may differ the next time.
    """
    unknown: list[ExecutionConfig | None] = [None] * len(options.models)
    if not options.resume or options.provider != "auto":
        return unknown
    begun = read_fingerprint(options.out)
    try:
        executions = [ExecutionConfig.from_json(values) for values in begun.values[EXECUTION]]
    except (KeyError, TypeError, ValueError, BadValue):
        return unknown
    return [*executions] if len(executions) == len(unknown) else unknown


def _load_as_before(path: Path, execution: ExecutionConfig | None) -> Model | None:
    """An exported model run as before, for a resumed run; None if that cannot be."""
    if execution is None or path.suffix.lower() != ".onnx" or not path.is_file():
        return None
    try:
        return OnnxModel(path, execution)
    except DistclsError:  # its provider is gone; the run is refused if that makes a difference
        return None


def _load_generic(path: Path, options: PredictOptions, request: ExecutionRequest) -> Model:
    if path.suffix.lower() != ".onnx" or not path.is_file():
        raise UsageError(f"classes: {path} is not an ONNX file; other models carry their classes")
    assert options.classes is not None
    return GenericOnnxModel(
        path,
        read_classes(options.classes),
        request,
        size=options.size,
        mean=options.mean or (0.0, 0.0, 0.0),
        std=options.std or (1.0, 1.0, 1.0),
    )


def fingerprint_of(model: Model, source: ImageSource, options: PredictOptions) -> Fingerprint:
    """Digests of the inputs (names, sizes, times) and of the model files, and what decides a row.

    Numbers may differ in their last digits between providers, threads and batch sizes, so these
    count as well.
    """
    executions = executions_of(model)
    files = [
        opened.sha256 if isinstance(opened, OnnxModel | GenericOnnxModel) else digest(path)
        for opened, path in zip(opened_models(model), options.models, strict=True)
    ]
    if options.classes is not None:
        files.append(digest(options.classes))
    return Fingerprint(
        {
            "distcls": __version__,
            "model": hashlib.sha256("".join(files).encode()).hexdigest(),
            "inputs": source.fingerprint(),
            "images": min(len(source), options.limit or len(source)),
            "provider": model.provider,
            "execution": "; ".join(map(str, executions)),
            EXECUTION: [execution.to_json() for execution in executions],
            "batch_size": options.batch_size or model.execution.batch_size,
            "part_rows": options.part_rows,
            "top_k": options.top_k,
            "probabilities": options.probabilities,
            "threshold": options.threshold,
            "coverage": options.coverage,
            "tta": options.tta,
            "features": options.features is not None,
            "scaled_decode": options.scaled_decode,
            "show": options.show,
            "seed": options.seed,
            "size": _plain(options.size),
            "mean": _plain(options.mean),
            "std": _plain(options.std),
        }
    )


def _plain(values: tuple[float, ...] | None) -> list[float] | None:
    return None if values is None else list(values)


COMPARED = 128
"""Images, spread over the input, that are predicted both ways."""
MIN_AGREEMENT = 0.998
"""Least fraction of them with an unchanged label, as for a model in reduced precision."""


def scale_decoding(source: ImageSource, model: Model) -> ImageSource:
    """The same images, JPEGs decoded no larger than the model's preprocessing needs them.

    Raises UsageError if there are no files to decode.
    """
    if not source.encoded:
        raise UsageError("scaled_decode: this input is decoded already; leave it out")
    preprocess = model.card.preprocess
    return with_decoder(
        source,
        lambda data: decode(data, downscale=preprocess.downscale, background=preprocess.background),
    )


def check_scaled_decoding(source: ImageSource, scaled: ImageSource, model: Model) -> None:
    """Raise UsageError if too many labels change with `scaled`, by `scale_decoding(source)`."""
    indices = range(0, len(source), -(-len(source) // COMPARED))
    expected, found = _decisions(source, model, indices), _decisions(scaled, model, indices)
    known = (expected >= 0).all(axis=1) & (found >= 0).all(axis=1)
    changed = int((expected[known] != found[known]).any(axis=1).sum())
    result = f"the label of {changed} of {known.sum()} images changes"
    if changed > (1 - MIN_AGREEMENT) * known.sum():
        raise UsageError(f"scaled_decode: {result} ({1 - MIN_AGREEMENT:.1%} may); leave it out")
    log.say(f"scaled decoding: {result}")


def _decisions(source: ImageSource, model: Model, indices: range) -> NDArray[np.int64]:
    """`Task.decide` of each image, [n, heads or labels]; -1 for a bad image."""
    with contextlib.closing(Predictor(model).chunks(source, indices=indices)) as chunks:
        logits = np.concatenate([chunk.logits for chunk in chunks])
    good = np.isfinite(logits).all(axis=1)
    decided = model.card.task.decide(logits[good]).astype(np.int64)
    decisions = np.full((len(logits), decided.shape[1]), -1, np.int64)
    decisions[good] = decided
    return decisions
