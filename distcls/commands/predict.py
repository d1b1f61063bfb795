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
from distcls.config import parse

ABOUT = "Predict the class of many images; one row each, in input order, bad images included."


def main(arguments: Sequence[str]) -> None:
    """Parse, predict, print."""
    options = parse(PredictOptions, arguments, prog="distcls predict", about=ABOUT)
    log.set_quiet(options.quiet)
    source = open_inputs(options)
    check_output(options)
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
        f"{result.images:,} images, {result.errors:,} errors, {abstained}"
        f"{result.images_per_second:,.0f} images/s on {result.provider}: {out}"
    )
    if result.features is not None:
        log.say(f"features: {result.features}")
    if result.shown is not None:
        log.say(f"drawn: {result.shown}")
    if options.json:
        log.print_json(result.to_json())


if __name__ == "__main__":
    run(main)
