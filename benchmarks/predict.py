"""`python -m benchmarks.predict`: from JPEG files to a CSV of labels, the common ways and ours.

All classify the same photographs of about 500x375 with MobileNetV3-Large at 224 pixels:

- tutorial: Pillow and torchvision's transforms, PyTorch in eager mode, one image at a time;
- DataLoader: the same with two worker processes and batches of 64, contiguous or channels_last;
- timm: its own dataset, loader (two workers) and transforms, batches of 64;
- distcls: `distcls predict` with each provider that is installed, and with `--provider auto`.

The two limits are measured in the same run: decoding alone on all cores, and the model alone. What
the stages allow combined is 1 / (1 / decode + 1 / infer), as both use the same cores.

What it is doing is said on standard error. A provider that is installed but does not start is left
out.

Each contestant runs in a separate process. Theirs build their model before the clock starts; ours
opens the model, and flushes its output to disk, while it runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import predict_ways as ways
from benchmarks.common import Apart, alternate, finish, ratio, table
from benchmarks.photographs import model_for, photographs
from distcls import log, plotting
from distcls.cli import run
from distcls.errors import UsageError, did_you_mean
from distcls.runtime.providers import installed, versions


def draw(rates: dict[str, list[float]], limits: dict[str, float], path: Path) -> None:
    """A bar for each contestant, with its extremes, and a line for what the stages allow."""
    figure = plotting.new_figure(9, 0.45 * len(rates) + 1.6)
    axes = figure.subplots()
    names = list(rates)
    middles = [statistics.median(rates[name]) for name in names]
    colours = [plotting.BLUE if name.startswith("distcls") else plotting.GREY for name in names]
    axes.barh(names, middles, color=colours)
    for place, name in enumerate(names):
        axes.plot([min(rates[name]), max(rates[name])], [place, place], color="black", lw=1)
        axes.text(max(rates[name]), place, f" {middles[place]:.0f}", va="center", size=8)
        limit = limits.get(name.removeprefix("distcls, "))
        if limit is not None:
            axes.plot([limit, limit], [place - 0.4, place + 0.4], color=plotting.ORANGE, lw=2)
    axes.invert_yaxis()
    axes.set_xlabel(
        "images/s, JPEG files of 500x375 to CSV\n"
        "(black: slowest to fastest round; orange: what decoding and the model allow)"
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    plotting.save(figure, path)


def compare(
    folder: Path, model: Path, rounds: int, only: list[str] | None
) -> dict[str, list[float]]:
    """Images per second of each contestant, in alternating rounds."""
    providers = ["auto", *reversed(installed())]
    entered: dict[str, tuple[Any, ...]] = {
        "tutorial": (ways.tutorial, folder),
        "DataLoader": (ways.loader, folder, False),
        "DataLoader, NHWC": (ways.loader, folder, True),
        "timm": (ways.timm_way, folder),
    }
    for name in providers:
        entered[f"distcls, {name}"] = (ways.ours, folder, model, name)
    entered["decode alone"] = (ways.decode_only, folder)
    for name in providers:
        entered[f"infer alone, {name}"] = (ways.infer_only, folder, model, name)
    for name in only or ():
        if name not in entered:
            raise UsageError(f"only: there is no {name!r}{did_you_mean(name, entered)}")
    chosen = {name: made for name, made in entered.items() if only is None or name in only}
    with ExitStack() as stack:
        contestants = {name: stack.enter_context(Apart(*made)) for name, made in chosen.items()}
        return alternate(contestants, rounds)


def limits_of(rates: dict[str, list[float]]) -> dict[str, float]:
    """The combined limit of decoding and the model on the same cores, for each provider."""
    if "decode alone" not in rates:
        return {}
    decode = statistics.median(rates["decode alone"])
    return {
        name.partition(", ")[2]: 1 / (1 / decode + 1 / statistics.median(values))
        for name, values in rates.items()
        if name.startswith("infer alone")
    }


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True, help="folder of large photographs")
    parser.add_argument("--count", type=int, default=2000, help="photographs to cut out of them")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    parser.add_argument("--only", nargs="+", help="contestants, by their names in the table")
    parser.add_argument("--out", type=Path, default=Path("predict.png"), help="the picture")
    parser.add_argument("--profile", type=Path, help="picture of where our time goes")
    given = parser.parse_args(arguments)
    folder = photographs(given.pictures, given.count)
    model = model_for(folder)
    log.say(f"comparing on {given.count:,} JPEGs, {given.rounds} rounds after one to warm up")
    rates = compare(folder, model, given.rounds, given.only)
    if not rates:
        raise UsageError("no contestant starts on this machine")
    baseline = next(iter(rates))
    print(f"{given.count} JPEGs to CSV, MobileNetV3-Large at 224")
    print(table(rates, baseline))
    told: dict[str, Any] = {}
    limits = limits_of(rates)
    for name, limit in limits.items():
        if f"distcls, {name}" in rates:
            share = statistics.median(rates[f"distcls, {name}"]) / limit
            told[name] = round(share, 3)
            print(f"{name}: {share:.0%} of the {limit:.0f} images/s that its stages allow")
    if given.profile is not None:
        ways.draw_stages(folder, model, given.profile)
    draw({name: rate for name, rate in rates.items() if "alone" not in name}, limits, given.out)
    finish(
        "predict",
        count=given.count,
        images_per_s={name: [round(value, 1) for value in own] for name, own in rates.items()},
        ratios={name: round(ratio(rates, name, baseline), 2) for name in rates},
        share_of_limit=told,
        versions=versions(),
    )


if __name__ == "__main__":
    run(main)
