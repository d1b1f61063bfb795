"""`distcls export-triton`: parse, write a model repository, print."""

from __future__ import annotations

from collections.abc import Sequence

from distcls import log
from distcls.cli import run
from distcls.config import Command
from distcls.export.triton import TritonOptions, write_repository

COMMAND = Command(
    options=TritonOptions,
    prog="distcls export-triton",
    about="Write an exported model into a model repository for Triton Inference Server or KServe.",
    examples=(
        "distcls export-triton --model runs/photos --out repository",
        "distcls export-triton --model best.onnx --out repository --name photos --version 2",
    ),
    groups={
        "essential options": ("model", "out", "name", "version"),
        "the server": (
            *("max_batch_size", "max_delay_us", "max_queue", "queue_timeout_ms"),
            *("device", "instances"),
        ),
    },
)


def main(arguments: Sequence[str]) -> None:
    """`distcls export-triton`, and `python -m export.triton`."""
    options = COMMAND.parse(arguments)
    log.set_quiet(options.quiet)
    folder = write_repository(options)
    log.say(f"wrote {folder}; tritonserver --model-repository {options.out} serves it")
    if options.json:
        log.print_json({"out": str(folder), "name": options.title, "version": options.version})


if __name__ == "__main__":
    run(main)
