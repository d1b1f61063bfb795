"""`distcls export`: parse, export, print."""

from __future__ import annotations

from collections.abc import Sequence

from distcls import log
from distcls.cli import run
from distcls.config import Command
from distcls.export.onnx import ExportOptions, ExportResult, export

COMMAND = Command(
    options=ExportOptions,
    prog="distcls export",
    about="Export a checkpoint to ONNX and compare the two on real images.",
    examples=(
        "distcls export --ckpt runs/photos",
        "distcls export --ckpt runs/photos/best.pth --precision int8 --out small.onnx",
    ),
    groups={
        "essential options": ("ckpt", "out", "precision", "overwrite"),
        "the comparison": (
            *("data", "split", "limit", "tolerance", "max_accuracy_drop", "min_agreement"),
        ),
    },
)


def main(arguments: Sequence[str]) -> None:
    """`distcls export`, and `python -m export.onnx`."""
    options = COMMAND.parse(arguments)
    log.set_quiet(options.quiet)
    result = ExportResult(path=options.target, certificate=export(options))
    size = result.path.stat().st_size / 1e6
    log.say(f"wrote {result.path} ({size:.1f} MB)")
    if options.json:
        log.print_json(result.to_json())


if __name__ == "__main__":
    run(main)
