"""`distcls export` and `python -m export.triton`: parse, export, print."""

from __future__ import annotations

from collections.abc import Sequence

from distcls import log
from distcls.cli import run
from distcls.config import parse
from distcls.export.onnx import ExportOptions, export_onnx
from distcls.export.triton import TritonOptions, write_repository

ABOUT = "Export a checkpoint to ONNX and compare the two on real images."


def main(arguments: Sequence[str]) -> None:
    """`distcls export`, and `python -m export.onnx`."""
    options = parse(ExportOptions, arguments, prog="distcls export", about=ABOUT)
    log.set_quiet(options.quiet)
    certificate = export_onnx(options)
    size = options.target.stat().st_size / 1e6
    log.say(f"wrote {options.target} ({size:.1f} MB)")
    if options.json:
        log.print_json({"out": str(options.target), **certificate.to_json()})


def main_triton(arguments: Sequence[str]) -> None:
    """`python -m export.triton`."""
    about = "Write an exported model into a model repository for Triton or KServe."
    options = parse(TritonOptions, arguments, prog="python -m export.triton", about=about)
    log.set_quiet(options.quiet)
    folder = write_repository(options)
    log.say(f"wrote {folder}; tritonserver --model-repository {options.out} serves it")
    if options.json:
        log.print_json({"out": str(folder), "name": options.title, "version": options.version})


if __name__ == "__main__":
    run(main)
