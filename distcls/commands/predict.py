"""`distcls predict`: predictions for many images as CSV, JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Sequence

from distcls import log
from distcls.batch.job import check_output, predict
from distcls.batch.options import PredictOptions
from distcls.batch.setup import check_shrunk, open_predictor, reopen, shrunk
from distcls.cli import run
from distcls.config import parse
from distcls.data.formats.detect import open_source

ABOUT = "Predict the class of many images; one row each, in input order, bad images included."


def main(arguments: Sequence[str]) -> None:
    """Parse, predict, tell."""
    options = parse(PredictOptions, arguments, prog="distcls predict", about=ABOUT)
    log.set_quiet(options.quiet)
    source = open_source(options.input, options.split, options.fetch_timeout)
    check_output(options)
    model = open_predictor(options, source)
    if options.scaled_decode:
        usual, source = source, shrunk(source, model)
        check_shrunk(usual, source, model)
    result = predict(model, source, options, reopen)
    unsure = f"{result.abstained:,} abstained, " if options.threshold is not None else ""
    log.say(
        f"{result.images:,} images, {result.errors:,} errors, {unsure}"
        f"{result.images_per_second:,.0f} images/s on {result.provider}: {result.out}"
    )
    if result.features is not None:
        log.say(f"features: {result.features}")
    if result.shown is not None:
        log.say(f"drawn: {result.shown}")
    if options.json:
        print(json.dumps(result.to_json(), ensure_ascii=False))


if __name__ == "__main__":
    run(main)
