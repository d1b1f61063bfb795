"""`distcls models`: networks by name with parameters, multiply-accumulates and input size."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distcls import log
from distcls.cli import run
from distcls.config import Command, bare, positional

if TYPE_CHECKING:
    from distcls.models.registry import Origin

CLASSES = 1000
"""ImageNet's, so that the figures are those of the papers."""
ANY_SIZE = (32, 32)
"""Input of the figures for networks without published weights."""
FEW = 10
"""Networks that match a pattern whose figures are computed unasked."""
HEADER = f"{'name':<40} {'library':<12}"
FIGURES = f" {'parameters':>11} {'MACs':>11}  input"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """Options of `distcls models`."""

    pattern: str | None = positional(None)
    """Names to list: a glob such as '*' (all) or 'timm:*vit*', or a substring; default: a short
    list."""
    figures: bool | None = bare("true")
    """Build each network to compute its parameters, multiply-accumulates and input size, which
    takes about half a second each; default: if no pattern is given, or at most 10 names match."""
    json: bool = False
    """Print one JSON object on standard output."""


COMMAND = Command(
    options=ModelsOptions,
    prog="distcls models",
    about="List networks by name with their parameters, multiply-accumulates and input size.",
    examples=("distcls models 'mobilenet*'", "distcls models 'timm:*vit_tiny*' --figures"),
    groups={"essential options": ("pattern", "figures")},
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One network with 1,000 classes."""

    name: str
    library: str
    size: tuple[int, int] | None = None
    """Height and width that its published weights expect; None where it was not built."""
    parameters: int | None = None
    macs: int | None = None
    """Multiply-accumulates of one image of that size; None if it could not be built."""
    note: str = ""
    """Why it could not be built."""

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return dataclasses.asdict(self)

    def line(self) -> str:
        """A row under `HEADER`."""
        if self.size is None or self.parameters is None or self.macs is None:
            return f"{self.name:<40} {self.library:<12} {self.note}".rstrip()
        height, width = self.size
        return (
            f"{self.name:<40} {self.library:<12} {log.amount(self.parameters, 2):>11} "
            f"{log.amount(self.macs, 1):>11}  {height}x{width}"
        )


def main(arguments: Sequence[str]) -> None:
    """Parse, look up, print."""
    options = COMMAND.parse(arguments)
    from distcls.models.registry import matching

    found = matching(options.pattern)
    figures = options.figures
    if figures is None:
        figures = options.pattern is None or len(found) <= FEW
    entries = (
        describe(name) if figures else ModelEntry(name=name, library=library)
        for name, library in found.items()
    )
    if options.json:
        log.print_json({"models": [entry.to_json() for entry in entries]})
        return
    print(HEADER + FIGURES * figures)
    for entry in entries:
        print(entry.line(), flush=figures)
    if not figures:
        log.say(f"{len(found):,} networks; --figures adds parameters, MACs and input size")


def describe(name: str) -> ModelEntry:
    """The figures of one network. Raises UsageError for an unknown name."""
    from distcls.models.pretrained import library_preprocess
    from distcls.models.registry import resolve

    origin = resolve(name)
    published = library_preprocess(origin)
    size = ANY_SIZE if published is None else published.size
    parameters = macs = None
    note = ""
    for device in ("meta", "cpu"):  # some constructors compute with values, which meta has none of
        try:
            parameters, macs = _figures(origin, size, device)
            break
        except Exception as error:  # hundreds of third-party networks, and as many ways to fail
            note = textwrap.shorten(str(error) or type(error).__name__, 100)
    return ModelEntry(
        name=name,
        library=origin.library,
        size=size,
        parameters=parameters,
        macs=macs,
        note="" if macs is not None else note,
    )


def _figures(origin: Origin, size: tuple[int, int], device: str) -> tuple[int, int]:
    """Parameters and multiply-accumulates; on the device `meta`, nothing is allocated."""
    import torch

    from distcls.imaging import Preprocess
    from distcls.models.classifier import Classifier, count_macs, count_parameters
    from distcls.models.factory import construct

    with torch.device(device):
        model = Classifier(construct(origin, CLASSES, size).network, Preprocess(size=size))
        return count_parameters(model), count_macs(model, size)


if __name__ == "__main__":
    run(main)
