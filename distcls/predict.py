"""`distcls predict`: predictions for many images as CSV, JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Sequence

from distcls import log
from distcls.config import parse
from distcls.door import run
from distcls.inference.predict import PredictOptions, check_output, predict
from distcls.inference.shrinking import check_shrunk, shrunk
from distcls.opening import open_predictor, open_source, reopen

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
