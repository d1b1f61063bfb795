"""`python -m distcls.commands.triton`: parse, write a model repository, print."""

from __future__ import annotations

from collections.abc import Sequence

from distcls import log
from distcls.cli import run
from distcls.config import Command
from distcls.export.triton import TritonOptions, write_repository

COMMAND = Command(
    options=TritonOptions,
    prog="python -m distcls.commands.triton",
    about="Write an exported model into a model repository for Triton or KServe.",
    examples=("python -m distcls.commands.triton --model runs/photos/best.onnx --out repository",),
)


def main(arguments: Sequence[str]) -> None:
    """`python -m distcls.commands.triton`, and `python -m export.triton`."""
    options = COMMAND.parse(arguments)
    log.set_quiet(options.quiet)
    folder = write_repository(options)
    log.say(f"wrote {folder}; tritonserver --model-repository {options.out} serves it")
    if options.json:
        log.print_json({"out": str(folder), "name": options.title, "version": options.version})


if __name__ == "__main__":
    run(main)
