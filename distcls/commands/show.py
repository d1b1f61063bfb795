"""`distcls show`: a grid of training images as the network gets them, labels below."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from distcls import log
from distcls.cli import run
from distcls.config import Command, positional
from distcls.errors import UsageError, require
from distcls.training.config import GROUPS, TrainConfig, require_data

MOST = 400
"""Most images in the grid: more would take minutes to draw and be too small to see."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowConfig(TrainConfig):
    """A training run's keys, but `out` is an image file."""

    data: Path = positional()
    """Dataset directory, or anything that `distcls prepare` reads: that is prepared in a temporary
    folder."""
    out: Path = Path("show.png")
    """PNG file to write; the `out` of a config file is ignored."""
    overwrite: bool = False
    """Replace the file if it exists."""
    epoch: int = 1
    """Epoch whose first images are drawn, counted from 1."""
    count: int = 32
    """Number of images to draw."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ending = self.out.suffix.lower() == ".png"
        require(ending, "out", str(self.out), "a name that ends in .png")
        known = self.epochs != "auto"
        epochs = f"1 to {self.epochs}, the epochs of the run" if known else "at least 1"
        last = self.epoch if self.epochs == "auto" else self.epochs
        require(1 <= self.epoch <= last, "epoch", self.epoch, epochs)
        require(1 <= self.count <= MOST, "count", self.count, f"1 to {MOST}")


COMMAND = Command(
    options=ShowConfig,
    prog="distcls show",
    about="Draw the first training images of an epoch as the network is given them.",
    examples=(
        "distcls show photos/ --out show.png",
        "distcls show photos/ --augment.policy trivialaugment --count 16 --overwrite",
    ),
    groups={"the picture": ("data", "out", "overwrite", "epoch", "count"), **GROUPS},
    config=True,
    aside=("out",),
    resolver="distcls.training.resolve:resolved_without_data",
)


def main(arguments: Sequence[str]) -> None:
    """Parse, compute the images, draw."""
    config = COMMAND.parse(arguments)
    log.set_quiet(config.quiet)
    require_data(config)
    check_output(config)
    from distcls.plotting import Tile, draw_grid
    from distcls.training.inputs import prepared
    from distcls.training.preview import preview  # torch loads for a right command only

    with tempfile.TemporaryDirectory(prefix=".show-", dir=config.out.parent) as folder:
        drawn = prepared(config, Path(folder) / config.data.name)
        found = preview(drawn, epoch=config.epoch - 1, count=config.count)
    steps = "step 1" if found.steps == 1 else f"steps 1 to {found.steps}"
    height, width = found.images.shape[1:3]
    count = log.counted(len(found.labels), "image")
    title = f"epoch {config.epoch}, {steps}: {count} of {height}x{width}"
    images = zip(found.pixels(), found.labels, strict=True)
    tiles = [Tile(image=image, text=label) for image, label in images]
    draw_grid(tiles, config.out, title=title)
    log.say(f"{title}; wrote {config.out}")
    if config.json:
        result = {"out": str(config.out), "images": len(found.labels), "steps": found.steps}
        log.print_json(result)


def check_output(config: ShowConfig) -> None:
    """Raise UsageError, before any work, if the image could not be drawn or written."""
    from distcls.files import require_writable
    from distcls.plotting import new_figure

    if config.out.is_dir():
        raise UsageError(f"out: {config.out} is a folder, expected the name of a file")
    if config.out.exists() and not config.overwrite:
        raise UsageError(f"{config.out} exists already; choose another --out or add --overwrite")
    new_figure(1, 1)  # raises now if matplotlib is missing
    require_writable(config.out.parent)


if __name__ == "__main__":
    run(main)
