"""`distcls models`: networks by name with parameters, multiply-accumulates and input size."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distcls import log
from distcls.cli import run
from distcls.config import parse, positional

if TYPE_CHECKING:
    from distcls.models.registry import Origin

ABOUT = "List networks by name with their parameters, multiply-accumulates and input size."
CLASSES = 1000
"""ImageNet's, so that the figures are those of the papers."""
ANY_SIZE = (32, 32)
"""Input of the figures for networks without published weights."""
HEADER = f"{'name':<40} {'library':<12} {'parameters':>11} {'MACs':>11}  input"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """Options of `distcls models`."""

    pattern: str | None = positional(None)
    """Names to list: a glob such as 'timm:*vit*', or a substring; default: a short list."""
    json: bool = False
    """Print one JSON object on standard output."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One network with 1,000 classes."""

    name: str
    library: str
    size: tuple[int, int]
    """Height and width that its published weights expect."""
    parameters: int | None
    macs: int | None
    """Multiply-accumulates of one image of that size; None if it could not be built."""
    note: str = ""
    """Why it could not be built."""

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return dataclasses.asdict(self)

    def line(self) -> str:
        """A row under `HEADER`."""
        if self.parameters is None or self.macs is None:
            return f"{self.name:<40} {self.library:<12} {self.note}"
        height, width = self.size
        return (
            f"{self.name:<40} {self.library:<12} {self.parameters / 1e6:>9.2f} M "
            f"{self.macs / 1e6:>9,.1f} M  {height}x{width}"
        )


def main(arguments: Sequence[str]) -> None:
    """Parse, look up, print."""
    options = parse(ModelsOptions, arguments, prog="distcls models", about=ABOUT)
    from distcls.models.registry import matching

    names = matching(options.pattern)
    if options.json:
        log.print_json({"models": [describe(name).to_json() for name in names]})
        return
    print(HEADER)
    for name in names:
        print(describe(name).line(), flush=True)


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
