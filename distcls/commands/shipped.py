"""`distcls recipes` and `distcls templates`: list the files that come with distcls, print one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from distcls import log
from distcls.config import Command, positional
from distcls.files import RECIPES, TEMPLATES, Shipped


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShippedOptions:
    """Options of `distcls recipes` and `distcls templates`."""

    name: str | None = positional(None)
    """The file to print on standard output; default: list all, each with its first line."""


@dataclasses.dataclass(frozen=True)
class ShippedCommand:
    """A command that lists a folder of files, or prints one of them."""

    files: Shipped
    COMMAND: Command[ShippedOptions]

    def main(self, arguments: Sequence[str]) -> None:
        """Parse, print."""
        name, paths = self.COMMAND.parse(arguments).name, self.files.paths()
        if name is None:
            width = max(map(len, paths))
            text = "".join(f"{name:<{width}}  {about(path)}\n" for name, path in paths.items())
        else:
            text = self.files.find(name).read_text(encoding="utf-8")
        with log.writing_output():
            print(text, end="")


RECIPES_COMMAND = ShippedCommand(
    RECIPES,
    Command(
        options=ShippedOptions,
        prog="distcls recipes",
        about="List the configs of training runs that `--config NAME` takes, or print one.",
        examples=("distcls recipes digits", "distcls recipes digits > mine.yaml"),
    ),
)
TEMPLATES_COMMAND = ShippedCommand(
    TEMPLATES,
    Command(
        options=ShippedOptions,
        prog="distcls templates",
        about="List the configs for accelerate launch, the scripts for SLURM and torchrun, the "
        "manifests for Kubernetes and KServe, and what runs a server on Ray or behind nginx; or "
        "print one.",
        examples=("distcls templates one_gpu > one_gpu.yaml", "distcls templates slurm > slurm.sh"),
    ),
)


def about(path: Path) -> str:
    """The first comment of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(line[2:] for line in lines if line.startswith("# "))
