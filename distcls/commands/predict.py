"""`distcls predict`: predictions for many images as CSV, JSON lines or Parquet."""

from __future__ import annotations

from collections.abc import Sequence

from distcls import log
from distcls.batch.job import check_output, predict
from distcls.batch.loading import (
    check_scaled_decoding,
    load_models,
    open_inputs,
    reopen,
    scale_decoding,
)
from distcls.batch.options import PredictOptions
from distcls.cli import run
from distcls.config import Command
from distcls.data.source import most_bad
from distcls.errors import DistclsError
from distcls.explanation.explain import check_folder, explain_source
from distcls.model_card import require_model

MAX_BAD = 0.5
"""Default of `max_bad`."""

COMMAND = Command(
    options=PredictOptions,
    prog="distcls predict",
    about="Predict the class of many images; one row each, in input order, bad images included.",
    examples=(
        "distcls predict --model runs/photos new_photos/ --out pre.csv --show 16",
        "distcls predict --model best.onnx a.jpg b.jpg --probabilities --out -",
    ),
    groups={
        "essential options": ("input", "model", "out", "overwrite", "resume", "provider", "show"),
        "input": ("split", "path_column", "root", "limit", "fetch_timeout", "max_bad"),
        "output": (
            *("out_format", "top_k", "probabilities", "threshold", "coverage", "tta"),
            *("features", "show_out", "seed", "explain"),
        ),
        "speed": ("batch_size", "workers", "engine", "scaled_decode", "part_rows", "profile"),
        "ONNX files that distcls has not exported": ("classes", "size", "mean", "std"),
    },
)


def main(arguments: Sequence[str]) -> None:
    """Parse, predict, print."""
    options = COMMAND.parse(arguments)
    log.set_quiet(options.quiet)
    for model_file in options.models:
        require_model(model_file)  # before a million inputs are listed
    source = open_inputs(options)
    check_output(options)
    if options.explain is not None:
        check_folder(options.explain, replace=options.overwrite or options.resume)
    for line in options.model_choices():
        log.say(line)
    model = load_models(options, source)
    if options.scaled_decode:
        original, source = source, scale_decoding(source, model)
        check_scaled_decoding(original, source, model)
    result = predict(model, source, options, reopen)
    abstained = f"{result.abstained:,} abstained, " if options.threshold is not None else ""
    out = "standard output" if options.to_standard_output else result.out
    log.say(
        f"{log.counted(result.images, 'image')}, {log.counted(result.errors, 'error')}, {abstained}"
        f"{result.images_per_s:,.0f} images/s on {result.provider}: {out}"
    )
    if result.features is not None:
        log.say(f"features: {result.features}")
    if result.shown is not None:
        log.say(f"drawn: {result.shown}")
    if options.explain is not None:
        drawn = explain_source(model, source, options.explain, limit=options.limit)
        log.say(f"explained: {log.counted(sum(1 for _ in drawn), 'image')}: {options.explain}")
    if options.json:
        log.print_json(result.to_json())
    if result.errors > most_bad(options.max_bad, MAX_BAD, result.images):
        raise DistclsError(
            f"{result.errors:,} of {result.images:,} images have an error in place of a "
            f"prediction, first {result.first_error}; {out} is complete, --max-bad 1 accepts it"
        )


if __name__ == "__main__":
    run(main)
